"""A conversation: what was said, what is forgotten of it, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from softmeet.errors import ContextError

# New text, and for each member the log-probability that it gave to it, in nats; none where that is not asked for.
Piece = tuple[str, list[float]]


class Conversation:
    """A conversation with an ensemble, which remembers what was said.

    Args:
        write: streams an answer to turns, as pieces.
        system: the system's message; None for none.
        forgot: called with the number of turns that are forgotten, as they no longer fit into a member's context.

    Attributes:
        turns: what was said, the system's message first.
    """

    def __init__(
        self,
        write: Callable[[Sequence[dict[str, str]]], Iterator[Piece]],
        system: str | None = None,
        forgot: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._write, self._forgot = write, forgot
        self.turns: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget what was said, and have another message of the system, None for none."""
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns = list(self._system)

    def clear(self) -> None:
        """Forget what was said, but for the system's message."""
        self.turns = list(self._system)

    def answer(self, text: str) -> Iterator[Piece]:
        """Answer a text, and yield what is new of the answer; one that is left off counts as far as it came.

        Raises:
            ContextError: if the text alone does not fit into a member's context.
        """
        self.turns.append({"role": "user", "content": text})
        said = ""
        try:
            for piece, log_probs in self._answered():
                said += piece
                yield piece, log_probs
        except BaseException:
            if not said:
                self.turns.pop()
            raise
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": said})

    def take_back(self) -> str | None:
        """Forget the last question and its answer, and return the question; None if there is none."""
        asked = [k for k, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            return None
        text = self.turns[asked[-1]]["content"]
        del self.turns[asked[-1] :]
        return text

    def _answered(self) -> Iterator[Piece]:
        forgotten = 0
        while True:
            try:
                for told in self._write(self.turns):
                    if forgotten:
                        self._forgot(forgotten)
                        forgotten = 0
                    yield told
            except ContextError:
                start = len(self._system)
                # A question with its answer at a time; the newest one stays.
                if len(self.turns) - start < 3:
                    raise
                del self.turns[start : start + 2]
                forgotten += 2
            else:
                return
