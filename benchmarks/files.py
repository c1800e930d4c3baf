"""What the user's own files are worth beside a model, what they cost, and what the controls are.

Each PROJECT is a folder. Some of its files are held out, and the others stand beside the model as files. The controls:
the model at the temperature that suits it best, told the file's name, beside an n-gram of the file's own beginning, and
with three chunks of the other files in its prompt, which BM25 finds by the path and the first 600 bytes.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import bm25s
import numpy as np
import torch
import typer

from report import JsonPath, commands, median, named, show
from softmeet import Ensemble, Files
from softmeet.evaluation.own_files import HEADER
from softmeet.hf.claiming import symbols_of
from softmeet.readers.files.claim import BYTES as BYTE_SCHEME
from softmeet.readers.files.claim import TOKENS, Relevance, claim
from softmeet.readers.files.corpus import Corpus, find_texts
from softmeet.readers.files.index import Index, in_order
from softmeet.readers.files.matches import Sorted, match
from softmeet.readers.reader import Read, Reader, Row, finished

app = commands(__doc__)
# The temperatures of which a model's best one is taken, in hindsight.
TEMPERATURES = [1.0, 1.1, 1.2, 1.3]
# So many symbols are read in a call.
PIECE = 128
# Of each held-out file so many bytes from the beginning are read, and files with fewer are not held out.
BYTES, LEAST = 1800, 1200
# A file is a near copy if more than the share of its windows of so many bytes stands in the other files.
WINDOW, SHARE = 100, 0.2
# Chunks have so many lines, and so many of them are retrieved.
LINES, CHUNKS = 25, 3
_WORD = r"[A-Z]?[a-z]{2,}|[A-Z]{2,}|\d+"


@dataclass(frozen=True)
class Project:
    """A folder's files, of which some are held out.

    Attributes:
        name: the folder's, with that of the one above.
        folder: the folder.
        held: the files that are predicted, in the order in which they were drawn.
        kept: those that stand beside the model.
    """

    name: str
    folder: Path
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
            gone = set[Path]()
            while parents and sum(path.parent in gone for path in long) < count:
                gone.add(parents.pop())
            held = [path for path in long if path.parent in gone]
            held = chosen.sample(held, min(count, len(held)))
            kept = tuple(path for path in texts.files if path.parent not in gone)
        else:
            held = chosen.sample(long, min(count, len(long) // 4))
            kept = tuple(path for path in texts.files if path not in held)
        whole = Path(folder).resolve()
        return cls("/".join(whole.parts[-2:]), whole, tuple(held), replace(texts, files=kept))

    def named(self, path: Path) -> str:
        """Return a line that tells a file's path."""
        return f"# {path.relative_to(self.folder)}\n"

    def is_near_copy(self, path: Path) -> bool:
        """Return whether more than a fifth of a file's windows stand in the others."""
        text = path.read_bytes()
        windows = [hash(text[k : k + WINDOW]) for k in range(max(1, len(text) - WINDOW + 1))]
        return sum(window in self._windows for window in windows) > SHARE * len(windows)

    def has_line(self, line: str) -> bool:
        """Return whether a line stands in one of the other files."""
        return line.strip() in self._lines

    def retrieved(self, path: Path, text: str) -> str:
        """Return the chunks of the other files that BM25 finds for a file, the best one last, under their paths.

        Args:
            path: the file's, whose words count.
            text: its beginning, of which lines count that no tenth of the other files has, such as those of a licence.
        """
        engine, chunks = self._engine
        rare = [line for line in text.splitlines() if 10 * self._lines[line.strip()] < len(self._texts)]
        best, _ = engine.retrieve(_words("\n".join([self.named(path), *rare])), k=CHUNKS, show_progress=False)
        return "\n".join(chunks[k] for k in reversed(best[0].tolist())) + "\n"

    @cached_property
    def _texts(self) -> list[tuple[Path, str]]:
        return [(path, path.read_bytes().decode(errors="ignore")) for path in self.kept.files]

    @cached_property
    def _windows(self) -> set[int]:
        every = (text.encode() for _, text in self._texts)
        return {hash(text[k : k + WINDOW]) for text in every for k in range(len(text) - WINDOW + 1)}

    @cached_property
    def _lines(self) -> Counter[str]:
        return Counter(line for _, text in self._texts for line in {line.strip() for line in text.splitlines()})

    @cached_property
    def _engine(self) -> tuple[bm25s.BM25, list[str]]:
        chunks = [
            self.named(path) + "\n".join(lines[k : k + LINES])
            for path, text in self._texts
            for lines in [text.splitlines()]
            for k in range(0, len(lines), LINES)
        ]
        engine = bm25s.BM25()
        engine.index(_words(*chunks), show_progress=False)
        return engine, chunks


