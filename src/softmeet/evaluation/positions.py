"""Positions: the members' hidden states over a text, from which every rule can be tried without running a model again.

Documents are cut into windows, and a member reads a window at once. With window W and stride S ≤ W, window k reads the
tokens [kS, kS + W) of its document and predicts the token after each. A token that the window before predicted is not
predicted again. So every token but the first is predicted exactly once; in all windows but the first from at least
W - S tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.claimed import claims_of
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache, Tensors, join_tensors
from softmeet.hf.running import claims_once, read_once
from softmeet.readers.reader import Predictions
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

# About how many positions a piece has: enough to be worth sending to a worker, few enough to lose if a run is stopped.
PIECE = 256
_OF_TEXT, _BY_MEMBER = ("targets", "document", "sizes"), ("hidden", "costs", "claims")


class Windowing(TypedDict, total=False):
    """The keyword arguments that say how a text is cut into windows.

    Attributes:
        window: tokens that a member reads at once; None, the default, for the shortest member's context, at most 1,024
            (over bytes: the bytes that fit every context, at most 4,096).
        stride: tokens from one window's start to the next; None, the default, for ``window``, so that windows do not
            overlap.
        bos: whether to put the token that begins a text before each document, unless the tokenizer has none or does so
            already; the document's own first token is then predicted, too. False by default.
        max_tokens: the most predictions in all documents together; later tokens are left out. None, the default, for no
            limit.
        max_per_document: the most predictions in each document; None, the default, for no limit.
    """

    window: int | None
    stride: int | None
    bos: bool
    max_tokens: int | None
    max_per_document: int | None


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as T + 1 tokens; all but the first are predicted.

    Attributes:
        name: the document's name.
        ids: token ids, (T + 1,), int64; over bytes, symbols.
        sizes: the UTF-8 bytes of text that each token but the first adds, (T,), int64.
    """

    name: str
    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " t"]


@dataclass(frozen=True, eq=False)
class Window:
    """A window of one document: t tokens that members read at once, and the k that are predicted.

    Attributes:
        document: the document's index in the text.
        ids: the t tokens that are read and the one after them, (t + 1,), int64; the last k of these are predicted.
        sizes: the UTF-8 bytes of text that each predicted token adds, (k,).
    """

    document: int
    ids: Int[Tensor, " ids"]
    sizes: Int[Tensor, " k"]

    def __len__(self) -> int:
        return len(self.sizes)


def cut(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
) -> tuple[list[TokenizedDocument], int, int]:
    """Tokenize documents for an ensemble, and settle the window and the stride in which it reads them.

    Args:
        ensemble: supplies the tokenizer and the context length.
        documents: the text, in order; a document of fewer than two tokens is left out.
        window: as in :class:`Windowing`, as are the next four.
        stride: how far the window moves on.
        bos: whether each document begins with the token that begins a text.
        max_tokens: how many tokens are predicted in all.
        max_per_document: how many are predicted in one document.

    Returns:
        (the tokenized documents; the window; the stride), the last two in tokens, or in bytes over bytes.

    Raises:
        InvalidInputError: if no document has two tokens, the window does not fit the members' context, or the stride is
            not from 1 to the window.
    """
    left, in_each = (math.inf if most is None else most for most in (max_tokens, max_per_document))
    tokens = []
    for document in documents:
        if left <= 0:
            break
        one = tokenize(ensemble.tokenizer, document, bos=bos)
        most = int(min(len(one.sizes), left, in_each))
        if most > 0:
            tokens.append(TokenizedDocument(one.name, one.ids[: most + 1], one.sizes[:most]))
            left -= most
    if not tokens:
        raise InvalidInputError("expected a text of at least two tokens: nothing can be predicted in a shorter one")
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


