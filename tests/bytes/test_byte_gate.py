"""The gate ``unsure`` over bytes: members that are behind, and read many bytes at once when they are asked."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from byte_members import EXACT, HOSTILE, TEXTS, member_of, unpruned
from serving import http, running, serving_of
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.engine.processors import MayFollow
from softmeet.hf import Recorder
from softmeet.readers.bytes.covers import Pruning
from softmeet.readers.bytes.next_tokens import END

KINDS = ("gpt2", "llama")
GREEDY = {"max_bytes": 3, "do_sample": False}
PROMPTS = ["the", "h", "\u00e9t"]


@pytest.fixture(scope="module")
def ensemble(folders):
    return unpruned(folders)


@pytest.fixture(scope="module")
def pruned(folders):
    return Ensemble.from_pretrained(folders, "logit-mean", vocabulary="bytes")


def one_by_one(member, reading, text):
    for byte in text:
        (reading,) = member.advance([reading], [byte])
    return reading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_read_at_once_are_bytes_read_one_by_one(kind, text):
    member = member_of(kind, EXACT)
    # The longest has the most tokenizations: from where it begins, and from within a word.
    for begun in range(0, len(text), 3 if text == TEXTS[0] else 1):
        readings = [member.begin(text[:begun])]
        for byte in text[begun:]:
            readings += member.advance(readings[-1:], [byte])
        expected = member.log_probs(readings)
        # All that is left, and by turns half of it or the next byte.
        for count in {len(text) - begun, (len(text) - begun + 1) // 2 if begun % 2 else 1}:
            ours = member.follow(readings[0], text[begun : begun + count])
            assert ours.text == readings[count].text
            assert torch.allclose(member.log_probs([ours]), expected[[count]], atol=1e-9)
            # What follows goes on from there as from any other reading.
            after = one_by_one(member, ours, text[begun + count :])
            assert torch.allclose(member.log_probs([after]), expected[-1:], atol=1e-9)


@pytest.fixture(scope="module")
def mixed():
    return Ensemble.from_pretrained("mixed")


def test_bytes_read_at_once_cost_fewer_calls_and_say_nearly_the_same(mixed):
    text = b"And the king said unto them, Go ye and seek the LORD in the mountain of the house"
    for member in mixed.model.readers:
        calls, far = np.zeros(2, int), []
        for begun in range(0, len(text) - 12, 10):
            reading = member.begin(text[:begun])
            found = []
            for k, read in enumerate((member.follow, lambda one, more: one_by_one(member, one, more))):  # noqa: B023
                one = read(reading, text[begun : begun + 12])
                calls[k] += one.work.calls - reading.work.calls
                assert one.work.tokens > reading.work.tokens
                found.append(member.log_probs([one]).exp())
            far.append(0.5 * (found[0] - found[1]).abs().sum().item())
        assert calls[0] < 0.6 * calls[1]
        assert np.mean(far) < 0.003


@pytest.mark.parametrize("text", [text[:1000] for text in HOSTILE if text])
def test_hostile_bytes_are_followed(text):
    member = member_of("gpt2", Pruning())
    reading = member.follow(member.begin(b"the"), text)
    assert reading.text == b"the" + text
    assert member.log_probs([reading]).exp().sum().item() == pytest.approx(1.0)


def test_a_context_that_is_full_ends_the_text_as_it_does_one_by_one(pruned):
    member = pruned.model.readers[0]
    reading = member.begin(b"x" * 110)
    for reader in (member.follow, lambda one, more: one_by_one(member, one, more)):
        found = reader(reading, b"x" * 30)
        assert found.ended
        assert found.full


def gated_greedy(model, prompt, threshold, count):
    """(the symbols, how many the first member gave alone): every text read from its beginning."""
    text, closed = prompt, 0
    for _ in range(count):
        log_probs = torch.cat([reader.log_probs([reader.begin(text)]) for reader in model.readers])
        alone = bool(log_probs[0].exp().max() >= threshold)
        scores = log_probs[0] if alone else log_probs.mean(0)
        scores = MayFollow(model.alphabet)(torch.tensor([list(text)]), scores[None])
        closed += alone
        text += bytes([int(scores[0, :END].argmax())])
    return text[len(prompt) :], closed


def test_the_first_answers_where_it_is_sure_and_all_where_it_is_not(ensemble):
    model, count, closed, gate, texts = ensemble.model, 3, 0, "unsure:0.5", []
    options = {"max_bytes": count, "do_sample": False, "gate": gate, "suppress_tokens": [END]}
    for prompt in PROMPTS:
        recorder = Recorder()
        expected, alone = gated_greedy(model, prompt.encode(), 0.5, count)
        texts.append(ensemble.generate(prompt, recorder=recorder, **options))
        assert texts[-1].encode() == expected.decode(errors="replace").encode()
        assert recorder.gate.gated == alone
        closed += alone
        assert texts[-1] == ensemble.generate(prompt, use_cache=False, **options)
        assert texts[-1] == ensemble.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert 0 < closed < count * len(PROMPTS)
    assert ensemble.generate(PROMPTS, **options) == texts
    beams = {**options, "num_beams": 2}
    assert ensemble.generate(PROMPTS[0], **beams) == ensemble.generate(PROMPTS[0], use_cache=False, **beams)


def test_a_gate_that_is_never_open_asks_nobody_else_and_one_that_always_is_is_none(ensemble, folders):
    second = ensemble.model.readers[1]
    alone = Ensemble.from_pretrained(folders[:1], "logit-mean", vocabulary="bytes", prune=0.0, dtype=torch.float64)
    for options, always in (({}, 1), ({"num_beams": 2}, 2), ({"use_cache": False}, 2)):
        before = second.spent
        found = ensemble.generate(PROMPTS[0], gate="unsure:0", **options, **GREEDY)
        assert second.spent == before
        assert found == alone.generate(PROMPTS[0], **options, **GREEDY)
        plain = ensemble.generate(PROMPTS[0], **options, **GREEDY)
        assert ensemble.generate(PROMPTS[0], gate=f"unsure:{always}", **options, **GREEDY) == plain


def test_a_gate_saves_calls_of_the_members_that_are_not_asked(mixed):
    second, spent = mixed.model.readers[1], []
    for gate in ("none", "unsure:0.3"):
        before, recorder = second.spent, Recorder()
        mixed.generate("And the king", gate=gate, max_bytes=100, do_sample=False, speculate=0, recorder=recorder)
        spent.append((second.spent.calls - before.calls, recorder.gate.gated))
    (calls, _), (fewer, gated) = spent
    assert 0 < gated < 100
    assert 0 < fewer < calls


def test_the_summary_says_how_often_the_gate_was_closed():
    options = ["-m", "mixed", "--gate", "unsure:0.9", "--seed", "1", "--max-new-bytes", "20", "--summary"]
    done = CliRunner().invoke(commands, ["generate", "And the king", *options])
    assert re.search(r"gate unsure:0.9: closed at \d+\.\d% of the bytes", done.stderr)


def test_served_texts_are_those_of_generate_in_any_company(pruned):
    """Of requests with gates that differ."""
    asked = [
        {"prompt": prompt, "seed": seed, "max_tokens": 8, "softmeet": {"gate": gate}}
        for seed, prompt in enumerate((PROMPTS[2], "the then the"))
        for gate in ("unsure:0.2", "unsure:0", "none")
    ]
    with running(serving_of({"bytes": pruned})) as url:
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda body: http.post(f"{url}/v1/completions", json=body).json(), asked))
        scored = http.post(
            f"{url}/v1/completions",
            json={
                "prompt": "the other",
                "echo": True,
                "logprobs": 1,
                "max_tokens": 0,
                "softmeet": asked[0]["softmeet"],
            },
        ).json()["choices"][0]
        metrics = http.get(f"{url}/metrics").text
    for body, answer in zip(asked, found, strict=True):
        expected = pruned.generate(
            body["prompt"], gate=body["softmeet"]["gate"], seed=body["seed"], max_new_tokens=body["max_tokens"],
            do_sample=True, top_k=0,
        )  # fmt: skip
        assert answer["choices"][0]["text"].rstrip("\ufffd") == expected.rstrip("\ufffd")
    closed = [line for line in metrics.splitlines() if line.startswith('softmeet_gated_tokens_total{gate="unsure"}')]
    assert float(closed[0].split()[-1]) > 0
    assert len(scored["logprobs"]["token_logprobs"]) == 9
