"""The flags for how tokens are drawn."""

from __future__ import annotations

from typing import Any, Literal

import typer

from softmeet.cli.flags import Flags, at_least_one, flag, optional, switch
from softmeet.engine import ANSWER_TOKENS


def _positive(value: float | None) -> float | None:
    """Return an option's value; this is typer's callback of options that have to be above 0."""
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} is not above 0.")
    return value


def checked_drafts(value: str | None) -> str | None:
    """Return the value of ``--speculate``, "auto" or a number; this is typer's callback of that option."""
    if value is not None and value != "auto" and not (value.isdecimal() and int(value) <= 64):
        raise typer.BadParameter(f"{value!r} is neither a number of tokens from 0 to 64 nor auto.")
    return value


def drafts_of(value: str) -> int | Literal["auto"]:
    """Return a value of ``--speculate`` as Python takes it."""
    return "auto" if value == "auto" else int(value)


class SamplingFlags(Flags, panel="Sampling"):
    """Flags for how tokens are drawn, named as in transformers."""

    max_new_tokens: int | None = at_least_one(
        "The most tokens to add to each prompt; over bytes as the first member's tokenizer cuts what is added.",
        shown=str(ANSWER_TOKENS),
    )
    max_bytes: int | None = at_least_one(
        "Over bytes, the most bytes to add to each prompt, whatever tokens they make unless --max-new-tokens is given.",
        "--max-new-bytes",
        shown="no limit",
    )
    seed: int | None = optional("The same integer gives the same texts again; without it, each run differs.", min=0)
    do_sample: bool = flag(True, "Draw each token at random; --no-do-sample always takes the likeliest.")
    temperature: float | None = optional(
        "Higher is more random; 0 always takes the likeliest. Log-probabilities are divided by X before drawing.",
        min=0, shown="1",
    )  # fmt: skip
    top_k: int = flag(0, "Draw from the N likeliest tokens only; 0 for all.", min=0)
    top_p: float | None = optional(
        "Draw only from the smallest set of likeliest tokens whose probabilities add up to at least X; 1 for all.",
        min=0, max=1,
        shown="1",
    )  # fmt: skip
    min_p: float | None = optional(
        "Draw only from tokens at least X times as probable as the likeliest; 0 for all.", min=0, max=1, shown="0"
    )
    repetition_penalty: float | None = optional(
        "Make tokens that came before less likely, by a factor of X in their scores, as in transformers; 1 for no "
        "change.",
        shown="1",
        callback=_positive,
    )
    speculate: str | None = optional(
        "Let the cheapest member, files or what the text repeats draft N tokens, which members read at once: the same "
        "text in less time where drafts are mostly right. N may be auto, for as many as pay, or 0.",
        metavar="N", shown="auto where a seed still repeats its text, else 0", callback=checked_drafts,
    )  # fmt: skip
    one_member: bool = switch(
        "By prob-mean, draw each token from one member, itself drawn by its weight: the same law at about the price of "
        "one member, without a seed, truncation or summary."
    )

    def arguments(self) -> dict[str, Any]:
        """Return the flags that are set as keyword arguments of ``Ensemble.generate``.

        Flags that are None are left out. A temperature of 0 means ``do_sample=False``, with which temperature, top-k,
        top-p and min-p are left out, too.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.max_bytes is None:
            given.setdefault("max_new_tokens", ANSWER_TOKENS)
        if self.speculate is not None:
            given["speculate"] = drafts_of(self.speculate)
        if self.do_sample and self.temperature != 0:
            return given
        unused = ("temperature", "top_k", "top_p", "min_p")
        return {name: value for name, value in given.items() if name not in unused} | {"do_sample": False}
