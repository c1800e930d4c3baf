"""What the batcher is asked for, the sequences that it runs, and the events that it reports of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.hf.combining import Deferral
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.report import TokenReport
from softmeet.members.partial_cache import PartialCache
from softmeet.rules.gates import Gate, Unsure, that_closes
from softmeet.rules.settings import Settings
from softmeet.server.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Combination:
    """An ensemble and how its members are combined: what sequences must have in common to be solved together.

    Args:
        model: the ensemble.
        settings: in place of the ensemble's own.
        names: of its members, for people.
    """

    model: EnsembleForCausalLM
    settings: Settings
    names: tuple[str, ...] = ()

    def room(self, length: int) -> int:
        """Return how many tokens the shortest context of a member can take after a prompt of ``length`` tokens."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return 1 << 30 if limit is None else max(limit - length, 0)

    @cached_property
    def gate(self) -> Gate | None:
        """The gate, if there is one that closes at all."""
        return that_closes(self.settings.gate)

    @property
    def unsure(self) -> Unsure | None:
        """The gate, if it is of the kind that keeps all members but the first from running."""
        return self.gate if isinstance(self.gate, Unsure) else None


@dataclass(frozen=True)
class Token:
    """A token of a sequence, drawn or of its prompt.

    Args:
        token: its id.
        log_prob: of the token, by the ensemble and before temperature, in nats; None if nobody asked.
        top: the most probable tokens there and their log-probabilities, likewise.
        report: what the members expected there, if that was asked for.
        gated: whether a gate was closed there.
        saved: about how many seconds that saved.
    """

    token: int
    log_prob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    report: TokenReport | None = None
    gated: bool = False
    saved: float = 0.0


@dataclass(frozen=True)
class PromptScored:
    """The event that a prompt was scored: all of its tokens but the first, with what was asked about them."""

    tokens: list[Token]


@dataclass(frozen=True)
class Finished:
    """The event that a sequence has ended: ``"stop"`` at an end-of-text token, ``"length"`` at its limit."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The event that a sequence has ended by an error, which concerns this sequence alone."""

    error: Exception


Event = Token | PromptScored | Finished | Failed
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for, checked and in tokens: several continuations of each of some prompts.

    Args:
        combination: which ensemble, and how its members are combined.
        sampling: how tokens are drawn; each sequence has a random generator of its own.
        max_tokens: how many tokens to draw at most.
        top: how many of the most probable tokens to list at each token; 0 for the token's own log-probability alone,
            None for none at all.
        report: how many tokens the report of each token lists, None for no reports.
        score_prompt: whether to score the prompts' tokens too.
        deadline: when to give up, on the clock of ``time.monotonic``.
        prompts: token ids.
        choices: how many continuations of each prompt; choice c of prompt p has index p · choices + c.
        stops: strings before which a text ends.
        model: the name of the ensemble.
        tokenizer: of the ensemble.
    """

    combination: Combination
    sampling: Sampling
    max_tokens: int
    top: int | None = None
    report: int | None = None
    score_prompt: bool = False
    deadline: float = float("inf")
    prompts: tuple[tuple[int, ...], ...] = ()
    choices: int = 1
    stops: tuple[str, ...] = ()
    model: str = ""
    tokenizer: Any = None


class Sequence:
    """One continuation of one prompt, and how far its members have come with it.

    Args:
        request: what is asked.
        prompt: token ids, at least one.
        key: number of the sequence within its request, which tells its random generator from the others'.
        emit: called on the batcher's thread with every event; it must not block.

    Attributes:
        tokens: the prompt and what was drawn.
        trails: what each member has run, if it does not run the sequence in its batch, or not yet.
        ahead: hidden states at the newest token of all members but the first, where they are known before anybody asks.
        asked: whether those members are to be asked at the newest token; None without a gate that decides that.
        spent: this sequence's part of the seconds that it took to ask them.
        joined, done: whether it has joined the running batch, and whether it has ended.
    """

    def __init__(self, request: GenerationRequest, prompt: tuple[int, ...], key: int, emit: Listener) -> None:
        self.request, self.prompt, self.emit = request, prompt, emit
        self.combination = request.combination
        self.sampler = Sampler(request.sampling, key, len(prompt))
        self.max_tokens = min(request.max_tokens, self.combination.room(len(prompt)))
        self.cancelled = self.joined = self.done = False
        self.tokens = list(prompt)
        self.members: list[PreTrainedModel] = list(self.combination.model.members)
        self.trails = [PartialCache() for _ in self.members]
        self.ahead: list[Float[Tensor, "1 _"]] = []
        self.asked: Deferral | None = None
        self.spent = 0.0

    @property
    def batched(self) -> list[PreTrainedModel]:
        """The members that run the sequence in their batches; those behind the gate ``unsure`` catch up when asked."""
        return self.members[:1] if self.combination.unsure else self.members

    @property
    def drawn(self) -> int:
        """How many tokens were drawn."""
        return len(self.tokens) - len(self.prompt)

    def cancel(self) -> None:
        """Give up the sequence's place before its next token; no more of its events are of use."""
        self.cancelled = True
