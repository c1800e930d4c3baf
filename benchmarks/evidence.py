"""What averages of real models gain, by weights of all kinds, and when they stop."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from report import JsonPath, Models, Texts, by_variable, commands, keep, show
from softmeet import Ensemble
from softmeet.evaluation.advise import part
from softmeet.evaluation.candidates import Options, sample_size
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.costs import ensemble_run, member_runs, milliseconds
from softmeet.evaluation.documents import Document, read_documents
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import fit
from softmeet.evaluation.folds import best_elsewhere
from softmeet.evaluation.intervals import Clusters, Difference, paired
from softmeet.evaluation.judged import Judged
from softmeet.evaluation.perplexity import evaluate_positions
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.hf.by_size import parameters
from softmeet.members.member import short
from softmeet.rules.values import POOLS
from softmeet.scaling.local import LocalEngine

app = commands(__doc__)
Row = dict[str, Any]
Kept = Annotated[Path | None, typer.Option(help="A folder for what members made of the texts.")]


def observed(
    ensemble: Ensemble, documents: list[Document], pattern: str, each: int | None, kept: Path | None, *, bos: bool
) -> Positions:
    """Return the positions of a text; what was read before is kept under a name made of members and pattern."""
    known = (pattern, ensemble.names, ensemble.model.config.prune) + (("bos",) if bos else ())
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
    cache = PieceCache(kept and kept / key, {"texts": [document.name for document in documents]})
    return observe_text(ensemble, documents, max_per_document=each, bos=bos, engine=LocalEngine(2), cache=cache)


def costs(ensemble: Ensemble, text: str) -> tuple[list[float], list[float]]:
    """Return milliseconds a byte of each member alone in its own tokens, and as a member of the ensemble."""
    own = member_runs(ensemble, text)
    alone = [ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in own]), own, strict=True)]
    if not ensemble.model.over_bytes:
        return alone, alone
    each = [part(ensemble, [i], {"rule": POOLS[0], "weights": [1.0]}) for i in range(len(ensemble.names))]
    runs = [ensemble_run(one, text) for one in each]
    return alone, [ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in runs]), runs, strict=True)]


def unfitted(ensemble: Ensemble, positions: Positions, prompt: int) -> dict[str, Tensor]:
    """Return losses of averages with equal weights, and with weights from each document's first predictions."""
    n = len(ensemble.names)
    even = {"weights": [1 / n] * n, "rule_temperature": 1.0}
    choices = [RuleChoice(f"uniform {rule}", {"rule": rule, **even}) for rule in POOLS]
    choices += [RuleChoice(f"{rule}, weights from {prompt}", {"rule": rule, **even}, prompt) for rule in POOLS]
    return {name: own.nats for name, own in evaluate_positions(ensemble, positions, choices).choices.items()}


def best_of_each_document(judged: Judged) -> Tensor:
    """Return losses of whichever member, as it is or with its temperature, is best on a document: an oracle."""
    found, document = judged.found, judged.found.positions.document
    tempered = [found.choices[own.label].nats for own in judged.fitted.candidates[: len(judged.names)]]
    nats = torch.stack([*(found.members[name].nats for name in judged.names), *tempered])
    best = torch.empty_like(nats[0])
    for k in document.unique().tolist():
        here = document == k
        best[here] = nats[nats[:, here].sum(-1).argmin(), here]
    return best


def control(bits: Sequence[float], alone: Sequence[float], cost: float, names: Sequence[str]) -> tuple[str, str]:
    """Return the best single member that costs no more, and the cheapest that costs more, with bits and ms."""
    within = [i for i in range(len(names)) if alone[i] <= cost]
    beyond = sorted((i for i in range(len(names)) if alone[i] > cost), key=lambda i: alone[i])

    def told(i: int) -> str:
        return f"{names[i]} {bits[i]:.4f} ({alone[i]:.1f} ms)"

    return (told(min(within, key=lambda i: bits[i])) if within else "none"), (told(beyond[0]) if beyond else "none")


def compared(
    ensemble: Ensemble, positions: Positions, times: Sequence[float], prompt: int, trusts: tuple[float, ...]
) -> Row:
    """Return gains of all kinds of averages, and of ``meet`` over tokens, over the best member, in bits a byte."""
    trusts = () if ensemble.model.over_bytes else trusts
    options = Options(folds=5, meets=False, adaptive=True, trusts=trusts, fit_positions=sample_size(ensemble))
    fitted = fit(ensemble, positions, options, engine=LocalEngine(2))
    judged = Judged(ensemble, fitted, times)
    losses = unfitted(ensemble, positions, prompt) | {name: own.nats for name, own in fitted.test.choices.items()}
    fold = fitted.fold
    assert fold is not None
    fits = {name: own for name, own in losses.items() if name.startswith("fitted")}
    ours = {name: own for name, own in fits.items() if name.endswith("mean")}
    groups = {
        "best fitted": {name: own for name, own in ours.items() if "adaptive" not in name},
        "best adaptive": {name: own for name, own in ours.items() if "adaptive" in name},
    }
    if trusts:
        groups["best meet"] = {name: own for name, own in fits.items() if name.startswith("fitted meet")}
    losses |= {name: best_elsewhere(own, fold) for name, own in groups.items()}
    losses["best member of each document (an oracle)"] = best_of_each_document(judged)
    return {
        "judged": judged, "verdict": judged.chosen()[0], "best": judged.best, "bits": judged.bits(judged.base),
        "losses": losses, "gains": {name: judged.gain(own) for name, own in losses.items()},
        "values": {own.name: own.settings for own in fitted.candidates},
    }  # fmt: skip


