"""Ensembles over the union of their members' tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import byte_members
import byte_tokenizers
import numpy as np
import pytest
import rival_oracles
import torch
from commands import run
from serving import http, running, serving_of

from softmeet import Ensemble, Structure
from softmeet.errors import InvalidInputError, UnsupportedHeadError, VocabularyMismatchError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.prompts import encoded
from softmeet.hf.union_modeling import UnionEnsembleForCausalLM
from softmeet.members.spelling import spelling_of
from softmeet.readers.reader import Read, finished
from softmeet.readers.transformers import TransformersReader
from softmeet.readers.union_alphabet import UnionAlphabet
from softmeet.readers.union_reader import UnionReader
from softmeet.readers.union_tokens import SpelledTokens

PROMPT = "The king said"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return list(map(str, byte_members.save_two(tmp_path_factory.mktemp("members"))))


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, vocabulary="union")


@pytest.fixture(scope="module")
def top_unions(folders):
    """Ensembles over the union of the members' k likeliest strings, by k."""
    loaded = {}
    return {k: Ensemble.from_pretrained(folders, vocabulary=f"union:k={k}", loaded=loaded) for k in (1, 3, 10)}


def ensemble_inputs(ensemble):
    return encoded(ensemble.model, ensemble.tokenizer, [PROMPT])


def oracle(ensemble, i):
    """A member as the oracles know it, and the tokens of the prompt as it cuts it."""
    model, spelling = ensemble.model.members[i], ensemble.model.space.spellings[i]
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


@pytest.mark.parametrize(("k", "weights"), [(1, (0.5, 0.5)), (3, (0.2, 0.8)), (10, (0.5, 0.5)), (10, (0.0, 1.0))])
def test_over_the_likeliest_strings_it_is_what_the_formulas_say(k, weights, top_unions):
    ensemble = top_unions[k]
    members, prompts = zip(*(oracle(ensemble, i) for i in range(2)), strict=True)
    expected = rival_oracles.top_union_distribution(members, prompts, np.array(weights), k)
    ours = ensemble.model(**ensemble_inputs(ensemble), weights=list(weights), logits_to_keep=1).logits[0, -1].exp()
    alphabet = ensemble.model.alphabet
    where = {alphabet.end if word is None else alphabet.symbol(word): p for word, p in expected.items()}
    assert set(ours.nonzero().flatten().tolist()) == {symbol for symbol, p in where.items() if p}
    assert [ours[symbol].item() for symbol in where] == pytest.approx(list(where.values()), abs=1e-6)
    text = rival_oracles.union_greedy(members, prompts, np.array(weights), 9, k)
    found = ensemble.generate(PROMPT, max_new_tokens=9, do_sample=False, weights=list(weights))
    assert found == b"".join(word for word in text if word).decode(errors="replace")


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


