"""A member over bytes: the probabilities of a text's next byte, from a model of tokens underneath."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.members.covers import END, SYMBOLS, Covers, Masses, NextTokenProbs, Open, Pruning
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.known_text import KnownText
from softmeet.members.reading import Guess, Reading, Work
from softmeet.members.spelling import Spelling
from softmeet.members.token_tree import Growth, Path, TokenTree
from softmeet.members.token_tree import run as run_trees
from softmeet.members.typical import SAMPLE, typical

# The least probability of a token: without it, masses of all covers could be rounded to nothing.
_LEAST = torch.finfo(torch.float32).tiny
# Bytes before the end of a prompt from which all tokenizations are followed; before them, the tokenizer's alone.
_LOOK_BACK = 64
# The probability from which a token is run before the model has to be asked about it, how many are at once, and what
# their probabilities have to sum to where else one token would be run alone: for a processor a product with one vector
# takes half of the time of one with several.
_LIKELY, _GUESSES, _WORTH = 0.04, 5, 0.6
# Positions whose next tokens' probabilities are held at once, and prefixes whose states are kept.
_AT_ONCE = 32
_PREFIXES = 16
# Logits whose probabilities are taken at once.
_CACHED = 1 << 20


class ByteMember:
    """A token model, read byte by byte.

    Args:
        model: in evaluation mode.
        spelling: how its tokenizer cuts text into tokens.
        pruning: how far tokenizations are followed.
        prefix: tokens before every text that has no others, in place of the tokenizer's own.
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
        self.head: SoftmaxHead = head_of(model)
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._limit: int = sys.maxsize if limit is None else limit
        self.prefix = list(self.spelling.start if prefix is None else prefix)
        columns = [*self.spelling.tokens.tolist(), *self.ends]
        self._columns = torch.tensor(columns, device=self.head.weight.device)
        self._prefixes: dict[tuple[int, ...], tuple[TokenTree, Tensor]] = {}
        # Of all texts, a call that serves several counted once.
        self.spent = Work()
        if self.pruning.prune:
            self.spelling = replace(spelling, typical=self._typical())

    def _typical(self) -> Masses:
        """Find what the model expects behind a token, by the token's last byte, on a short text."""
        start = self.spelling.start
        tokens = self.spelling.encode(SAMPLE.encode())[: self._limit - len(start)]
        _, hidden = self.run_chain([*start, *tokens])
        nowhere = np.empty(0, np.int64)
        roots = [
            one.root
            for states in hidden[len(start) :].split(_AT_ONCE)
            for one in self.next_token_probs([nowhere] * len(states), states)
        ]
        return typical(self.spelling, tokens, roots)

    def find_head_again(self) -> None:
        """Read the model's output layer where it is now."""
        self.head = replace_weight(self.head, self.model)
        self._columns = self._columns.to(self.head.weight.device)
        self._prefixes.clear()

    @property
    def room(self) -> int:
        """Bytes that fit into the context, whatever tokens they make."""
        # A token behind every one may have to be asked about, and the dummy prefix is one.
        return max(1, self._limit - len(self.prefix) - 2)

    def behind(self, prefix: Sequence[int]) -> tuple[TokenTree, Float[Tensor, "1 d"]]:
        """Read tokens that stand before a text, and keep the result for other texts.

        Returns:
            (what the model keeps, its last hidden state).

        Raises:
            InvalidInputError: there is no token, or one that the model does not have.
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
        """Read a prompt: all tokenizations of its end, behind the tokenizer's own of what comes before.

        Args:
            text: of any bytes.
            prefix: tokens before it; None for the member's own.
        """
        return self._read(text, prefix, _LOOK_BACK if self.pruning.prune else 0)[0]

    def score(
        self, text: bytes, prefix: Sequence[int] | None = None
    ) -> tuple[Reading, Float[np.ndarray, "t 257"], Float[np.ndarray, " t"]]:
        """Read a text, and return how probable every byte's alternatives were.

        Args:
            text: of any bytes.
            prefix: tokens before it; None for the member's own.

        Returns:
            The text as read; the log-probabilities in nats of what could stand in each byte's place, of the first byte
            too, and after the last; and the share of mass that each of these rests on estimates for.
        """
        spelling = self.spelling
        reading, covers = self._read(text, prefix, 0)
        written = np.cumsum([len(spelling.dummy), *(byte not in spelling.unwritable for byte in text)])
        found = np.array([one.prediction(spelling) for one in covers])[written]
        with np.errstate(divide="ignore"):
            return reading, np.log(found), np.array([one.unasked for one in covers])[written]

    def _read(self, text: bytes, prefix: Sequence[int] | None, look_back: int) -> tuple[Reading, list[Covers]]:
        """Read a text whose bytes are all known, in one call for the tokenizer's tokens and few for others.

        Returns:
            (the text as read; its covers from the place on from which all tokenizations are followed, byte by byte).
        """
        known = KnownText(self, self.prefix if prefix is None else prefix, text, look_back)
        while missing := known.walk(self.pruning):
            known.ask(missing)
        work = known.work.and_(dropped=sum(covers.unasked for covers in known.covers))
        return Reading(known.covers[-1], known.tree, text, work).compact(), known.covers

    def expected(self, text: bytes, top: int) -> dict[int, list[tuple[str, float]]]:
        """List the tokens that the model expects where a token of a text begins.

        Args:
            text: of any bytes.
            top: tokens to list.

        Returns:
            By the byte at which a token of the text begins, the most probable tokens there, as text, and their
            log-probabilities in nats.
        """
        spelling = self.spelling
        tokens = spelling.encode(text)
        _, hidden = self.run_chain([*self.prefix, *tokens])
        behind = hidden[len(self.prefix) - 1 :][: len(tokens)]
        # Where they are in the text, which may hold bytes that the member does not see, and no dummy prefix.
        seen = [k for k, byte in enumerate(text) if byte not in spelling.unwritable]
        found = {}
        for place, state in zip(spelling.bounds(tokens)[:-1].tolist(), behind, strict=True):
            with torch.inference_mode():
                best = self.head.logits(state[None])[0].log_softmax(-1).topk(min(top, self.head.v))
            listed = [(self._named(k), x) for k, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            found[seen[max(0, place - len(spelling.dummy))]] = listed
        return found

    def _named(self, token: int) -> str:
        """Return a token as text; one that ends a text, or stands for none, by its number."""
        word = self.spelling.spelled([token])
        return word.decode(errors="backslashreplace") if word else f"<{token}>"

    def log_probs(self, readings: Sequence[Reading]) -> Float[Tensor, "B 257"]:
        """Return the next symbol's log-probabilities in nats, fp64; 256 is the end, and all that follows the end."""
        end = np.eye(SYMBOLS)[END]
        found = [end if one.ended else one.covers.prediction(self.spelling) for one in readings]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(np.stack(found)))

    def advance(self, readings: Sequence[Reading], symbols: Sequence[int]) -> list[Reading]:
        """Read one more symbol of each text; all that the model has to be asked goes through it in one batch.

        A text that would not fit into the model's context ends.
        """
        found = list(readings)
        for k, (reading, symbol) in enumerate(zip(readings, symbols, strict=True)):
            if symbol == END or reading.ended:
                found[k] = replace(reading, ended=True)
                continue
            text, covers = reading.text + bytes([symbol]), reading.covers
            if symbol not in self.spelling.unwritable:
                covers = covers.followed(self.spelling, symbol, self.pruning)
            found[k] = replace(reading, covers=covers, text=text)
        return self._settled(found)

    def _settled(self, readings: list[Reading]) -> list[Reading]:
        """Ask about all open covers that count, and along with them about what may come next."""
        while True:
            readings = [reading if reading.ended else self._close_guessed(reading) for reading in readings]
            asking = self._wanted(readings)
            if not asking:
                break
            steps = {
                k: [*((one.probs, one.token) for one in opened), *self._likely(readings[k], len(opened))]
                for k, opened in asking.items()
            }
            growths = [
                Growth(readings[k].tree, [probs.path for probs, _ in own], [[token] for _, token in own])
                for k, own in steps.items()
            ]
            for (k, opened), own, (tree, states) in zip(asking.items(), steps.values(), self.run(growths), strict=True):
                before, count = readings[k].tree.columns, len(opened)
                paths = [np.append(probs.path, before + i) for i, (probs, _) in enumerate(own)]
                found = self.next_token_probs(paths[:count], torch.cat(states[:count]))
                answers = list(zip(opened, found, strict=True))
                ahead = zip(own[count:], paths[count:], states[count:], strict=True)
                guesses = [Guess(probs, token, path, state[0]) for (probs, token), path, state in ahead]
                readings[k] = replace(
                    readings[k],
                    covers=readings[k].covers.answered(self.spelling, answers, self.pruning),
                    tree=tree,
                    work=readings[k].work.and_(calls=1, tokens=len(own)),
                    guesses=(*readings[k].guesses, *guesses),
                )
        for k, reading in enumerate(readings):
            if not reading.ended:
                work = reading.work.and_(dropped=reading.covers.unasked)
                self.spent = self.spent.and_(dropped=reading.covers.unasked)
                readings[k] = replace(reading, work=work, guesses=self._possible(reading)).compact()
        return readings

    def _wanted(self, readings: list[Reading]) -> dict[int, list[Open]]:
        """Return the open covers of each text to ask the model about, and end texts for which it has no room."""
        found = {}
        for k, reading in enumerate(readings):
            opened = [] if reading.ended else reading.covers.wanted(self.pruning)
            if any(len(one.probs.path) >= self._limit for one in opened):
                readings[k] = replace(reading, ended=True, full=True)
            elif opened:
                found[k] = opened
        return found

    def _close_guessed(self, reading: Reading) -> Reading:
        """Close the open covers whose token was guessed."""
        known = {(id(guess.behind), guess.token): guess for guess in reading.guesses}
        while True:
            pairs = [(one, known.get((id(one.probs), one.token))) for one in reading.covers.wanted(self.pruning)]
            found = [(one, guess) for one, guess in pairs if guess is not None]
            if not found:
                return reading
            paths, hidden = [guess.path for _, guess in found], torch.stack([guess.hidden for _, guess in found])
            answers = list(zip((one for one, _ in found), self.next_token_probs(paths, hidden), strict=True))
            reading = replace(reading, covers=reading.covers.answered(self.spelling, answers, self.pruning))

    def _likely(self, reading: Reading, asking: int) -> list[tuple[NextTokenProbs, int]]:
        """Choose tokens to guess along with so many open covers, and return them with what they stand behind."""
        if not self.pruning.prune:
            return []
        known = {(id(guess.behind), guess.token) for guess in reading.guesses}
        found, together = list[tuple[NextTokenProbs, int]](), 0.0
        for probs, k, share in reading.covers.likely(self.spelling, _LIKELY, _GUESSES):
            token = int(self.spelling.tokens[k])
            if len(probs.path) < self._limit and (id(probs), token) not in known:
                found.append((probs, token))
                together += share
        return [] if asking == 1 and together < _WORTH else found

    def _possible(self, reading: Reading) -> tuple[Guess, ...]:
        """Return the guesses that may still come true: their token begins with the bytes since, and is longer."""
        rests = {id(cover.probs): cover.rest for cover in reading.covers.closed}
        found = []
        for guess in reading.guesses:
            rest, word = rests.get(id(guess.behind)), self.spelling.spelled([guess.token])
            if rest is not None and len(word) > len(rest) and word.startswith(rest):
                found.append(guess)
        return tuple(found)

    def run_chain(self, tokens: Sequence[int], tree: TokenTree | None = None) -> tuple[TokenTree, Float[Tensor, "t d"]]:
        """Run tokens one behind the other, behind the only chain of a tree, if one is given.

        Returns:
            (what the model keeps, its last hidden states at the tokens).
        """
        tree = tree or TokenTree()
        ((tree, (hidden,)),) = self.run([Growth(tree, [np.arange(tree.columns)], [list(tokens)])])
        return tree, hidden

    def run(self, growths: Sequence[Growth]) -> list[tuple[TokenTree, list[Float[Tensor, "t d"]]]]:
        """Run tokens.

        Raises:
            InvalidInputError: they are more than the model's context holds.
        """
        pairs = [(path, own) for growth in growths for path, own in zip(growth.paths, growth.tokens, strict=True)]
        longest = max(len(path) + len(own) for path, own in pairs)
        if longest > self._limit:
            raise InvalidInputError(
                f"expected a text of at most {self._limit} tokens, the context of {self.spelling.name}, got {longest}: "
                "shorten the prompt or lower max_new_tokens"
            )
        self.spent = self.spent.and_(calls=1, tokens=sum(len(own) for _, own in pairs))
        with torch.inference_mode():
            return run_trees(self.model, growths)

    def next_token_probs(self, paths: Sequence[Path], hidden: Float[Tensor, "k d"]) -> list[NextTokenProbs]:
        """Compute the next token's probabilities behind each path, from the last hidden states there."""
        found, m = list[NextTokenProbs](), len(self.spelling.words)
        with torch.inference_mode():
            logits = self.head.logits(hidden)
        # Several passes over a vocabulary follow: those over a few rows stay in a processor's caches.
        size = _CACHED // self.head.v if logits.device.type == "cpu" else len(logits)
        for some in logits.split(max(1, size)):
            # A byte that a member holds for impossible may come all the same: something has to be left to go on from.
            own = some.gather(1, self._columns.expand(len(some), -1)).softmax(-1).clamp_min_(_LEAST)
            probs, (letters, where) = own.cpu().numpy(), self.spelling.beginnings
            roots = np.zeros((len(some), SYMBOLS))
            roots[:, letters] = np.add.reduceat(probs[:, :m], where, axis=1, dtype=np.float64)
            roots[:, END] = probs[:, m:].sum(1, dtype=np.float64)
            places = paths[len(found) : len(found) + len(some)]
            found += [NextTokenProbs(*one) for one in zip(places, probs[:, :m], roots, strict=True)]
        return found
