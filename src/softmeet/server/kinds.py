"""Which sequences are solved together, those of one kind, unless a row takes long; and whose prompts run together."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any
from weakref import WeakKeyDictionary

from softmeet.server.sequences import Sequence

# In seconds: where a request's several rows take longer to solve, those of other requests do not wait for them.
_DEAR = 0.02
# Of how many kinds of one ensemble it is known how long a row takes.
_KNOWN = 256
# The most bytes, summed over prompts, of several prompts over bytes that are run together.
_BYTES = 2048


class Kinds:
    """The kinds of sequences, and how long a row of each takes to solve.

    A sequence whose kind is being solved waits for that, so that all of the kind go on together, in one batch. Where a
    request's several rows take long, the others would be held up by that: the request is of a kind of its own.

    Args:
        alone: whether every sequence is of a kind of its own.
    """

    def __init__(self, *, alone: bool) -> None:
        # By model, so that one which nobody needs any more, as of a request's passages, is not kept.
        self._alone, self._seconds = alone, WeakKeyDictionary[Any, OrderedDict[Any, float]]()

    def of(self, s: Sequence) -> Any:
        """Return a sequence's kind, which may change when :meth:`learn` is called."""
        if self._alone:
            return s
        kind, rows = _kind(s), s.request.choices * len(s.request.prompts)
        is_dear = rows > 1 and rows * self._known(s).get(_way(s), 0.0) > _DEAR
        return (*kind, id(s.request)) if is_dear else kind

    def learn(self, s: Sequence, seconds: float) -> None:
        """Take note that a row of a sequence's kind has just taken so many seconds; long unused kinds are forgotten."""
        known, way = self._known(s), _way(s)
        known[way] = 0.5 * (known.pop(way, seconds) + seconds)
        if len(known) > _KNOWN:
            known.popitem(last=False)

    def _known(self, s: Sequence) -> OrderedDict[Any, float]:
        return self._seconds.setdefault(s.combination.model, OrderedDict())


def _way(s: Sequence) -> tuple[Any, ...]:
    """Return how a model is used for a sequence, without the model."""
    return s.combination.settings, s.request.report is None


def _kind(s: Sequence) -> tuple[Any, ...]:
    # Reports take time: an average with them is not drawn at once.
    return s.combination, s.request.report is None


def prompts_together(new: list[Sequence], *, alone: bool) -> list[list[Sequence]]:
    """Group sequences whose prompts are to be run together.

    Over bytes one call of a member reads any number of texts: those of about one length are read together. Over tokens
    each prompt is run by itself, so that no bit of it depends on the others, as are all if ``alone``, and scored ones.
    """
    groups = defaultdict[Any, list[Sequence]](list)
    for s in new:
        by_itself = alone or s.combination.symbols_are_tokens or s.request.score_prompt
        groups[id(s) if by_itself else (s.combination, len(s.prompt).bit_length())].append(s)
    return [own[k : k + size] for own in groups.values() for size in [_fitting(own)] for k in range(0, len(own), size)]


def _fitting(group: list[Sequence]) -> int:
    """Return how many prompts of about one length are run together."""
    return max(1, _BYTES // max(1, *(len(s.prompt) for s in group)))
