"""What a member has read of a text, and what that has cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from softmeet.members.covers import Covers, NextTokenProbs
from softmeet.members.token_tree import Path, TokenTree


@dataclass(frozen=True)
class Work:
    """What a text has cost one member: calls of its model, tokens run in them, and mass estimated, summed over bytes.

    A call that serves several texts counts for each of them, and one that reads a prefix, which is kept, for none.
    """

    calls: int = 0
    tokens: int = 0
    dropped: float = 0.0

    def and_(self, calls: int = 0, tokens: int = 0, dropped: float = 0.0) -> Work:
        """Return this work with so many more calls, tokens and so much more estimated mass."""
        return Work(self.calls + calls, self.tokens + tokens, self.dropped + dropped)


@dataclass(frozen=True, eq=False)
class Guess:
    """A token that a text is likely to go on with, run before it is known to come.

    Attributes:
        behind: what the token stands behind.
        token: its id.
        path: of the token in the tree of what has been run.
        hidden: (d,), the model's last hidden state at it.
    """

    behind: NextTokenProbs
    token: int
    path: Path
    hidden: Float[Tensor, " d"]


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as one member has read it so far.

    Attributes:
        covers: of all its bytes.
        tree: what the model keeps of them.
        text: the bytes.
        work: what reading them has cost.
        guesses: tokens beyond them that the model was given along with others.
        ended: whether nothing can follow.
        full: whether that is because the model's context is full.
    """

    covers: Covers
    tree: TokenTree
    text: bytes
    work: Work = field(default_factory=Work)
    guesses: tuple[Guess, ...] = ()
    ended: bool = False
    full: bool = False

    def compact(self) -> Reading:
        """Drop what the model keeps of covers that were let go."""
        covers, guesses = self.covers, self.guesses
        behind = {id(one.probs): one.probs for group in (covers.closed, covers.open) for one in group}
        tree, paths = self.tree.kept([*(probs.path for probs in behind.values()), *(guess.path for guess in guesses)])
        if tree is self.tree:
            return self
        moved = {key: probs.moved(path) for (key, probs), path in zip(behind.items(), paths, strict=False)}
        ahead = zip(guesses, paths[len(behind) :], strict=True)
        return replace(
            self,
            tree=tree,
            guesses=tuple(replace(guess, behind=moved[id(guess.behind)], path=path) for guess, path in ahead),
            covers=replace(
                covers,
                closed=tuple(one._replace(probs=moved[id(one.probs)]) for one in covers.closed),
                open=tuple(one._replace(probs=moved[id(one.probs)]) for one in covers.open),
            ),
        )