def tokenize(tokenizer: PreTrainedTokenizerBase, document: Document, *, bos: bool = False) -> TokenizedDocument:
    """Return the token ids of a document, and the UTF-8 bytes of text that each token after the first adds.

    The bytes are exact with a fast tokenizer; else they are spread evenly over the tokens, and only their sum is exact.

    Args:
        tokenizer: the members' tokenizer.
        document: the text.
        bos: whether to put the token that begins a text before it, unless the tokenizer has none or does so already.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    out = tokenizer(document.text, verbose=False, return_offsets_mapping=fast)
    ids = list(out["input_ids"])
    places = list(accumulate((len(c.encode()) for c in document.text), initial=0))
    if fast:  # special tokens have no place in the text: keep ends from falling at them
        ends = list(accumulate((places[end] for _, end in out["offset_mapping"]), max))
    else:  # no offsets: bytes are spread evenly, and their sum is exact
        ends = [round(places[-1] * (k + 1) / len(ids)) for k in range(len(ids))]
    if bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    sizes = torch.tensor(ends, dtype=torch.int64).diff()
    return TokenizedDocument(document.name, torch.tensor(ids, dtype=torch.int64), sizes)


def windows(documents: Sequence[TokenizedDocument], window: int, stride: int) -> Iterator[Window]:
    """Yield the windows of every document, in order.

    Args:
        documents: tokenized, as :func:`cut` returns them.
        window: the most tokens that are read at once.
        stride: tokens from one window's start to the next, at most ``window``.

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


def grouped(
    documents: Sequence[TokenizedDocument], window: int, stride: int, size: int, *, by_document: bool
) -> list[list[Window]]:
    """Put the windows of documents, in order, into groups of at least ``size`` predictions; the last may have fewer.

    Args:
        documents: what :func:`cut` returns first.
        window: what it returns second.
        stride: what it returns third.
        size: the least number of predictions in a group.
        by_document: whether each document starts a new group; the last group of each may then have fewer predictions.
    """
    groups: list[list[Window]] = []
    for found in windows(documents, window, stride):
        last = groups[-1] if groups else []
        if sum(map(len, last)) >= size or not last or (by_document and last[0].document != found.document):
            groups.append([])
        groups[-1].append(found)
    return groups


@dataclass(frozen=True, eq=False)
class Positions:
    """N positions of a text: each member's hidden states, and the tokens that came.

    Attributes:
        hidden: each member's last hidden states, (N, d_i), one tensor a member, row k that from which target k is
            predicted; an empty list if they are no longer needed. Of members without output layers, as over bytes,
            log-probabilities in nats stand in for them.
        targets: the tokens that came, (N,), int64.
        document: the document of each position, an index into ``names``, (N,), int64.
        sizes: the number of UTF-8 bytes of text that each target adds, (N,), int64.
        names: the documents' names.
        costs: of each member that leaves out some probability mass, as over bytes, what reading has cost, (N, 3) fp64:
            the share of mass that was estimated or dropped there and, at the last position of a window, the calls of
            the model and the tokens that were run in them for the whole window, elsewhere zeros. Else an empty list.
        claims: of each reader that claims, what it tells of the targets, (N, 2), as of
            :func:`softmeet.evaluation.claimed.claims_of`; an empty list if there is none, or ``hidden`` has its states.
    """

    hidden: list[Tensor]
    targets: Int[Tensor, " N"]
    document: Int[Tensor, " N"]
    sizes: Int[Tensor, " N"]
    names: list[str]
    costs: list[Float[Tensor, "N 3"]] = field(default_factory=list)
    claims: list[Float[Tensor, "N 2"]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: slice | Tensor) -> Positions:
        """Return the positions at ``rows`` (a slice, indices or a mask), in that order."""
        own: dict[str, Any] = {name: [one[rows] for one in getattr(self, name)] for name in _BY_MEMBER}
        return Positions(**own | {name: getattr(self, name)[rows] for name in _OF_TEXT}, names=self.names)

    def chunks(self, size: int) -> Iterator[Positions]:
        """Yield all positions, in order, ``size`` at a time; the last chunk may be smaller."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def tensors(self) -> Tensors:
        """Return all tensors on the CPU by name: ``targets``, ``document``, ``sizes``, and ``hidden 0`` and so on."""
        found = {name: getattr(self, name).cpu() for name in _OF_TEXT}
        return found | {f"{name} {i}": own.cpu() for name in _BY_MEMBER for i, own in enumerate(getattr(self, name))}


def from_tensors(found: Tensors, names: list[str]) -> Positions:
    """Make positions from the tensors that :meth:`Positions.tensors` returned, ignoring others in ``found``.

    Args:
        found: tensors by name: ``targets``, ``document``, ``sizes`` and, for each member i from 0, ``hidden i`` and
            maybe ``costs i``, and ``claims i`` for each reader that claims.
        names: the documents' names, which ``document`` indexes.
    """
    own: dict[str, Any] = {
        name: [found[f"{name} {i}"] for i in range(sum(key.startswith(f"{name} ") for key in found))]
        for name in _BY_MEMBER
    }
    return Positions(**own | {name: found[name] for name in _OF_TEXT}, names=names)


def join(parts: Sequence[Positions], names: list[str]) -> Positions:
    """Join one or more runs of positions, in order, to one; ``names`` are the documents' names that all parts index."""
    own: dict[str, Any] = {
        name: [torch.cat(one) for one in zip(*(getattr(part, name) for part in parts), strict=True)]
        for name in _BY_MEMBER
    }
    own |= {name: torch.cat([getattr(part, name) for part in parts]) for name in _OF_TEXT}
    return Positions(**own, names=names)


