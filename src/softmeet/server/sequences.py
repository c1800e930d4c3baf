"""What passes between the API and the batcher: requests, the sequences that continue their prompts, and events."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from softmeet.engine.continuation import Continuation, Own
from softmeet.engine.draw import Sampling
from softmeet.engine.limits import AnswerLength
from softmeet.engine.masking import ends_of
from softmeet.errors import SoftmeetError
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.readers.reader import Alphabet
from softmeet.rules.base import Rule
from softmeet.rules.gates import Gate, Unsure, that_closes, unsure_of
from softmeet.rules.registry import all_rules, source_of
from softmeet.rules.settings import Settings
from softmeet.suspended import Control


def unused(rule: Rule) -> tuple[str, ...]:
    """Return the names of those settings, of ``trust`` and ``pool``, that cannot change a rule's answer.

    A rule that chooses from the feasible set uses both, as its fallback ``meet`` does; a rule that is not softmeet's
    may read the pool whether or not it reads heads.

    >>> from softmeet.rules.settings import rule_of
    >>> unused(rule_of("prob-mean")), unused(rule_of("meet"))
    (('trust', 'pool'), ())
    """
    used = {"trust": rule.uses_trust or rule.is_feasible, "pool": rule.reads_heads or source_of(rule) is not None}
    return tuple(name for name, has_effect in used.items() if not has_effect)


@dataclass(frozen=True)
class Combination:
    """An ensemble with the settings by which its members are combined, for one or more sequences.

    The batcher solves sequences with equal combinations together.

    Args:
        model: the ensemble.
        settings: the rule, trusts, gate and so on, used in place of the ensemble's own; either its ``settings`` with
            :meth:`Settings.changed`, or completed for its members by :meth:`Settings.for_members`.
        names: the members' names, as shown to clients.
    """

    model: EnsembleForCausalLM
    settings: Settings
    names: tuple[str, ...] = ()

    @property
    def symbols_are_tokens(self) -> bool:
        """Whether symbols are tokens of the members, whose number is what limits and usage count."""
        return self.alphabet.spelling is None

    @property
    def unit(self) -> str:
        """What symbols are called, in the plural."""
        return "tokens" if self.symbols_are_tokens else "bytes"

    @property
    def alphabet(self) -> Alphabet:
        """The symbols of texts, which the API calls tokens."""
        return self.model.alphabet

    @property
    def spellers(self) -> list[Any]:
        """The members that spell texts by tokens of their own, in order; none where symbols are tokens."""
        return [] if self.symbols_are_tokens else list(self.model.readers)

    def room(self, length: int, own: Own = ()) -> int:
        """Return how many tokens fit after ``length`` tokens, in whose place members read ``own``; at most 2³⁰."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        shared = 1 << 30 if limit is None else max(limit - length, 0)
        return min(shared, self.model.contexts.room(own)) if self.symbols_are_tokens else shared

    def shown(self) -> dict[str, Any]:
        """Return the settings that have an effect, in the types of JSON, as clients are told of them.

        They are ``rule``, ``trust`` and ``pool`` where the rule uses them, ``weights``, and ``gate`` if there is one.
        Over bytes there is also ``vocabulary``: "bytes".
        """
        plain, idle = self.settings.plain(), unused(self.settings.rule)
        found = {name: plain[name] for name in ("rule", "trust", "weights", "pool") if name not in idle}
        if not self.symbols_are_tokens:
            found["vocabulary"] = self.unit
        if self.gate is not None:
            found["gate"] = plain["gate"]
        return found

    @property
    def rules(self) -> dict[str, list[str]]:
        """By name, the rules that can combine the members, and which settings each leaves unused."""
        every = (*all_rules(), self.settings.rule)
        # Only tokens have rows in heads.
        return {rule.name: list(unused(rule)) for rule in every if self.symbols_are_tokens or not rule.reads_heads}

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the ensemble's end-of-text tokens."""
        return ends_of(self.model.generation_config)

    @cached_property
    def gate(self) -> Gate | None:
        """The settings' gate; None if there is none, or if it never closes (``Gate.never_closes``)."""
        return that_closes(self.settings.gate)

    @property
    def is_quick(self) -> bool:
        """Whether combining the members takes next to no time: an average, and no gate that runs members."""
        return self.settings.rule.is_average and self.unsure is None

    @property
    def unsure(self) -> Unsure | None:
        """The gate if it is ``unsure``, under which the other members run only where the first is unsure; else None."""
        return unsure_of(self.settings.gate)


