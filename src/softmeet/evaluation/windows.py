"""Cut documents into the windows in which members read them.

Window k reads tokens [kS, kS + W) of its document and predicts, at each, the one that follows. Predictions that the
window before made already are not counted again, so every token but the first is predicted exactly once, from at least
W - S tokens past the first window. The stride S is at most the window W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document


class Windowing(TypedDict, total=False):
    """Keyword arguments of :func:`cut`, which all functions that read a text take."""

    window: int | None
    stride: int | None
    bos: bool
    max_tokens: int | None
    max_per_document: int | None


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """Token ids (T + 1,), and the UTF-8 bytes that each but the first adds to the text, (T,)."""

    name: str
    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " t"]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens that are read at once.

    Attributes:
        document: the document's place in the text.
        ids: the tokens that are read and the one that follows, (t + 1,); the last k of them are predicted.
        sizes: UTF-8 bytes of each predicted token, (k,).
    """

    document: int
    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " k"]

    def __len__(self) -> int:
        return len(self.sizes)


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
) -> list[TokenizedDocument]:
    """Return token ids and byte counts of each document; one of a single token is left out.

    Args:
        tokenizer: the members'.
        documents: in order.
        bos: put the token that begins a text before each, if the tokenizer has one and does not do so itself; the
            first word is then predicted too.
        max_tokens: the most predictions over all documents.
        max_per_document: the most predictions in each.

    Raises:
        InvalidInputError: no document has two tokens.
    """
    found, left = [], max_tokens if max_tokens is not None else -1
    for document in documents:
        if left == 0:
            break
        one = _tokenize(tokenizer, document, bos)
        limits = [limit for limit in (left, max_per_document) if limit is not None and limit >= 0]
        count = min([len(one.sizes), *limits])
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
    places = list(accumulate((len(c.encode()) for c in document.text), initial=0))
    if fast:  # special tokens have no place of their own, so that ends must be kept from falling
        ends = list(accumulate((places[end] for _, end in out["offset_mapping"]), max))
    else:  # no offsets: bytes are spread evenly, and their sum is exact
        ends = [round(places[-1] * (k + 1) / len(ids)) for k in range(len(ids))]
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    sizes = torch.tensor(ends, dtype=torch.int64).diff()
    return TokenizedDocument(document.name, torch.tensor(ids, dtype=torch.int64), sizes)


def cut(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    window: int | None = None,
    stride: int | None = None,
    **limits: Any,
) -> tuple[list[TokenizedDocument], int, int]:
    """Tokenize documents for an ensemble, and say in which windows it reads them.

    Args:
        ensemble: whose tokenizer and context count.
        documents: in order.
        window: tokens that a member reads at once; None for the shortest member's context, 1,024 at most.
        stride: tokens from one window to the next; None for the window, so that windows do not overlap.
        limits: ``bos``, ``max_tokens`` and ``max_per_document`` of :func:`tokenize`.

    Returns:
        (the documents' tokens, or bytes over bytes; the window; the stride).

    Raises:
        InvalidInputError: the text is too short, the window does not fit the members' context, or the stride does not
            fit the window.
    """
    tokens = tokenize(ensemble.tokenizer, documents, **limits)
    limit = getattr(ensemble.model.config, "max_position_embeddings", None)
    window = ensemble.model.window if window is None else window
    if window < 1 or (limit is not None and window > limit):
        raise InvalidInputError(
            f"expected a window from 1 to {limit or 'any'} tokens, the shortest member's context, got {window}"
        )
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise InvalidInputError(f"expected a stride from 1 to the window of {window} tokens, got {stride}")
    return tokens, window, stride


def windows(documents: Sequence[TokenizedDocument], window: int, stride: int) -> Iterator[Window]:
    """Yield the windows of every document, in order.

    Args:
        documents: as :func:`tokenize` gives them.
        window, stride: in tokens; the stride is at most the window.

    >>> document = TokenizedDocument("a", torch.arange(8), torch.ones(7, dtype=torch.int64))
    >>> [(w.ids.tolist(), len(w)) for w in windows([document], 4, 2)]
    [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7], 1)]
    """
    for k, document in enumerate(documents):
        length, done = len(document.sizes), 0
        for start in range(0, length, stride):
            stop = min(start + window, length)
            if stop > done:
                yield Window(k, document.ids[start : stop + 1], document.sizes[done:stop])
                done = stop


def grouped(found: Iterable[Window], size: int, *, by_document: bool) -> list[list[Window]]:
    """Put windows, in order, in groups of at least ``size`` predictions each; the last group may have fewer.

    Args:
        found: the windows.
        size: predictions in a group.
        by_document: let no group hold windows of two documents; the last of each document may then have fewer.
    """
    groups: list[list[Window]] = []
    for window in found:
        last = groups[-1] if groups else []
        if sum(map(len, last)) >= size or not last or (by_document and last[0].document != window.document):
            groups.append([])
        groups[-1].append(window)
    return groups


def text_hash(documents: Sequence[TokenizedDocument]) -> str:
    """Compute SHA-256 over the names, token ids and byte counts of documents."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0")
        digest.update(document.ids.numpy().tobytes())
        digest.update(document.sizes.numpy().tobytes())
    return digest.hexdigest()
