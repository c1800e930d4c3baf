"""From documents to the windows in which members read them.

Window k reads tokens [kS, kS + W) of its document and predicts, at each, the one that follows. Predictions that the
window before made already are not counted again, so every token but the first is predicted exactly once, from at least
W - S tokens past the first window. The stride S is at most the window W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """Token ids (T + 1,), and the UTF-8 bytes that each but the first adds to the text, (T,)."""

    name: str
    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " t"]


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a document are read; predictions at [first, stop) count."""

    document: int
    start: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
) -> list[TokenizedDocument]:
    """Token ids and byte counts of each document, cut to so many predictions; one of a single token is left out.

    Args:
        tokenizer: the members'.
        documents: in order.
        bos: put the token that begins a text before each, if the tokenizer has one and does not do so itself; the
            first word is then predicted too.
        max_tokens: predictions over all documents.
        max_per_document: predictions in each.

    Raises:
        InvalidInputError: no document has two tokens.
    """
    found, left = [], max_tokens if max_tokens is not None else -1
    for document in documents:
        if left == 0:
            break
        one = _tokenize(tokenizer, document, bos)
        limits = [limit for limit in (left, max_per_document) if limit is not None and limit >= 0]
        count = min([len(one.ids) - 1, *limits])
        if count < 1:
            continue
        found.append(TokenizedDocument(one.name, one.ids[: count + 1], one.sizes[:count]))
        left -= count if left > 0 else 0
    if not found:
        raise InvalidInputError("expected a text of at least two tokens: nothing can be predicted in a shorter one")
    return found


def _tokenize(tokenizer: PreTrainedTokenizerBase, document: Document, bos: bool) -> TokenizedDocument:
    fast = bool(getattr(tokenizer, "is_fast", False))
    out = tokenizer(document.text, verbose=False, return_offsets_mapping=fast)
    ids = list(out["input_ids"])
    total = len(document.text.encode())
    if fast:
        ends = _byte_ends(document.text, [end for _, end in out["offset_mapping"]])
    else:  # no offsets: bytes are spread evenly, and their sum is exact
        ends = [round(total * (k + 1) / max(len(ids), 1)) for k in range(len(ids))]
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    sizes = torch.tensor(ends, dtype=torch.int64).diff()
    return TokenizedDocument(document.name, torch.tensor(ids, dtype=torch.int64), sizes)


def _byte_ends(text: str, ends: list[int]) -> list[int]:
    """Character positions to byte positions, never falling: special tokens have none of their own."""
    if text.isascii():
        places = range(len(text) + 1)
    else:
        lengths = torch.tensor([len(c.encode()) for c in text]).cumsum(0).tolist()
        places = [0, *lengths]  # type: ignore[assignment]
    return list(accumulate((places[end] for end in ends), max))


def window_length(limit: int | None, default: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride): what was asked for, or the default without overlap.

    Raises:
        InvalidInputError: the window does not fit the context, or the stride does not fit the window.
    """
    found = default if window is None else window
    if found < 1 or (limit is not None and found > limit):
        raise InvalidInputError(
            f"expected a window from 1 to {limit or 'any'} tokens, the shortest member's context, got {found}"
        )
    step = found if stride is None else stride
    if not 1 <= step <= found:
        raise InvalidInputError(f"expected a stride from 1 to the window of {found} tokens, got {step}")
    return found, step


def cut(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    window: int | None = None,
    stride: int | None = None,
    **limits: Any,
) -> tuple[list[TokenizedDocument], int, int]:
    """Cut documents into what an ensemble reads: (their tokens, or bytes; the window; the stride).

    Args:
        ensemble: whose tokenizer and context count.
        documents: in order.
        window: tokens that a member reads at once; None for ``model.window``.
        stride: from one window to the next; None for the window.
        limits: ``bos``, ``max_tokens`` and ``max_per_document`` of :func:`tokenize`.

    Raises:
        InvalidInputError: the text is too short, or window and stride do not fit.
    """
    model = ensemble.model
    limit = getattr(model.config, "max_position_embeddings", None)
    return tokenize(ensemble.tokenizer, documents, **limits), *window_length(limit, model.window, window, stride)


def windows(documents: Sequence[TokenizedDocument], window: int, stride: int) -> Iterator[Window]:
    """The windows of every document, in order."""
    for k, document in enumerate(documents):
        length, done = len(document.ids) - 1, 0
        for start in range(0, length, stride):
            stop = min(start + window, length)
            if stop > done:
                yield Window(k, start, max(start, done), stop)
                done = stop


def grouped(found: Iterable[Window], size: int, *, by_document: bool) -> list[list[Window]]:
    """Windows in order, in groups of at least ``size`` positions; the last, and ends of documents, may have fewer.

    Args:
        found: the windows.
        size: positions.
        by_document: let no group hold windows of two documents.
    """
    groups: list[list[Window]] = []
    for window in found:
        last = groups[-1] if groups else None
        crosses = by_document and last is not None and last[0].document != window.document
        if last is None or crosses or sum(map(len, last)) >= size:
            groups.append([window])
        else:
            last.append(window)
    return groups


@dataclass(frozen=True, eq=False)
class Reading:
    """A window by itself: its tokens and the one that follows, (t + 1,), the last k of which are predicted.

    ``sizes``, (k,), are bytes, and ``place`` says which document of the whole text it is of.
    """

    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " k"]
    place: int


def readings(documents: Sequence[TokenizedDocument], read: Sequence[Window]) -> list[Reading]:
    """Some windows with what they read of a text, and no more."""
    found = []
    for window in read:
        document = documents[window.document]
        ids, sizes = document.ids[window.start : window.stop + 1], document.sizes[window.first : window.stop]
        found.append(Reading(ids.clone(), sizes.clone(), window.document))
    return found


def text_hash(documents: Sequence[TokenizedDocument]) -> str:
    """SHA-256 over names, token ids and bytes."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0")
        digest.update(document.ids.numpy().tobytes())
        digest.update(document.sizes.numpy().tobytes())
    return digest.hexdigest()
