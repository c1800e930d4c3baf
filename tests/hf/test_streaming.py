"""Text that streams with the members' disagreement: the same text, the same figures, and an end when it is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from serving import tiny_ensemble

from softmeet.engine.recorder import Savings
from softmeet.hf import Recorder, TokenReports
from softmeet.hf.report import known_sum, style
from softmeet.hf.streaming import MembersStreamer
from softmeet.readers.byte_tokenizer import byte_tokenizer

# The end of a text, 0, has no text of its own.
SAMPLED = {"seed": 5, "max_new_tokens": 10, "do_sample": True, "suppress_tokens": [0]}


@pytest.fixture(scope="module")
def ensemble():
    return tiny_ensemble("gpt2", "llama")


@pytest.mark.parametrize("gate", ["none", "unsure:0.13"])
def test_pieces_are_the_text_and_figures_are_the_reports(ensemble, gate):
    reports, recorder = TokenReports(), Recorder()
    text = ensemble.generate("hello", recorder=reports, gate=gate, **SAMPLED)
    pieces = list(ensemble.stream_with_disagreement("hello", recorder=recorder, gate=gate, **SAMPLED))
    assert "".join(piece for piece, _ in pieces) == text
    found = [reports.at(k, token) for k, token in enumerate(ensemble.tokenizer(text)["input_ids"])]
    assert [nats for _, nats in pieces] == pytest.approx([known_sum(report.disagreement) for report in found], abs=1e-6)
    assert recorder.rows == reports.rows == len(pieces)
    assert (recorder.gate.gated, recorder.passes) == (reports.gate.gated, reports.passes)
    assert (0 < recorder.gate.gated < 10) == (gate != "none")


def test_figures_are_of_the_tokens_that_assisted_decoding_accepts(ensemble):
    prompt, greedy = "ababababab", {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    alone, counted = list(ensemble.stream_with_disagreement(prompt, **greedy)), Recorder()
    together = list(ensemble.stream_with_disagreement(prompt, prompt_lookup_num_tokens=4, recorder=counted, **greedy))
    assert counted.rows > len(together)
    assert [piece for piece, _ in together] == [piece for piece, _ in alone]
    assert [nats for _, nats in together] == pytest.approx([nats for _, nats in alone], abs=1e-3)


def test_characters_stay_whole_with_the_largest_figure_of_their_bytes():
    streamer = MembersStreamer(byte_tokenizer(), SimpleNamespace(gate=Savings(), add=lambda *_: None))
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    text = "aé€\nb".encode() + b"\xc3"  # which ends within a character
    for k, byte in enumerate(text):
        streamer.passes.add(
            SimpleNamespace(disagreement=torch.tensor([[k % 3], [torch.nan]])), torch.full((2, 1, 257), -k)
        )
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert [(text, sum(nats), sums) for text, nats, sums in streamer] == [
        ("a", 0.0, [0, 0]),
        ("é", 2.0, [-3, -3]),
        ("€", 2.0, [-12, -12]),
        ("\n", 0.0, [-6, -6]),
        ("b", 1.0, [-7, -7]),
        ("�", 2.0, [-8, -8]),
    ]


def test_a_stream_that_is_left_stops_the_generation(ensemble):
    recorder = Recorder()
    stream = ensemble.stream_with_disagreement("hello", **SAMPLED | {"max_new_tokens": 58}, recorder=recorder)
    next(stream)
    stream.close()
    assert 0 < recorder.rows < 58


def test_errors_come_out_of_the_stream(ensemble):
    with pytest.raises(ValueError, match="temperature"):
        list(ensemble.stream_with_disagreement("hello", do_sample=True, temperature=-1.0))
    with pytest.raises(ValueError, match="batch size 1"):
        list(ensemble.stream_with_disagreement("hello", do_sample=True, num_return_sequences=2))


def test_colours_grow_with_the_disagreement():
    assert style(0.0) == ""
    assert [style(nats).rpartition("rgb")[2] for nats in (0.01, 0.5, 9.0)] == ["(43,68,40)", "(220,0,40)", "(220,0,40)"]
