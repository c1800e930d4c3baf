"""The base class of decoders, what one is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.readers.union_form import UnionForm
from softmeet.rules.frozen import Frozen
from softmeet.rules.settings import Settings

# Options of ``generate`` that change nothing at these values, and those that decoders take.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,), "top_k": (0,), "top_p": (1,), "min_p": (0,), "temperature": (1,), "repetition_penalty": (1,),
    "one_member": (False,), "prompt_weights": (False,), "reproducible": (False,), "speculate": (0, "auto"),
    "num_beams": (1,),
}  # fmt: skip
_TAKEN = ("weights", "gate", "seed", "max_new_tokens", "max_bytes")


class Texts(Protocol):
    """Texts that are written, in rows, behind prompts of their own.

    Attributes:
        rows: how many there are.
    """

    rows: int

    def log_probs(self, rows: Sequence[int]) -> Float[Tensor, "n k v"]:
        """Return each member's log-probabilities in nats, fp64, of the symbol that follows the texts of k rows."""

    def add(self, rows: Sequence[int], symbols: Sequence[int]) -> None:
        """Add a symbol to the text of each of some rows."""

    def finish(self, rows: Sequence[int]) -> None:
        """Have the members forget the texts of some rows, to which nothing is added any more."""

    def replace(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Have each of some rows be a copy of what another row was before."""

    def symbols(self, row: int) -> tuple[int, ...]:
        """Return the symbols that were added to a row, or to what it is a copy of."""

    def allowed(self, rows: Sequence[int]) -> Tensor | None:
        """Return which symbols can follow in UTF-8, (k, v) bool; None if all can, as over tokens."""


@dataclass(frozen=True)
class ToWrite:
    """What a decoder is to do: write behind each of B prompts.

    Attributes:
        prompts: B, how many there are.
        settings: the rule, the weights and so on, from :meth:`Settings.for_members`.
        most: T, the most symbols of a text, its end included.
        ends: the symbols that end a text.
        generator: what all draws come from.
    """

    prompts: int
    settings: Settings
    most: int
    ends: frozenset[int]
    generator: torch.Generator


@dataclass(frozen=True)
class WeightedText:
    """A text that a decoder has written.

    Attributes:
        symbols: its symbols, of which the last may end it; where members write in tokens of their own, the first's.
        ended: whether it does.
        log_weight: the logarithm of its weight among the texts behind one prompt, not normalised; -inf for weight 0. Of
            a decoder that searches, the score Σ w_i log P_i(text).
        log_probs: log P_i(text) by each member i, in nats, its end included; where members write in tokens of their
            own, of what each has written, which may be shorter in a text that has not ended.
        text: what the symbols spell; where members write in tokens of their own, what they agree on.
    """

    symbols: tuple[int, ...]
    ended: bool
    log_weight: float
    log_probs: tuple[float, ...]
    text: str = ""


@dataclass(frozen=True)
class Decoding:
    """What a decoder has written behind one prompt.

    Attributes:
        texts: all texts, with their weights.
        chosen: the number of the one that stands for all; None of a decoder that draws, if every weight is 0.
        log_z: the logarithm of the decoder's estimate of what the weights of all possible texts sum to, in nats; None
            of a decoder without one.
    """

    texts: tuple[WeightedText, ...]
    chosen: int | None
    log_z: float | None = None

    @property
    def text(self) -> str | None:
        """The text that was chosen; None if there is none."""
        return None if self.chosen is None else self.texts[self.chosen].text

    def chosen_text(self) -> str:
        """Return the text that was chosen.

        Raises:
            InvalidInputError: if every weight is 0.
        """
        if self.text is None:
            raise InvalidInputError(
                "expected a text to which the members together give some probability, and none of those that were "
                "tried has any: raise the decoder's n, or choose another rule"
            )
        return self.text


class Decoder(Frozen, ABC):
    """A way to write texts by several members: the base class of all decoders.

    A subclass sets ``name`` and ``summary`` and defines :meth:`decode`. Its options are pydantic fields, each with a
    default and one line of help. ``str`` of an instance is what ``--decoder`` takes: ``particles:n=16``.

    Attributes:
        name: the name under which it is asked for: lower-case letters, digits and hyphens.
        summary: one line about it.
        reference: its source: a paper or a web address; empty if there is none.
        own_tokens: whether each member writes in tokens of its own, as of
            :class:`softmeet.decoders.own_tokens.OwnTokensDecoder`, and not in symbols that all share.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    own_tokens: ClassVar[bool] = False

    @abstractmethod
    def rows(self, members: int) -> int:
        """Return how many rows :meth:`decode` needs for each prompt, of so many members."""

    @property
    def ahead(self) -> int:
        """How many symbols more than the limit allows members may read of a text; by default none."""
        return 0

    @abstractmethod
    def decode(self, texts: Any, job: ToWrite) -> list[Decoding]:
        """Write behind each of B prompts.

        Args:
            texts: a :class:`Texts`, with :meth:`rows` rows for each prompt, one prompt's after the other's, of which
                nothing has been written; with ``own_tokens`` a list of
                :class:`~softmeet.decoders.own_tokens.OwnTexts`, which have such rows, one for each member.
            job: what is to be written.
        """

    def require(self, settings: Settings) -> None:
        """Check that the decoder can use a rule, a gate and so on; by default, any.

        Raises:
            InvalidInputError: if it cannot; the message says what to choose.
        """

    def require_vocabulary(self, vocabulary: str | None) -> None:
        """Check that the decoder can be used over a vocabulary, such as "bytes".

        Raises:
            InvalidInputError: if it cannot, as members have no tokens of their own over it, or say nothing by
                themselves.
        """
        form = UnionForm.parse(vocabulary) if vocabulary and vocabulary.startswith("union") else None
        if self.own_tokens and (vocabulary == "bytes" or form not in (None, UnionForm())):
            raise InvalidInputError(
                f"the decoder {self.name} has members write tokens of their own, and over {vocabulary} they have none: "
                "load them with vocabulary='union', or in the command --vocabulary union"
            )
        if form is not None and form.is_joint:
            raise InvalidInputError(
                f"the decoder {self.name} takes what each member says by itself, and {vocabulary} is made of what all "
                "members say at a step: load them with vocabulary='union', or in the command --vocabulary union"
            )

    def __str__(self) -> str:
        own = self.model_dump(exclude_defaults=True)
        return ":".join(
            [self.name, *(f"{key}={str(x).lower() if x is True or x is False else x}" for key, x in own.items())]
        )


def refuse_given(decoder: Decoder, against: Mapping[str, bool]) -> None:
    """Raise InvalidInputError if one of some settings, by what it is called, is given that a decoder cannot use."""
    if wrong := [name for name, given in against.items() if given]:
        raise InvalidInputError(f"the decoder {decoder.name} cannot be used with {', '.join(wrong)}: leave it out")


def require_plain(decoder: Decoder, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call that change something.

    Raises:
        InvalidInputError: if one of them means nothing for whole texts.
    """
    given = {name: x for name, x in options.items() if x is not None and x not in _PLAIN.get(name, ())}
    if decoder.own_tokens and given.get("do_sample") is False:
        del given["do_sample"]  # such decoders draw nothing
    if wrong := sorted(given.keys() - set(_TAKEN)):
        raise InvalidInputError(
            f"the decoder {decoder.name} writes whole texts by what members predict, and cannot be used with "
            f"{', '.join(wrong)}: leave it out"
        )
    return given
