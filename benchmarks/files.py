"""What the user's own files are worth beside a model: python benchmarks/files.py bits MODEL PROJECT…

Each PROJECT is a folder. Some of its files are held out, and the others stand beside the model as files. ``weights``
fits the table of weights of :mod:`softmeet.readers.files.claim` on projects, and prints it; a project of which it is to
be judged must not be among them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from report import show
from softmeet import Ensemble
from softmeet.hf.claiming import symbols_of
from softmeet.readers.files.claim import BYTES as BYTE_SCHEME
from softmeet.readers.files.claim import TOKENS, Scheme
from softmeet.readers.files.corpus import Corpus, find_texts
from softmeet.readers.files.index import Index
from softmeet.readers.files.matches import match
from softmeet.readers.files.reader import FilesReader
from softmeet.readers.reader import Read, finished

app = typer.Typer(add_completion=False)
# Of each held-out file so many bytes from the beginning are read, and files with fewer are not held out.
BYTES, LEAST = 1800, 900
# Behind so many bytes a file's header is past.
HEADER = 600
# A file is a near copy if more than the share of its windows of so many bytes stands in the other files.
WINDOW, SHARE = 100, 0.2
# The temperatures of which a model's best one is taken, in hindsight.
TEMPERATURES = [0.8 + 0.05 * k for k in range(17)]


@dataclass(frozen=True)
class Project:
    """A folder's files, of which some are held out.

    Attributes:
        name: the folder's.
        held: the files that are predicted.
        kept: those that stand beside the model.
    """

    name: str
    held: tuple[Path, ...]
    kept: Corpus

    @classmethod
    def of(cls, folder: str, count: int, include: str | None, by: str) -> Project:
        """Hold out files that are drawn at random, by a fixed seed, or all files of folders that are."""
        texts = find_texts([folder], include)
        long = [path for path in texts.files if path.stat().st_size >= LEAST]
        chosen = random.Random(1)  # noqa: S311 - which files are held out is no secret
        if by == "folder":
            parents = sorted({path.parent for path in long})
            chosen.shuffle(parents)
            held = list[Path]()
            for parent in parents:
                held += [path for path in long if path.parent == parent] if len(held) < count else []
            held, gone = held[:count], {path.parent for path in held}
            kept = tuple(path for path in texts.files if path.parent not in gone)
        else:
            held = chosen.sample(long, min(count, len(long) // 4))
            kept = tuple(path for path in texts.files if path not in held)
        return cls("/".join(Path(folder).parts[-2:]), tuple(sorted(held)), replace(texts, files=kept))

    @cached_property
    def _windows(self) -> set[bytes]:
        every = (path.read_bytes() for path in self.kept.files)
        return {text[k : k + WINDOW] for text in every for k in range(len(text) - WINDOW + 1)}

    def is_near_copy(self, path: Path) -> bool:
        """Return whether more than a fifth of a file's windows stand in the others."""
        text = path.read_bytes()
        windows = [text[k : k + WINDOW] for k in range(max(1, len(text) - WINDOW + 1))]
        return sum(window in self._windows for window in windows) > SHARE * len(windows)


@dataclass(frozen=True, eq=False)
class Alone:
    """What a model says of a held-out file's beginning.

    Attributes:
        symbols: the text.
        ends: where each symbol but the first ends, in bytes.
        nats: by temperature, of each symbol but the first (over bytes of each), its log-probability.
    """

    symbols: list[int]
    ends: np.ndarray
    nats: dict[float, np.ndarray]


@torch.inference_mode()
def alone(ensemble: Ensemble, path: Path) -> Alone:
    """Read a file's beginning by the members alone."""
    model: Any = ensemble.model
    text = path.read_bytes()[:BYTES].decode(errors="ignore")
    alphabet = symbols_of(model)
    symbols = alphabet.encode(text)
    begun = [256, *symbols] if model.over_bytes else symbols
    hidden = [states[:-1] for states in model.hidden_states(torch.tensor([begun]))]
    wanted = torch.tensor(begun[1:])
    found = {t: list[torch.Tensor]() for t in TEMPERATURES}
    for _, solution in model.combiner.solve_in_chunks(hidden, model.settings.ungated()):
        some, wanted = wanted[: len(solution.log_probs)], wanted[len(solution.log_probs) :]
        for t, parts in found.items():
            parts.append((solution.log_probs / t).log_softmax(-1).gather(-1, some[:, None]).squeeze(-1).double())
    sizes = [len(alphabet.decode([symbol])) for symbol in symbols]
    return Alone(
        symbols, np.cumsum(sizes)[len(begun) == len(symbols) :], {t: torch.cat(p).numpy() for t, p in found.items()}
    )


def index_of(ensemble: Ensemble, texts: Corpus) -> Index:
    """Return the index of files, in memory."""
    alphabet = symbols_of(ensemble.model)
    return Index.of(texts, alphabet.encode_all, alphabet.size, alphabet.identity, None)


def with_files(reader: FilesReader, told: Alone, temperature: float = 1.0) -> np.ndarray:
    """Return the log-probability of each symbol with files beside the model."""
    start, symbols = len(told.symbols) - len(told.ends), told.symbols
    row, found = reader.open(symbols), list[float]()
    for begin in range(0, len(symbols), 64):
        piece = symbols[begin : begin + 64]
        behind = finished(reader.read([Read(row, piece, range(len(piece)))]))
        assert behind.claims is not None
        for k, share in enumerate(behind.claims.tolist()):
            if (place := begin + k) >= start:
                ours = math.exp(told.nats[temperature][place - start])
                own = math.exp(behind.log_probs()[k, symbols[place]].item())
                found.append(math.log((1 - share) * ours + share * own))
    reader.close(row)
    return np.array(found)


