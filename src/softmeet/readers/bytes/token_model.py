"""A causal language model over tokens, as reading by bytes uses it: chains of tokens, next tokens' probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.opaque import Head
from softmeet.members.reader_model import ReaderModel
from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.covers import Pruning
from softmeet.readers.bytes.next_tokens import END, LEAST, RULED_OUT, SYMBOLS, NextTokenProbs
from softmeet.readers.bytes.nodes import Chain, Next, Rows
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.kv import require_trees
from softmeet.readers.reader import Reader, Work
from softmeet.readers.transformers import TransformersReader

# Logits that are normalised at once on a CPU.
_CACHED = 1 << 20


class TokenModel:
    """A causal language model that is run on chains of tokens, and gives the probabilities of tokens that spell bytes.

    Args:
        model: a causal LM of transformers, in evaluation mode; or a reader of its tokens that can fork and crop.
        spelling: what :func:`spelling_of` returns for the model's tokenizer.
        pruning: which tokenizations of a text are followed.
        prefix: ids, at least one, of the tokens that precede each text for which no other prefix is given; None for
            ``spelling.start``, the tokenizer's own.

    Attributes:
        model, pruning: as given; of a reader its ``model``, None if it has none.
        assets: the folder for what is derived from the model; None to keep nothing.
        head: the model's output layer; None of a reader that has none.
        limit: the number of tokens in its context, prefix included.
        ends: ids of the tokens that end a text.
        spent: the :class:`Work` for all texts, prefixes and a sample run on construction: calls of the model (one for
            several texts counts once), tokens run in them, and the shares of mass estimated in reading, summed.

    Raises:
        CheckpointError, InvalidInputError: if the model gives NaN; if it cannot read trees of tokens; if a reader
            cannot fork or crop.
    """

    def __init__(
        self, model: PreTrainedModel | Reader, spelling: Spelling, pruning: Pruning, prefix: Sequence[int] | None
    ) -> None:
        self.spelling, self.pruning = spelling, pruning
        self.model: Any = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
        self.assets: Path | None = getattr(self.model, "assets", None)
        reader = model if isinstance(model, Reader) else _reader(model, head_of(model), spelling.name)
        if not (reader.traits.can_fork and reader.traits.can_crop):
            raise InvalidInputError(
                f"expected a reader that can fork rows and take back what it has read, as members of different "
                f"tokenizers are read over bytes, which {reader.name} cannot: keep a state for each symbol, or choose "
                "members with its tokens"
            )
        if reader.traits.known is not None:
            raise InvalidInputError(
                f"expected members that tell every token, as over bytes all that begin alike are summed, and "
                f"{reader.name} tells the {reader.traits.known} likeliest alone: ask for all by +top=all, where the "
                "server tells them, or choose members with its tokens"
            )
        self._tells = reader.head is None
        self.head: Any = head_of(model) if isinstance(model, ReaderModel) else reader.head
        self.ends = sorted(reader.alphabet.ends | ({spelling.end} if spelling.end is not None else set()))
        self.limit = reader.limit
        self.prefix = list(self.spelling.start if prefix is None else prefix)
        self._v = reader.alphabet.size
        self._columns = torch.tensor([*spelling.tokens.tolist(), *self.ends])
        self._rows = Rows(reader)
        self.spent = Work()

    @property
    def reader(self) -> Reader:
        """The reader of the tokens, in whose rows texts are read."""
        return self._rows.reader

    def find_head_again(self) -> None:
        """Take ``head`` anew after the model has changed device or dtype; what was read before cannot be read on."""
        self.head = replace_weight(self.head, self.model)
        self._rows = Rows(_reader(self.model, self.head, self.spelling.name))

    @property
    def room(self) -> int:
        """The number of bytes, at least 1, that fit into the model's context after ``prefix`` at a token per byte."""
        # The model may have to be run on one token more than the bytes make, and the dummy prefix is another.
        return max(1, self.limit - len(self.prefix) - 2)

    def require_prefix(self, prefix: Sequence[int]) -> None:
        """Check the ids of tokens before a text.

        Raises:
            InvalidInputError: if there are none, the model does not know one, or they exceed its context.
        """
        if not prefix:
            raise InvalidInputError("expected a prefix of at least one token, such as the one that begins a text")
        known = range(self._v)
        if wrong := [token for token in prefix if isinstance(token, bool | str) or token not in known]:
            raise InvalidInputError(
                f"expected a prefix of token ids of {self.spelling.name}, from 0 to {self._v - 1}, got {wrong[0]!r}"
            )
        self._require_room(len(prefix))

    def behind(self, prefix: Sequence[int]) -> Next:
        """Return what follows a prefix, the ids of tokens before a text; the reader keeps it for later texts.

        Raises:
            InvalidInputError: as of :meth:`require_prefix`.
        """
        self.require_prefix(prefix)
        return self.run_chain(prefix, (), (0,))[0]

    def run_chain(self, prefix: Sequence[int], tokens: Sequence[int], at: Sequence[int]) -> list[Next]:
        """Run a sequence of tokens after a prefix, in one call of the model, or none if all is known.

        Args:
            prefix: the ids of tokens before a text, at least one.
            tokens: the ids of the t that follow.
            at: behind how many of these the predictions of next tokens are wanted, 0 to t, ascending.
        """
        self._require_room(len(prefix) + len(tokens))
        found, work = self._rows.begin(prefix, tokens, at)
        self.spent = self.spent.and_(work.calls, work.tokens)
        return found

    def run(self, texts: Sequence[Sequence[Chain]]) -> list[list[list[Next]]]:
        """Run chains of tokens of one or more texts in one call of the model; count it in ``spent``.

        Returns:
            For each text, for each of its chains, the predictions of next tokens that are wanted along it.

        Raises:
            InvalidInputError: if a chain, with the tokens before it, is longer than the model's context.
        """
        chains = [chain for own in texts for chain in own]
        self._require_room(max(chain.length for chain in chains))
        ran, work = self._rows.run(chains)
        self.spent, found = self.spent.and_(work.calls, work.tokens), iter(ran)
        return [[next(found) for _ in own] for own in texts]

    def _require_room(self, tokens: int) -> None:
        if tokens > self.limit:
            raise InvalidInputError(
                f"expected a text of at most {self.limit} tokens, the context of {self.spelling.name}, got {tokens}: "
                "shorten the prompt or lower max_new_tokens"
            )

    def logits(self, behind: Sequence[Next]) -> Float[Tensor, "k v"]:
        """Compute the logits of the next tokens at k ≥ 1 places, in nats."""
        with torch.inference_mode():
            parts = list[Tensor]()
            for _, group in groupby(behind, lambda one: id(one.told)):
                own = list(group)
                told, numbers = own[0].told, [one.number for one in own]
                places = slice(None) if numbers == [*range(len(told))] else torch.tensor(numbers)
                parts.append(told.logits(places) if self._tells else told.hidden(places))
            found = torch.cat(parts) if len(parts) > 1 else parts[0]
            return found if self._tells else self.head.logits(found)

    def next_token_probs(self, behind: Sequence[Next], places: Sequence[int]) -> list[NextTokenProbs]:
        """Compute the next token's probabilities at k places.

        They sum to 1 over the tokens that spell bytes or end a text, and none is below 1.17e-38 but those that have a
        logit of -inf, for which ``RULED_OUT`` stands.

        Args:
            behind: the predictions; their paths become ``path`` of the result.
            places: for each, the number of the text's bytes that the tokens spell; they become ``place``.
        """
        found, m = list[NextTokenProbs](), len(self.spelling.words)
        logits = self.logits(behind)
        paths, columns = [one.path for one in behind], self._columns.to(logits.device)
        # Several passes over the vocabulary follow: a few rows at a time stay in the CPU's caches.
        size = _CACHED // self._v if logits.device.type == "cpu" else len(logits)
        for some in logits.split(max(1, size)):
            chosen = some.index_select(1, columns)
            probs, out = chosen.softmax(-1).cpu().numpy(), (chosen == -torch.inf).cpu().numpy()
            np.maximum(probs, LEAST, out=probs)
            probs[out] = 0.0
            letters, where = self.spelling.beginnings
            roots = np.zeros((len(some), SYMBOLS))
            roots[:, letters] = np.add.reduceat(probs[:, :m], where, axis=1, dtype=np.float64).clip(RULED_OUT)
            if self.ends:
                roots[:, END] = probs[:, m:].sum(1, dtype=np.float64).clip(RULED_OUT)
            probs[out] = RULED_OUT
            rows = slice(len(found), len(found) + len(some))
            found += [NextTokenProbs(*one) for one in zip(paths[rows], places[rows], probs[:, :m], roots, strict=True)]
        return found


def _reader(model: PreTrainedModel, head: Head, name: str) -> Reader:
    """Make the reader of a model's tokens, which reads those of all texts in one call."""
    if isinstance(model, ReaderModel):
        return GuardedReader(model.reader)
    require_trees(model)
    return TransformersReader(model, None, name, kept_tokens=0, head=head, at_once=True)
