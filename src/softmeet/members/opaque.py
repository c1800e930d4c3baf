"""Output layers whose weight cannot be read: logits come from running them, which is all that averages need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from softmeet.heads import SoftmaxHead
from softmeet.members.placement import gives_logits, head_device
from softmeet.simplex import capped, log_normalize

# The names of tensors by which torch calls a weight that is a plain one.
_PLAIN = (nn.Parameter, Tensor)


@dataclass(frozen=True, eq=False)
class OpaqueHead:
    """A model's output layer that is run instead of read: quantised, adapted or of an unknown kind.

    It has what averages need of a :class:`~softmeet.heads.SoftmaxHead`, on the same terms, and no weight. If the model
    computes its logits in an unknown way, these logits stand in for its hidden states
    (:func:`softmeet.members.trunk.last_hidden`), and d is v.

    Args:
        model: the causal LM whose output layer this is; its present layer is run, also after it was moved or cast.
        v: the number of tokens, padding included.
        d: the width of hidden states.
        why: why it cannot be read, a clause such as "is quantised (Int8Tensor)", for messages.
        remedy: what would make it readable, a clause for messages; empty if nothing does.
        scale: a factor on the layer's output.
        soft_cap: c > 0 of the soft-cap c·tanh(x / c), or None for no soft-cap.
        known: how many tokens the model tells of each place, the others having -inf; None for all.
    """

    model: PreTrainedModel
    v: int
    d: int
    why: str
    remedy: str = ""
    scale: float = 1.0
    soft_cap: float | None = None
    known: int | None = None

    @property
    def device(self) -> torch.device:
        """The device on which the last hidden states come, and logits are computed."""
        return head_device(self.model)

    @property
    def is_told(self) -> bool:
        """Whether there is nothing to be read, as the model's logits stand in for its hidden states."""
        return gives_logits(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.model.dtype  # type: ignore[no-any-return]

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the model's logits at its last hidden states, in nats, in fp32, or fp64 if ``hidden`` is fp64."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if gives_logits(self.model):
            return hidden.to(dtype)
        layer: Any = self.model.get_output_embeddings()
        out: Tensor = layer(hidden.reshape(-1, self.d).to(self.dtype)).to(dtype)
        return capped(out, self.scale, self.soft_cap).reshape(*hidden.shape[:-1], self.v)

    def log_probs(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the log-softmax of :meth:`logits` at the last hidden states, in nats, in the dtype of the logits."""
        return log_normalize(self.logits(hidden))


class NoHead(OpaqueHead):
    """In place of the output layer of a member that tells log-probabilities, which stand in for its hidden states.

    Args:
        v: the number of symbols.

    Example:
        >>> NoHead(2).logits(torch.tensor([[-0.5, -0.9]]))
        tensor([[-0.5000, -0.9000]])
    """

    def __init__(self, v: int) -> None:
        # The fields of a frozen dataclass, without the model that others have.
        vars(self).update(v=v, d=v, why="is none")

    @property
    def device(self) -> torch.device:
        """The device on which log-probabilities come."""
        return torch.device("cpu")

    @property
    def is_told(self) -> bool:
        """True: log-probabilities stand in for hidden states."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which members without an output layer tell log-probabilities."""
        return torch.float64

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the log-probabilities, in nats, as they are."""
        return hidden


Head = SoftmaxHead | OpaqueHead


def width_of(head: Head) -> int | None:
    """Return the number of a head's columns; None where logits stand in for hidden states, and tell nothing of it.

    >>> width_of(NoHead(2)), width_of(SoftmaxHead(torch.ones(3, 2)))
    (None, 2)
    """
    return None if isinstance(head, OpaqueHead) and head.is_told else head.d


def is_readable(layer: nn.Module | None) -> bool:
    """Return whether an output layer is a plain linear one, whose weight is a floating tensor of no special kind."""
    return type(layer) is nn.Linear and type(layer.weight) in _PLAIN and layer.weight.is_floating_point()


def reason(layer: nn.Module) -> tuple[str, str]:
    """Return (why an output layer's weight cannot be read, what would make it readable), clauses for messages."""
    weight, kind = getattr(layer, "weight", None), f"{type(layer).__module__}.{type(layer).__name__}"
    if hasattr(layer, "base_layer"):  # as peft names what an adapter is put around
        return f"has an adapter ({kind})", "merge the adapter into the member"
    if isinstance(weight, Tensor) and (type(weight) not in _PLAIN or not weight.is_floating_point()):
        special = type(weight).__name__ if type(weight) not in _PLAIN else str(weight.dtype).removeprefix("torch.")
        return f"is quantised ({special})", "load the member with its head unquantised"
    return f"is no plain linear layer ({kind})", ""
