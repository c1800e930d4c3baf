"""What the user's own files are worth beside a model, and what the controls are: python benchmarks/files.py --help.

Each PROJECT is a folder. Some of its files are held out, and the others stand beside the model as files. ``measure``
reads the held-out files and keeps, of each, what a model, the files and the controls say of every symbol, so that it
goes on where it was stopped; ``python benchmarks/files_tables.py`` makes tables of it. ``weights`` fits the weights of
:mod:`softmeet.readers.files.claim` on projects; one of which they are to be judged must not be among them.

The controls: the model at the temperature that suits it best, told the file's name, beside an n-gram of the file's own
beginning, and with three chunks of the other files in its prompt, which BM25 finds by the path and the first 600 bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer

from held_files import BYTES, Project
from softmeet import Ensemble
from softmeet.evaluation.own_files import HEADER
from softmeet.hf.claiming import symbols_of
from softmeet.readers.files.claim import BYTES as BYTE_SCHEME
from softmeet.readers.files.claim import TOKENS, Relevance, claim
from softmeet.readers.files.corpus import Corpus, find_texts
from softmeet.readers.files.index import Index, in_order
from softmeet.readers.files.matches import Sorted, match
from softmeet.readers.reader import Read, Reader, Row, finished

app = typer.Typer(add_completion=False)
# The temperatures of which a model's best one is taken, in hindsight.
TEMPERATURES = [1.0, 1.1, 1.2, 1.3]
# So many symbols are read in a call.
PIECE = 128


@dataclass(frozen=True)
class Line:
    """A line of a held-out file that is to be written behind all that stands before it.

    Attributes:
        start: the number of the symbol that it begins with.
        text: the line, without its end.
    """

    start: int
    text: bytes


class Model:
    """Members that answer as one, by the mean of their log-probabilities."""

    def __init__(self, names: str) -> None:
        members = names.split(",")
        ensemble = Ensemble.from_pretrained(members, "logit-mean", weights=[1] * len(members))
        self.readers: list[Reader] = ensemble.model.readers_of_members
        self.alphabet = symbols_of(ensemble.model)
        self.scheme = BYTE_SCHEME if ensemble.model.over_bytes else TOKENS

    def index_of(self, texts: Corpus) -> Index:
        """Return the index of files, in memory."""
        return Index.of(texts, self.alphabet.encode_all, self.alphabet.size, self.alphabet.identity, None)

    def text_of(self, path: Path) -> list[int]:
        """Return the symbols of a file's beginning."""
        return self.alphabet.encode(path.read_bytes()[:BYTES].decode(errors="ignore"))

    def read(self, rows: Sequence[Row], symbols: Sequence[int], at: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities behind some of the symbols that are read next, (k, v)."""
        pairs = zip(self.readers, rows, strict=True)
        told = [finished(reader.read([Read(row, symbols, at)])).log_probs().float() for reader, row in pairs]
        return told[0] if len(told) == 1 else torch.stack(told).mean(0).log_softmax(-1)

    def begun(self, prompt: Sequence[int]) -> list[Row]:
        """Return rows in which a prompt has been read."""
        rows = [reader.open(reuse=False) for reader in self.readers]
        for begin in range(0, len(prompt), PIECE):
            self.read(rows, prompt[begin : begin + PIECE], [])
        return rows

    def forked(self, rows: Sequence[Row], length: int) -> list[Row]:
        """Return rows in which the first symbols of others have been read."""
        return [reader.fork(row, 1, length)[0] for reader, row in zip(self.readers, rows, strict=True)]


@dataclass(eq=False)
class Memory:
    """The files as a member that goes along a text.

    Attributes:
        model: what they stand beside.
        index: the files; None for the text's own beginning.
        text: the symbols of a prompt, and of the held-out file.
        before: how many are the prompt's.
        relevance: what the text has shown.
    """

    model: Model
    index: Sorted | None
    text: Sequence[int]
    before: int
    relevance: Relevance = field(init=False)
    _last: int = -1
    _told: tuple[np.ndarray, float] = (np.zeros(0), 0.0)

    def __post_init__(self) -> None:
        self.relevance = Relevance(self.model.scheme)
        for place in range(max(0, self.before - self.model.scheme.window), self.before + 1):
            self.see(place)

    def told(self, place: int, text: Sequence[int] | None = None) -> tuple[np.ndarray, float]:
        """Return what follows the first symbols of the text, or of another, (v,), and the weight before relevance."""
        if place == self._last and text is None:
            return self._told
        scheme, size = self.model.scheme, self.model.alphabet.size
        last = (self.text if text is None else text)[max(0, place - scheme.orders[-1]) : place]
        mask = self.model.alphabet.may_follow(last)
        index = self._beginning(place) if self.index is None else self.index
        found = match(index, last, scheme.orders, size)
        probs = found.probs(None if mask is None else mask.numpy())
        told = probs, scheme.weight(found, float(probs.max())) if found.order else 0.0
        if text is None:
            self._last, self._told = place, told
        return told

    def share_behind(self, place: int) -> float:
        """Return what is claimed behind the first symbols of the text, all of which were given and seen."""
        return claim(self.told(place)[1], self.relevance.behind(place))

    def see(self, place: int) -> float:
        """Take note of the symbol that stands at a place, and return its probability."""
        probs, weight = self.told(place)
        prob = float(probs[self.text[place]])
        self.relevance.see(place, prob, weight)
        return prob

    def most_likely(self, log_probs: torch.Tensor, place: int, given: int, text: Sequence[int] | None = None) -> int:
        """Return the most probable symbol of the mixture at a place, of which the first ``given`` symbols were given.

        Args:
            log_probs: what the model says, (v,).
            place, text: as of :meth:`told`.
            given: how many of the symbols were.
        """
        own, weight = self.told(place, text)
        share = claim(weight, self.relevance.behind(given))
        return int(log_probs.exp().mul_(1 - share).add_(torch.from_numpy(own).float(), alpha=share).argmax())

    def _beginning(self, place: int) -> Sorted:
        symbols = np.array([*self.text[:place], self.model.alphabet.size], dtype=np.int32)
        return SimpleNamespace(symbols=symbols, order=in_order(symbols))


def lines_of(model: Model, symbols: Sequence[int], ends: np.ndarray) -> list[Line]:
    """Return the lines behind a file's header that begin where a symbol does and have a letter or a digit."""
    text, starts = model.alphabet.decode(symbols), {0: 0} | {int(end): k + 1 for k, end in enumerate(ends)}
    found, offset = list[Line](), 0
    for line in text.splitlines(keepends=True):
        if offset >= HEADER and line.endswith(b"\n") and offset in starts and any(chr(c).isalnum() for c in line):
            found.append(Line(starts[offset], line.rstrip(b"\r\n")))
        offset += len(line)
    return found


def measure_behind(
    model: Model,
    prompt: Sequence[int],
    symbols: Sequence[int],
    lines: Sequence[Line],
    indexes: Mapping[str, Sorted | None],
) -> dict[str, Any]:
    """Return what is said of each symbol but the first behind a prompt, and which lines are written right.

    Returns:
        ``nats``, by temperature the log-probability of each symbol, (4, n - 1), behind a prompt at 1 alone. For each
        name of an index, ``NAME q`` and ``NAME c``, the files' probability and their claim, (n - 1,). ``right``, for
        each line, and ``right with files``.
    """
    text, before = [*prompt, *symbols], len(prompt)
    rows = model.begun(prompt)
    memories = {name: Memory(model, index, text, before) for name, index in indexes.items()}
    lines = [replace(line, start=line.start + before) for line in lines]
    nats, said = list[torch.Tensor](), {f"{name} {what}": list[float]() for name in indexes for what in "qc"}
    plain, mixed, files = dict[int, int](), dict[int, int](), memories.get("files")
    for begin in range(before, len(text) - 1, PIECE):
        piece = text[begin : min(len(text) - 1, begin + PIECE)]
        log_probs = model.read(rows, piece, range(1, len(piece) + 1))
        ours = torch.tensor(text[begin + 1 : begin + 1 + len(piece)])[:, None]
        temperatures = [] if prompt else TEMPERATURES[1:]
        nats.append(torch.cat([log_probs.gather(-1, ours), *heated(log_probs, ours, temperatures)], 1).T)
        for place, told in enumerate(log_probs, begin + 1):
            for name, memory in memories.items():
                share = memory.share_behind(place)
                said[f"{name} q"].append(memory.see(place))
                said[f"{name} c"].append(share)
            if files and lines and place >= lines[0].start:
                start = max(line.start for line in lines if line.start <= place)
                plain[place], mixed[place] = int(told.argmax()), files.most_likely(told, place, start)
    found: dict[str, Any] = {"nats": torch.cat(nats, 1).double().numpy(), **{k: np.array(v) for k, v in said.items()}}
    found["right"] = [is_right(model, rows, text, line, plain, None) for line in lines]
    found["right with files"] = [is_right(model, rows, text, line, mixed, files) for line in lines]
    for reader, row in zip(model.readers, rows, strict=True):
        reader.close(row)
    return found


def heated(log_probs: torch.Tensor, ours: torch.Tensor, temperatures: Sequence[float]) -> list[torch.Tensor]:
    """Return the log-probabilities of some symbols at further temperatures."""
    return [log_probs.gather(-1, ours) / t - (log_probs / t).logsumexp(-1, keepdim=True) for t in temperatures]


def is_right(
    model: Model, rows: Sequence[Row], text: Sequence[int], line: Line, tops: dict[int, int], files: Memory | None
) -> bool:
    """Return whether a line is what is written greedily behind what stands before it.

    Where the text itself is the most likely, nothing has to be written for it; where it is not, but the symbol could
    begin the line all the same, the rest is written.
    """
    left, place = line.text + b"\n", line.start
    while True:
        told = model.alphabet.decode([tops[place]])
        if (ended := ends(told, left)) is not None:
            return ended
        if tops[place] != text[place]:
            break
        left, place = left[len(told) :], place + 1
    written, top, forks = list(text[:place]), tops[place], model.forked(rows, place)
    while (ended := ends(told := model.alphabet.decode([top]), left)) is None:
        left, written = left[len(told) :], [*written, top]
        log_probs = model.read(forks, [top], [1])[0]
        top = files.most_likely(log_probs, len(written), line.start, written) if files else int(log_probs.argmax())
    for reader, row in zip(model.readers, forks, strict=True):
        reader.close(row)
    return ended


def ends(told: bytes, left: bytes) -> bool | None:
    """Return whether a symbol ends a line as it should, whatever stands behind it; None if it goes on as it should."""
    return None if told and left.startswith(told) and told != left else bool(told) and told.startswith(left)


def measure_one(
    model: Model, project: Project, path: Path, index: Index, stranger: Index | None, *, controls: bool
) -> dict[str, Any]:
    """Return all that is kept of one held-out file."""
    symbols = model.text_of(path)
    ends = np.cumsum([len(model.alphabet.decode([symbol])) for symbol in symbols])
    lines = lines_of(model, symbols, ends)
    others = {"files": index, "own": None} | ({"unrelated": stranger} if stranger else {})
    found = {"alone": measure_behind(model, [], symbols, lines, others)}
    if controls:
        encode = model.alphabet.encode
        chunks = project.retrieved(path, path.read_bytes()[:HEADER].decode(errors="ignore"))
        found["named"] = measure_behind(model, encode(project.named(path)), symbols, [], {})
        prompt = encode(chunks + project.named(path))
        found["retrieved"] = measure_behind(model, prompt, symbols, lines, {"files": index})
    flat = {f"{where}/{what}": value for where, told in found.items() for what, value in told.items()}
    verbatim = [project.has_line(line.text.decode(errors="ignore")) for line in lines]
    return flat | {"ends": ends, "fresh": not project.is_near_copy(path), "verbatim": verbatim}


Models = Annotated[str, typer.Argument(help="A model; several with commas between are an average.")]
Projects = Annotated[list[str], typer.Argument(metavar="PROJECT…", help="Folders.")]
Kept = Annotated[Path, typer.Option(help="The folder where what was measured is kept.")]
Held = Annotated[int, typer.Option(help="The most files of a project that are held out.")]
Include = Annotated[str | None, typer.Option(help="A glob of files.")]


@app.command()
def measure(
    models: Models,
    projects: Projects,
    kept: Kept,
    unrelated: Annotated[
        list[str] | None, typer.Option(help="For each project, one whose files have nothing to do with it.")
    ] = None,
    held: Held = 12,
    first: Annotated[int | None, typer.Option(help="Read so many of the held-out files alone.")] = None,
    include: Include = None,
    by: Annotated[str, typer.Option(help="What is held out at random: file or folder.")] = "file",
    *,
    controls: Annotated[bool, typer.Option(help="Measure what the file's name and retrieval are worth.")] = True,
) -> None:
    """Read held-out files, and keep what is said of each; go on where this was stopped."""
    model: Model | None = None
    who = "+".join(Path(one).stem for one in models.split(","))
    for number, folder in enumerate(projects):
        project, indexes = Project.of(folder, held, include, by), list[Index | None]()
        for k, path in enumerate(project.held[:first]):
            told = hashlib.sha256(str(path.relative_to(project.folder)).encode()).hexdigest()[:12]
            file = kept / who / by / project.name.replace("/", "-") / f"{told}.npz"
            if file.exists():
                continue
            model = model or Model(models)
            if not indexes:
                indexes = [model.index_of(project.kept)]
                indexes += [model.index_of(find_texts([unrelated[number]])) if unrelated else None]
            ours, others = indexes
            assert ours is not None
            with torch.inference_mode():
                found = measure_one(model, project, path, ours, others, controls=controls)
            size = sum(entry.size for entry in ours.entries) / 1e6
            file.parent.mkdir(parents=True, exist_ok=True)
            made = file.with_suffix(".part.npz")
            beside = Project.of(unrelated[number], 0, include, by).name if unrelated else ""
            np.savez_compressed(made, **found, project=project.name, MB=size, unrelated=beside)
            made.replace(file)
            print(f"{who} {project.name} by {by}: {k + 1} of {len(project.held[:first])}", flush=True)


@app.command()
def weights(models: Models, projects: Projects, held: Held = 12, include: Include = None) -> None:
    """Print the table of weights that fits held-out files best, by expectation maximisation."""
    model, seen = Model(models), list[tuple[int, int, float, float]]()
    for project in (Project.of(folder, held, include, "file") for folder in projects):
        index = model.index_of(project.kept)
        for path in project.held:
            symbols = model.text_of(path)
            nats = measure_behind(model, [], symbols, [], {})["nats"][0]
            seen += cells(model, index, symbols, nats)
        print(project.name, len(seen), flush=True)
    rows, columns, files, rule = map(np.array, zip(*seen, strict=True))
    shape = model.scheme.weights.shape
    where, found = np.ravel_multi_index((rows, columns), shape), np.full(math.prod(shape), 0.5)
    for _ in range(60):
        share = found[where] * files / (found[where] * files + (1 - found[where]) * rule)
        found = (np.bincount(where, share, len(found)) + 1.5) / (np.bincount(where, minlength=len(found)) + 3)
    for row in found.reshape(shape):
        print("    [" + ", ".join(f"{weight:.2f}" for weight in row) + "],")


def cells(
    model: Model, index: Index, symbols: Sequence[int], nats: np.ndarray
) -> Iterator[tuple[int, int, float, float]]:
    """Yield, of each symbol behind a match, the table's row and column, and the files' and the model's probability."""
    scheme = model.scheme
    for place in range(1, len(symbols)):
        found = match(index, symbols[max(0, place - scheme.orders[-1]) : place], scheme.orders, model.alphabet.size)
        if found.order:
            probs = found.probs()
            yield *scheme.cell(found, float(probs.max())), float(probs[symbols[place]]), math.exp(nats[place - 1])


if __name__ == "__main__":
    app()
