"""Weights that need no text of one's own: python benchmarks/auto_weights.py -m A -m B -m C -t 'texts/*.txt'

Members read texts over bytes, and a sample of 4 kB (prose, code, a dialogue). Two ways to weigh them are tried on every
pair, each with its constant chosen on the other pairs: by the number of parameters to the power ``a``, which is 1 in an
average without weights, and by exp(-k Δ), where a member needs Δ bits a byte more on the sample than the best.
The mean of logits is set against the best member: both as they are; and with the temperatures that suit each member on
the sample, against the best member at the temperature that suits it on the very text. Differences are paired by
document.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from evidence import observed
from report import by_variable, show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents
from softmeet.evaluation.intervals import Clusters, Difference, paired
from softmeet.evaluation.positions import Positions
from softmeet.hf.by_size import parameters
from softmeet.members.member import short
from softmeet.rules.values import POOLS

_TEMPERATURES = [1 + k / 50 for k in range(-15, 31)]
_POWERS = (0, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)
_STEEPNESS = (2, 4, 6, 8, 10, 12, 16, 20, 30, 40)
Some = tuple[int, ...]


class Observed:
    """What members make of a text: their log-probabilities, the bits of each, and of weighted means of them."""

    def __init__(self, positions: Positions) -> None:
        self.logs = [own.double().log_softmax(-1) for own in positions.hidden]
        self.targets, self.sizes = positions.targets, positions.sizes
        self.documents = Clusters(positions.document, "documents")

    def nats(self, logits: Tensor) -> Tensor:
        """Losses by logits, at every position."""
        return -logits.log_softmax(-1).gather(-1, self.targets[:, None]).squeeze(-1)

    def bits(self, nats: Tensor) -> float:
        """Bits a byte."""
        return nats.sum().item() / math.log(2) / int(self.sizes.sum())

    def tempered(self, i: int) -> tuple[float, Tensor]:
        """The temperature that suits a member best, and its losses there."""
        found = [(T, self.nats(self.logs[i] / T)) for T in _TEMPERATURES]
        return min(found, key=lambda own: own[1].sum().item())

    def best(self, some: Some, *, tempered: bool) -> Tensor:
        """Losses of the best of some members."""
        found = [self.tempered(i)[1] if tempered else self.nats(self.logs[i]) for i in some]
        return min(found, key=lambda nats: nats.sum().item())

    def mean(self, some: Some, weights: Sequence[float], temperatures: Sequence[float]) -> Tensor:
        """Losses of the weighted mean of logits, each divided by its member's temperature."""
        each = zip(some, weights, temperatures, strict=True)
        return self.nats(sum((w / T * self.logs[i] for i, w, T in each), torch.zeros(())))

    def gain(self, nats: Tensor, over: Tensor) -> Difference:
        """What losses are below others, in bits a byte."""
        return paired(over / math.log(2), nats / math.log(2), self.documents, self.sizes)


def softmax(scores: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    return [float(w) for w in torch.tensor(scores, dtype=torch.float64).softmax(0)]


def chosen_elsewhere(
    gain: Callable[[Some, str, float], Difference], values: Sequence[float], pairs: Sequence[Some], texts: Sequence[str]
) -> dict[Some, float]:
    """For each pair the value of the largest mean gain over all others, on all texts."""
    known = {one: gain(*one) for one in itertools.product(pairs, texts, values)}
    return {
        pair: max(values, key=lambda v: sum(known[other, t, v].mean for other in pairs if other != pair for t in texts))
        for pair in pairs
    }


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Members, at least three.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns; each is judged by itself.")],
    each: Annotated[int, typer.Option(help="The most predictions in a document of the texts.")] = 300,
    kept: Annotated[Path | None, typer.Option(help="A folder for what members made of the texts.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print what every two and three members gain over the best of them, on every text."""
    ensemble = Ensemble.from_pretrained(members, POOLS[0], vocabulary="bytes")
    names = [short(by_variable(name)) for name in ensemble.names]
    size = list(map(parameters, ensemble.names, ensemble.model.members))
    files = ["benchmarks/sample/*.txt"]
    sample = Observed(observed(ensemble, read_documents(files), "sample", None, kept, bos=False))
    texts = {own: Observed(observed(ensemble, read_documents([own]), own, each, kept, bos=False)) for own in text}
    fitted = [sample.tempered(i) for i in range(len(names))]
    heat, known = [T for T, _ in fitted], [sample.bits(nats) for _, nats in fitted]

    def by_size(some: Some, power: float) -> list[float]:
        return softmax([power * math.log(size[i]) for i in some])

    def by_bits(some: Some, k: float) -> list[float]:
        return softmax([-k * known[i] for i in some])

    def judged(some: Some, place: str, weights: Sequence[float], *, tempered: bool) -> Difference:
        own = texts[place]
        mean = own.mean(some, weights, [heat[i] if tempered else 1.0 for i in some])
        return own.gain(mean, own.best(some, tempered=tempered))

    pairs = list(itertools.combinations(range(len(names)), 2))
    powers = chosen_elsewhere(
        lambda p, t, a: judged(p, t, by_size(p, a), tempered=True), _POWERS, pairs, list(texts)
    )  # fmt: skip
    steep = chosen_elsewhere(
        lambda p, t, k: judged(p, t, by_bits(p, k), tempered=True), _STEEPNESS, pairs, list(texts)
    )  # fmt: skip
    rows = []
    for some, place in itertools.product([*pairs, *itertools.combinations(range(len(names)), 3)], texts):
        ways: dict[str, Difference] = {
            "as they are": judged(some, place, by_size(some, 1), tempered=False),
            "tempered": judged(some, place, by_size(some, 1), tempered=True),
            "equal": judged(some, place, [1 / len(some)] * len(some), tempered=False),
        }
        row: dict[str, Any] = {
            "text": Path(place).parent.name, "members": " + ".join(names[i] for i in some),
            "weights": " ".join(f"{w:.2f}" for w in by_size(some, 1)),
        }  # fmt: skip
        if some in powers:
            row |= {"power elsewhere": powers[some], "k elsewhere": steep[some]}
            ways["by size, power elsewhere"] = judged(some, place, by_size(some, powers[some]), tempered=True)
            ways["by bits"] = judged(some, place, by_bits(some, steep[some]), tempered=True)
        for way, gain in ways.items():
            row |= {way: gain.mean, f"± {way}": (gain.high - gain.low) / 2}
        rows.append(row)
    alone = [
        {"member": name, "parameters": n, "temperature on the sample": T, "bits a byte there": bits}
        for name, n, T, bits in zip(names, size, heat, known, strict=True)
    ]
    show("members", alone, None)
    show("gain in bits a byte over the best member", rows, json)


if __name__ == "__main__":
    typer.run(main)
