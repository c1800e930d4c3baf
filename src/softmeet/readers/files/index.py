"""The index of files: their symbols, and the places of these sorted by the text that ends there."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softmeet.extras import require_extra
from softmeet.readers.files.corpus import Corpus
from softmeet.readers.files.entries import Entries, Entry
from softmeet.readers.files.gathered import Encode, Progress, gather, hash_of, in_order
from softmeet.readers.files.kept import ARRAYS, Former, KeptIndex, Shelf, Symbols, drop, indexes

__all__ = ["Encode", "Entry", "Index", "KeptIndex", "Progress", "Symbols", "drop", "indexes"]


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class Index:
    """The index of files.

    Attributes:
        symbols: (n,) int32, the files' symbols one file behind the other, each followed by the separator ``size``.
        order: (n,) int32, the positions of ``symbols`` sorted by the text that ends there, read backwards. So all
            places where one context ends are one interval, and that of a longer context lies within it.
        entries: what was read of each file, sorted by path.
        left_out: how many files were left out, by the reason.

    Both arrays are mapped from the disk where the index is kept there.
    """

    symbols: Symbols
    order: Symbols
    entries: Entries
    left_out: dict[str, int]

    @classmethod
    def of(
        cls,
        texts: Corpus,
        encode: Encode,
        size: int,
        key: str,
        folder: Path | None,
        on_progress: Progress = _silent,
        *,
        keep: bool = True,
    ) -> Index:
        """Return the index of some files: as it is kept, or made anew where a file has changed.

        Files whose size and time have not changed are not read again, those whose bytes have not are not encoded.

        Args:
            texts: the files.
            encode: turns several texts into their symbols, each from 0 to ``size - 1``.
            size: the number of symbols.
            key: names what encodes, such that the indexes of two tokenizers are two.
            folder: where indexes are kept; None to keep this one in memory alone.
            on_progress: called with what is done (``"waiting for another process"``, ``"reading files"``,
                ``"sorting"``), how much of it is, and of how much.
            keep: whether it is kept in place of a former one, whose symbols are used in any case.

        Raises:
            InvalidInputError: if pydivsufsort is missing, ``encode`` gives other symbols, or there are more than
                2,147,483,647 of them.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from softmeet.readers.files.corpus import find_texts
            >>> with TemporaryDirectory() as folder:
            ...     _ = Path(folder, "a.txt").write_text("abab")
            ...     texts = find_texts([folder])
            ...     index = Index.of(texts, lambda those: [list(text.encode()) for text in those], 256, "bytes", None)
            >>> index.symbols.tolist(), index.order.tolist()
            ([97, 98, 97, 98, 256], [0, 2, 1, 3, 4])
        """
        require_extra("an index of files", "files", "pydivsufsort")
        if folder is None:
            return cls._made(texts, encode, size, None, None, on_progress)
        shelf = Shelf.of(folder, key, texts.paths, texts.include)
        if not keep:
            return cls._made(texts, encode, size, None, shelf.former(), on_progress)
        if (index := cls._unchanged(texts, shelf.former())) is not None:
            return index
        with shelf.alone(lambda: on_progress("waiting for another process", 0, 1)):
            former = shelf.former()
            return cls._unchanged(texts, former) or cls._made(texts, encode, size, shelf, former, on_progress)

    @classmethod
    def _unchanged(cls, texts: Corpus, former: Former | None) -> Index | None:
        """Return the index that is kept, if no file is another, or has another size or time."""
        if former is None or [entry.path for entry in former.entries] != [str(path) for path in texts.files]:
            return None
        try:
            if not all(entry.is_as(path.stat()) for entry, path in zip(former.entries, texts.files, strict=True)):
                return None
        except OSError:  # one is gone
            return None
        symbols, order = map(former.array, ARRAYS)
        if symbols is None or order is None:
            return None
        return cls._over(symbols, order, former.entries, texts)

    @classmethod
    def _made(
        cls, texts: Corpus, encode: Encode, size: int, shelf: Shelf | None, former: Former | None, on_progress: Progress
    ) -> Index:
        """Make an index of what a former one has and what has changed since then, and keep it."""
        entries, symbols = gather(texts.files, encode, size, former, on_progress)
        hashes = [entry.sha256 for entry in entries if entry.symbols >= 0]
        version = hashlib.sha256("\n".join([str(size), *hashes]).encode()).hexdigest()
        making = None if shelf is None else shelf.version(version, former)
        kept = [None, None] if former is None or former.version != version else [*map(former.array, ARRAYS)]

        def stored(name: str, array: Symbols) -> Symbols:
            return array if making is None else making.put(name, array)

        # Before they are sorted, so that they take no memory meanwhile.
        symbols = stored("symbols", symbols) if kept[0] is None else kept[0]
        if (order := kept[1]) is None:
            on_progress("sorting", 0, len(symbols))
            order = stored("order", in_order(symbols))
            on_progress("sorting", len(symbols), len(symbols))
        if making is not None:
            making.keep(entries)
        return cls._over(symbols, order, entries, texts)

    @classmethod
    def _over(cls, symbols: Symbols, order: Symbols, entries: tuple[Entry, ...], texts: Corpus) -> Index:
        """Return an index, with what was left out of its files: by name, and when they were read."""
        more = {
            "not UTF-8 text": sum(entry.symbols < 0 for entry in entries),
            "could not be read": len(texts.files) - len(entries),
        }
        left_out = dict(Counter(texts.left_out) + Counter(more))
        return cls(symbols, order, Entries(entries), left_out)

    @property
    def files(self) -> tuple[Path, ...]:
        """The path of each file that is a text."""
        return tuple(Path(self.entries[k].path) for k in self._texts)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """(files,) int64, the position of each file's first symbol (of its separator, if it is empty)."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.entries.symbols[self._texts] + 1)])[:-1]

    @cached_property
    def _texts(self) -> npt.NDArray[np.int64]:
        """The numbers of the entries that are texts."""
        return np.flatnonzero(self.entries.symbols >= 0)

    def place(self, position: int) -> tuple[Path, int]:
        """Return the file that a position of ``symbols`` is in, and the position of that file's first symbol."""
        which = int(np.searchsorted(self.starts, position, "right")) - 1
        return Path(self.entries[self._texts[which]].path), int(self.starts[which])

    def line(self, position: int, decode: Callable[[Sequence[int]], bytes]) -> int:
        """Return the line, from 1, in which the symbol at a position begins; ``decode`` makes bytes of symbols."""
        _, start = self.place(position)
        return 1 + decode(self.symbols[start:position].tolist()).count(b"\n")

    def is_stale(self, path: Path) -> bool:
        """Return whether a file is gone, or holds something else than when it was read."""
        entry = self.entries.find(str(path))
        try:
            return entry is None or not (entry.is_as(path.stat()) or hash_of(path) == entry.sha256)
        except OSError:
            return True