def plotted(rows: Sequence[Row], path: Path) -> None:
    """Draw the gain of pairs against the gap in strength between the two, by what their weights are."""
    from softmeet.evaluation.plots import blank

    figure, axes = blank()
    for kind, mark in (("best fitted", "o"), ("best adaptive", "s"), ("uniform logit-mean", "^")):
        some = [row for row in rows if row["kind"] == kind and len(row["some"]) == 2]
        gain = [row["gain"] for row in some]
        error = [[g - row["interval"][0] for g, row in zip(gain, some, strict=True)],
                 [row["interval"][1] - g for g, row in zip(gain, some, strict=True)]]  # fmt: skip
        axes.errorbar([row["gap"] for row in some], gain, yerr=error, fmt=mark, capsize=2, label=kind)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="gap between the two members (bits a byte)", ylabel="gain over the best member (bits a byte)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@app.command()
def gains(
    members: Models,
    text: Texts,
    vocabulary: Annotated[str, typer.Option(help="bytes, tokens, or auto.")] = "auto",
    largest: Annotated[int, typer.Option(help="The most members that are combined.")] = 3,
    each: Annotated[int | None, typer.Option(help="The most predictions in a document.")] = None,
    prompt: Annotated[int, typer.Option(help="Predictions at a document's start that weights come from.")] = 100,
    trust: Annotated[list[float] | None, typer.Option(help="Over tokens: a trust at which meet is tried.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin documents with the token for their beginning.")] = False,
    kept: Kept = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of gain against gap.")] = None,
    json: JsonPath = None,
) -> None:
    """Judge averages of every two and three members, each text by itself.

    Every member reads every document once. Then some members are fitted by folds of documents, and judged on the
    others, as `softmeet advise` and `softmeet evaluate --folds` do: averages with equal weights, with fitted ones, with
    weights that adapt to each document, and with weights from its beginning. Beside them stand the best member, the
    best member of each document (an oracle, which no one has), and the control: the best single member that writes a
    byte in no more time, and the next larger one. Differences are paired, 95 %, by document.
    """
    ensemble = Ensemble.from_pretrained(members, POOLS[0], vocabulary=vocabulary)
    names, every = [short(by_variable(name)) for name in ensemble.names], list[Row]()
    for pattern in text:
        documents = read_documents([pattern])
        positions = observed(ensemble, documents, pattern, each, kept, bos=bos)
        alone, within = costs(ensemble, max((own.text for own in documents), key=len))
        rows, bits = list[Row](), dict[str, float]()
        for size in range(2, min(largest, len(names)) + 1):
            for some in itertools.combinations(range(len(names)), size):
                own = part(ensemble, some, {"rule": POOLS[0]})
                at = replace(positions, hidden=[positions.hidden[i] for i in some])
                found = compared(own, at, [alone[i] for i in some], prompt, tuple(trust or ()))
                cost = sum(within[i] for i in some)
                judged = found["judged"]
                strength = [judged.bits(judged.found.members[name].nats) for name in judged.names]
                bits |= dict(zip((names[i] for i in some), strength, strict=True))
                for kind, gain in found["gains"].items():
                    rows.append({
                        "text": pattern, "members": " + ".join(names[i] for i in some), "kind": kind,
                        "gap": sorted(strength)[1] - min(strength), "best member": short(by_variable(found["best"])),
                        "best bits": found["bits"], "bits": judged.bits(found["losses"][kind]),
                        "gain": gain.mean, "interval": [gain.low, gain.high], "ms a byte": cost,
                        "verdict": found["verdict"], "some": some,
                        "values": found["values"].get(kind.removeprefix("fitted ")),
                    })  # fmt: skip
        for row in rows:
            by = [bits[name] for name in names]
            row["control"], row["next larger"] = control(by, alone, row["ms a byte"], names)
        every += rows
        _print(pattern, rows, names, bits, alone, within)
    if plot is not None:
        plotted(every, plot)
    if json is not None:
        keep(json, "gains in bits a byte over the best member", by_kind(every), combinations=every)


def by_kind(every: Sequence[Row]) -> list[Row]:
    """Return one row for some members on a text, with the gain of each kind of average, and half its interval."""
    rows: dict[tuple[str, str], Row] = {}
    for row in every:
        first = {name: row[name] for name in ("text", "members", "gap", "best member", "best bits", "verdict")}
        low, high = row["interval"]
        own = rows.setdefault((row["text"], row["members"]), first)
        own |= {row["kind"]: row["gain"], f"± {row['kind']}": (high - low) / 2}
    return list(rows.values())


