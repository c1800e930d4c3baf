"""Decoders on members: what texts say of themselves, what they sum to, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import byte_members
import numpy as np
import pytest
import torch
from commands import run
from serving import tiny_ensemble

import softmeet
from softmeet import Ensemble
from softmeet.errors import InvalidInputError, NonFiniteError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ensembles over tokens and over bytes, and the option that limits their texts."""
    folders = byte_members.save_two(tmp_path_factory.mktemp("members"))
    over_bytes = Ensemble.from_pretrained(list(map(str, folders)), "logit-mean", vocabulary="bytes", prune=0.0)
    return {
        "tokens": (tiny_ensemble("gpt2", "llama", rule="logit-mean"), "max_new_tokens", "w5 w6"),
        "bytes": (over_bytes, "max_bytes", "he"),
    }


def told(ensemble, texts):
    """Each member's log-probabilities behind texts of symbols, (n, texts, v)."""
    readers = ensemble.model.readers_of_members
    return torch.stack([
        reader.read_whole(texts, [[len(one)] for one in texts]).log_probs().double().log_softmax(-1)
        for reader in readers
    ])  # fmt: skip


@pytest.mark.parametrize("over", ["tokens", "bytes"])
@torch.inference_mode()
def test_texts_are_weighed_by_what_members_predict(over, made):
    """Of two symbols: what a text says of itself is true, and the mean of the estimates is the sum over all texts."""
    ensemble, limit, prompt = made[over]
    row = ensemble.tokenizer(prompt)["input_ids"]
    (first,) = told(ensemble, [row]).unbind(1)
    second = told(ensemble, [[*row, k] for k in range(first.shape[-1])])
    ends = ensemble.model.generation_config.eos_token_id
    pairs = (first[:, :, None] + second).mean(0).exp()
    singles = first.mean(0).exp()
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    ended = torch.zeros(len(singles), dtype=torch.bool)
    ended[ends] = True
    z = float(singles[ended].sum() + pairs[~ended].sum())
    estimates = []
    for seed in range(15):
        found = ensemble.decode([prompt] * 4, "particles:n=4", seed=seed, **{limit: 2})
        estimates += [math.exp(one.log_z) for one in found]
    assert abs(np.mean(estimates) - z) <= 4 * np.std(estimates) / len(estimates) ** 0.5
    for text in found[0].texts:
        start, *rest = text.symbols
        own = first[:, start] + (second[:, start, rest[0]] if rest else 0)
        assert text.ended == (text.symbols[-1] in ends)
        assert np.array(text.log_probs) == pytest.approx(own.numpy(), abs=1e-4)


@pytest.mark.parametrize("over", ["tokens", "bytes"])
def test_texts_end_by_their_limit_and_a_seed_repeats_them(over, made):
    ensemble, limit, prompt = made[over]
    ways, held = [], []
    for _ in range(2):
        ways.append(ensemble.decode([prompt, prompt], "particles:n=3:utf8=true", seed=3, **{limit: 4}))
        held.append([reader.bytes for reader in ensemble.model.readers_of_members])
    assert held[0] == held[1]  # no row is left open
    assert [one.text for one in ways[0]] == [one.text for one in ways[1]]
    assert all(len(text.symbols) <= 4 for one in ways[0] for text in one.texts)
    one = ensemble.generate(prompt, decoder="particles:n=3:utf8=true", seed=3, **{limit: 4})
    assert isinstance(one, str)
    assert ensemble.generate([prompt], decoder="particles:n=3:utf8=true", seed=3, **{limit: 4}) == [one]
    seeds = [seed + high for seed in (3, 4) for high in (0, 1 << 32, 1 << 33, 1 << 63)]
    drawn = [ensemble.decode([prompt], "particles:n=4:utf8=true", seed=seed, **{limit: 3})[0] for seed in seeds]
    assert len({tuple(text.symbols for text in one.texts) for one in drawn}) > 6


