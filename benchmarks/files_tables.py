"""Tables of what benchmarks/files.py measure has kept: bits a byte, unrelated files, lines written right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import binomtest

from files import TEMPERATURES
from report import JsonPath, commands, show
from softmeet.evaluation.own_files import HEADER

app = commands(__doc__)
PLAIN = TEMPERATURES.index(1.0)
# How often files are drawn anew for an interval, and its share.
DRAWS, SHARE = 2000, 0.95
# Projects of fewer megabytes are small: they are shown, and are in no mean.
SMALL = 1.0

Kept = Annotated[Path, typer.Argument(help="The folder where what was measured is kept.")]


class Told:
    """What was kept of one held-out file.

    Args:
        path: where that is.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as kept:
            self._kept = dict(kept)
        self.name, self.unrelated = path.name, _short(str(self._kept["unrelated"]))
        self.project = _short(str(self._kept["project"]))
        self.megabytes, self.fresh = float(self._kept["MB"]), bool(self._kept["fresh"])

    def has(self, where: str) -> bool:
        """Return whether something was measured behind a prompt."""
        return f"{where}/nats" in self._kept

    def nats(self, where: str, memory: str | None = None, temperature: int = PLAIN) -> np.ndarray:
        """Return the log-probability of each symbol, beside what some memory says of it."""
        ours: np.ndarray = self._kept[f"{where}/nats"][temperature]
        if memory is None:
            return ours
        share, own = self._kept[f"{where}/{memory} c"], self._kept[f"{where}/{memory} q"]
        return np.asarray(np.logaddexp(np.log1p(-share) + ours, np.log(np.maximum(share * own, 1e-300))))

    def sums(self, nats: np.ndarray, behind: int) -> tuple[float, int]:
        """Return the bits and the bytes of the symbols that begin behind so many bytes."""
        ends = self._kept["ends"]
        some = ends[:-1] >= behind
        return float(-nats[some].sum() / np.log(2)), int(np.diff(ends)[some].sum())

    def right(self, where: str, *, files: bool) -> np.ndarray:
        """Return which lines are written right."""
        return np.asarray(self._kept[f"{where}/right{' with files' * files}"], dtype=bool)

    @cached_property
    def verbatim(self) -> np.ndarray:
        """Which lines stand in the memory."""
        return np.asarray(self._kept["verbatim"], dtype=bool)


def _short(project: str) -> str:
    """Return a project's name without the owner of its repository."""
    return project.rpartition("+")[2]


def groups(kept: Path) -> dict[tuple[str, str, str], list[Told]]:
    """Return all files by model, by how they were held out, and by project."""
    found = dict[tuple[str, str, str], list[Told]]()
    for path in sorted(kept.glob("*/*/*/*.npz")):
        if not path.name.endswith(".part.npz"):
            who, by = path.parts[-4:-2]
            told = Told(path)
            found.setdefault((who.upper(), by, told.project), []).append(told)
    return found


Sums = Sequence[tuple[float, int]]


def of_all(sums: Sums) -> float:
    """Return the bits a byte of files."""
    return sum(bits for bits, _ in sums) / sum(size for _, size in sums)


