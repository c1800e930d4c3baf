"""A member over bytes: the probabilities of a text's next byte, from a model of tokens underneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.members.covers import (
    END,
    SYMBOLS,
    Asked,
    Cover,
    Covers,
    Masses,
    Open,
    Pruning,
    by_symbol,
    closed,
    followed,
    prediction,
    wanted,
)
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.known_text import KnownText
from softmeet.members.spelling import spelling_of
from softmeet.members.token_tree import Growth, Path, TokenTree
from softmeet.members.token_tree import run as run_trees

# The least probability of a token: without it, masses of all covers could be rounded to nothing.
_LEAST = 1e-300
# Bytes before the end of a prompt from which all tokenizations are followed; before them, the tokenizer's alone.
_LOOK_BACK = 64


@dataclass
class Work:
    """What bytes have cost: calls of the model, tokens that it ran in them, bytes, and mass that was estimated."""

    calls: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped: float = 0.0


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as one member has read it so far: ``covers`` of all its bytes, and what the model keeps of them."""

    covers: Covers
    tree: TokenTree
    text: bytes
    ended: bool = False


class ByteMember:
    """A token model, read byte by byte.

    Args:
        name: for messages.
        model: in evaluation mode.
        tokenizer: a fast one that loses no bytes.
        pruning: how far tokenizations are followed.
        prefix: tokens that stand before every text in place of the tokenizer's own.

    Raises:
        VocabularyMismatchError: the tokenizer changes text, or cannot write every byte.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pruning: Pruning | None = None,
        prefix: Sequence[int] | None = None,
    ) -> None:
        self.name, self.model, self.pruning = name, model, pruning or Pruning()
        self.spelling = spelling_of(name, tokenizer, model)
        self.head: SoftmaxHead = head_of(model)
        self.prefix = list(self.spelling.start if prefix is None else prefix)
        self.work = Work()
        columns = [*self.spelling.tokens.tolist(), *self.spelling.ends]
        self._columns = torch.tensor(columns, device=self.head.weight.device)
        self._first = self.spelling.flat[self.spelling.offsets[:-1]]

    def find_head_again(self) -> None:
        """Read the model's output layer where it is now."""
        self.head = replace_weight(self.head, self.model)
        self._columns = self._columns.to(self.head.weight.device)

    def begin(self, text: bytes) -> Reading:
        """Read a prompt: all tokenizations of its end, behind the tokenizer's own of what comes before."""
        return self._read(text, everything=False)[0]

    def score(self, text: bytes) -> tuple[Reading, Float[np.ndarray, "t 257"]]:
        """Read a text, and the log-probabilities in nats of every byte's alternatives, of the first byte's too."""
        reading, found = self._read(text, everything=True)
        with np.errstate(divide="ignore"):
            return reading, np.log(found)

    def log_probs(self, readings: Sequence[Reading]) -> Float[Tensor, "B 257"]:
        """The next symbol's log-probabilities in nats, fp64; 256 is the end, and all that follows the end."""
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(np.stack([self._predict(reading) for reading in readings])))

    def _predict(self, reading: Reading) -> Masses:
        return np.eye(SYMBOLS)[END] if reading.ended else prediction(self.spelling, reading.covers)

    def advance(self, readings: Sequence[Reading], symbols: Sequence[int]) -> list[Reading]:
        """Each text with one more byte, or ended; all that the model has to be asked goes through it in one batch."""
        found = list(readings)
        for k, (reading, symbol) in enumerate(zip(readings, symbols, strict=True)):
            if symbol == END or reading.ended:
                found[k] = replace(reading, ended=True)
                continue
            text = reading.text + bytes([symbol])
            if symbol in self.spelling.unwritable:
                found[k] = replace(reading, text=text)
                continue
            covers = followed(self.spelling, reading.covers, symbol, self.pruning)
            self.work.bytes += 1
            found[k] = Reading(covers, reading.tree, text)
        return self._settled(found)

    def _settled(self, readings: list[Reading]) -> list[Reading]:
        """Ask about all open covers that count."""
        while True:
            asking = {k: wanted(r.covers, self.pruning) for k, r in enumerate(readings) if not r.ended}
            asking = {k: opened for k, opened in asking.items() if opened}
            if not asking:
                break
            growths = [
                Growth(readings[k].tree, [o.asked.path for o in opened], [[o.token] for o in opened])
                for k, opened in asking.items()
            ]
            hidden = self.run(growths)
            for (k, opened), (tree, states) in zip(asking.items(), hidden, strict=True):
                before = readings[k].tree.columns
                paths = [np.append(o.asked.path, before + i) for i, o in enumerate(opened)]
                answers = list(zip(opened, self.asked(paths, torch.cat(states)), strict=True))
                covers = closed(self.spelling, readings[k].covers, answers, self.pruning)
                readings[k] = replace(readings[k], covers=covers, tree=tree)
        for k, reading in enumerate(readings):
            if not reading.ended:
                self.work.dropped += reading.covers.unasked
                readings[k] = _compact(reading)
        return readings

    def run(self, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
        """Run tokens, and count them."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        pairs = [(path, own) for growth in growths for path, own in zip(growth.paths, growth.tokens, strict=True)]
        longest = max(len(path) + len(own) for path, own in pairs)
        if limit is not None and longest > limit:
            raise InvalidInputError(
                f"expected a text of at most {limit} tokens, the context of {self.name}, got {longest}: shorten the "
                "prompt or lower max_new_tokens"
            )
        self.work.calls += 1
        self.work.tokens += sum(len(tokens) for growth in growths for tokens in growth.tokens)
        with torch.inference_mode():
            return run_trees(self.model, growths)

    def asked(self, paths: Sequence[Path], hidden: Float[Tensor, "k d"]) -> list[Asked]:
        """The next token's probabilities behind each path."""
        with torch.inference_mode():
            logits = self.head.logits(hidden)[:, self._columns].double()
            # A byte that a member holds for impossible may come all the same: something has to be left to go on from.
            probs = logits.softmax(-1).clamp_min(_LEAST).cpu().numpy()
        m = len(self.spelling.words)
        found = []
        for path, own in zip(paths, probs, strict=True):
            root = by_symbol(self._first, own[:m])
            root[END] = own[m:].sum()
            found.append(Asked(path, own[:m], root))
        return found

    def _read(self, text: bytes, *, everything: bool) -> tuple[Reading, Masses]:
        """Read a text whose bytes are all known, in one call for the tokenizer's tokens and few for others.

        Returns:
            (the text as read; the probabilities of each byte's alternatives and of what comes after the text, if
            everything is wanted).
        """
        spelling, pruning = self.spelling, self.pruning
        known = KnownText(self, text, 0 if everything or not pruning.prune else _LOOK_BACK)
        while True:
            walk = known.walk(pruning, everything=everything)
            if not walk.missing:
                break
            known.ask(walk.missing)
        self.work.bytes += len(known.text) - known.place
        self.work.dropped += walk.dropped
        found = np.empty((0, SYMBOLS))
        if everything:
            written = np.cumsum([len(spelling.dummy), *(byte not in spelling.unwritable for byte in text)])
            found = np.array(walk.predictions)[written]
        return _compact(Reading(walk.covers, known.tree, text)), found


def _compact(reading: Reading) -> Reading:
    """Without what the model keeps of covers that were let go."""
    covers = reading.covers
    every: list[Cover | Open] = [*covers.closed, *covers.open]
    behind = {id(one.asked): one.asked for one in every}
    tree, paths = reading.tree.kept([asked.path for asked in behind.values()])
    if tree is reading.tree:
        return reading
    moved = {key: asked.moved(path) for (key, asked), path in zip(behind.items(), paths, strict=True)}
    return replace(
        reading,
        tree=tree,
        covers=replace(
            covers,
            closed=tuple(replace(one, asked=moved[id(one.asked)]) for one in covers.closed),
            open=tuple(replace(one, asked=moved[id(one.asked)]) for one in covers.open),
        ),
    )
