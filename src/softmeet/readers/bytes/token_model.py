"""A causal language model over tokens, as reading by bytes uses it: trees of tokens, and next tokens' probabilities."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.opaque import Head
from softmeet.members.spelling import Spelling
from softmeet.members.token_tree import Growth, Path, TokenTree, require_trees
from softmeet.members.token_tree import run as run_trees
from softmeet.readers.bytes.covers import END, SYMBOLS, NextTokenProbs
from softmeet.readers.reader import Work

# The least probability of a token: without it, rounding could leave all covers without mass.
_LEAST = torch.finfo(torch.float32).tiny
# Prefixes whose states are kept.
_PREFIXES = 16
# Logits that are normalised at once on a CPU.
_CACHED = 1 << 20


class TokenModel:
    """A causal language model that is run on trees of tokens, and gives the probabilities of tokens that spell bytes.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        spelling: what :func:`spelling_of` returns for the model's tokenizer.
        prefix: ids, at least one, of the tokens that precede each text for which no other prefix is given; None for
            ``spelling.start``, the tokenizer's own.

    Attributes:
        head: the model's output layer.
        limit: the number of tokens in its context, prefix included.
        ends: ids of the tokens that end a text.
        spent: the :class:`Work` for all texts, prefixes and a sample run on construction: calls of the model (one for
            several texts counts once), tokens run in them, and the shares of mass estimated in reading, summed.

    Raises:
        CheckpointError, InvalidInputError: if the model gives NaN; if it cannot read trees of tokens.
    """

    def __init__(self, model: PreTrainedModel, spelling: Spelling, prefix: Sequence[int] | None = None) -> None:
        self.model, self.spelling = model, spelling
        named = model.generation_config.eos_token_id
        self.ends = sorted({spelling.end, *(named if isinstance(named, list) else [named])} - {None})
        self.head: Head = head_of(model)
        require_trees(model)
        config = model.config.get_text_config(decoder=True)
        self.limit: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.prefix = list(self.spelling.start if prefix is None else prefix)
        self._columns = torch.tensor([*spelling.tokens.tolist(), *self.ends], device=self.head.device)
        self._prefixes: dict[tuple[int, ...], tuple[TokenTree, Tensor]] = {}
        self.spent = Work()

    def find_head_again(self) -> None:
        """Update ``head`` after the model has changed device or dtype, and forget the results of :meth:`behind`."""
        self.head = replace_weight(self.head, self.model)
        self._columns = self._columns.to(self.head.device)
        self._prefixes.clear()

    @property
    def room(self) -> int:
        """The number of bytes, at least 1, that fit into the model's context after ``prefix`` at a token per byte."""
        # The model may have to be run on one token more than the bytes make, and the dummy prefix is another.
        return max(1, self.limit - len(self.prefix) - 2)

    def behind(self, prefix: Sequence[int]) -> tuple[TokenTree, Float[Tensor, "1 d"]]:
        """Run a prefix, the ids of tokens before a text, and keep the result for later texts (of the 16 newest).

        Returns:
            (the prefix's keys and values as a tree of one path; (1, d), the last hidden state at its last token).

        Raises:
            InvalidInputError: if the prefix is empty, has an id that the model does not know, or exceeds its context.
        """
        key = tuple(prefix)
        if not key:
            raise InvalidInputError("expected a prefix of at least one token, such as the one that begins a text")
        known = range(self.head.v)
        if wrong := [token for token in key if isinstance(token, bool | str) or token not in known]:
            raise InvalidInputError(
                f"expected a prefix of token ids of {self.spelling.name}, from 0 to {self.head.v - 1}, got {wrong[0]!r}"
            )
        if key not in self._prefixes:
            tree, hidden = self.run_chain(key)
            for old in list(self._prefixes)[: 1 - _PREFIXES]:
                self._prefixes.pop(old, None)
            self._prefixes[key] = tree, hidden[-1:]
        return self._prefixes[key]

    def run_chain(self, tokens: Sequence[int], tree: TokenTree | None = None) -> tuple[TokenTree, Float[Tensor, "t d"]]:
        """Run a sequence of tokens after those of ``tree``, which must be a single sequence, in one call of the model.

        Args:
            tokens: t ids, at least one.
            tree: the keys and values of the tokens before them; None if there are none.

        Returns:
            (the tree with the new tokens; (t, d), the last hidden states at them).
        """
        tree = tree or TokenTree()
        ((tree, (hidden,)),) = self.run([Growth(tree, [np.arange(tree.columns)], [list(tokens)])])
        return tree, hidden

    def run(self, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
        """Run the tokens of one or more ``growths`` (:class:`Growth`) in one call of the model; count it in ``spent``.

        Returns:
            For each, (its tree with the new tokens; for each of its chains of t tokens, last hidden states, (t, d)).

        Raises:
            InvalidInputError: if a chain, with the tokens before it, is longer than the model's context.
        """
        pairs = [(path, own) for growth in growths for path, own in zip(growth.paths, growth.tokens, strict=True)]
        longest = max(len(path) + len(own) for path, own in pairs)
        if longest > self.limit:
            raise InvalidInputError(
                f"expected a text of at most {self.limit} tokens, the context of {self.spelling.name}, got {longest}: "
                "shorten the prompt or lower max_new_tokens"
            )
        self.spent = self.spent.and_(calls=1, tokens=sum(len(own) for _, own in pairs))
        with torch.inference_mode():
            return run_trees(self.model, growths)

    def next_token_probs(
        self, paths: Sequence[Path], places: Sequence[int], hidden: Sequence[Float[Tensor, " d"]]
    ) -> list[NextTokenProbs]:
        """Compute the next token's probabilities at k places from the last hidden states there.

        They sum to 1 over the tokens that spell bytes or end a text, and none is below 1.17e-38.

        Args:
            paths: for each place, the columns that the tokens before it have among the keys and values of its text's
                :class:`TokenTree`, first to last; they become ``path`` of the result.
            places: for each, the number of the text's bytes that these tokens spell; they become ``place``.
            hidden: (d,) for each, the last hidden state at the last of these tokens.
        """
        found, m = list[NextTokenProbs](), len(self.spelling.words)
        with torch.inference_mode():
            logits = self.head.logits(torch.stack([*hidden]))
        # Several passes over the vocabulary follow: a few rows at a time stay in the CPU's caches.
        size = _CACHED // self.head.v if logits.device.type == "cpu" else len(logits)
        for some in logits.split(max(1, size)):
            # A byte to which the member gives probability 0 may come all the same, and some cover has to continue then.
            own = some.gather(1, self._columns.expand(len(some), -1)).softmax(-1).clamp_min_(_LEAST)
            probs, (letters, where) = own.cpu().numpy(), self.spelling.beginnings
            roots = np.zeros((len(some), SYMBOLS))
            roots[:, letters] = np.add.reduceat(probs[:, :m], where, axis=1, dtype=np.float64)
            roots[:, END] = probs[:, m:].sum(1, dtype=np.float64)
            rows = slice(len(found), len(found) + len(some))
            found += [NextTokenProbs(*one) for one in zip(paths[rows], places[rows], probs[:, :m], roots, strict=True)]
        return found
