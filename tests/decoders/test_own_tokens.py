"""Decoders by which members keep their own tokens, on models with different tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace

import byte_members
import numpy as np
import pytest
import rival_oracles
import spans_oracle
import torch
from commands import refusal, run

from softmeet import Ensemble, Settings
from softmeet.decoders.own_tokens import OwnTokens
from softmeet.decoders.registry import decoder_of
from softmeet.errors import InvalidInputError

PROMPT = "The king said"
DECODERS = ("agreement", "spans")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return list(map(str, byte_members.save_two(tmp_path_factory.mktemp("members"))))


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, "logit-mean", vocabulary="union")


def oracles(ensemble, prompt):
    """The members as the oracles know them, which are run anew for each text, and the prompt as they read it."""
    return zip(*(oracle(ensemble, i, prompt) for i in range(len(ensemble.names))), strict=True)


def oracle(ensemble, i, prompt):
    model, alone = ensemble.model.members[i], ensemble.model.alone[i]
    own = ensemble.model.own_prompt(prompt, special=True)[i]
    words, ends = dict(alone.tokens.spelling), frozenset(alone.tokens.ends)

    @torch.inference_mode()
    def probs(ids):
        found = model(torch.tensor([ids])).logits[0, -1].double()
        kept = torch.full_like(found, -torch.inf)
        kept[[*words, *ends]] = found[[*words, *ends]]
        return kept.softmax(-1).numpy()

    return rival_oracles.TinyMember(words, ends, alone.tokens.cut, probs), tuple(own)


def test_real_members_search_as_the_oracle_does(ensemble):
    """Which tries all pairs of tokens, and so takes few steps."""
    prompts, weights = [PROMPT, "And"], [0.2, 0.8]
    found = ensemble.decode(prompts, "agreement:beam=3", max_new_tokens=2, weights=weights)
    for prompt, one in zip(prompts, found, strict=True):
        text, score = rival_oracles.agreement_search(*oracles(ensemble, prompt), np.array(weights), 3, 2, eager=True)
        best = one.texts[one.chosen]
        assert (best.text, best.log_weight) == (text.decode(errors="replace"), pytest.approx(score, abs=1e-4))


@pytest.mark.parametrize("own", ["", "+prompt=In the beginning {prompt} and"])
def test_real_members_write_spans_as_the_oracle_does(own, folders):
    """Each behind what it reads of its own."""
    ensemble = Ensemble.from_pretrained([folders[0] + own, folders[1]], "logit-mean", vocabulary="union")
    prompts = [PROMPT, "And"]
    found = ensemble.decode(prompts, "spans:margin=0.1", max_new_tokens=10)
    for prompt, one in zip(prompts, found, strict=True):
        text, ended, log_probs = spans_oracle.spans_search(*oracles(ensemble, prompt), [0.5, 0.5], 10, margin=0.1)
        (best,) = one.texts
        assert (best.text, best.ended) == (text.decode(errors="replace"), ended)
        assert best.log_probs == pytest.approx(log_probs, abs=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_a_text_says_of_itself_is_true(decoder, ensemble):
    """A prompt has the same text in any company, no row is left open, and a seed changes nothing."""
    found, _ = ensemble.decode([PROMPT, "And"], decoder, max_new_tokens=12, seed=1)
    held = [reader.bytes for reader in ensemble.model.readers_of_members]
    again = ensemble.decode(PROMPT, decoder, max_new_tokens=12)
    assert [reader.bytes for reader in ensemble.model.readers_of_members] == held
    assert again.text == found.text == ensemble.generate(PROMPT, decoder=decoder, max_new_tokens=12)
    assert found.log_z is None
    first, best = ensemble.model.alone[0].tokens, found.texts[found.chosen]
    spelled = first.spelled(best.symbols).decode(errors="replace")
    assert found.text.startswith(spelled) if decoder == "agreement" else found.text == spelled
    assert best.ended == (best.symbols[-1] in first.ends)
    assert best.log_weight == pytest.approx(np.mean(best.log_probs))


@pytest.mark.parametrize("decoder", DECODERS)
def test_members_of_one_tokenizer_write_the_same_over_tokens_and_over_a_union(decoder, folders, tmp_path):
    twin = str(byte_members.save(tmp_path / "twin", "gpt2", 7))
    members = [folders[0], f"{twin}+prompt=In the beginning"]
    over = [Ensemble.from_pretrained(members, "logit-mean", vocabulary=v) for v in ("tokens", "union")]
    texts = [one.decode(PROMPT, decoder, max_new_tokens=12).text for one in over]
    assert texts[0] == texts[1] != ""


def test_spans_that_are_proposed_have_room_in_the_contexts(ensemble):
    with pytest.raises(InvalidInputError, match="expected a limit of at most 79"):
        ensemble.decode(PROMPT, "spans", max_new_tokens=80)
    assert ensemble.decode(PROMPT, "spans", max_new_tokens=79).texts[0].symbols


def test_what_ends_a_text_is_no_ordinary_token():
    tokens = OwnTokens.of([(b"b", 0), (b"<s>", 1), (b"ab", 2), (b"a", 3)], [1], list)
    assert (tokens.words, tokens.ids.tolist(), tokens.ends) == ([b"a", b"ab", b"b"], [3, 2, 0], (1,))
    assert tokens.spelled([2, 1]) == b"ab"
    assert tokens.words[tokens.longer(b"a")] == [b"ab"]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "prob-mean"}, "which prob-mean does not: choose the rule logit-mean"),
        ({"rule": "meet"}, "which meet does not"), ({"plausibility": 0.1}, "cannot be used with plausibility"),
        ({"gate": "unsure:0.5"}, "cannot be used with the gate unsure:0.5"), ({"rule_temperature": 0.5}, "temperature"),
        ({"weights": [1.5, -0.5]}, "cannot be used with weights below 0: leave it out"),
    ],
)  # fmt: skip
def test_what_changes_log_probabilities_is_refused(decoder, settings, message):
    with pytest.raises(InvalidInputError, match=f"the decoder {decoder} .*{message}"):
        decoder_of(decoder).require(Settings.of({"rule": "logit-mean", **settings}))


@pytest.mark.parametrize("decoder", DECODERS)
def test_members_that_cannot_write_so_are_refused(decoder, folders, ensemble, monkeypatch):
    over_bytes = Ensemble.from_pretrained(folders, "logit-mean", vocabulary="bytes")
    with pytest.raises(InvalidInputError, match=f"{decoder} has members write tokens of their own, and over bytes"):
        over_bytes.decode(PROMPT, decoder, max_bytes=3)
    for more in ({"num_beams": 2}, {"top_k": 5}, {"temperature": 0.5}):
        with pytest.raises(InvalidInputError, match=f"whole texts .* used with {next(iter(more))}: leave it out"):
            ensemble.decode(PROMPT, decoder, max_new_tokens=3, **more)
    reader = ensemble.model.readers_of_members[1].below
    monkeypatch.setattr(reader, "traits", replace(reader.traits, can_fork=False))
    with pytest.raises(InvalidInputError, match="can fork rows"):
        ensemble.decode(PROMPT, decoder, max_new_tokens=3)
    assert ensemble.decode(PROMPT, "agreement:beam=1", max_new_tokens=3).chosen is not None


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_command_loads_members_over_a_union(decoder, folders):
    asked = ("generate", PROMPT, "-m", folders[0], "-m", folders[1], "--decoder", decoder, "--max-new-tokens", "5")
    plain, told = run(*asked), json.loads(run(*asked, "--json", "--vocabulary", "auto").stdout)
    (one,) = told["completions"]
    assert plain.stdout == one["text"] + "\n"
    assert (told["rule"], one["log_z"]) == ("logit-mean", None)
    ensemble = Ensemble.from_pretrained(folders, "logit-mean", vocabulary="union")
    assert ensemble.decode(PROMPT, decoder, max_new_tokens=5).text == one["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decoder", "agreement", "--vocabulary", "bytes"), "over bytes they have none"),
        (("--decoder", "spans", "--vocabulary", "union:as=gac"), "over union:as=gac they have none"),
        (("--decoder", "agreement", "--rule", "core"), "core"),
        (("--decoder", "particles", "--gate", "unsure:0.5"), "cannot be used with the gate unsure:0.5"),
        (("--decoder", "particles", "--top-k", "5"), "top_k"),
        (("--decoder", "particles", "--vocabulary", "union:k=10"), "takes what each member says by itself"),
        (("--one-member", "--vocabulary", "union:k=10"), "--one-member has one member answer alone"),
        (("--speculate", "3", "--vocabulary", "union:as=unite"), "--speculate has one member answer alone"),
        (("--prompt-weights", "--vocabulary", "union"), "--prompt-weights needs a text's likelihood"),
        (("--decoder", "particles", "--rule", "meet"), "combines the probabilities of whole texts"),
        (("--decoder", "particles", "--summary"), "cannot be used with"),
        (("--decoder", "particles", "--temperature", "0.5"), "with temperature"),
    ],
)
def test_the_command_refuses_before_it_loads(arguments, message, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    assert message in refusal("generate", "a", *arguments)


def test_what_an_interrupted_search_leaves_is_given_back(ensemble, monkeypatch):
    """Rows that could not be closed where they were dropped are, before the next search."""
    readers = {one.readers_of_members[0] for one in ensemble.model.alone}
    held = {reader: len(reader._rows) for reader in readers}

    def failing(self, *given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("softmeet.decoders.agreement.Agreement.decode", failing)
        with pytest.raises(KeyboardInterrupt):
            ensemble.decode(PROMPT, "agreement:beam=3", max_new_tokens=3)
    for reader in readers:
        ensemble.model.garbage.append((reader, reader.open(own=[0])))
    ensemble.decode(PROMPT, "agreement:beam=3", max_new_tokens=3)
    assert {reader: len(reader._rows) for reader in readers} == held


def test_rows_of_members_that_are_one_model_are_counted_together(folders, monkeypatch):
    twice = Ensemble.from_pretrained([folders[0], f"{folders[0]}+prompt=In"], "logit-mean", vocabulary="tokens")
    (reader,) = {one.readers_of_members[0] for one in twice.model.alone}
    monkeypatch.setattr(reader, "traits", replace(reader.traits, rows=8))
    with pytest.raises(InvalidInputError, match=r"expected at most 8 texts at once, .* got 10: ask for fewer"):
        twice.decode(PROMPT, "agreement:beam=5", max_new_tokens=3)
    assert twice.decode(PROMPT, "agreement:beam=4", max_new_tokens=3).texts


def test_a_decoder_that_reads_too_far_ahead_says_so(ensemble):
    with pytest.raises(InvalidInputError, match="spans:words=64 reads 768 symbols ahead"):
        ensemble.decode(PROMPT, "spans:words=64", max_new_tokens=1)
    assert ensemble.generate(PROMPT, decoder="agreement", max_new_tokens=3, do_sample=False)