def test_it_is_saved_and_loaded(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    (tmp_path / "a.txt").write_text("The king said so. " * 50)
    refused = run("evaluate", "-m", tmp_path, "--text", tmp_path / "a.txt")
    assert "needs a text's likelihood" in refused.stderr.replace("\n", " ")
    drawn = run("generate", PROMPT, "-m", tmp_path, "--decoder", "particles:n=2", "--json", "--max-new-tokens", "4")
    assert json.loads(drawn.stdout)["rule"] == "prob-mean"
    assert "Infinity" not in drawn.stdout
    again = Ensemble.from_pretrained(tmp_path)
    assert isinstance(again.model, UnionEnsembleForCausalLM)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert again.generate(PROMPT, **given) == ensemble.generate(PROMPT, **given)
    assert isinstance(EnsembleForCausalLM.from_pretrained(tmp_path), UnionEnsembleForCausalLM)


def test_a_text_ends_before_a_context_is_full(ensemble):
    found = ensemble.generate(PROMPT, do_sample=False)
    assert len(found) > 100


def test_a_symbol_for_which_there_is_too_little_room_ends_a_text(ensemble):
    """One that a member reads as more tokens than it has room for."""
    reader, symbol = max(
        ((one, k) for one in ensemble.model.readers_of_members for k in range(ensemble.model.alphabet.size - 1)),
        key=lambda pair: len(pair[0].tokens_of(pair[1])),
    )
    width = len(reader.tokens_of(symbol))
    assert width > 1
    row = reader.open(reuse=False)
    finished(reader.read([Read(row, [symbol] * ((row.most - 1) // width), [])]))
    assert row.tokens[-1] + width > row.most
    told = finished(reader.read([Read(row, [symbol], [1])]))
    assert (told.errors, row.full) == ({}, True)
    reader.close(row)


def test_a_part_of_an_ensemble_has_the_same_symbols(ensemble):
    """As a request for some members has it: they write what they write over the whole union."""
    with running(serving_of({"union": ensemble})) as url:

        def told(**more):
            asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "model": "union", **more}
            return http.post(f"{url}/v1/completions", json=asked)

        found = told(softmeet={"members": [ensemble.names[1]]}).json()["choices"][0]["text"]
        assert found == ensemble.generate(PROMPT, max_new_tokens=8, do_sample=False, weights=[0.0, 1.0])
        echoed = told(echo=True).json()
        assert echoed["choices"][0]["text"].startswith(PROMPT)
        assert echoed["usage"]["prompt_tokens"] == len(ensemble.model.alphabet.encode(PROMPT))
        long = told(prompt=PROMPT * 2000)
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert told(prompt=PROMPT * 100, truncate_prompt_tokens=-1).status_code == 200
        assert told(echo=True, logprobs=1).status_code == 400  # which scores the prompt


def test_what_members_read_before_texts_they_read_before_symbols_too(folders):
    own = Ensemble.from_pretrained([folders[0], f"{folders[0]}+prompt=In the days of"], "prob-mean", vocabulary="union")
    symbols = torch.tensor([own.model.alphabet.encode(PROMPT)])
    first, second = (own.model(symbols, weights=w, logits_to_keep=1).logits for w in ([1.0, 0.0], [0.0, 1.0]))
    assert not torch.allclose(first, second)
    given = {"vocabulary": "union", "prefixes": [[5, 6, 7], None]}
    plain, behind = (Ensemble.from_pretrained(folders, **more) for more in ({"vocabulary": "union"}, given))
    assert plain.next_token(PROMPT).top != behind.next_token(PROMPT).top


def test_stop_strings_and_the_tokenizer_take_any_text(ensemble):
    tokenizer = ensemble.tokenizer
    assert tokenizer.decode(tokenizer("a king, \u00e9")["input_ids"]) == "a king, \u00e9"
    found = ensemble.generate(PROMPT, max_new_tokens=20, seed=1, stop_strings=["d"], tokenizer=tokenizer)
    assert "d" not in found[:-1]


def test_a_head_that_is_too_small_is_refused():
    tokenizer = byte_tokenizers.KINDS["gpt2"]()
    below, spelling = (
        TransformersReader(byte_members.model_of(tokenizer), tokenizer, "it"),
        spelling_of("it", tokenizer),
    )
    below.alphabet = replace(below.alphabet, size=10)
    alphabet = UnionAlphabet.of([spelling])
    with pytest.raises(VocabularyMismatchError, match="a logit for each of its tokens"):
        UnionReader(below, SpelledTokens(spelling, alphabet, ()), alphabet)


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


@pytest.mark.parametrize(
    "wrong", ["union:", "union:k", "union:k=0", "union:k=-1", "union:k=1.5", "union:as=core", "union:k=3:as=gac",
              "union:k=3:k=4", "unions", "bytes:k=3", "union:k=3:"]
)  # fmt: skip
def test_forms_of_a_union_that_do_not_exist_are_refused_before_anything_is_loaded(wrong, folders, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.load_tokenizers", None)
    with pytest.raises(InvalidInputError, match=r"expected a (union of tokens as|vocabulary)|GaC's code takes all"):
        Ensemble.from_pretrained(folders, vocabulary=wrong)


def test_what_one_member_does_alone_is_refused_where_all_make_the_union_together(folders, top_unions, monkeypatch):
    ensemble = top_unions[3]
    for given in ({"one_member": True}, {"speculate": 3}, {"gate": "unsure:0.5"}):
        with pytest.raises(InvalidInputError, match=r"all members (make|say)"):
            ensemble.generate(PROMPT, max_new_tokens=3, **given)
    seeded = {"max_new_tokens": 6, "seed": 2}
    assert "".join(ensemble.stream(PROMPT, **seeded)) == ensemble.generate(PROMPT, **seeded)
    with running(serving_of({"union": ensemble}, one_member=True)) as url:
        asked = {"prompt": PROMPT, "max_tokens": 6, "seed": 2, "model": "union"}
        told = http.post(f"{url}/v1/completions", json=asked).json()
        assert told["choices"][0]["text"] == ensemble.generate(PROMPT, **seeded)
        drawn = http.post(f"{url}/v1/completions", json={**asked, "seed": None}).json()
        assert drawn["choices"][0]["finish_reason"] == "length"
        metrics = http.get(f"{url}/metrics").text
    assert "softmeet_draft_tokens_total 0.0" in metrics
    monkeypatch.setattr("softmeet.ensemble.load_members", None)
    with pytest.raises(InvalidInputError, match="lets the first member answer alone"):
        Ensemble.from_pretrained(folders, vocabulary="union:k=3", gate="unsure:0.5")


def test_a_letter_is_read_as_its_token_and_not_as_the_byte_that_stands_in_for_it():
    """A SentencePiece tokenizer has both, the byte first; a trained member hardly knows the byte."""
    ensemble = Ensemble.from_pretrained("mixed/llama", "prob-mean", vocabulary="union")
    (reader,), alphabet = ensemble.model.readers_of_members, ensemble.model.alphabet
    tokenizer, twice = ensemble.model.tokenizer_of(0), 0
    for symbol, word in enumerate(alphabet.words):
        twice += len(reader._own.ids[symbol]) > 1
        (token,) = reader.tokens_of(symbol)
        if word.isascii() and word.isalnum():
            assert tokenizer.convert_ids_to_tokens(token) == word.decode()
    assert twice > 20
    plain = Ensemble.from_pretrained("mixed/llama", "prob-mean", vocabulary="tokens")
    given = {"max_new_tokens": 20, "do_sample": False}
    assert ensemble.generate("Behold", **given) == plain.generate("Behold", **given)


def test_a_part_of_an_ensemble_refuses_what_the_whole_refuses(folders, top_unions):
    with running(serving_of({"union": top_unions[3]})) as url:
        for settings in ({"gate": "unsure:0.3"}, {"rule": "meet"}):
            for more in ({}, {"members": top_unions[3].names[:1]}):
                asked = {"prompt": PROMPT, "max_tokens": 2, "model": "union", "softmeet": {**settings, **more}}
                assert http.post(f"{url}/v1/completions", json=asked).status_code == 400


def test_structures_are_refused_where_the_likeliest_strings_alone_can_follow(top_unions):
    with pytest.raises(InvalidInputError, match="may need what is not among the likeliest"):
        top_unions[3].generate(PROMPT, structure=Structure.choice(["yes", "no"]), max_new_tokens=5)


def test_parts_share_their_tokenizer(ensemble):
    config = EnsembleConfig(ensemble.names[1:], "prob-mean", vocabulary="union")
    assert ensemble.model.part([1], config).tokenizer is ensemble.tokenizer