def bits(parts: Sequence[tuple[np.ndarray, np.ndarray]], behind: int = 0) -> float:
    """Return the bits a byte of log-probabilities, with where their symbols end; ``behind`` so many bytes of each."""
    nats = sum(own[ends > behind].sum() for own, ends in parts)
    size = sum(ends[-1] - max(behind, ends[0] - 1) if behind else ends[-1] for _, ends in parts)
    return float(-nats / math.log(2) / size)


Parts = dict[Path, tuple[np.ndarray, np.ndarray]]


def _both(how: str, alone: Parts, beside: Parts, behind: int = 0) -> dict[str, float]:
    """Return the bits without and with files, in one way of counting."""
    named = {f"alone{how}": alone, f"with files{how}": beside}
    return {name: bits(list(parts.values()), behind) for name, parts in named.items() if parts}


Models = Annotated[str, typer.Argument(help="A model; several with commas between are an average.")]
Projects = Annotated[list[str], typer.Argument(metavar="PROJECT…", help="Folders.")]
Held = Annotated[int, typer.Option(help="The most files of a project that are held out.")]
Include = Annotated[str | None, typer.Option(help="A glob of files.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the rows with the command and the machine.")]


@app.command("bits")
def bits_of(
    models: Models,
    projects: Projects,
    unrelated: Annotated[
        list[str] | None, typer.Option(help="A project whose files have nothing to do with these.")
    ] = None,
    held: Held = 12,
    include: Include = None,
    by: Annotated[str, typer.Option(help="What is held out at random: file or folder.")] = "file",
    json: JsonPath = None,
) -> None:
    """Print the bits a byte of held-out files, alone and with the project's other files."""
    ensemble = Ensemble.from_pretrained(models.split(","), "logit-mean")
    alphabet, rows = ensemble.model.readers_of_members[0].alphabet, []
    strangers = [
        ("/".join(Path(folder).parts[-2:]), index_of(ensemble, find_texts([folder], include)))
        for folder in unrelated or ()
    ]
    for project in (Project.of(folder, held, include, by) for folder in projects):
        told = {path: alone(ensemble, path) for path in project.held}
        best = min(TEMPERATURES, key=lambda t: bits([(one.nats[t], one.ends) for one in told.values()]))
        fresh = [path for path in project.held if not project.is_near_copy(path)]
        plain = {path: (one.nats[1.0], one.ends) for path, one in told.items()}
        for name, index in [(project.name, index_of(ensemble, project.kept)), *strangers]:
            reader = FilesReader(name, alphabet, index)
            parts = {path: (with_files(reader, one), one.ends) for path, one in told.items()}
            row: dict[str, Any] = {
                "text": project.name,
                "files": name,
                "MB": round(sum(one.size for one in index.entries) / 1e6, 2),
            }
            row |= {
                "held out": len(told),
                **_both("", plain, parts),
                **_both(", behind 600 bytes", plain, parts, HEADER),
            }
            row |= {
                "fresh": len(fresh),
                **_both(", fresh", {path: plain[path] for path in fresh}, {path: parts[path] for path in fresh}),
            }
            heated = {path: (with_files(reader, one, best), one.ends) for path, one in told.items()}
            cool = {path: (one.nats[best], one.ends) for path, one in told.items()}
            rows.append(row | {"temperature": best, **_both(", at it", cool, heated)})
            print(rows[-1], flush=True)
    show("Bits a byte of held-out files", rows, json)


def cells(index: Index, told: Alone, scheme: Scheme, size: int) -> Iterator[tuple[int, int, float]]:
    """Yield for each symbol the row and column of the table of weights that it falls in, and the files' probability."""
    start = len(told.symbols) - len(told.ends)
    for place in range(start, len(told.symbols)):
        found = match(index, told.symbols[max(0, place - scheme.orders[-1]) : place], scheme.orders, size)
        probs = found.probs()
        yield *scheme.cell(found, float(probs.max())), float(probs[told.symbols[place]])


@app.command()
def weights(models: Models, projects: Projects, held: Held = 12, include: Include = None) -> None:
    """Print the table of weights that fits held-out files best, by expectation maximisation."""
    ensemble = Ensemble.from_pretrained(models.split(","), "logit-mean")
    size = ensemble.model.readers_of_members[0].alphabet.size
    scheme = BYTE_SCHEME if ensemble.model.over_bytes else TOKENS
    seen = list[tuple[int, int, float, float]]()
    for project in (Project.of(folder, held, include, "file") for folder in projects):
        index = index_of(ensemble, project.kept)
        for one in (alone(ensemble, path) for path in project.held):
            told = zip(cells(index, one, scheme, size), one.nats[1.0], strict=True)
            seen += [(*own, math.exp(nats)) for own, nats in told if own[0] >= 0]
        print(project.name, len(seen), flush=True)
    rows, columns, files, rule = map(np.array, zip(*seen, strict=True))
    shape = scheme.weights.shape
    where, found = np.ravel_multi_index((rows, columns), shape), np.full(math.prod(shape), 0.5)
    for _ in range(60):
        share = found[where] * files / (found[where] * files + (1 - found[where]) * rule)
        found = (np.bincount(where, share, len(found)) + 1.5) / (np.bincount(where, minlength=len(found)) + 3)
    for row in found.reshape(shape):
        print("    [" + ", ".join(f"{weight:.2f}" for weight in row) + "],")


if __name__ == "__main__":
    app()
