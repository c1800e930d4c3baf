"""The time that a model takes to write a byte, by itself or as an ensemble, measured by generating a few tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from softmeet.ensemble import Ensemble
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM

# New tokens in the shorter and in the longer of two runs, whose difference leaves out the prompt; bytes of the prompt.
_SHORT, _LONG, _PROMPT = 4, 20, 100
_REPEATS = 4
# Over bytes a token is about so many steps.
_BYTES = 4


def milliseconds(runs: Sequence[Callable[[int], Any]], repeats: int = _REPEATS) -> list[float]:
    """Measure the milliseconds that each of several generators takes for one more token.

    Each runs for a few tokens and for more; the difference is divided by that of the numbers. Generators take turns,
    so that a machine that slows down does so for all, and of each the shortest times count, as what else a machine does
    only adds to them.

    Args:
        runs: functions of a number of new tokens, which generate as many.
        repeats: how often each is measured.
    """
    for run in runs:
        run(_SHORT)
    shortest = [{_SHORT: math.inf, _LONG: math.inf} for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, shortest, strict=True):
            for count in own:
                start = time.perf_counter()
                run(count)
                own[count] = min(own[count], time.perf_counter() - start)
    return [1000 * (own[_LONG] - own[_SHORT]) / (_LONG - _SHORT) for own in shortest]


def member_runs(ensemble: Ensemble, text: str) -> list[tuple[Callable[[int], Any], float]]:
    """Return, for each member alone in its own tokens, (a function that generates behind a text, its tokens a byte).

    transformers generates, as it would without softmeet; a member's prompt of its own is not read.

    Args:
        ensemble: the members.
        text: of which the first bytes are the prompt, and all are counted in tokens.
    """
    model, size = ensemble.model, len(text.encode())
    if isinstance(model, ByteEnsembleForCausalLM):
        pairs = [(reader.model, [*reader.prefix, *reader.spelling.encode(text.encode())]) for reader in model.readers]
    else:
        ids = ensemble.tokenizer(text, verbose=False)["input_ids"]
        pairs = [(member, ids) for member in model.members]
    found = []
    for member, ids in pairs:
        room = (getattr(member.config, "max_position_embeddings", None) or len(ids) + _LONG) - _LONG
        found.append((_generator(member, ids, max(1, min(len(ids) * _PROMPT // size, room))), len(ids) / size))
    return found


def _generator(model: Any, ids: Sequence[int], length: int) -> Callable[[int], Any]:
    prompt = torch.tensor([ids[:length]], device=model.device)

    def run(count: int) -> Any:
        # Quietly: an attention mask of ones is what no mask stands for.
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0,
        )  # fmt: skip

    return run


def ensemble_run(ensemble: Ensemble, text: str) -> tuple[Callable[[int], Any], float]:
    """Return (a function by which an ensemble generates greedily behind a text; what it makes of these, a byte).

    Over bytes the function makes four bytes for each token that it is asked for.
    """
    model, over_bytes = ensemble.model, ensemble.model.over_bytes
    rate = 1.0 if over_bytes else len(ensemble.tokenizer(text, verbose=False)["input_ids"]) / len(text.encode())
    times = _BYTES if over_bytes else 1
    room = (model.window if over_bytes else getattr(model.config, "max_position_embeddings", None)) or _PROMPT
    prompt = text.encode()[: min(_PROMPT, max(1, int((room - times * _LONG) / rate) - 1))].decode(errors="ignore")

    def run(count: int) -> Any:
        many = times * count
        most = {"max_bytes" if over_bytes else "max_new_tokens": many}
        return ensemble.generate(prompt, do_sample=False, min_new_tokens=many, **most)

    return run, rate / times