@torch.no_grad()  # not inference mode: a fit's graph may hold these tensors
def observe(
    ensemble: Ensemble,
    read: Sequence[Window],
    advance: Callable[[int], object] = lambda count: None,
    *,
    mixed: bool = False,
) -> Positions:
    """Run every member over some windows, one window at a time, and keep its hidden states.

    Args:
        ensemble: the members.
        read: at least one window, as :func:`windows` yields them or as a group of :func:`grouped`.
        advance: called when a member has read a window, with its share of the window's positions.
        mixed: whether ``hidden`` has the states of readers that claim, too, so that rules are solved with them.

    Returns:
        The predicted positions of all windows, in order, on the ensemble's device; ``names`` is empty.
    """
    parts, n = [], len(ensemble.names)
    for window in read:
        ids, predicted = window.ids.to(ensemble.model.device), slice(-len(window), None)
        told = read_once(ensemble.model, ids[None, :-1], partial(_advanced, advance, len(window), n))
        more = claims_once(ensemble.model, ids[None, :-1]) if mixed else []
        hidden = [one.states()[predicted] for one in (*told, *more)]
        costs = [own[predicted] for own in map(_costs, told) if len(own)]
        claims = [] if mixed else claims_of(ensemble.model, ids, len(window))
        document, sizes = torch.full_like(ids[predicted], window.document), window.sizes.to(ids.device)
        parts.append(Positions(hidden, ids[predicted], document, sizes, [], costs, claims))
    return join(parts, [])


def _advanced(advance: Callable[[int], object], count: int, n: int, member: int) -> None:
    """Call ``advance`` with the share of one of n members in ``count`` positions; all shares sum to ``count``."""
    advance(count * (member + 1) // n - count * member // n)


def _costs(told: Predictions) -> Float[Tensor, "_ 3"]:
    """Return what reading a window has cost, as :attr:`Positions.costs` has it; (0, 3) if nothing was left out."""
    if told.dropped is None:
        return torch.zeros(0, 3)
    spent = torch.tensor([[told.work.calls, told.work.tokens]]).double()
    return torch.cat((told.dropped[:, None], pad(spent, (0, 0, len(told) - 1, 0))), 1)


def observe_text(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda count: None,
    **windowing: Unpack[Windowing],
) -> Positions:
    """Tokenize documents, run every member over them, and return the positions with hidden states, on the CPU.

    Args:
        ensemble: the members.
        documents: the text.
        engine: runs the members, a piece of about 256 positions in each call; None for this process.
        cache: keeps finished pieces, and supplies those that an earlier run finished; None to keep nothing.
        begin: called in this process with the number of positions; returns a function that is called with the number
            of positions that are done: first those that the cache supplies, then of each piece when it is done, or in
            this process of each window when a member has read it, in any thread.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as in :class:`Windowing`.

    Raises:
        InvalidInputError: if the text is too short, or window and stride do not fit.
    """
    tokens, window, stride = cut(ensemble, documents, **windowing)
    groups = grouped(tokens, window, stride, PIECE, by_document=False)
    advance, here = begin(sum(len(t.sizes) for t in tokens)), engine is None or isinstance(engine, LocalEngine)
    of_cache = True

    def done(some: Sequence[Sequence[Window]]) -> None:
        nonlocal of_cache
        if of_cache or not here:
            advance(sum(map(len, chain.from_iterable(some))))
        of_cache = False

    found = (cache or PieceCache()).map(
        engine, "observe", _observe_piece, groups, lambda group: (ensemble, group, *[advance] * here), done
    )
    return from_tensors(join_tensors(found), [t.name for t in tokens])


def _observe_piece(ensemble: Ensemble, read: Sequence[Window], *advance: Callable[[int], object]) -> Tensors:
    return observe(ensemble, read, *advance).tensors()
