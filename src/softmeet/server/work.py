"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.report import TokenReport
from softmeet.rules.gates import Gate, Unsure, that_closes
from softmeet.rules.settings import Settings
from softmeet.server.sampling import Sampling


@dataclass(frozen=True)
class Combination:
    """An ensemble and how it is combined: what rows must have in common to be solved together."""

    model: EnsembleForCausalLM
    settings: Settings

    def room(self, length: int) -> int:
        """How many tokens fit after a prompt of that length into the shortest context."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return 1 << 30 if limit is None else max(limit - length, 0)

    @cached_property
    def gate(self) -> Gate | None:
        """The gate, if there is one that closes."""
        return that_closes(self.settings.gate)

    @property
    def unsure(self) -> Unsure | None:
        """The gate that keeps members from running, if there is one."""
        return self.gate if isinstance(self.gate, Unsure) else None


@dataclass(frozen=True)
class Token:
    """A token that came. ``log_prob`` and ``top`` (token, log-probability) are the ensemble's, untempered, in nats.

    ``gated`` if a gate was closed there, which ``saved`` about so many seconds.
    """

    token: int
    log_prob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    report: TokenReport | None = None
    gated: bool = False
    saved: float = 0.0


@dataclass(frozen=True)
class PromptScored:
    """The prompt's tokens but the first, each with the log-probabilities that were asked for."""

    tokens: list[Token]


@dataclass(frozen=True)
class Finished:
    """The end: ``"stop"`` at an end-of-text token, ``"length"`` at the limit."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The end, by an error that concerns this sequence."""

    error: Exception


Event = Token | PromptScored | Finished | Failed


@dataclass(frozen=True)
class Work:
    """What the sequences of a request have in common.

    Args:
        combination: which ensemble, and how.
        sampling: how tokens are drawn; a sequence has a key of its own.
        max_tokens: how many to draw at most.
        top: how many log-probabilities to list, 0 for the token's own, None for none.
        report: how many tokens a report lists, None for no report.
        score_prompt: also score the prompt's tokens.
        deadline: on the clock of ``time.monotonic``.
    """

    combination: Combination
    sampling: Sampling
    max_tokens: int
    top: int | None = None
    report: int | None = None
    score_prompt: bool = False
    deadline: float = float("inf")


class Sequence:
    """One continuation of one prompt.

    Args:
        work: what is asked.
        prompt: token ids, at least one.
        key: of its generator among those of the request's seed.
        emit: called on the engine's thread with every event; it must not block.
    """

    def __init__(self, work: Work, prompt: tuple[int, ...], key: int, emit: Callable[[Event], None]) -> None:
        self.work, self.prompt, self.emit = work, prompt, emit
        self.sampling = replace(work.sampling, key=key)
        self.max_tokens = min(work.max_tokens, work.combination.room(len(prompt)))
        self.cancelled = False

    def cancel(self) -> None:
        """Give up its place before the next token; no more events are of use."""
        self.cancelled = True
