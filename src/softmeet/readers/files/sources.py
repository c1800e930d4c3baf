"""Where a text stands in files: which of its symbols, in which file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from softmeet.members.files import spelled
from softmeet.readers.files.index import Index
from softmeet.readers.files.matches import intervals
from softmeet.readers.source import Source

# Symbols of a text further apart are not matched in one.
_LONGEST = 2048


def source_of(
    index: Index, symbols: Sequence[int], decode: Callable[[Sequence[int]], bytes], folders: Sequence[Path] = ()
) -> Source | None:
    """Return where the most of the last symbols of a text stand in files; None if the last one stands nowhere.

    Args:
        index: the files.
        symbols: the text.
        decode: makes bytes of symbols.
        folders: those that were named.
    """
    found = intervals(index, symbols[-_LONGEST:])
    if not found:
        return None
    last = int(index.order[found[-1][0]])
    path, _ = index.place(last)
    line = index.line(last - len(found) + 1, decode)
    start, changed = len(symbols) - len(found), index.is_stale(path)
    told, below = (spelled(name) for name in (str(path), _below(path, folders)))
    return Source(start, len(symbols), told, below, line, changed)


def _below(path: Path, folders: Sequence[Path]) -> str:
    """Return a path below the innermost of the folders; of several, behind that one's name."""
    around = max(
        (one for one in folders if path.is_relative_to(one)), key=lambda one: len(one.parts), default=path.parent
    )
    return path.relative_to(around.parent if len(folders) > 1 else around).as_posix()


def sources_of(
    index: Index,
    symbols: Sequence[int],
    decode: Callable[[Sequence[int]], bytes],
    least: int,
    folders: Sequence[Path] = (),
) -> list[Source]:
    """Return where stretches of a text stand in files, in order; none of them overlap.

    Each is the longest that ends where it does, and the last ones are taken first.

    Args:
        index, symbols, decode, folders: as of :func:`source_of`.
        least: the fewest symbols of a stretch.
    """
    return list(_backwards(index, symbols, decode, least, folders))[::-1]


def _backwards(
    index: Index, symbols: Sequence[int], decode: Callable[[Sequence[int]], bytes], least: int, folders: Sequence[Path]
) -> Iterator[Source]:
    end = len(symbols)
    while end >= least:
        length = len(intervals(index, symbols[max(0, end - _LONGEST) : end]))
        if length < least:
            end -= 1
        elif (found := source_of(index, symbols[:end], decode, folders)) is not None:
            yield found
            end -= length
