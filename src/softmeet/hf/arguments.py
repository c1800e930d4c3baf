"""What a model's ``generate`` is given for prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from softmeet.engine.recorder import Recorder
from softmeet.errors import InvalidInputError
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.prompts import Prompt, encoded
from softmeet.hf.sampling import RowSampler


def arguments_of(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int | None,
    recorder: Recorder | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the model's ``generate``; without a length, text may fill the shortest context."""
    if "decoder" in options:
        raise InvalidInputError("decoder= writes whole texts, which come at their end: call generate or decode")
    inputs = encoded(model, tokenizer, prompts)
    usual = options.get("generation_config") or model.generation_config
    drawn = options.get("do_sample", bool(usual.do_sample) or seed is not None)
    # transformers would keep the 50 likeliest tokens where no number is given.
    whole = {"top_k": usual.top_k or 0} if drawn else {}
    found = {**inputs, "pad_token_id": tokenizer.pad_token_id, "do_sample": drawn, **whole, **options}
    room, limits = model.room(inputs["input_ids"].shape[1]), {"max_new_tokens", "max_length", "max_bytes"}
    if room is not None and not limits & {*found}:
        found["max_new_tokens"] = room
    sampler = RowSampler(seed, range(len(prompts))) if drawn and seed is not None else None
    more = {"recorder": recorder, "row_sampler": sampler}
    return found | {name: value for name, value in more.items() if value is not None}
