"""The rows of a reader behind a text that is read byte by byte: one for each sequence of tokens that was run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from sys import is_finalizing
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

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

    Attributes:
        row: the row; None if it was given up for others, and is read anew where it is forked.
        used: the number of the last call in which it was made or forked.
    """

    def __init__(self, rows: Rows, row: Row, before: int, tokens: tuple[int, ...], used: int) -> None:
        self.row: Row | None = row
        self.before, self.tokens, self.used = before, tokens, used
        self._rows = rows

    def __del__(self, is_over: Callable[[], bool] = is_finalizing) -> None:
        """Give the row up, but for the end of the interpreter, when what closes it may be gone."""
        # Bound above, as nodes that an error's traceback holds go after the names of this module.
        if self.row is not None and not is_over():
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

    Of a reader that can open few rows, those are given up that have not been used for longest. What goes on behind one
    of them is read again, from where the open row that begins most alike parts from it.

    Args:
        reader: a reader of tokens that can fork and crop.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._lock, self._left = Lock(), deque[Row]()
        # In the order in which they were made: what is read does not depend on where they lie in memory.
        self._nodes, self._numbers, self._calls = WeakValueDictionary[int, Node](), count(), 0
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
            self._calls += 1
            self._make_room(1, frozenset())
            row = self.reader.open(own=before)
            self._held += 1
            node = self._made(row, len(before), (*before, *tokens))
            ((found,), work) = self._read([node], [Chain(Path(node, len(before)), tokens, at)])
        self._close_left()
        return found, work

    def run(self, chains: Sequence[Chain]) -> tuple[list[list[Next]], Work]:
        """Run chains of tokens, each in a fork of the row of its path, in one call of the reader where rows suffice.

        Where they do not, as of a long text, the rows of all chains but the last are given up when they were read.

        Returns:
            (for each chain its predictions, the cost).
        """
        with self._lock:
            self._calls += 1
            step = max(1, len(chains)) if self._has_room(len(chains)) else _SPARE
            found, work = list[list[Next]](), Work()
            for start in range(0, len(chains), step):
                some = chains[start : start + step]
                for path, _, _ in some:
                    path.node.used = self._calls
                self._make_room(len(some), {path.node for path, _, _ in some})
                nodes = list[Node]()
                for path, tokens, _ in some:
                    row, again = self._fork(path)
                    nodes.append(self._made(row, path.node.before, (*path.tokens, *tokens)))
                    work = work.and_(again.calls, again.tokens)
                told, cost = self._read(nodes, some)
                found, work = found + told, work.and_(cost.calls, cost.tokens)
                for node in nodes if start + step < len(chains) else ():
                    self._give_up(node)
        self._close_left()
        return found, work

    def _made(self, row: Row, before: int, tokens: tuple[int, ...]) -> Node:
        node = Node(self, row, before, tokens, self._calls)
        self._nodes[next(self._numbers)] = node
        return node

    def _has_room(self, count: int) -> bool:
        most = self.reader.traits.rows
        return most is None or self._held + count <= most - _SPARE

    def _make_room(self, count: int, needed: Collection[Node]) -> None:
        """Give up rows, but those that are needed, until there is room for ``count`` more, or no other is left."""
        while self._left:
            self._close(self._left.popleft())
        if not self._has_room(count):
            for node in sorted(self._nodes.values(), key=lambda node: node.used):
                if node.row is not None and node not in needed and not self._has_room(count):
                    self._give_up(node)

    def _give_up(self, node: Node) -> None:
        if node.row is not None:
            self._close(node.row)
            node.row = None

    def _fork(self, path: Path) -> tuple[Row, Work]:
        """Open a row in which the tokens of a path have been read; return it, and the cost of reading some again."""
        tokens, before = path.tokens, path.node.before
        source, length = (path.node, path.length) if path.node.row is not None else self._nearest(tokens, before)
        if source is None:
            row = self.reader.open(tokens[before:], own=tokens[:before])
            length = before + row.known
        else:
            (row,) = self.reader.fork(source.row, 1, length - before)  # type: ignore[arg-type]
        self._held += 1
        if length == len(tokens):
            return row, Work()
        told = finished(self.reader.read([Read(row, tokens[length:], ())]))
        for error in told.errors.values():
            self._close(row)
            raise error
        return row, told.work

    def _nearest(self, tokens: tuple[int, ...], before: int) -> tuple[Node | None, int]:
        """Return the node with a row whose tokens begin most like others, and how many tokens are alike; maybe none."""
        found, most = None, before
        for node in self._nodes.values():
            if node.row is not None and node.before == before:
                read = min(before + node.row.length, len(tokens))
                pairs = enumerate(zip(node.tokens[:read], tokens, strict=False))
                alike = next((k for k, (ours, theirs) in pairs if ours != theirs), read)
                if alike > most or (found is None and alike == before):
                    found, most = node, alike
        return found, most

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