@dataclass(frozen=True)
class Token:
    """The event that a token was drawn; also one scored token of a prompt.

    Args:
        token: the token's id.
        log_prob: the ensemble's log-probability of the token before sampling's temperature and truncation, in nats;
            None if neither log-probabilities nor a report were asked for, and for a prompt's first token.
        top: (id, log-probability in nats) of the most probable tokens at this position, as many as
            ``GenerationRequest.top`` says, the most probable first.
        rank: the token's place among all tokens by their log-probability, from 1; None but in a scored prompt.
        report: each member's distribution and correction at this position, as
            :meth:`softmeet.hf.report.TokenReport.spelled` returns it; None if no report was asked for.
        status: how the rule ended here, the name of a :class:`softmeet.Status`; empty if no rule did, as at a prompt's
            first token.
        gated: whether a gate was closed at this position.
        saved: about how many seconds the closed gate saved here; 0 if it was open.
        claims: the share that each of the user's files took here, if sources were asked for.
    """

    token: int
    log_prob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    rank: int | None = None
    report: dict[str, Any] | None = None
    status: str = ""
    gated: bool = False
    saved: float = 0.0
    claims: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class PromptScored:
    """The event that a prompt was scored.

    Args:
        tokens: all of the prompt's tokens but the first, in order, each with the log-probabilities and report asked
            for.
    """

    tokens: list[Token]


@dataclass(frozen=True)
class Finished:
    """The event that a sequence has ended as planned.

    Args:
        reason: ``"stop"`` if it ended at one of ``GenerationRequest.ends``, ``"length"`` if it came to its limit.
    """

    reason: str


@dataclass(frozen=True)
class Failed:
    """The event that a sequence was ended by an error.

    Args:
        error: a :class:`softmeet.errors.SoftmeetError`; InternalError if a defect of the server is the cause.
    """

    error: Exception


Event = Token | PromptScored | Finished | Failed
Listener = Callable[[Event], None]


@dataclass
class Account:
    """The time that the rule may still take in this round for the sequences of a request.

    Attributes:
        left: seconds; negative if the rule has taken longer than its share, which later rounds make up for.
        saves: the most seconds of earlier rounds that it may keep.
    """

    left: float = 0.0
    saves: float = 0.0

    def add(self, share: float) -> None:
        """Begin a round: add its seconds to what is owed or kept."""
        self.left = min(self.left, self.saves) + share


