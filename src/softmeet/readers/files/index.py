"""The index of files: their symbols, and the places of these sorted by the text that ends there."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG

import numpy as np
import numpy.typing as npt

from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra
from softmeet.readers.files.corpus import Corpus
from softmeet.readers.files.kept import ARRAYS, Entries, Entry, Former, KeptIndex, Shelf, Symbols, drop, indexes

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
Progress = Callable[[str, int, int], None]
# How many characters are encoded at once: tokenizers take a hundred times a text's memory.
_AT_ONCE = 1 << 20
# Nanoseconds for which a file may change again without another time: the clocks of some file systems are as coarse.
_UNSETTLED = 2 * 10**9
_MOST = np.iinfo(np.int32).max
# Newlines are counted in blocks of so many symbols.
_BLOCK = 4096
# A text to be encoded, or the symbols that it had before; None of what is no text.
_Piece = str | Symbols | None


def gather(
    files: Sequence[Path], encode: Encode, size: int, former: Former | None, on_progress: Progress
) -> tuple[tuple[Entry, ...], Symbols]:
    """Return what was read of files, without those that are gone, and the symbols of all of them, one after the other.

    Args:
        files: their paths.
        encode: turns several texts into their symbols.
        size: the number of symbols, and the separator behind each file.
        former: what was read of them the last time.
        on_progress: called with ``"reading files"``, how many are read, and how many there are.

    Raises:
        InvalidInputError: if ``encode`` gives other symbols than 0 to ``size - 1``, or there are too many.
    """
    entries: list[Entry] = []
    symbols = array("i")
    for group in _grouped(_pieces(files, former, on_progress)):
        encoded = _encoded([piece for _, piece in group if isinstance(piece, str)], encode)
        for entry, piece in group:
            if piece is None:
                entries.append(entry)
                continue
            own = next(encoded) if isinstance(piece, str) else piece
            if own.size and not 0 <= own.min() <= own.max() < size:
                raise InvalidInputError(f"expected symbols from 0 to {size - 1}, got {own.min()} to {own.max()}")
            symbols.frombytes(own.tobytes())
            symbols.append(size)
            entries.append(entry._replace(symbols=own.size))
        if len(symbols) > _MOST:
            raise _too_many(_MOST)
    return tuple(entries), np.frombuffer(symbols, np.int32) if symbols else np.empty(0, np.int32)


def _too_many(most: int) -> InvalidInputError:
    return InvalidInputError(
        f"expected files of at most {most:,} symbols together, got more: name fewer, or say include="
    )


def in_order(symbols: Symbols) -> Symbols:
    """Return the positions of symbols, sorted by the text that ends there, read backwards.

    Raises:
        InvalidInputError: if there are too many to be sorted, of tokens about 700 million.

    Example:
        >>> in_order(np.array([1, 0, 1, 2], np.int32)).tolist()
        [1, 0, 2, 3]
    """
    from pydivsufsort import divsufsort

    n = len(symbols)
    if not n:
        return np.empty(0, np.int32)
    pieces = [slice(start, start + _AT_ONCE) for start in range(0, n, _AT_ONCE)]  # numpy makes 64 bits of what indexes
    present = np.zeros(int(symbols.max()) + 1, np.uint32)
    for piece in pieces:
        present[symbols[piece]] = 1
    # What sorts sorts bytes: each symbol is its rank among those that occur, in as few bytes as will do.
    width = 1 if (count := int(present.sum())) <= 1 << 8 else 2 if count <= 1 << 16 else 3
    if n > _MOST // width:
        raise _too_many(_MOST // width)
    spelling = (np.cumsum(present) - 1).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - width :]
    backwards, spelt = symbols[::-1], np.empty((n, width), np.uint8)
    for piece in pieces:
        spelt[piece] = spelling[backwards[piece]]
    found: Symbols = divsufsort(spelt.ravel())
    del spelt
    done = 0
    for start in range(0, len(found), _AT_ONCE):
        begun = found[start : start + _AT_ONCE]
        whole = begun[begun % width == 0]  # the others begin amid a symbol
        found[done : done + len(whole)] = n - 1 - whole // width
        done += len(whole)
    return found if width == 1 else found[:n].astype(np.int32)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: if there is none, or it cannot be read.
    """
    return _read(path)[0].sha256


