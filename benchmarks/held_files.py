"""Projects of which some files are held out, and chunks of the others by BM25: what benchmarks of files share."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import bm25s

from softmeet.readers.files.corpus import Corpus, find_texts

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