def interval(files: int, value: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """Return the interval of a value of files that are drawn anew."""
    random = np.random.default_rng(1)
    found = [value(random.integers(files, size=files)) for _ in range(DRAWS)]
    low, high = np.quantile(found, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def change(one: Sums, other: Sums) -> tuple[float, float, float]:
    """Return by what share bits a byte change, with an interval over files."""

    def of(some: np.ndarray) -> float:
        return of_all([other[k] for k in some]) / of_all([one[k] for k in some]) - 1

    return of(np.arange(len(one))), *interval(len(one), of)


WAYS = {"whole": (0, False), "behind 600 bytes": (HEADER, False), "behind 600 bytes, no near copies": (HEADER, True)}


@app.command()
def bits(kept: Kept, json: JsonPath = None) -> None:
    """Print the bits a byte of held-out files, alone, with files and by each control, in three ways of counting."""
    rows, every = list[dict[str, Any]](), groups(kept)
    for (who, by, project), files in every.items():
        for way, (behind, fresh) in WAYS.items():
            some = [one for one in files if one.fresh or not fresh]
            if some:
                about = {"model": who, "held out by": by, "project": project, "MB": round(some[0].megabytes, 2)}
                rows.append({**about, "way": way, "files": len(some), **_row(some, behind)})
    for who, by in {(who, by): None for who, by, _ in every}:
        for way in WAYS:
            those = [
                row for row in rows if (row["model"], row["held out by"], row["way"]) == (who, by, way)
                and row["MB"] >= SMALL
            ]  # fmt: skip
            if those:
                mean = sum(row["change"] for row in those) / len(those)
                rows.append(
                    {"model": who, "held out by": by, "project": "mean", "way": way, "change": mean, "saved": -mean}
                )
    show("Bits a byte of held-out files", rows, json)


def _row(files: Sequence[Told], behind: int) -> dict[str, Any]:
    """Return a row's figures; those of prompts behind the header alone, which chose what was retrieved."""

    def sums(where: str, memory: str | None = None, temperature: int = PLAIN) -> list[tuple[float, int]]:
        return [one.sums(one.nats(where, memory, temperature), behind) for one in files]

    ours, theirs = sums("alone"), sums("alone", "files")
    share, low, high = change(ours, theirs)
    best = min(range(len(TEMPERATURES)), key=lambda t: of_all(sums("alone", None, t)))
    row = {
        "alone": of_all(ours), "with files": of_all(theirs), "change": share, "saved": -share, "low": low, "high": high,
        "temperature": TEMPERATURES[best], "alone at it": of_all(sums("alone", None, best)),
        "with files at it": of_all(sums("alone", "files", best)), "own beginning": of_all(sums("alone", "own")),
    }  # fmt: skip
    if not (behind and files[0].has("retrieved")):
        return row
    prompt, both = sums("retrieved"), sums("retrieved", "files")
    better = min(theirs, prompt, key=of_all)
    more, least, most = change(better, both)
    return {
        **row, "named": of_all(sums("named")), "retrieval": of_all(prompt), "both": of_all(both),
        "both over the better": more, "both low": least, "both high": most,
    }  # fmt: skip


@app.command()
def sizes(kept: Kept, small: str, large: str, json: JsonPath = None) -> None:
    """Print the bits a byte that two models need of the same files, alone and with the project's other files."""
    rows, every = list[dict[str, Any]](), groups(kept)
    for (who, by, project), files in every.items():
        both = {one.name for one in files} & {one.name for one in every.get((large, by, project), ())}
        if who == small and by == "file" and both:
            for way, behind in (("whole", 0), ("behind 600 bytes", HEADER)):
                row: dict[str, Any] = {"project": project, "way": way, "files": len(both)}
                for name, told in ((small, files), (large, every[large, by, project])):
                    some = [one for one in told if one.name in both]
                    for what, memory in (("alone", None), ("with files", "files")):
                        row[f"{name} {what}"] = of_all([one.sums(one.nats("alone", memory), behind) for one in some])
                rows.append(row)
    show("Files beside a model, and a larger model", rows, json)


@app.command()
def unrelated(kept: Kept, json: JsonPath = None) -> None:
    """Print the bits a byte of held-out files beside files that have nothing to do with them."""
    rows = list[dict[str, Any]]()
    for (who, by, project), files in groups(kept).items():
        if by == "file" and files[0].unrelated:
            alone, beside = (of_all([one.sums(one.nats("alone", m), 0) for one in files]) for m in (None, "unrelated"))
            about = {"model": who, "project": project, "unrelated": files[0].unrelated, "files": len(files)}
            rows.append({**about, "alone": alone, "beside": beside, "bits more": beside - alone})
    show("Beside unrelated files", rows, json)


@app.command()
def lines(kept: Kept, json: JsonPath = None) -> None:
    """Print how many lines behind the header are written right, with McNemar's exact test."""
    rows = list[dict[str, Any]]()
    every = [(who, project, files) for (who, by, project), files in groups(kept).items() if by == "file"]
    every = [one for one in every if one[2][0].has("retrieved")]
    for who, project, files in every:
        rows.append({"model": who, "project": project, "files": "all", **_lines(files)})
        if fresh := [one for one in files if one.fresh]:
            rows.append({"model": who, "project": project, "files": "no near copies", **_lines(fresh)})
    for who in dict.fromkeys(who for who, _, _ in every):
        files = [one for name, _, some in every if name == who for one in some]
        rows.append({"model": who, "project": "all", "files": "all", **_lines(files)})
        rows.append(
            {"model": who, "project": "all", "files": "no near copies", **_lines([f for f in files if f.fresh])}
        )
    show("Lines written right", rows, json)


def _lines(files: Sequence[Told]) -> dict[str, Any]:
    def right(where: str, *, files_too: bool) -> np.ndarray:
        return np.concatenate([one.right(where, files=files_too) for one in files])

    ways = {
        "alone": right("alone", files_too=False), "with files": right("alone", files_too=True),
        "retrieval": right("retrieved", files_too=False), "both": right("retrieved", files_too=True),
    }  # fmt: skip
    row: dict[str, Any] = {"lines": len(ways["alone"])}
    row["stand in the files"] = int(np.concatenate([one.verbatim for one in files]).sum())
    row |= {name: int(found.sum()) for name, found in ways.items()}
    pairs = {"alone to files": ("alone", "with files"), "retrieval to files": ("retrieval", "with files"),
             "retrieval to both": ("retrieval", "both")}  # fmt: skip
    for pair, (one, other) in pairs.items():
        lost, won = int((ways[one] & ~ways[other]).sum()), int((~ways[one] & ways[other]).sum())
        p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
        row |= {f"{pair}, lost": lost, f"{pair}, won": won, f"{pair}, p": p}
    return row


if __name__ == "__main__":
    app()
