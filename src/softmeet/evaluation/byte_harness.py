"""What the lm-evaluation-harness asks of a model, for ensembles over bytes: scores of continuations, and new ones.

A *symbol* is a byte, 0 to 255, or 256: the end of a text, and before its first byte the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from softmeet.errors import InvalidInputError
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.next_tokens import END

# The bytes of UTF-8 that begin no character.
_WITHIN = bytes(range(0x80, 0xC0))


@torch.inference_mode()
def log_likelihoods(
    model: ByteEnsembleForCausalLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[float, bool]]:
    """Score continuations of contexts: each member reads each text at once.

    Neighbouring pairs that differ in their last symbol alone, such as questions with answers A to D, are read once.

    Args:
        model: the ensemble; its own settings hold.
        pairs: (the symbols of a context, those of its continuation, at least one) each. A context loses as many first
            bytes as do not fit into every member's context; an empty one is the beginning of a text.

    Yields:
        For each pair, in order, (the sum of the log-probabilities of the continuation's symbols, in nats; whether each
        of them is the most probable one).

    Raises:
        InvalidInputError: if a continuation alone exceeds a member's context.
    """
    settings = model.combiner.resolved(model.settings)
    for read, group in groupby(pairs, key=lambda pair: [*(pair[0] or [END]), *pair[1]][:-1]):
        continuations = [torch.tensor(after) for _, after in group]
        longest = max(map(len, continuations))
        text = fitting(model, read, least=longest)
        hidden = model.hidden_states(torch.tensor([text]), given=len(text) - longest + 1)
        last = [rows[-longest:] for rows in hidden]
        log_probs = torch.cat([part.ours for part in model.combiner.combined(last, settings)]).cpu()
        for after in continuations:
            own = log_probs[-len(after) :]
            yield own.gather(-1, after[:, None]).sum().item(), bool((own.argmax(-1) == after).all())


def fitting(model: ByteEnsembleForCausalLM, symbols: Sequence[int], *, least: int = 1, spare: int = 0) -> list[int]:
    """Leave out as many of a text's first bytes as do not fit into every member's context, whole characters.

    Args:
        model: the ensemble.
        symbols: the text, at least one symbol; only the first may be 256, which is kept.
        least: how many last symbols are kept even if they do not fit.
        spare: for how many tokens more each member must have room.
    """
    begun = symbols[0] == END
    text, least = bytes(symbols[begun:]), least - begun
    while (over := max(_over(reader.spelling, text, reader.room - spare) for reader in model.readers)) > 0:
        # A token has at least one byte, so that no more is left out than has to be.
        shorter = text[over:].lstrip(_WITHIN)
        if len(shorter) < least:
            break
        text = shorter
    return [*symbols[:begun], *text]


def _over(spelling: Spelling, text: bytes, room: int) -> int:
    """Return how many tokens a text has beyond ``room``; 0 or less if it fits."""
    return len(text) - room if len(text) <= room else len(spelling.encode(text)) - room


@torch.inference_mode()
def continuations(
    model: ByteEnsembleForCausalLM, contexts: Sequence[str], stop: Sequence[str], most: int, **options: Any
) -> list[str]:
    """Continue contexts, as one batch, each until it has a stop string or ``most`` tokens.

    Args:
        model: the ensemble; its own settings hold.
        contexts: texts; each loses as many first bytes as leave no room for ``most`` tokens in a member's context.
        stop: strings at the first of which a continuation ends; it is left in the text.
        most: the most tokens of a continuation, as the first member's tokenizer cuts it, at least 1.
        options: of transformers' ``generate``.

    Raises:
        InvalidInputError: if a member's context has no room for ``most`` tokens after a context of one.
    """
    room = min(reader.room for reader in model.readers)
    if most >= room:
        raise InvalidInputError(
            f"expected max_gen_toks below {room}, the tokens of the shortest member's context, got {most}"
        )
    rows = [fitting(model, list(context.encode()) or [END], spare=most) for context in contexts]
    width = max(map(len, rows))
    ids = torch.tensor([[END] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ended = _Ended(width, [text.encode() for text in stop])
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=most, pad_token_id=END,
        stopping_criteria=StoppingCriteriaList([ended]), **options,
    )  # fmt: skip
    return [ended.text(row).decode(errors="ignore") for row in made.tolist()]


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its new text has one of the strings ``stop``.

    Args:
        width: the number of symbols of every row's prompt, padding included.
    """

    def __init__(self, width: int, stop: Sequence[bytes]) -> None:
        self.width, self.stop = width, stop

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of the rows that have ended."""
        texts = [self.text(row) for row in input_ids.tolist()]
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)

    def text(self, row: Sequence[int]) -> bytes:
        """Return a row's new text: the bytes before its end."""
        new = list(row[self.width :])
        return bytes(new[: new.index(END)] if END in new else new)
