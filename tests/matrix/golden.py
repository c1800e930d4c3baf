"""Golden texts: what every case writes, decoded in the plainest way, in a file that ``tools/update_golden.py`` writes.

Members compute in double precision, and where a token is chosen by so little that rounding could choose another, the
case gets another seed; so the texts are the same on every machine.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf
from cases import CASES, Case
from roads import Asked, generate, together, transformers
from worlds import World

from softmeet import noise
from softmeet.engine import draw

FILE = Path(__file__).with_name("golden.json")
# By how much the token that is chosen is ahead of the second one, in double precision and in single.
_MARGIN, _MARGIN_FP32 = 1e-4, 1e-3
# How many log-probabilities are kept of each text, to six digits.
_LOG_PROBS = 4
_ANOTHER = 1000


def texts() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def asked(worlds: dict[str, World], case: Case, known: dict[str, Any], **more: Any) -> Asked:
    return Asked(worlds[case.vocabulary], case, known[str(case)]["seed"], **more)


def digest() -> str:
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]


class _Margins(tf.LogitsProcessor):
    """Keeps how far the best score was ahead of the second, at every token."""

    def __init__(self) -> None:
        self.least = float("inf")

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        best, second = scores.topk(2).values.unbind(-1)
        self.least = min(self.least, (best - second).min().item())
        return scores

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.add(scores)

    @contextlib.contextmanager
    def of_draws(self) -> Iterator[None]:
        original = noise.noisy

        def noisy(*given: Any) -> torch.Tensor:
            return self.add(original(*given))

        with mock.patch.object(noise, "noisy", noisy), mock.patch.object(draw, "noisy", noisy):
            yield


def make(world: World, case: Case, seed: int) -> dict[str, Any]:
    """Return a case's golden entry: its seed, and what is written without drafts."""
    margins, plain = _Margins(), case.__class__(**dict(case.named()) | {"speculation": "0"})
    own = Asked(world, plain, seed)
    greedy = {} if case.drawn else {"logits_processor": [margins]}
    with margins.of_draws():
        found = transformers(own, **greedy)
        six = [found.texts[0]] if case.sampling == "torch" else together(own, **greedy).texts
        chat = generate(Asked(world, plain, seed, chat=True), **greedy)
    if margins.least < (_MARGIN_FP32 if world.dtype is None else _MARGIN):
        return make(world, case, seed + _ANOTHER)
    log_probs = [round(own, 6) for own in found.log_probs[:_LOG_PROBS]]
    entry = {"seed": seed, "text": found.texts[0], "tokens": found.tokens, "log_probs": log_probs}
    return entry | {"six": six[1:], "chat": chat.texts[0]}


def made(worlds: dict[str, World]) -> dict[str, Any]:
    return {str(case): make(worlds[case.vocabulary], case, seed) for seed, case in enumerate(CASES, 1)}


def write(entries: dict[str, Any]) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(own, ensure_ascii=False)}" for name, own in entries.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
