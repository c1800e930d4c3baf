"""The rows of a reader behind a text that is read byte by byte: one for each sequence of tokens that was run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from sys import is_finalizing
from threading import Lock
from typing import NamedTuple

from softmeet.readers.reader import Predictions, Read, Reader, Row, Work, finished

# So many of a reader's rows are left for one call, where it cannot open any number.
_SPARE = 64


class Node:
    """A sequence of tokens that a reader has read, in a row that is closed when nothing refers to the node any more.

    Args:
        rows: those of the reader.
        row: the node's own.
        before: how many of the tokens are the member's own before the text, which are no symbols of the row.
        tokens: the ids of all tokens.
        parent: the tokens from which it was forked; None of one that was read from its beginning.

    Attributes:
        row: the row; None if it was given up for others, and is read anew where it is forked.
    """

    def __init__(self, rows: Rows, row: Row, before: int, tokens: tuple[int, ...], parent: Path | None = None) -> None:
        self.row: Row | None = row
        self.before, self.tokens, self.parent = before, tokens, parent
        self._rows = rows

    def __del__(self) -> None:
        """Give the row up, but for the end of the interpreter, when what closes it may be gone."""
        if self.row is not None and not is_finalizing():
            self._rows.leave(self.row)


class Path(NamedTuple):
    """The first ``length`` tokens of a node."""

    node: Node
    length: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return self.node.tokens[: self.length]

    def last(self, count: int) -> tuple[int, ...]:
        """Return the ids of the last ``count`` tokens."""
        return self.node.tokens[self.length - count : self.length]


class Chain(NamedTuple):
    """Tokens to run behind a path.

    Attributes:
        path: the tokens before them.
        tokens: the ids, at least one.
        at: behind how many of them the next token's prediction is wanted, ascending, each at least 1.
    """

    path: Path
    tokens: Sequence[int]
    at: Sequence[int]

    @property
    def length(self) -> int:
        """The number of all tokens, those before them included."""
        return self.path.length + len(self.tokens)


class Next(NamedTuple):
    """The prediction of the token behind a path, computed when it is asked for.

    Attributes:
        path: the tokens.
        told: predictions of one call of a reader.
        number: which of them it is.
    """

    path: Path
    told: Predictions
    number: int


class Rows:
    """The rows of a reader that nodes own; calls from several threads wait for each other.

    Args:
        reader: a reader of tokens that can fork and crop.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._lock, self._left = Lock(), deque[Row]()
        # How many rows nodes have.
        self._held = 0

    def __reduce__(self) -> tuple[type[Rows], tuple[Reader]]:
        """Leave the lock out of copies."""
        return Rows, (self.reader,)

    def leave(self, row: Row) -> None:
        """Close a row, now or after the call that the reader is in; nodes go in any thread, amid anything."""
        self._left.append(row)
        self._close_left()

    def _close_left(self) -> None:
        while self._left and self._lock.acquire(blocking=False):
            try:
                self._close(self._left.popleft())
            except IndexError:  # another thread was faster
                pass
            finally:
                self._lock.release()

    def _close(self, row: Row) -> None:
        self.reader.close(row)
        self._held -= 1

    def begin(self, before: Sequence[int], tokens: Sequence[int], at: Sequence[int]) -> tuple[list[Next], Work]:
        """Read tokens in a row of their own.

        Args:
            before: the member's own tokens before the text.
            tokens: those that follow, if any.
            at: behind how many of these predictions are wanted, ascending.

        Returns:
            (the predictions, the cost).
        """
        with self._lock:
            node = Node(self, self.reader.open(own=before), len(before), (*before, *tokens))
            self._held += 1
            ((found,), work) = self._read([node], [Chain(Path(node, len(before)), tokens, at)])
        self._close_left()
        return found, work

    def run(self, chains: Sequence[Chain]) -> tuple[list[list[Next]], Work]:
        """Run chains of tokens, each in a fork of the row of its path, in one call of the reader where rows suffice.

        Of a reader that can open few rows, those of many chains, as of a long text, are given up as soon as they were
        read; a chain behind one of them reads its tokens again.

        Returns:
            (for each chain its predictions, the cost).
        """
        most = self.reader.traits.rows
        with self._lock:
            crowded = most is not None and self._held + len(chains) > most - _SPARE
            step = _SPARE if crowded else max(1, len(chains))
            found, work = list[list[Next]](), Work()
            for start in range(0, len(chains), step):
                some = chains[start : start + step]
                nodes = list[Node]()
                for path, tokens, _ in some:
                    row, again = self._fork(path)
                    nodes.append(Node(self, row, path.node.before, (*path.tokens, *tokens), path))
                    work = work.and_(again.calls, again.tokens)
                told, cost = self._read(nodes, some)
                found, work = found + told, work.and_(cost.calls, cost.tokens)
                for node in nodes if crowded else ():
                    self._close(node.row)  # type: ignore[arg-type]
                    node.row = None
        self._close_left()
        return found, work

    def _fork(self, path: Path) -> tuple[Row, Work]:
        """Open a row in which the tokens of a path have been read; return it, and the cost of reading some again."""
        node, parent = path.node, path.node.parent
        if node.row is not None or parent is None:
            (row,) = self.reader.fork(node.row, 1, path.length - node.before)  # type: ignore[arg-type]
            self._held += 1
            return row, Work()
        row, work = self._fork(Path(parent.node, min(parent.length, path.length)))
        if rest := path.tokens[parent.length :]:
            told = finished(self.reader.read([Read(row, rest, ())]))
            for error in told.errors.values():
                self._close(row)
                raise error
            work = work.and_(told.work.calls, told.work.tokens)
        return row, work

    def _read(self, nodes: Sequence[Node], chains: Sequence[Chain]) -> tuple[list[list[Next]], Work]:
        asked = [
            Read(node.row, chain.tokens, chain.at)  # type: ignore[arg-type]
            for node, chain in zip(nodes, chains, strict=True)
        ]
        told = finished(self.reader.read(asked))
        for error in told.errors.values():
            raise error
        found, number = list[list[Next]](), 0
        for node, (path, _, at) in zip(nodes, chains, strict=True):
            found.append([Next(Path(node, path.length + k), told, number + j) for j, k in enumerate(at)])
            number += len(at)
        return found, told.work
