"""What readers that claim, such as the user's files, make of losses: two numbers a place, whatever a rule has said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.engine.claims import claimed
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.readers.reader import Read, finished

# At how many places a whole distribution is held at once.
_AT_ONCE = 64


@torch.no_grad()
def claims_of(model: EnsembleForCausalLM, ids: Int[Tensor, " ids"], count: int) -> list[Float[Tensor, "k 2"]]:
    """Return what each reader that claims tells of the last k = ``count`` tokens of a text, of which all were given.

    The two columns are the log-probability of the token that came, and that of the share that is claimed, in nats.

    Args:
        model: the ensemble.
        ids: the text, of which the last token is not read.
        count: how many of its last tokens are told of.
    """
    tokens: list[int] = ids.tolist()
    _, skipped = model.before_claims(tokens, ())
    symbols, targets = tokens[skipped:-1], ids[-count:].cpu()
    places, found = range(len(symbols) + 1 - count, len(symbols) + 1), list[Tensor]()
    for reader in model.claimants:
        row, parts = reader.open(symbols, reuse=False), list[Tensor]()
        try:
            for start in range(0, count, _AT_ONCE):
                some, came = places[start : start + _AT_ONCE], targets[start : start + _AT_ONCE, None]
                begin = row.length
                behind = finished(
                    reader.read([Read(row, symbols[begin : some[-1]], [place - begin for place in some])])
                )
                for error in behind.errors.values():
                    raise error
                assert behind.claims is not None, "it claims, as its traits say"
                log_probs = behind.log_probs()
                two = log_probs.gather(-1, came.to(log_probs.device)).squeeze(-1), behind.claims.log()
                parts.append(torch.stack([one.double().cpu() for one in two], -1))
        finally:
            reader.close(row)
        found.append(torch.cat(parts))
    return found


def beside(nats: Float[Tensor, " N"], claims: Sequence[Float[Tensor, "N 2"]]) -> Float[Tensor, " N"]:
    """Return a rule's losses, in nats, once readers have taken the share that they claim (:func:`claims_of`).

    Example:
        >>> half, right = torch.tensor([0.5]).log(), torch.tensor([[1.0, 0.5]]).log()
        >>> beside(-half, [right]).neg().exp()
        tensor([0.7500])
    """
    return -claimed(-nats[:, None], claims).squeeze(-1)
