"""The gate ``unsure`` over bytes: members that are behind, and read many bytes at once when they are asked."""

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.engine.processors import MayFollow
from softmeet.hf import Recorder
from softmeet.readers.bytes.next_tokens import END

GREEDY = {"max_bytes": 3, "do_sample": False}
PROMPTS = ["the", "h", "\u00e9t"]


def one_by_one(member, reading, text):
    for byte in text:
        (reading,) = member.advance([reading], [byte])
    return reading


@pytest.fixture(scope="module")
def mixed():
    return Ensemble.from_pretrained("mixed")


def test_bytes_read_at_once_cost_fewer_calls_and_say_nearly_the_same(mixed):
    text = b"And the king said unto them, Go ye and seek the LORD in the mountain of the house"
    for member in mixed.model.readers:
        calls, far = np.zeros(2, int), []
        for begun in range(0, len(text) - 12, 10):
            reading, more = member.begin(text[:begun]), text[begun : begun + 12]
            both = member.follow(reading, more), one_by_one(member, reading, more)
            calls += [one.work.calls - reading.work.calls for one in both]
            far.append(0.5 * (member.log_probs(both[:1]).exp() - member.log_probs(both[1:]).exp()).abs().sum().item())
        assert calls[0] < 0.6 * calls[1]
        assert np.mean(far) < 0.003


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


def test_the_summary_says_how_often_the_gate_was_closed():
    options = ["-m", "mixed", "--gate", "unsure:0.9", "--seed", "1", "--max-new-bytes", "20", "--summary"]
    done = CliRunner().invoke(commands, ["generate", "And the king", *options])
    assert re.search(r"gate unsure:0.9: closed at \d+\.\d% of the bytes", done.stderr)