@dataclass(frozen=True)
class GenerationRequest:
    """A client's request, checked and with its prompts as tokens: several continuations (choices) of each prompt.

    :meth:`Serving.prepare` makes it and checks its prompts; nothing is checked here.

    Args:
        combination: the ensemble, and how its members are combined.
        sampling: how tokens are drawn; each sequence has its own noise.
        max_tokens: the most tokens of a continuation; over bytes as the first member's tokenizer cuts it.
        max_bytes: over bytes the most bytes of a continuation; None for any number.
        top: how many of the most probable tokens to list at each token; 0 for the token's own log-probability and rank
            alone, None for no log-probabilities.
        report: how many tokens to list of each distribution in the report of each token; None for no reports.
        sources: whether it is told where answers stand in files, and how much these claimed.
        score_prompt: whether the prompts' own tokens are scored as well.
        deadline: the time after which its sequences fail, in seconds on the clock of ``time.monotonic``.
        prompts: each prompt's token ids, at least one, below the vocabulary's size, and no more than fit into the
            context; over bytes its bytes, after a symbol 256 if the text is to begin there.
        own: for each prompt what members read of their own: for each member the ids of its own tokens, over bytes
            before the prompt, over tokens in its place, or None; empty for None everywhere. None stands for the prompt
            behind what the member reads before every text.
        choices: how many continuations of each prompt; choice c of prompt p has index p · choices + c.
        stops: non-empty strings; the text of a choice ends before the first of them that occurs.
        ignore_eos: whether an end-of-text token is drawn, and followed, as any other.
        stop_token_ids: the ids of further tokens that end a sequence.
        skip_special: whether special tokens have no text.
        show_stop: whether the text includes the stop string, or the token, at which it ends.
        most_calls: the most functions that each choice may call; 0 if there are none to call.
        model: the ensemble's name.
        tokenizer: the ensemble's tokenizer, a fast one of transformers.
        account: the time that is left to its sequences in this round.
    """

    combination: Combination
    sampling: Sampling
    max_tokens: int
    max_bytes: int | None = None
    top: int | None = None
    report: int | None = None
    sources: bool = False
    score_prompt: bool = False
    deadline: float = float("inf")
    prompts: tuple[tuple[int, ...], ...] = ()
    own: tuple[Own, ...] = ()
    choices: int = 1
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special: bool = True
    show_stop: bool = False
    most_calls: int = 0
    model: str = ""
    tokenizer: Any = None
    account: Account = field(default_factory=Account, compare=False)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end a sequence."""
        return (*(() if self.ignore_eos else self.combination.ends), *self.stop_token_ids)


class Sequence(Continuation):
    """One continuation of one prompt: its tokens, and how many of them each member has run.

    Args:
        request: the request that it is part of.
        prompt: the prompt's token ids, at least one.
        key: the sequence's number within its request; its noise is determined by (the request's seed, key).
        emit: called on the batcher's thread with every event of the sequence, in order, as soon as it occurs; the last
            is :class:`Finished` or :class:`Failed`. It must not block. If it raises an exception, the
            sequence is cancelled.

    Attributes:
        combination: the request's.
        draw: how the sequence's tokens are chosen.
        dead_end: why nothing can follow, as the text's structure is too complex; None while something can.
        answer: how long the answer is, and whether it has come to its limit.
        max_tokens: the most tokens to draw: the request's, or fewer if the shortest context ends before; over bytes the
            most symbols.
        held: drawn tokens that are not emitted yet: over bytes those of a character that has not ended.
        alone: how it goes on while it runs alone, as :func:`softmeet.server.alone.alone` returns it, False for as in a
            batch; None before.
        cancelled: whether the sequence is to be ended before its next token.
        reading: the sequences whose prompts are read together with its own, and what stops that.
        busy: whether a task works on it, or it waits for one, so that it has no new token to run.
        account: the time that is left to its tasks: its request's, but all sequences without a token share one.
        last: when its last token was drawn, by ``time.perf_counter``; None before the first.
        done: whether it has ended.
    """

    def __init__(self, request: GenerationRequest, prompt: tuple[int, ...], key: int, emit: Listener) -> None:
        own = request.own[key // request.choices] if request.own else ()
        super().__init__(request.combination.model, prompt, own, ())
        self.request, self.emit = request, emit
        self.combination = request.combination
        self.draw = request.sampling.begin(key, len(prompt), request.ends)
        self.dead_end: SoftmeetError | None = None
        room = self.combination.room(len(prompt), self.own)
        most = room if request.max_bytes is None else min(room, request.max_bytes)
        self.answer = AnswerLength(self.combination.alphabet, request.max_tokens, most)
        self.max_tokens = self.answer.longest or 0
        self.cancelled = self.done = False
        self.busy = True
        self.account = request.account
        self.last: float | None = None
        self.held = list[Token]()
        self.reading: tuple[Several[Sequence], Control] = (self,), Control()
        self.alone: Any = None

    def begin_anew(self) -> None:
        """Have members that round coarsely read a seeded sequence as if they had read nothing before.

        What is kept of earlier prompts would change rounding, and with it now and then a token.
        """
        for reader in {*self.readers} if self.request.sampling.is_seeded else ():
            if reader.traits.rounding == "coarse":
                with reader.to_itself():
                    pass

    @property
    def waits(self) -> bool:
        """Whether a member waits for answers from elsewhere."""
        return any(reader.traits.waits for reader in self.readers)

    @property
    def batched(self) -> slice:
        """The members that read every token: all, or under the gate ``unsure`` the first alone."""
        return slice(1 if self.combination.unsure else None)

    @property
    def reused(self) -> int:
        """How many tokens of the prompt none of these had to read."""
        rows = self.rows[: len(self.model.members)][self.batched]
        return min(0 if row is None else row.known for row in rows)

    def add(self, token: Token) -> list[Token]:
        """Append a drawn token, and return those that belong to the answer for certain and were not returned before."""
        self.tokens.append(token.token)
        self.held.append(token)
        certain = len(self.held)
        if token.token not in self.request.ends:
            self.answer.push(token.token)
            certain -= self.answer.count - self.answer.kept
        found, self.held = self.held[:certain], [] if self.answer.is_over else self.held[certain:]
        return found

    def rest(self, last: Event) -> list[Token]:
        """Return the tokens that are held as the last event comes: a character may begin where a context is full."""
        return self.held if isinstance(last, Finished) else []

    @property
    def drawn(self) -> int:
        """The number of tokens drawn so far."""
        return len(self.tokens) - len(self.prompt)

    def forget(self) -> None:
        """Free the keys and values, even if somebody keeps the sequence."""
        super().forget()
        self.alone = None

    def cancel(self) -> None:
        """Ask the batcher to end the sequence before its next token; its later events are to be ignored.

        Its prompt is read no further, unless others are read with it.
        """
        self.cancelled = True
        group, control = self.reading
        if all(s.cancelled for s in group):
            control.stop()