def _print(
    pattern: str, rows: list[Row], names: list[str], bits: dict[str, float], alone: Sequence[float],
    within: Sequence[float],
) -> None:  # fmt: skip
    show(
        f"{pattern}: members alone",
        [
            {"member": name, "bits a byte": bits[name], "ms a byte": own, "in an ensemble": there}
            for name, own, there in zip(names, alone, within, strict=True)
        ],
        None,
    )
    told = [
        {
            "members": row["members"], "kind": row["kind"], "bits": row["bits"], "best member": row["best member"],
            "gain": f"{row['gain']:+.4f} [{row['interval'][0]:+.4f}, {row['interval'][1]:+.4f}]",
            "ms a byte": row["ms a byte"], "control": row["control"], "next larger": row["next larger"],
            "verdict": row["verdict"],
        }
        for row in rows
    ]  # fmt: skip
    show(f"{pattern}: combinations", told, None)


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
        """Return losses by logits, at every position."""
        return -logits.log_softmax(-1).gather(-1, self.targets[:, None]).squeeze(-1)

    def bits(self, nats: Tensor) -> float:
        """Return bits a byte."""
        return nats.sum().item() / math.log(2) / int(self.sizes.sum())

    def tempered(self, i: int) -> tuple[float, Tensor]:
        """Return the temperature that suits a member best, and its losses there."""
        found = [(T, self.nats(self.logs[i] / T)) for T in _TEMPERATURES]
        return min(found, key=lambda own: own[1].sum().item())

    def best(self, some: Some, *, tempered: bool) -> Tensor:
        """Return losses of the best of some members."""
        found = [self.tempered(i)[1] if tempered else self.nats(self.logs[i]) for i in some]
        return min(found, key=lambda nats: nats.sum().item())

    def mean(self, some: Some, weights: Sequence[float], temperatures: Sequence[float]) -> Tensor:
        """Return losses of the weighted mean of logits, each divided by its member's temperature."""
        each = zip(some, weights, temperatures, strict=True)
        return self.nats(sum((w / T * self.logs[i] for i, w, T in each), torch.zeros(())))

    def gain(self, nats: Tensor, over: Tensor) -> Difference:
        """Return what losses are below others, in bits a byte."""
        return paired(over / math.log(2), nats / math.log(2), self.documents, self.sizes)


def softmax(scores: Sequence[float]) -> list[float]:
    """Return weights that sum to 1."""
    return [float(w) for w in torch.tensor(scores, dtype=torch.float64).softmax(0)]


def chosen_elsewhere(
    gain: Callable[[Some, str, float], Difference], values: Sequence[float], pairs: Sequence[Some], texts: Sequence[str]
) -> dict[Some, float]:
    """Return for each pair the value of the largest mean gain over all others, on all texts."""
    known = {one: gain(*one) for one in itertools.product(pairs, texts, values)}
    return {
        pair: max(values, key=lambda v: sum(known[other, t, v].mean for other in pairs if other != pair for t in texts))
        for pair in pairs
    }


@app.command()
def weights(
    members: Models,
    text: Texts,
    each: Annotated[int, typer.Option(help="The most predictions in a document of the texts.")] = 300,
    kept: Kept = None,
    json: JsonPath = None,
) -> None:
    """Try weights that need no text of one's own, for every two and three of at least three members, on every text.

    Members read texts over bytes, and a sample of 4 kB (prose, code, a dialogue). Two ways to weigh them are tried on
    every pair, each with its constant chosen on the other pairs: by the number of parameters to the power a, which is 1
    in an average without weights, and by exp(-k Δ), where a member needs Δ bits a byte more on the sample than the
    best. The mean of logits is set against the best member: both as they are; and with the temperatures that suit each
    member on the sample, against the best member at the temperature that suits it on the very text. Differences are
    paired by document.
    """
    ensemble = Ensemble.from_pretrained(members, POOLS[0], vocabulary="bytes")
    names = [short(by_variable(name)) for name in ensemble.names]
    size = list(map(parameters, ensemble.names, ensemble.model.members))
    documents = read_documents(["benchmarks/sample/*.txt"])
    sample = Observed(observed(ensemble, documents, "sample", None, kept, bos=False))
    texts = {one: Observed(observed(ensemble, read_documents([one]), one, each, kept, bos=False)) for one in text}
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
    powers = chosen_elsewhere(lambda p, t, a: judged(p, t, by_size(p, a), tempered=True), _POWERS, pairs, list(texts))
    steep = chosen_elsewhere(lambda p, t, k: judged(p, t, by_bits(p, k), tempered=True), _STEEPNESS, pairs, list(texts))
    rows = []
    for some, place in itertools.product([*pairs, *itertools.combinations(range(len(names)), 3)], texts):
        ways: dict[str, Difference] = {
            "as they are": judged(some, place, by_size(some, 1), tempered=False),
            "tempered": judged(some, place, by_size(some, 1), tempered=True),
            "equal": judged(some, place, [1 / len(some)] * len(some), tempered=False),
        }
        row: Row = {
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
    app()
