"""What averages of real models gain, and when they stop: python benchmarks/evidence.py -m A -m B -m C -t 'texts/*.txt'

Every member reads every document once. Then every pair and every three members are fitted by folds of documents, and
judged on the others, as ``softmeet advise`` and ``softmeet evaluate --folds`` do: averages with equal weights, with
fitted ones, with weights that adapt to each document, and with weights from its beginning. Beside them stand the best
member, the best member of each document (an oracle, which no one has), and the control: the best single member that
writes a byte in no more time, and the next larger one. Differences are paired, 95 %, by document.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from report import by_variable, keep, show
from softmeet import Ensemble
from softmeet.evaluation.advise import part
from softmeet.evaluation.candidates import Options, sample_size
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.costs import ensemble_run, member_runs, milliseconds
from softmeet.evaluation.documents import Document, read_documents
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import fit
from softmeet.evaluation.folds import best_elsewhere
from softmeet.evaluation.intervals import Difference
from softmeet.evaluation.judged import Judged
from softmeet.evaluation.perplexity import evaluate_positions
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.members.member import short
from softmeet.rules.values import POOLS
from softmeet.scaling.local import LocalEngine


def costs(ensemble: Ensemble, text: str) -> tuple[list[float], list[float]]:
    """Milliseconds a byte of each member alone in its own tokens, and as a member of the ensemble."""
    own = member_runs(ensemble, text)
    alone = [ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in own]), own, strict=True)]
    if not ensemble.model.over_bytes:
        return alone, alone
    each = [part(ensemble, [i], {"rule": POOLS[0], "weights": [1.0]}) for i in range(len(ensemble.names))]
    runs = [ensemble_run(one, text) for one in each]
    return alone, [ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in runs]), runs, strict=True)]


def unfitted(ensemble: Ensemble, positions: Positions, prompt: int) -> dict[str, Tensor]:
    """Losses of averages with equal weights, and with weights from each document's first predictions."""
    n = len(ensemble.names)
    even = {"weights": [1 / n] * n, "rule_temperature": 1.0}
    choices = [RuleChoice(f"uniform {rule}", {"rule": rule, **even}) for rule in POOLS]
    choices += [RuleChoice(f"{rule}, weights from {prompt}", {"rule": rule, **even}, prompt) for rule in POOLS]
    return {name: own.nats for name, own in evaluate_positions(ensemble, positions, choices).choices.items()}


def best_of_each_document(judged: Judged) -> Tensor:
    """Losses of whichever member, as it is or with its temperature, is best on a document: an oracle."""
    found, document = judged.found, judged.found.positions.document
    tempered = [found.choices[own.label].nats for own in judged.fitted.candidates[: len(judged.names)]]
    nats = torch.stack([*(found.members[name].nats for name in judged.names), *tempered])
    best = torch.empty_like(nats[0])
    for k in document.unique().tolist():
        here = document == k
        best[here] = nats[nats[:, here].sum(-1).argmin(), here]
    return best


def control(bits: Sequence[float], alone: Sequence[float], cost: float, names: Sequence[str]) -> tuple[str, str]:
    """The best single member that costs no more, and the cheapest that costs more: names, bits and milliseconds."""
    within = [i for i in range(len(names)) if alone[i] <= cost]
    beyond = sorted((i for i in range(len(names)) if alone[i] > cost), key=lambda i: alone[i])

    def told(i: int) -> str:
        return f"{names[i]} {bits[i]:.4f} ({alone[i]:.1f} ms)"

    return (told(min(within, key=lambda i: bits[i])) if within else "none"), (told(beyond[0]) if beyond else "none")


def compared(
    ensemble: Ensemble, positions: Positions, times: Sequence[float], prompt: int, trusts: tuple[float, ...]
) -> dict[str, Any]:
    """Gains of all kinds of averages, and of ``meet`` over tokens, of some members over the best, in bits a byte."""
    trusts = () if ensemble.model.over_bytes else trusts
    options = Options(
        folds=5, meets=False, adaptive=True, trusts=trusts, fit_positions=sample_size(ensemble)
    )  # fmt: skip
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


def plotted(rows: Sequence[dict[str, Any]], path: Path) -> None:
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


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Hub ids, folders or GGUF files.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns; each is judged by itself.")],
    vocabulary: Annotated[str, typer.Option(help="bytes, tokens, or auto.")] = "auto",
    largest: Annotated[int, typer.Option(help="The most members that are combined.")] = 3,
    each: Annotated[int | None, typer.Option(help="The most predictions in a document.")] = None,
    prompt: Annotated[int, typer.Option(help="Predictions at a document's start that weights come from.")] = 100,
    trust: Annotated[list[float] | None, typer.Option(help="Over tokens: a trust at which meet is tried.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin documents with the token for their beginning.")] = False,
    kept: Annotated[Path | None, typer.Option(help="A folder for what members made of the texts.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG of gain against gap.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON of all figures.")] = None,
) -> None:
    """Print a table for each text."""
    ensemble = Ensemble.from_pretrained(members, POOLS[0], vocabulary=vocabulary)
    names, every = [short(by_variable(name)) for name in ensemble.names], list[dict[str, Any]]()
    for pattern in text:
        documents = read_documents([pattern])
        positions = observed(ensemble, documents, pattern, each, kept, bos=bos)
        alone, within = costs(ensemble, max((own.text for own in documents), key=len))
        rows, bits = list[dict[str, Any]](), dict[str, float]()
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
                    rows.append(
                        {
                            "text": pattern, "members": " + ".join(names[i] for i in some), "kind": kind,
                            "gap": sorted(strength)[1] - min(strength),
                            "best member": short(by_variable(found["best"])),
                            "best bits": found["bits"], "bits": judged.bits(found["losses"][kind]), **_told(gain),
                            "ms a byte": cost, "verdict": found["verdict"], "some": some,
                            "values": found["values"].get(kind.removeprefix("fitted ")),
                        }
                    )  # fmt: skip
        for row in rows:
            by = [bits[name] for name in names]
            row["control"], row["next larger"] = control(by, alone, row["ms a byte"], names)
        every += rows
        _print(pattern, rows, names, bits, alone, within)
    if plot is not None:
        plotted(every, plot)
    if out is not None:
        keep(out, "gains in bits a byte over the best member", by_kind(every), combinations=every)


def observed(
    ensemble: Ensemble, documents: list[Document], pattern: str, each: int | None, kept: Path | None, *, bos: bool
) -> Positions:
    """The positions of a text; what was read before is kept under a name made of members and pattern."""
    known = (pattern, ensemble.names, ensemble.model.config.prune) + (("bos",) if bos else ())
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
    cache = PieceCache(kept and kept / key, {"texts": [document.name for document in documents]})
    return observe_text(ensemble, documents, max_per_document=each, bos=bos, engine=LocalEngine(2), cache=cache)


def by_kind(every: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for some members on a text, with the gain of each kind of average, and half its interval."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in every:
        first = {name: row[name] for name in ("text", "members", "gap", "best member", "best bits", "verdict")}
        low, high = row["interval"]
        own = rows.setdefault((row["text"], row["members"]), first)
        own |= {row["kind"]: row["gain"], f"± {row['kind']}": (high - low) / 2}
    return list(rows.values())


def _told(gain: Difference) -> dict[str, Any]:
    return {"gain": gain.mean, "interval": [gain.low, gain.high]}


def _print(
    pattern: str, rows: list[dict[str, Any]], names: list[str], bits: dict[str, float], alone: Sequence[float],
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


if __name__ == "__main__":
    typer.run(main)
