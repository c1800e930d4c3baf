"""A causal language model over tokens that is read byte by byte: the probabilities of a text's next byte.

docs/guides/vocabularies.md states the method. A text's bytes can be cut into tokens in several ways; each way that is
followed is a *cover*: whole tokens that spell the beginning of the text, with the text's remaining bytes as the
beginning of the next token (:mod:`softmeet.readers.bytes.covers`). A *symbol* is a byte, or 256: the end of the text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.covers import Answers, Open, Pruning
from softmeet.readers.bytes.known_text import KnownText, way
from softmeet.readers.bytes.next_tokens import END, SYMBOLS
from softmeet.readers.bytes.nodes import Chain
from softmeet.readers.bytes.reading import Guess, Reading
from softmeet.readers.bytes.token_model import TokenModel
from softmeet.readers.bytes.typical import expected_after_bytes
from softmeet.readers.reader import Reader, Work
from softmeet.suspended import Done, finished

# A token is run before it is needed if its probability is at least _LIKELY, at most _GUESSES at once. Beside a single
# open cover they are run only if their probabilities sum to _WORTH: on a CPU, a product with one vector takes half the
# time of one with several.
_LIKELY, _GUESSES, _WORTH = 0.04, 5, 0.6


class LikelyToken(NamedTuple):
    """A likely next token of a text, and how the model gets behind it.

    Attributes:
        place: the number of the text's bytes with those of the token.
        word: the bytes that it spells.
        chain: the tokenizer's own tokens of all these bytes.
    """

    place: int
    word: bytes
    chain: Chain


def likely(reading: Reading, spelling: Spelling, limit: int, asking: int) -> list[LikelyToken]:
    """Choose the tokens to run ahead of need, none that was guessed already.

    Args:
        reading: the text so far.
        spelling: the member's.
        limit: the number of tokens in the member's context.
        asking: the number of open covers that the model is run on in the same call.
    """
    known = {(guess.place, guess.word) for guess in reading.guesses}
    written, places = spelling.written(reading.text), [(one.path, one.place) for one in reading.covers.places]
    found, together = list[LikelyToken](), 0.0
    for probs, k, share in reading.covers.likely(spelling, _LIKELY, _GUESSES):
        word = spelling.words[k]
        if (probs.place + len(word), word) in known:
            continue
        chain = way(spelling, written[: probs.place] + word, places)
        if chain.length <= limit:
            found.append(LikelyToken(probs.place + len(word), word, chain))
            together += share
    return [] if asking == 1 and together < _WORTH else found


def possible(guesses: Sequence[Guess], written: bytes) -> tuple[Guess, ...]:
    """Return the guesses whose token begins with the bytes that have come since, and is longer.

    Args:
        guesses: those of a text.
        written: the bytes that its tokens spell, as :meth:`Spelling.written` makes them.
    """
    return tuple(
        one for one in guesses if len(written) < one.place and one.word.startswith(written[one.place - len(one.word) :])
    )


# Likely next tokens are run before they are needed beside at most so many texts: among more, some text has to run a
# token at each byte anyway. And only where a row more costs less than this share of a call.
_FEW, _DEAR = 4, 0.7
# What follows a text that has ended, and what does where nothing is known.
_END, _ANY = np.eye(SYMBOLS)[END], np.full(SYMBOLS, 1 / SYMBOLS)


class _Wanted(NamedTuple):
    """The covers of a text that have to be closed before its next byte is predicted.

    Attributes:
        known: those whose last token was run as a guess, with the next token's probabilities there.
        missing: the others, each with the number of the text's bytes that its tokens spell.
        ahead: likely next tokens, to be run beside them.
        chains: for each of ``missing``, then of ``ahead``, its last tokens, behind those that have been run.
    """

    known: Answers
    missing: list[tuple[Open, int]]
    ahead: list[LikelyToken]
    chains: list[Chain]


class ByteMember(TokenModel):
    """A causal language model over tokens that is read byte by byte.

    :meth:`begin` and :meth:`score` read a text and return its state, a :class:`Reading`; :meth:`advance` lengthens
    readings by a symbol (a byte 0 to 255, or 256 for the end), and :meth:`follow` one by several bytes;
    :meth:`log_probs` gives the next symbol's distribution.

    Args:
        model: a causal LM of transformers, in evaluation mode; or a reader of its tokens that can fork and crop.
        spelling: what :func:`spelling_of` returns for the model's tokenizer; ``self.spelling`` may be an adjusted copy.
        pruning: which tokenizations of a text are followed; None for the defaults of :class:`Pruning`.
        prefix: ids, at least one, of the tokens that precede each text for which no other prefix is given; None for
            ``spelling.start``, the tokenizer's own.

    Attributes:
        model, pruning, head, limit, ends, prefix, spent: those of a :class:`TokenModel`.

    Raises:
        CheckpointError, InvalidInputError: if the model gives NaN; if it cannot read trees of tokens; if a reader
            cannot fork or crop.
    """

    def __init__(
        self,
        model: PreTrainedModel | Reader,
        spelling: Spelling,
        pruning: Pruning | None = None,
        prefix: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, spelling, pruning or Pruning(), prefix)
        if self.pruning.prune:
            self.spelling = replace(spelling, typical=expected_after_bytes(self))

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
        return finished(self.beginning([text], [prefix], [[len(text)]]))[0][len(text)]

    def beginning(
        self, texts: Sequence[bytes], prefixes: Sequence[Sequence[int] | None], wanted: Sequence[Sequence[int]]
    ) -> Generator[Done, None, list[dict[int, Reading]]]:
        """Read several texts from their beginnings, each call of the model for all of them; yield between.

        The tokenizer's tokens of a text are run in one call, others in few more.

        Args:
            texts: any bytes.
            prefixes: for each, ids of the tokens that precede it; None for the member's own.
            wanted: for each, after how many of its bytes readings are wanted, ascending; the last is among them. If it
                is the only one, several tokenizations are followed in the last 64 bytes or more alone: from a place on
                that no token spans, which leaves everything behind it as it would be.

        Returns:
            for each, the readings after so many bytes, as of :meth:`following`.

        Raises:
            InvalidInputError: for the reasons of :meth:`begin`; then none is read.
        """
        begun = [
            KnownText.begun(self, own, text, len(places) == 1)
            for text, own, places in zip(texts, prefixes, wanted, strict=True)
        ]
        yield from self._finish(begun)
        each = zip(texts, wanted, begun, strict=True)
        return [self._after(None, text, places, known) for text, places, known in each]

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
        readings = [*finished(self.beginning([text], [prefix], [range(len(text) + 1)]))[0].values()]
        return readings[-1], self.log_probs(readings).numpy(), np.array([one.covers.unasked for one in readings])

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
        return finished(self.following([reading], [text], [[len(text)]]))[0][len(text)]

    def following(
        self, readings: Sequence[Reading], texts: Sequence[bytes], wanted: Sequence[Sequence[int]]
    ) -> Generator[Done, None, list[dict[int, Reading]]]:
        """Lengthen several readings as :meth:`follow` does, each call of the model for all of them; yield between.

        Args:
            readings: those that have not ended.
            texts: for each, one or more bytes.
            wanted: for each, after how many of these bytes readings are wanted, ascending; the last is among them.

        Returns:
            for each, the readings after so many bytes. All tell what follows (:meth:`log_probs`); those can be
            lengthened of which :meth:`Reading.goes_on` is true, the last among them.
        """
        found: list[dict[int, Reading]] = [{} for _ in readings]
        begun = dict[int, KnownText]()
        for k, (reading, text) in enumerate(zip(readings, texts, strict=True)):
            longest = max((probs.path.length for probs in reading.covers.places), default=0)
            if len(text) > 1 and longest + len(text) < self.limit:
                begun[k] = KnownText.after(self, reading, text)
                continue
            for count, byte in enumerate(text, 1):
                (reading,) = self.advance([reading], [byte])
                if count in wanted[k]:
                    found[k][count] = reading
                yield None
        yield from self._finish(list(begun.values()))
        for k, known in begun.items():
            found[k] = self._after(readings[k], texts[k], wanted[k], known)
        return found

    def _after(
        self, before: Reading | None, text: bytes, places: Sequence[int], known: KnownText
    ) -> dict[int, Reading]:
        """Return the readings after so many bytes of a text that is known, behind a reading or from its beginning."""
        spelling, found = self.spelling, dict[int, Reading]()
        start = len(spelling.dummy) - known.place if before is None else 0
        begun, spent, guesses = (b"", Work(), ()) if before is None else (before.text, before.work, before.guesses)
        written = start + np.cumsum([0, *(byte not in spelling.unwritable for byte in text)])
        dropped = np.cumsum([covers.unasked for covers in known.covers])
        for count in places:
            whole, place = begun + text[:count], int(written[count])
            work = spent.and_(known.work.calls, known.work.tokens, float(dropped[place] - dropped[0]))
            left = possible(guesses, spelling.written(whole)) if guesses else ()
            found[count] = Reading(known.covers[place], whole, work, left)
        return found

    def _finish(self, texts: Sequence[KnownText]) -> Generator[Done, None, None]:
        """Run the model on what known texts want, each call for all of them, until they want nothing."""
        while True:
            wanting = [(known, chains) for known in texts if (chains := known.wanted())]
            if not wanting:
                return
            for (known, _), found in zip(wanting, self.run([chains for _, chains in wanting]), strict=True):
                known.ran(found)
            texts = [known for known, _ in wanting]
            yield None

    def log_probs(self, readings: Sequence[Reading | None]) -> Float[Tensor, "B 257"]:
        """Return the next symbol's log-probabilities after each of B readings, (B, 257) fp64, in nats, on the CPU.

        Columns 0 to 255 are bytes, 256 is the end. A reading that has ended gives the end probability 1, and None, in
        place of one, all symbols the same.
        """
        found = [_ANY if k is None else _END if k.ended else k.covers.prediction(self.spelling) for k in readings]
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(np.reshape(found, (-1, SYMBOLS))))

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
            found[k] = Reading(covers, one.text + bytes([symbol]), one.work, one.guesses)
        self._settle(found, moved)
        for k in moved:
            if not (one := found[k]).ended:
                work = one.work.and_(dropped=one.covers.unasked)
                guesses = possible(one.guesses, self.spelling.written(one.text)) if one.guesses else ()
                found[k] = Reading(one.covers, one.text, work, guesses)
        self.spent = self.spent.and_(dropped=sum(found[k].covers.unasked for k in moved if not found[k].ended))
        return found

    def _settle(self, readings: list[Reading], moved: list[int]) -> None:
        """Run the model on the open covers that weigh enough, and on likely next tokens, for some readings at once.

        Args:
            readings: the list in which these readings are replaced.
            moved: their indices.
        """
        few = len(moved) <= _FEW and bool(self.pruning.prune) and self.reader.traits.row_cost < _DEAR
        while asking := self._wanted(readings, moved, few):
            ran = [[own[-1] for own in each] for each in self.run([wanted.chains for wanted in asking.values()])]
            pairs = list(zip(asking.values(), ran, strict=True))
            behind = [one for wanted, each in pairs for one in each[: len(wanted.missing)]]
            found = iter(self.next_token_probs(behind, [place for wanted, _ in pairs for _, place in wanted.missing]))
            for k, (wanted, each) in zip(asking, pairs, strict=True):
                one = readings[k]
                answers = [*wanted.known, *((cover, next(found)) for cover, _ in wanted.missing)]
                covers = one.covers.answered(self.spelling, answers, self.pruning)
                run_ahead = zip(wanted.ahead, each[len(wanted.missing) :], strict=True)
                guesses = [Guess(own.place, own.word, behind) for own, behind in run_ahead]
                work = one.work.and_(calls=1, tokens=sum(len(chain.tokens) for chain in wanted.chains))
                readings[k] = Reading(covers, one.text, work, (*one.guesses, *guesses))
            moved = list(asking)

    def _wanted(self, readings: list[Reading], moved: list[int], few: bool) -> dict[int, _Wanted]:
        """Return what the model has to be run on, by index of reading, for some of ``readings``.

        Where all that is wanted was run as a guess, covers are closed at once, and readings that exceed the model's
        context are ended. Likely next tokens are among it where these are ``few``.
        """
        found = {}
        for k in moved:
            while opened := readings[k].covers.wanted(self.pruning):
                one = readings[k]
                wanted = self._sorted_out(one, opened, few)
                if any(chain.length > self.limit for chain in wanted.chains):
                    readings[k] = replace(one, ended=True, full=True)
                elif not wanted.missing:
                    readings[k] = replace(one, covers=one.covers.answered(self.spelling, wanted.known, self.pruning))
                    continue
                else:
                    found[k] = wanted
                break
        return found

    def _sorted_out(self, reading: Reading, opened: list[Open], few: bool) -> _Wanted:
        """Tell wanted covers whose last token was run as a guess from those that the model has to be run on."""
        if not self.pruning.prune:
            chains = [Chain(one.probs.path, [one.token], [1]) for one in opened]
            return _Wanted([], [(one, 0) for one in opened], [], chains)
        written = self.spelling.written(reading.text)
        guesses = {guess.place: guess for guess in reading.guesses if written[: guess.place].endswith(guess.word)}
        pairs = [(one, len(written) - len(one.rest)) for one in opened]
        hits = [(one, place) for one, place in pairs if place in guesses]
        known: Answers = []
        if hits:
            probs = self.next_token_probs([guesses[place].behind for _, place in hits], [place for _, place in hits])
            known = list(zip((one for one, _ in hits), probs, strict=True))
        missing = [(one, place) for one, place in pairs if place not in guesses]
        paths = [(probs.path, probs.place) for probs in reading.covers.places]
        ahead = likely(reading, self.spelling, self.limit, len(missing)) if few and missing else []
        chains = [*(way(self.spelling, written[:place], paths) for _, place in missing), *(one.chain for one in ahead)]
        return _Wanted(known, missing, ahead, chains)