def _words(*texts: str) -> list[list[str]]:
    """Return the words of texts, those within names with underscores and capitals apart."""
    found: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=_WORD, stopwords=None, lower=False, return_ids=False, show_progress=False
    )
    return [[word.lower() for word in words] for words in found]


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
    """Read held-out files, and keep what a model, the files and the controls say of every symbol of each.

    It goes on where it was stopped; benchmarks/files_tables.py makes tables of it.
    """
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
    """Print the table of weights that fits held-out files best, by expectation maximisation.

    They are those of softmeet.readers.files.claim; a project by which they are to be judged must not be among them.
    """
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


Taken = tuple[float, float, list[int]]


def written(ensemble: Ensemble, text: str, tokens: int, speculate: Any) -> Taken:
    """Write on; return the seconds to the first token, those of each further one, and the tokens."""
    prompt, told = ensemble.tokenizer(text, return_tensors="pt"), dict[str, Any](do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    out = ensemble.model.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True, **told)
    first = time.perf_counter()
    length = out.sequences.shape[1]
    made = ensemble.model.generate(
        out.sequences, cache=out.cache, max_new_tokens=tokens, speculate=speculate, eos_token_id=None, **told
    )
    return first - start, (time.perf_counter() - first) / tokens, made[0, length:].tolist()


@app.command()
def seconds(
    models: Models,
    project: Annotated[str, typer.Argument(help="A folder.")],
    include: Include = None,
    held: Annotated[int, typer.Option(help="How many files are written on.")] = 6,
    prompt: Annotated[int, typer.Option(help="How many bytes of each are the prompt.")] = 1200,
    tokens: Annotated[int, typer.Option(help="How many tokens are written.")] = 64,
    json: JsonPath = None,
) -> None:
    """Time files, retrieval and both: seconds to the first token, and milliseconds of each further one.

    Each way writes on behind the first bytes of the same held-out files, greedily, in one process and in turns. A line
    that differs stands before each prompt, so that nothing of it was read before.
    """
    texts, names, loaded = Project.of(project, held, include, "file"), models.split(","), dict[Any, Any]()
    how: dict[str, Any] = {"rule": "logit-mean", "weights": [1] * len(names), "loaded": loaded}
    alone = Ensemble.from_pretrained(names, **how)
    files = Files(*map(str, texts.kept.files), name="files")
    beside = Ensemble.from_pretrained([*names, files], **how)
    salt, ways = count(), dict[str, list[Taken]]()
    for path in texts.held:
        text = path.read_bytes()[:prompt].decode(errors="ignore")
        chunks = texts.retrieved(path, text)
        for way, ensemble, before, speculate in (
            ("alone", alone, "", 0),
            ("with files", beside, "", 0),
            ("alone, drafts", alone, "", "auto"),
            ("with files, drafts", beside, "", "auto"),
            ("retrieval", alone, chunks, 0),
            ("both", beside, chunks, 0),
            ("both, drafts", beside, chunks, "auto"),
        ):
            if len(names) > 1 or way != "alone, drafts":
                taken = written(ensemble, f"# {next(salt)}\n{before}{text}", tokens, speculate)
                ways.setdefault(way, []).append(taken)
                print(f"{path.name}: {way} {taken[0]:.2f} s, {taken[1] * 1000:.0f} ms", flush=True)
    plain = {"with files, drafts": "with files", "both, drafts": "both"}
    rows = [
        {
            "models": named(models), "project": texts.name.rpartition("+")[2], "way": way, "files": len(taken),
            "seconds to the first token": median(one[0] for one in taken),
            "milliseconds a token": 1000 * median(one[1] for one in taken),
            "times plain": median(b[1] / a[1] for a, b in zip(ways[plain.get(way, "alone")], taken, strict=True)),
            "same text": sum(a[2] == b[2] for a, b in zip(ways[plain.get(way, way)], taken, strict=True)),
        }
        for way, taken in ways.items()
    ]  # fmt: skip
    show("What files cost", rows, json)


if __name__ == "__main__":
    app()