def _pieces(files: Sequence[Path], former: Former | None, on_progress: Progress) -> Iterator[tuple[Entry, _Piece]]:
    """Yield what was read of each file that is there, and what its symbols are to be made of."""
    before = former.array("symbols") if former is not None else None
    entries = former.entries if former is not None and before is not None else ()
    by_path = {entry.path: entry for entry in entries}
    by_hash, start = {}, 0
    for entry in entries:
        if entry.symbols >= 0:
            by_hash[entry.sha256] = start, start + entry.symbols
            start += entry.symbols + 1
    for k, path in enumerate(files):
        on_progress("reading files", k, len(files))
        known, content = by_path.get(str(path)), b""
        try:
            if known is None or not known.is_as(path.stat()):
                known, content = _read(path)
        except OSError:
            continue
        if known.sha256 in by_hash and before is not None:
            yield known, before[slice(*by_hash[known.sha256])]
        elif known.symbols < 0 or (text := _text(content)) is None:
            yield known._replace(symbols=-1), None
        else:
            yield known, text
    on_progress("reading files", len(files), len(files))


def _read(path: Path) -> tuple[Entry, bytes]:
    """Read a file: what is kept of it, but for the number of its symbols, and its bytes.

    Raises:
        OSError: if it cannot be read, or a link or no regular file has come in its place.
    """
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        state, now = os.fstat(file.fileno()), time.time_ns()
        if not S_ISREG(state.st_mode):
            raise OSError(f"{path} is no regular file")
        content = file.read(state.st_size)  # while somebody adds to it
        after = os.fstat(file.fileno())
    settled = len(content) == state.st_size and state.st_mtime_ns == after.st_mtime_ns < now - _UNSETTLED
    modified = state.st_mtime_ns if settled else -1
    sha256 = hashlib.sha256(content).hexdigest()
    return Entry(str(path), len(content), modified, state.st_ctime_ns, sha256, 0), content


def _text(content: bytes) -> str | None:
    """Return the text that bytes are in UTF-8; None if they are none, or hold a zero, as texts do not."""
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _encoded(texts: Sequence[str], encode: Encode) -> Iterator[Symbols]:
    """Yield the symbols of each of several texts; long ones are cut where lines end, and encoded piece by piece."""
    short = [text for text in texts if len(text) <= _AT_ONCE]
    encoded = iter(encode(short) if short else ())
    for text in texts:
        if len(text) <= _AT_ONCE:
            yield np.asarray(next(encoded), np.int32)
        else:
            yield np.concatenate([np.asarray(encode([piece])[0], np.int32) for piece in _pieces_of(text)])


def _pieces_of(text: str) -> Iterator[str]:
    """Yield the pieces of a text, each up to the end of a line, if that is not too far."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _AT_ONCE) + 1 or start + _AT_ONCE
        yield text[start:end]
        start = end


def _grouped(pieces: Iterator[tuple[Entry, _Piece]]) -> Iterator[list[tuple[Entry, _Piece]]]:
    """Yield pieces in groups whose texts are encoded together."""
    group: list[tuple[Entry, _Piece]] = []
    volume = 0
    for entry, piece in pieces:
        group.append((entry, piece))
        volume += len(piece) if isinstance(piece, str) else 0
        if volume >= _AT_ONCE:
            yield group
            group, volume = [], 0
    yield group


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

    def place(self, position: int) -> tuple[Path, range]:
        """Return the file that a position of ``symbols`` is in, and the positions of that file's symbols."""
        which = int(np.searchsorted(self.starts, position, "right")) - 1
        entry, start = self.entries[self._texts[which]], int(self.starts[which])
        return Path(entry.path), range(start, start + entry.symbols)

    def line(self, position: int, decode: Callable[[Sequence[int]], bytes]) -> int:
        """Return the line, from 1, in which the symbol at a position begins; ``decode`` makes bytes of symbols."""
        _, own = self.place(position)
        counts, blocks = list(self._newlines.get(own.start, (0,))), range(own.start, position + 1, _BLOCK)
        for start in blocks[len(counts) - 1 : -1]:
            counts.append(counts[-1] + decode(self.symbols[start : start + _BLOCK].tolist()).count(b"\n"))
        self._newlines[own.start] = tuple(counts)
        return 1 + counts[len(blocks) - 1] + decode(self.symbols[blocks[-1] : position].tolist()).count(b"\n")

    @cached_property
    def _newlines(self) -> dict[int, tuple[int, ...]]:
        """By a file's first position, how many newlines stand before each of its blocks, as far as anybody asked."""
        return {}

    def is_stale(self, path: Path) -> bool:
        """Return whether a file is gone, or holds something else than when it was read."""
        entry = self.entries.find(str(path))
        try:
            return entry is None or not (entry.is_as(path.stat()) or hash_of(path) == entry.sha256)
        except OSError:
            return True
