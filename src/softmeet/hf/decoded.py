"""Texts by a decoder, in place of a draw of one token after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.decoders.base import Decoder, Decoding, ToWrite, require_plain
from softmeet.decoders.own_tokens import OwnTexts
from softmeet.engine.masking import ends_of
from softmeet.engine.population import Population, require_rows
from softmeet.errors import InvalidInputError
from softmeet.hf.call_options import CallOptions
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.prompts import Prompt, encoded
from softmeet.hf.running import begun, rereads
from softmeet.noise import generator_of, require_seed


def decoded(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoder: Decoder,
    options: Mapping[str, Any],
) -> list[Decoding]:
    """Have a decoder write behind each of some prompts.

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        prompts: texts or conversations.
        decoder: the decoder.
        options: the call's: ``max_new_tokens`` over tokens, ``max_bytes`` over bytes, ``seed``, ``weights``, ``gate``.

    Raises:
        InvalidInputError: if another option is given, the limit is missing or larger than a member's context, or the
            decoder cannot be used with the rule or a member.
    """
    decoder.require_vocabulary(model.config.vocabulary)
    # What an earlier text has left behind, as where it was interrupted, takes rows.
    model.close_dropped()
    given = require_plain(decoder, options)
    most = _limit(model, given)
    settings = model.settings.changed(**{name: given[name] for name in ("weights", "gate") if name in given})
    if rereads(model):
        raise InvalidInputError(f"the decoder {decoder.name} needs members that take a cache: use other members")
    inputs = encoded(model, tokenizer, prompts)
    call = CallOptions.of(model, {"settings": settings, "own_prompts": inputs.get("own_prompts")})
    decoder.require(call.settings)
    rows = [ids[real.bool()].tolist() for ids, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    wanted = most + decoder.ahead
    longest = min(call.longest(model, len(row) + wanted, len(row)) - len(row) for row in rows)
    room = min([longest, *(own for row in rows if (own := model.room(len(row))) is not None)])
    if room <= decoder.ahead:
        raise InvalidInputError(
            f"the decoder {decoder} reads {decoder.ahead} symbols ahead, and the members' contexts have room for "
            f"{room}: lower its options, or shorten the prompt"
        )
    if room < wanted:
        raise InvalidInputError(
            f"expected a limit of at most {room - decoder.ahead}, for which the members' contexts have room, "
            f"got {most}: lower it"
        )
    seed = require_seed(given["seed"]) if "seed" in given else int(torch.randint(1 << 62, ()))
    generator = generator_of(seed)
    job = ToWrite(len(rows), call.settings, most, frozenset(ends_of(model.generation_config)), generator)
    if model.claimants:
        raise InvalidInputError(
            f"expected members alone for the decoder {decoder}, got {model.claimants[0].name}: leave the files out"
        )
    if decoder.own_tokens:
        return _apart(model, decoder, rows, call, job)
    texts = Population(begun(model, rows, call), decoder.rows(len(model.members)), model.reading)
    try:
        found = decoder.decode(texts, job)
    finally:
        texts.close()
    return [
        replace(one, texts=tuple(
            replace(text, text=tokenizer.decode(text.symbols, skip_special_tokens=True)) for text in one.texts
        ))
        for one in found
    ]  # fmt: skip


def _apart(
    model: EnsembleForCausalLM, decoder: Decoder, rows: Sequence[Sequence[int]], call: CallOptions, job: ToWrite
) -> list[Decoding]:
    """Have a decoder write by members each of which has tokens of its own.

    Args:
        model: the ensemble.
        decoder: the decoder.
        rows: the tokens of each prompt that members share.
        call: the options, among them what members read in place of these.
        job: what is to be written.
    """
    each, texts = decoder.rows(len(model.members)), list[OwnTexts]()
    readers = Counter(own.readers_of_members[0] for own in model.alone)
    for reader, times in readers.items():
        require_rows(reader, times * each * len(rows))
    with ExitStack() as opened:
        for own in model.alone:
            population = Population(begun(own, rows, call), each, own.reading)
            opened.callback(population.close)
            texts.append(OwnTexts(population, own.tokens))
        return decoder.decode(texts, replace(job, ends=frozenset(texts[0].tokens.ends)))


def _limit(model: EnsembleForCausalLM, given: Mapping[str, Any]) -> int:
    """Return the most symbols of a text, which are part of what a decoder draws from."""
    own = model.limit_of_symbols
    (other,) = {"max_bytes", "max_new_tokens"} - {own}
    if other in given or own not in given:
        why = "they are what it counts" if other in given else "without one texts have no last symbol"
        raise InvalidInputError(f"expected the limit of a decoder's texts as {own} alone, as {why}")
    most = given[own]
    if type(most) is not int or most < 1:
        raise InvalidInputError(f"expected {own} as a number from 1, got {most!r}")
    return most
