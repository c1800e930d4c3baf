"""A base class for dataclasses of tensors that have one row per problem, with operations on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

B = TypeVar("B", bound="Batched")


class Batched:
    """Base class of dataclasses whose tensors, and tuples of tensors, have one row per problem of a batch.

    The first dimension of a tensor counts rows. Other fields, such as None or a tuple of numbers, belong to the whole
    batch and are kept. No method changes an object in place.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> @dataclass
        ... class Pair(Batched):
        ...     first: torch.Tensor
        ...     second: torch.Tensor
        >>> pair = Pair(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
        >>> pair.take(torch.tensor([0, 2]))
        Pair(first=tensor([1, 3]), second=tensor([4, 6]))
    """

    def mapped(self: B, function: Callable[[Tensor], Tensor]) -> B:
        """Return a copy in which each tensor t that is a field, or in a field's tuple, becomes ``function(t)``.

        ``function`` is called once with each such tensor; a None in a tuple stays None.
        """
        return _by_field(function, [self])

    def take(self: B, rows: Int[Tensor, " k"] | slice) -> B:
        """Return a copy that has only ``rows``: k indices, in that order, or a slice."""
        return self.mapped(lambda mine: mine[rows])

    def put(self: B, rows: Int[Tensor, " k"], other: B) -> B:
        """Return a copy whose rows at k distinct indices ``rows`` are replaced by the k rows of ``other``, in order.

        ``other`` is of the same class, with tensors of the same dtypes on the same device.
        """
        return _by_field(lambda mine, theirs: mine.index_copy(0, rows, theirs), [self, other])

    @staticmethod
    def joined(parts: Sequence[B]) -> B:
        """Concatenate the rows of one or more batches of one class, in order.

        Fields that are neither tensors nor tuples of tensors come from the first batch; a single batch is returned
        itself.
        """
        return parts[0] if len(parts) == 1 else _by_field(lambda *each: torch.cat(each), parts)


def _by_field(function: Callable[..., Tensor], batches: Sequence[B]) -> B:
    changed: dict[str, Any] = {}
    for f in fields(batches[0]):  # type: ignore[arg-type]
        values = [getattr(batch, f.name) for batch in batches]
        if isinstance(values[0], Tensor):
            changed[f.name] = function(*values)
        elif isinstance(values[0], tuple) and any(isinstance(part, Tensor) for part in values[0]):
            changed[f.name] = tuple(None if part[0] is None else function(*part) for part in zip(*values, strict=True))
    return replace(batches[0], **changed)  # type: ignore[type-var]
