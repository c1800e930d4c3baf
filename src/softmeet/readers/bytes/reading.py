"""The state of one text that one member has read byte by byte, and what reading has cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from softmeet.members.token_tree import Path, TokenTree
from softmeet.readers.bytes.covers import Covers
from softmeet.readers.reader import Work


@dataclass(frozen=True, eq=False)
class Guess:
    """A token that was run because the text of a :class:`Reading` may continue with it, before its bytes have come.

    Attributes:
        place: the number of the text's bytes that it and the tokens before it spell.
        word: the bytes that it spells.
        path: the columns in the reading's ``tree`` of the tokens before it, first to last, and of itself.
        hidden: (d,), the model's last hidden state at it.
    """

    place: int
    word: bytes
    path: Path
    hidden: Float[Tensor, " d"]


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as one member has read it so far; immutable, and made by the methods of :class:`ByteMember`.

    Attributes:
        covers: the tokenizations of the text that are still pursued (the others are too improbable), each with the next
            token's probabilities after it; the last token may run past the text (:mod:`softmeet.readers.bytes.covers`).
        tree: the keys and values of all tokens that were run for the text.
        text: the bytes read.
        work: the cost of reading them, without the prefix before the text.
        guesses: likely next tokens that were run ahead of need, in a call for tokens that were needed.
        ended: whether nothing can follow: the end has come, or the model's context is full.
        full: whether it has ended because the model's context is full.
    """

    covers: Covers
    tree: TokenTree
    text: bytes
    work: Work = field(default_factory=Work)
    guesses: tuple[Guess, ...] = ()
    ended: bool = False
    full: bool = False

    def compact(self) -> Reading:
        """Return a copy whose ``tree`` lacks the tokens that no cover or guess needs.

        This very reading is returned if they are fewer than 64, or less than a quarter of the tokens in ``tree``.
        """
        covers, guesses = self.covers, self.guesses
        if covers.closed and not self.tree.may_shrink(covers.closed[0].probs.path):
            return self
        behind = covers.places
        tree, paths = self.tree.kept([*(probs.path for probs in behind), *(guess.path for guess in guesses)])
        if tree is self.tree:
            return self
        moved = {id(probs): probs.moved(path) for probs, path in zip(behind, paths, strict=False)}
        ahead = zip(guesses, paths[len(behind) :], strict=True)
        return replace(
            self,
            tree=tree,
            guesses=tuple(replace(guess, path=path) for guess, path in ahead),
            covers=replace(
                covers,
                closed=tuple(one._replace(probs=moved[id(one.probs)]) for one in covers.closed),
                open=tuple(one._replace(probs=moved[id(one.probs)]) for one in covers.open),
            ),
        )
