"""Ensembles over the union of their members' tokens."""

from __future__ import annotations

import byte_members
import numpy as np
import pytest
import rival_oracles
import torch
from commands import run
from serving import http, running, serving_of

from softmeet import Ensemble
from softmeet.errors import InvalidInputError, UnsupportedHeadError
from softmeet.hf import EnsembleForCausalLM
from softmeet.hf.union_modeling import UnionEnsembleForCausalLM

PROMPT = "The king said"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return list(map(str, byte_members.save_two(tmp_path_factory.mktemp("members"))))


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, vocabulary="union")


def oracle(ensemble, i):
    """A member as the oracles know it, and the tokens of the prompt as it cuts it."""
    model, spelling = ensemble.model.members[i], ensemble.model._spellings[i]
    ends = frozenset(ensemble.model.readers_of_members[i].below.alphabet.ends)
    words = dict(zip(spelling.tokens.tolist(), spelling.words, strict=True))

    @torch.inference_mode()
    def probs(ids):
        found = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
        kept = [*words, *ends]
        return found / found[kept].sum()

    own = {k: word for k, word in words.items() if k not in ends}
    member = rival_oracles.TinyMember(own, ends, lambda text: spelling.cut(text), probs)
    return member, tuple(ensemble.model.own_tokens(PROMPT)[i])


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8)])
def test_greedy_text_is_what_the_formulas_say(ensemble, weights):
    members, prompts = zip(*(oracle(ensemble, i) for i in range(2)), strict=True)
    expected = rival_oracles.union_greedy(members, prompts, np.array(weights), 12)
    found = ensemble.generate(PROMPT, max_new_tokens=12, do_sample=False, weights=list(weights))
    assert found == b"".join(word for word in expected if word).decode(errors="replace")


def test_the_next_string_is_the_mean_of_what_members_say_of_it(ensemble):
    members, prompts = zip(*(oracle(ensemble, i) for i in range(2)), strict=True)
    expected = rival_oracles.union_distribution(members, prompts, np.array([0.5, 0.5]))
    found = ensemble.next_token(PROMPT, top=3)
    best = sorted(expected.values(), reverse=True)[:3]
    assert [p for _, p in found.top] == pytest.approx(best, abs=1e-6)


def test_members_in_another_order_write_the_same(folders, ensemble):
    other = Ensemble.from_pretrained(folders[::-1], vocabulary="union")
    given = {"max_new_tokens": 12, "do_sample": False}
    assert other.generate(PROMPT, **given) == ensemble.generate(PROMPT, **given)


def test_one_member_is_itself(folders):
    alone, itself = (Ensemble.from_pretrained(folders[:1], "prob-mean", vocabulary=v) for v in ("union", "tokens"))
    given = {"max_new_tokens": 12, "do_sample": False}
    assert alone.generate(PROMPT, **given) == itself.generate(PROMPT, **given)


def test_members_of_one_vocabulary_are_combined_as_over_tokens(folders, tmp_path):
    twin = str(byte_members.save(tmp_path / "twin", "gpt2", 7))
    over = [Ensemble.from_pretrained([folders[0], twin], "prob-mean", vocabulary=v) for v in ("union", "tokens")]
    found, expected = (one.next_token(PROMPT, top=20).top for one in over)
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-6)
    assert over[0].generate(PROMPT, max_new_tokens=9, do_sample=False) == over[1].generate(
        PROMPT, max_new_tokens=9, do_sample=False
    )


def test_every_road_writes_the_same(folders, ensemble):
    seeded = {"max_new_tokens": 10, "seed": 3}
    expected = ensemble.generate(PROMPT, **seeded)
    assert "".join(ensemble.stream(PROMPT, **seeded)) == expected
    assert ensemble.generate([PROMPT, "And"], **seeded)[0] == expected
    assert ensemble.generate(PROMPT, **seeded, speculate=0) == ensemble.generate(PROMPT, **seeded, speculate=3)
    line = run("generate", PROMPT, "-m", folders[0], "-m", folders[1], "--vocabulary", "union", "--max-new-tokens",
               "10", "--seed", "3")  # fmt: skip
    assert line.stdout == expected + "\n"
    with running(serving_of({"union": ensemble})) as url:
        asked = {"prompt": PROMPT, "max_tokens": 10, "seed": 3, "model": "union"}
        told = http.post(f"{url}/v1/completions", json=asked).json()
    assert told["choices"][0]["text"] == expected


def test_it_is_saved_and_loaded(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    again = Ensemble.from_pretrained(tmp_path)
    assert isinstance(again.model, UnionEnsembleForCausalLM)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert again.generate(PROMPT, **given) == ensemble.generate(PROMPT, **given)
    assert isinstance(EnsembleForCausalLM.from_pretrained(tmp_path), UnionEnsembleForCausalLM)


def test_a_text_ends_before_a_context_is_full(ensemble):
    found = ensemble.generate(PROMPT, max_new_tokens=500, do_sample=False)
    assert len(found) > 100


def test_chats_and_prompts_of_members_own_are_read(folders):
    behind = Ensemble.from_pretrained([f"{folders[0]}+prompt=In the beginning", folders[1]], vocabulary="union")
    plain = Ensemble.from_pretrained(folders, vocabulary="union")
    found, other = (one.next_token(PROMPT).members for one in (behind, plain))
    assert found[behind.names[0]] != other[plain.names[0]]
    assert found[behind.names[1]] == other[plain.names[1]]


@pytest.mark.parametrize("rule", ["meet", "max-entropy"])
def test_rules_that_read_heads_are_refused_before_anything_is_loaded(rule, folders, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.load_members", None)
    with pytest.raises(UnsupportedHeadError, match="the strings of a union have none"):
        Ensemble.from_pretrained(folders, rule, vocabulary="union")


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_commands_that_score_refuse_it_before_anything_is_loaded(command, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    (tmp_path / "a.txt").write_text("The king said so. " * 50)
    text = ["--text", tmp_path / "a.txt"] if command == "evaluate" else ["The king"]
    found = run(command, *text, "-m", folders[0], "-m", folders[1], "--vocabulary", "union")
    assert found.returncode == 2
    assert "--vocabulary union is for generate and serve" in found.stderr.replace("\n", " ")


def test_what_needs_a_likelihood_is_refused(ensemble):
    for score in (ensemble.inspect, ensemble.prompt_weights):
        with pytest.raises(InvalidInputError, match="a text can be written in many ways: load the members with"):
            score("The king said so")