@pytest.mark.parametrize("over", ["tokens", "bytes"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"top_k": 5}, "whole texts .* cannot be used with top_k: leave it out"), ({"temperature": 0.5}, "temperature"),
        ({"do_sample": False}, "do_sample"), ({"structure": 3}, "structure"), ({"gate": "unsure:0.5"}, "gate unsure"),
        ({"max_new_tokens": 3, "max_bytes": 3}, "expected the limit"), ({"recorder": 1}, "recorder"),
        ({"seed": "x"}, "seed"), ({"prompt_weights": True}, "prompt_weights"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_texts_is_refused(over, more, message, made):
    ensemble, limit, prompt = made[over]
    with pytest.raises(InvalidInputError, match=message):
        ensemble.generate(prompt, decoder="particles", **{limit: 3, **more})


def test_limits_and_rooms_are_checked(made, monkeypatch):
    ensemble, _, prompt = made["tokens"]
    reader = ensemble.model.readers_of_members[0]
    for limit, traits, message in (
        ({}, {}, "max_new_tokens alone, as without one"),
        ({"max_new_tokens": 10**6}, {}, "expected a limit of at most"),
        ({"max_new_tokens": 0}, {}, "a number from 1"),
        ({"max_new_tokens": 3}, {"can_fork": False}, "can fork rows"),
        ({"max_new_tokens": 3}, {"rows": 8}, "at most 8 texts at once, as .* got 16"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(reader, "traits", replace(reader.traits, **traits))
            with pytest.raises(InvalidInputError, match=message):
                ensemble.decode(prompt, **limit)


def test_a_member_that_tells_no_numbers_is_named(made):
    ensemble, _, prompt = made["tokens"]
    weight = ensemble.model.members[1].get_output_embeddings().weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = math.nan
        ensemble.model.find_heads_again()
        with pytest.raises(NonFiniteError, match="llama"):
            ensemble.decode(prompt, "particles:n=2", max_new_tokens=3)
    finally:
        with torch.no_grad():
            weight.copy_(before)
        ensemble.model.find_heads_again()


def test_a_decoder_of_ones_own(made):
    """The likeliest symbol of the first member, again and again."""
    from softmeet.decoders.base import Decoding, WeightedText
    from softmeet.decoders.registry import DECODERS

    @softmeet.register_decoder
    class First(softmeet.Decoder):
        """The first member alone, greedily."""

        name = "first-greedy"
        summary = "for tests"

        def rows(self, members):
            return 1

        def decode(self, texts, job):
            for _ in range(job.most):
                best = texts.log_probs(range(texts.rows))[0].argmax(-1).tolist()
                texts.add(range(texts.rows), best)
            return [Decoding((WeightedText(texts.symbols(k), False, 0.0, ()),), 0) for k in range(texts.rows)]

    try:
        ensemble, _, prompt = made["tokens"]
        assert softmeet.decoder_names()[-1] == "first-greedy"
        two = ensemble.decode([prompt, prompt], "first-greedy", max_new_tokens=4)
        assert len(two[0].texts[0].symbols) == 4
        assert two[0].texts == two[1].texts
        with pytest.raises(InvalidInputError, match="whole texts, which come at their end"):
            next(ensemble.stream(prompt, decoder="first-greedy", max_new_tokens=3))
        with pytest.raises(InvalidInputError, match="expected a subclass"):
            softmeet.register_decoder(softmeet.Decoder)
    finally:
        DECODERS._registered.clear()


def test_the_command_prints_the_drawn_text_or_all_as_json():
    asked = ("generate", "And the king said", "--decoder", "particles:n=3", "--max-new-tokens", "6", "--seed", "1")
    plain, told = run(*asked), json.loads(run(*asked, "--json").stdout)
    (one,) = told["completions"]
    assert plain.stdout == one["text"] + "\n"
    assert [set(text) for text in one["texts"]] == [{"symbols", "ended", "log_weight", "log_probs", "text"}] * 3
    assert told["rule"] == "logit-mean"
