"""A causal language model over tokens that is read byte by byte: the probabilities of a text's next byte.

docs/guides/vocabularies.md states the method. A text's bytes can be cut into tokens in several ways; each way that is
followed is a *cover*: whole tokens that spell the beginning of the text, with the text's remaining bytes as the
beginning of the next token (:mod:`softmeet.members.covers`). A *symbol* is a byte, or 256: the end of the text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.covers import END, SYMBOLS, Covers, NextTokenProbs, Open, Pruning
from softmeet.members.guesses import likely, possible
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.known_text import KnownText
from softmeet.members.opaque import Head
from softmeet.members.reading import Guess, Reading, Work
from softmeet.members.spelling import Spelling
from softmeet.members.token_tree import Growth, Path, TokenTree, require_trees
from softmeet.members.token_tree import run as run_trees
from softmeet.members.typical import of_member

# The least probability of a token: without it, rounding could leave all covers without mass.
_LEAST = torch.finfo(torch.float32).tiny
# Several tokenizations are followed in this many last bytes of a prompt; before them, the tokenizer's alone.
_LOOK_BACK = 64
# Likely next tokens are run before they are needed beside at most so many texts: among more, some text has to run a
# token at each byte anyway.
_FEW = 4
# Prefixes whose states are kept.
_PREFIXES = 16
# Logits that are normalised at once on a CPU.
_CACHED = 1 << 20


class ByteMember:
    """A causal language model over tokens that is read byte by byte.

    :meth:`begin` and :meth:`score` read a text and return its state, a :class:`Reading`; :meth:`advance` lengthens
    readings by a symbol (a byte 0 to 255, or 256 for the end), and :meth:`follow` one by several bytes;
    :meth:`log_probs` gives the next symbol's distribution.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        spelling: what :func:`spelling_of` returns for the model's tokenizer; ``self.spelling`` may be an adjusted copy.
        pruning: which tokenizations of a text are followed; None for the defaults of :class:`Pruning`.
        prefix: ids, at least one, of the tokens that precede each text for which no other prefix is given; None for
            ``spelling.start``, the tokenizer's own.

    Attributes:
        head: the model's output layer.
        limit: the number of tokens in its context, prefix included.
        ends: ids of the tokens that end a text.
        spent: the :class:`Work` for all texts, prefixes and a sample run on construction: calls of the model (one for
            several texts counts once), tokens run in them, and the shares of mass estimated in :meth:`advance`, summed.

    Raises:
        CheckpointError, InvalidInputError: if the model gives NaN; if it cannot read trees of tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spelling: Spelling,
        pruning: Pruning | None = None,
        prefix: Sequence[int] | None = None,
    ) -> None:
        self.model, self.spelling, self.pruning = model, spelling, pruning or Pruning()
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
        if self.pruning.prune:
            self.spelling = replace(spelling, typical=of_member(self))

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

    def begin(self, text: bytes, prefix: Sequence[int] | None = None) -> Reading:
        """Read a prompt, and return the reading, from which :meth:`log_probs` and :meth:`advance` continue.

        Probabilities are sums over several tokenizations of the last 64 bytes or a little more, and of the whole prompt
        if ``pruning.prune`` is 0; the bytes before are cut into tokens as the tokenizer cuts them.

        Args:
            text: the prompt: any bytes, UTF-8 or not.
            prefix: ids of the tokens that precede it; None for the member's own, ``self.prefix``.

        Raises:
            InvalidInputError: if prefix and text exceed the model's context, the prefix is empty or has an unknown id,
                or ``pruning.covers`` is None and more than 2,048 tokenizations would have to be followed.
        """
        return self.begin_all([text], [prefix])[0]

    def begin_all(
        self,
        texts: Sequence[bytes],
        prefixes: Sequence[Sequence[int] | None],
        pause: Callable[[], None] = lambda: None,
    ) -> list[Reading]:
        """Read several prompts as :meth:`begin` does, each call of the model for all of them.

        Args:
            texts: the prompts.
            prefixes: for each, ids of the tokens that precede it; None for the member's own.
            pause: called between calls of the model.

        Raises:
            InvalidInputError: for the reasons of :meth:`begin`; then none is read.
        """
        look_back = _LOOK_BACK if self.pruning.prune else 0
        return [reading for reading, _ in self._read(texts, prefixes, look_back, pause)]

    def score(
        self, text: bytes, prefix: Sequence[int] | None = None
    ) -> tuple[Reading, Float[np.ndarray, "t 257"], Float[np.ndarray, " t"]]:
        """Read a whole text, and return the log-probabilities of all symbols at each of its places.

        Args:
            text: t - 1 bytes, UTF-8 or not.
            prefix: ids of the tokens that precede it; None for the member's own, ``self.prefix``.

        Returns:
            (reading, log_probs, unasked): the reading of the whole text; (t, 257) fp64 in nats, in row k the
            distribution of the symbol after the first k bytes (column 256 is the end), so that the last row is that
            after the text; (t,), for each row the share of probability mass that was estimated or dropped, instead of
            computed by the model.

        Raises:
            InvalidInputError: for the reasons of :meth:`begin`.
        """
        spelling = self.spelling
        ((reading, covers),) = self._read([text], [prefix], 0)
        written = np.cumsum([len(spelling.dummy), *(byte not in spelling.unwritable for byte in text)])
        found = np.array([one.prediction(spelling) for one in covers])[written]
        with np.errstate(divide="ignore"):
            return reading, np.log(found), np.array([one.unasked for one in covers])[written]

    def _read(
        self,
        texts: Sequence[bytes],
        prefixes: Sequence[Sequence[int] | None],
        look_back: int,
        pause: Callable[[], None] = lambda: None,
    ) -> list[tuple[Reading, list[Covers]]]:
        """Read texts whose bytes are all known: one call of the model for the tokenizer's tokens, few for others.

        Several tokenizations are followed in the last ``look_back`` bytes or a little more; 0 for the whole text.

        Returns:
            for each text (the reading; the covers at the first byte from which several tokenizations are followed, and
            after each later byte).
        """
        pairs = zip(texts, prefixes, strict=True)
        begun = [KnownText.begun(self, self.prefix if own is None else own, text, look_back) for text, own in pairs]
        self._finish(begun, pause)
        found = []
        for text, known in zip(texts, begun, strict=True):
            work = known.work.and_(dropped=sum(covers.unasked for covers in known.covers))
            found.append((Reading(known.covers[-1], known.tree, text, work).compact(), known.covers))
        return found

    def follow(self, reading: Reading, text: bytes) -> Reading:
        """Lengthen a reading by several bytes, in fewer calls of the model than :meth:`advance` needs for one by one.

        As the bytes are known, the tokenizer's own tokens are run in one call, and tokens that the bytes rule out are
        not run. The probabilities of what follows are those of :meth:`score`, up to rounding and pruning.

        Args:
            reading: one that has not ended.
            text: one or more bytes.

        Returns:
            the new reading; it has ended if its tokens would exceed the model's context, as in :meth:`advance`.
        """
        places = [one.probs for one in reading.covers.closed] + [one.probs for one in reading.covers.open]
        longest = max((len(probs.path) for probs in places), default=0)
        if len(text) == 1 or longest + len(text) >= self.limit:
            for byte in text:
                (reading,) = self.advance([reading], [byte])
            return reading
        known = KnownText.after(self, reading, text)
        self._finish([known])
        dropped = sum(covers.unasked for covers in known.covers[1:])
        work = reading.work.and_(known.work.calls, known.work.tokens, dropped)
        found = Reading(known.covers[-1], known.tree, reading.text + text, work, reading.guesses)
        return replace(found, guesses=possible(found, self.spelling)).compact()

    def _finish(self, texts: Sequence[KnownText], pause: Callable[[], None] = lambda: None) -> None:
        """Run the model on what known texts want, each call for all of them, until they want nothing."""
        while True:
            wanting = [(known, growth) for known in texts if (growth := known.wanted(self.pruning)) is not None]
            if not wanting:
                return
            for (known, _), (tree, states) in zip(wanting, self.run([own for _, own in wanting]), strict=True):
                known.grown(tree, states)
            texts = [known for known, _ in wanting]
            pause()

    def log_probs(self, readings: Sequence[Reading]) -> Float[Tensor, "B 257"]:
        """Return the next symbol's log-probabilities after each of B ≥ 1 readings, (B, 257) fp64, in nats, on the CPU.

        Columns 0 to 255 are bytes, 256 is the end. A reading that has ended gives the end probability 1.
        """
        end = np.eye(SYMBOLS)[END]
        found = [end if one.ended else one.covers.prediction(self.spelling) for one in readings]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(np.stack(found)))

    def advance(self, readings: Sequence[Reading], symbols: Sequence[int]) -> list[Reading]:
        """Lengthen each reading by one symbol, and return the new readings; each call of the model serves all of them.

        A symbol is a byte, 0 to 255, or 256: the end. A reading comes back with ``ended`` True if its symbol is 256, if
        it had ended before, or if its tokens would exceed the model's context; ``full`` is True in the last case.
        InvalidInputError is raised if ``pruning.covers`` is None and a text has over 2,048 tokenizations to follow.
        """
        pairs = zip(readings, symbols, strict=True)
        found = [replace(one, ended=True) if symbol == END or one.ended else one for one, symbol in pairs]
        moved = [k for k, one in enumerate(found) if not one.ended]
        for k in moved:
            one, covers, symbol = found[k], found[k].covers, symbols[k]
            if symbol not in self.spelling.unwritable:
                covers = covers.followed(self.spelling, symbol, self.pruning)
            found[k] = Reading(covers, one.tree, one.text + bytes([symbol]), one.work, one.guesses)
        self._settle(found, moved)
        for k in moved:
            if not (one := found[k]).ended:
                work, guesses = one.work.and_(dropped=one.covers.unasked), possible(one, self.spelling)
                found[k] = Reading(one.covers, one.tree, one.text, work, guesses).compact()
        self.spent = self.spent.and_(dropped=sum(found[k].covers.unasked for k in moved if not found[k].ended))
        return found

    def _settle(self, readings: list[Reading], moved: list[int]) -> None:
        """Run the model on the open covers that weigh enough, and on likely next tokens, for some readings at once.

        Args:
            readings: the list in which these readings are replaced.
            moved: their indices.
        """
        few = len(moved) <= _FEW
        while asking := self._wanted(readings, moved):
            steps = {k: [(one.probs, one.token) for one in opened] for k, opened in asking.items()}
            for k, own in steps.items() if few else ():
                own += likely(readings[k], self.spelling, self.limit, len(own)) if self.pruning.prune else []
            growths = [
                Growth(readings[k].tree, [probs.path for probs, _ in own], [[token] for _, token in own])
                for k, own in steps.items()
            ]
            grown = dict(zip(asking, self.run(growths), strict=True))
            paths = {
                k: [np.append(probs.path, readings[k].tree.columns + i) for i, (probs, _) in enumerate(own)]
                for k, own in steps.items()
            }
            asked = [(paths[k][i], grown[k][1][i]) for k, opened in asking.items() for i in range(len(opened))]
            found = iter(self.next_token_probs([path for path, _ in asked], torch.cat([states for _, states in asked])))
            for k, opened in asking.items():
                (tree, states), one = grown[k], readings[k]
                covers = one.covers.answered(self.spelling, [(cover, next(found)) for cover in opened], self.pruning)
                ahead = list(zip(steps[k], paths[k], states, strict=True))[len(opened) :]
                guesses = [Guess(probs, token, path, state[0]) for (probs, token), path, state in ahead]
                work = one.work.and_(calls=1, tokens=len(steps[k]))
                readings[k] = Reading(covers, tree, one.text, work, (*one.guesses, *guesses))
            moved = list(asking)

    def _wanted(self, readings: list[Reading], moved: list[int]) -> dict[int, list[Open]]:
        """Return the open covers to run the model on, by index of reading, for some of ``readings``.

        Those whose last token was run as a guess are closed, and readings that exceed the model's context are ended.
        """
        found = {}
        for k in moved:
            readings[k] = self._close_guessed(readings[k]) if readings[k].guesses else readings[k]
            opened = readings[k].covers.wanted(self.pruning)
            if any(len(one.probs.path) >= self.limit for one in opened):
                readings[k] = replace(readings[k], ended=True, full=True)
            elif opened:
                found[k] = opened
        return found

    def _close_guessed(self, reading: Reading) -> Reading:
        """Close the open covers whose last token was run as a guess, with the hidden states kept then."""
        known = {(id(guess.behind), guess.token): guess for guess in reading.guesses}
        while True:
            pairs = [(one, known.get((id(one.probs), one.token))) for one in reading.covers.wanted(self.pruning)]
            found = [(one, guess) for one, guess in pairs if guess is not None]
            if not found:
                return reading
            paths, hidden = [guess.path for _, guess in found], torch.stack([guess.hidden for _, guess in found])
            answers = list(zip((one for one, _ in found), self.next_token_probs(paths, hidden), strict=True))
            reading = replace(reading, covers=reading.covers.answered(self.spelling, answers, self.pruning))

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

    def next_token_probs(self, paths: Sequence[Path], hidden: Float[Tensor, "k d"]) -> list[NextTokenProbs]:
        """Compute the next token's probabilities at k places from the last hidden states there.

        They sum to 1 over the tokens that spell bytes or end a text, and none is below 1.17e-38.

        Args:
            paths: for each place, the columns that the tokens before it have among the keys and values of its text's
                :class:`TokenTree`, first to last; they become ``path`` of the result.
            hidden: (k, d), the last hidden states at the last of these tokens.
        """
        found, m = list[NextTokenProbs](), len(self.spelling.words)
        with torch.inference_mode():
            logits = self.head.logits(hidden)
        # Several passes over the vocabulary follow: a few rows at a time stay in the CPU's caches.
        size = _CACHED // self.head.v if logits.device.type == "cpu" else len(logits)
        for some in logits.split(max(1, size)):
            # A byte to which the member gives probability 0 may come all the same, and some cover has to continue then.
            own = some.gather(1, self._columns.expand(len(some), -1)).softmax(-1).clamp_min_(_LEAST)
            probs, (letters, where) = own.cpu().numpy(), self.spelling.beginnings
            roots = np.zeros((len(some), SYMBOLS))
            roots[:, letters] = np.add.reduceat(probs[:, :m], where, axis=1, dtype=np.float64)
            roots[:, END] = probs[:, m:].sum(1, dtype=np.float64)
            places = paths[len(found) : len(found) + len(some)]
            found += [NextTokenProbs(*one) for one in zip(places, probs[:, :m], roots, strict=True)]
        return found
