"""The time that a model takes to write a byte, by itself or as an ensemble, measured by generating a few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from timeit import timeit
from typing import Any

import torch

from softmeet.ensemble import Ensemble
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.reader_model import ReaderModel

# New tokens in the shorter and in the longer of two runs, whose difference leaves out the prompt; bytes of the prompt.
_SHORT, _LONG, _PROMPT = 4, 20, 100
_REPEATS = 4
# A larger model of one kind takes so many times the bits for so many times the time: Qwen2.5-Coder 1.5B beside 0.5B on
# prose and code (docs/reference/results.md: 0.695 and 0.741 to 0.804 and 0.843 bits a byte, 85 ms a byte to 34).
_LARGER_BITS, _LARGER_TIME = 0.872, 2.5
# The ratio of times below which they count as the same.
SAME = 1.01


def larger(ratio: float) -> float:
    """Return how many percent fewer bits a larger model gives for so many times the time."""
    kept: float = _LARGER_BITS ** (math.log(ratio) / math.log(_LARGER_TIME))
    return 100 * (1 - kept)


class Others:
    """What other programs take of the processors, from when this is made."""

    def __init__(self) -> None:
        self._before = self._times()

    @staticmethod
    def _times() -> tuple[float, float]:
        """Return the seconds that all processors were busy, and those that they had."""
        import psutil

        every, own = psutil.cpu_times(), psutil.Process()
        ours = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
        idle = every.idle + getattr(every, "iowait", 0.0)
        return sum(every[:8]) - idle - sum(x.user + x.system for x in ours), sum(every[:8])

    def share(self) -> float:
        """Return the share of all processors' time that others have taken, from 0 to 1."""
        busy, had = (after - before for after, before in zip(self._times(), self._before, strict=True))
        return min(1.0, max(0.0, busy / had)) if had > 0 else 0.0


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
                own[count] = min(own[count], timeit(partial(run, count), number=1))
    return [1000 * (own[_LONG] - own[_SHORT]) / (_LONG - _SHORT) for own in shortest]


def member_runs(ensemble: Ensemble, text: str) -> list[tuple[Callable[[int], Any], float]]:
    """Return, for each member alone in its own tokens, (a function that generates behind a text, its tokens a byte).

    transformers generates, as it would without softmeet, but of a registered reader, which is read row by row; a
    member's prompt of its own is not read.

    Args:
        ensemble: the members.
        text: of which the first bytes are the prompt, and all are counted in tokens.
    """
    found, size = [], len(text.encode())
    for name, member, ids in zip(ensemble.names, ensemble.model.members, ensemble.model.own_tokens(text), strict=True):
        alone = member
        if isinstance(member, ReaderModel):
            alone = EnsembleForCausalLM(EnsembleConfig([name], "logit-mean"), [member]).eval()
        room = (getattr(member.config, "max_position_embeddings", None) or len(ids) + _LONG) - _LONG
        found.append((_generator(alone, ids, max(1, min(len(ids) * _PROMPT // size, room))), len(ids) / size))
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
    times, tokenizer = ensemble.model.symbols_of_token, ensemble.tokenizer
    rate = len(tokenizer(text, verbose=False)["input_ids"]) / len(text.encode())
    room = int((ensemble.model.window - times * _LONG) / rate) - 1
    prompt = text.encode()[: min(_PROMPT, max(1, room))].decode(errors="ignore")
    return lambda count: written([prompt], ensemble, times * count, do_sample=False), rate / times


def written(prompts: Sequence[str], ensemble: Ensemble, many: int, **options: Any) -> list[str]:
    """Have an ensemble continue prompts of one length, each by so many tokens (over bytes: bytes), and return these.

    Args:
        prompts: the prompts.
        ensemble: the ensemble.
        many: how many symbols it writes.
        options: of :meth:`Ensemble.generate`.
    """
    length = len(ensemble.tokenizer(prompts[0], verbose=False)["input_ids"]) + many
    return ensemble.generate(list(prompts), max_length=length, min_new_tokens=many, **options)
