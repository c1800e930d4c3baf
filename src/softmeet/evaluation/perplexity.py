"""How well members and rules predict a text: nats, hits and confidence at each position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import Choice
from softmeet.evaluation.positions import Positions
from softmeet.hf.calibrated import resolved
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.weighting import perplexity_weights
from softmeet.rules.gates import Gate, that_closes
from softmeet.rules.movement import Movement
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.solution import Solution
from softmeet.simplex import kl, prob_mean
from softmeet.solvers.base import Status

# Elements of one member's log-probabilities at once.
_ELEMENTS = 1 << 22


@dataclass
class Scores:
    """One member's or rule's predictions at N positions; rows in the order of the text.

    Attributes:
        nats: -log p(target), (N,), fp64.
        hit: whether the target was the most probable token, (N,).
        confidence: the probability of that token, (N,).
        num_passes: reads of all heads, (N,); this and what follows are empty for a member.
        fallback: whether another rule answered for want of a feasible distribution, (N,).
        not_converged: whether the rule was not solved, (N,).
        gated: whether a gate was closed, (N,).
        work: of a member over bytes, (N, 3), as ``model.work`` has it; empty for all others.
        movement: of a rule that tilts the pool, without a gate, (N, 5), as :meth:`Movement.table` has it; else empty.
    """

    nats: Float[Tensor, " N"]
    hit: Bool[Tensor, " N"]
    confidence: Float[Tensor, " N"]
    num_passes: Float[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    fallback: Bool[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    not_converged: Bool[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    gated: Bool[Tensor, " M"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    work: Float[Tensor, "K 3"] = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.float64))
    movement: Float[Tensor, "L 5"] = field(default_factory=lambda: torch.zeros(0, 5, dtype=torch.float64))

    @property
    def mean(self) -> float:
        """The mean loss over all positions, in nats a token."""
        return self.nats.mean().item()

    @property
    def passes(self) -> float:
        """Reads of all heads, summed."""
        return self.num_passes.sum().item()

    @property
    def fallbacks(self) -> int:
        """How many rows another rule answered."""
        return int(self.fallback.sum())

    @property
    def unconverged(self) -> int:
        """How many rows were not solved."""
        return int(self.not_converged.sum())


@dataclass
class Evaluation:
    """Scores of every member and choice on the same positions, whose hidden states need not be there any more.

    ``disagreement`` is the mean of KL(p̂_i‖mean of p̂) over members, (N,), nats: their Jensen-Shannon divergence.
    ``vocabulary`` is what positions are of, ``"tokens"`` or ``"bytes"``.
    """

    positions: Positions
    members: dict[str, Scores] = field(default_factory=dict)
    choices: dict[str, Scores] = field(default_factory=dict)
    disagreement: Float[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0))
    vocabulary: str = "tokens"


def in_turn(settings: Settings) -> tuple[bool, float]:
    """The order to solve in: what tilts the pool, by its trusts, then the rest; each may start from those before."""
    rule = settings.rule
    return (False, sum(rule.effective_trust(settings.member_trust))) if rule.tilts_pool else (True, 0.0)


def chunk_size(v: int) -> int:
    """Positions to solve at once."""
    return max(4, min(64, _ELEMENTS // v))


@torch.inference_mode()
def evaluate(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[Choice],
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Evaluation:
    """Every member and every choice at every position.

    Args:
        ensemble: whose heads and settings are used.
        positions: of a text, or from a trace.
        choices: rules and options, changes to the ensemble's settings; a gate of the ensemble's own does not count.
        on_progress: called with the number of positions after each chunk.
    """
    names = distinct_names(ensemble)
    if both := sorted({*names} & {choice.name for choice in choices}):
        raise InvalidInputError(
            f"expected members and rules of different names, but {both[0]} is both: rename the member"
        )
    settings = settings_of(ensemble, choices)
    order = sorted(choices, key=lambda choice: in_turn(settings[choice.name]))
    parts: dict[str, list[Scores]] = {name: [] for name in [*names, *(choice.name for choice in choices)]}
    disagreement = []
    for chunk, weights in _chunks(ensemble, positions, choices):
        log_probs, logits = ensemble.model.combiner.own_log_probs(chunk.hidden)
        targets = chunk.targets.to(log_probs.device)
        for name, own, hidden in zip(names, log_probs, chunk.hidden, strict=True):
            parts[name].append(replace(_scores(own, targets), work=ensemble.model.work(hidden).double().cpu()))
        mean = prob_mean(log_probs, log_probs.new_full((len(names),), 1 / len(names)))
        disagreement.append(torch.stack([kl(own, mean) for own in log_probs]).mean(0).double().cpu())
        solver = _Solver(ensemble.model, log_probs, logits, targets)
        for choice in order:
            by_prompt = {"weights": weights[choice.prompt]} if choice.prompt else {}
            parts[choice.name].append(solver.scores(settings[choice.name].changed(**by_prompt)))
        on_progress(len(chunk))
    joined = {name: _joined(some) for name, some in parts.items()}
    return Evaluation(
        positions,
        {name: joined[name] for name in names},
        {choice.name: joined[choice.name] for choice in choices},
        torch.cat(disagreement),
        ensemble.model.config.vocabulary,
    )


def settings_of(ensemble: Ensemble, choices: Sequence[Choice]) -> dict[str, Settings]:
    """The settings that each choice stands for; a gate ``movement`` is calibrated, and what it found is kept.

    Raises:
        UnsupportedHeadError, InvalidInputError: the ensemble is over bytes, and one of them is not for those.
    """
    ungated = ensemble.model.settings.ungated()
    found = {choice.name: ungated.changed(**choice.settings) for choice in choices}
    for settings in found.values():
        ensemble.model.require(settings)
    return {name: resolved(ensemble.model, settings) for name, settings in found.items()}


def distinct_names(ensemble: Ensemble) -> list[str]:
    """The members' names, with a number where the same one comes again."""
    before = [ensemble.names[:i].count(name) for i, name in enumerate(ensemble.names)]
    return [f"{name}#{k + 1}" if k else name for name, k in zip(ensemble.names, before, strict=True)]


def _chunks(
    ensemble: Ensemble, positions: Positions, choices: Sequence[Choice]
) -> Iterator[tuple[Positions, dict[int, list[float]]]]:
    """Chunks, and for each length of prompt the weights that it gives there; then no chunk crosses a document."""
    size = chunk_size(ensemble.model.config.vocab_size)
    prompts = sorted({choice.prompt for choice in choices if choice.prompt})
    if not prompts:
        yield from ((chunk, {}) for chunk in positions.chunks(size))
        return
    start = 0
    for length in positions.document.unique_consecutive(return_counts=True)[1].tolist():
        document = positions.take(slice(start, start + length))
        start += length
        cuts = sorted({0, length, *(p for p in prompts if p < length)})
        known = {p: _prompt_weights(ensemble, document.take(slice(p))) for p in prompts}
        own = list(ensemble.model.config.weights)
        for first, last in pairwise(cuts):
            # A prompt's own tokens are predicted with the weights that there are before it.
            weights = {p: known[p] if first >= p else own for p in prompts}
            yield from ((chunk, weights) for chunk in document.take(slice(first, last)).chunks(size))


def _prompt_weights(ensemble: Ensemble, prompt: Positions) -> list[float]:
    log_probs, _ = ensemble.model.combiner.own_log_probs(prompt.hidden)
    targets = prompt.targets.to(log_probs.device)
    nats = -log_probs.gather(-1, targets.expand(len(log_probs), -1)[..., None]).squeeze(-1)
    return perplexity_weights(nats.mean(-1).tolist())


@dataclass(eq=False)
class _Solver:
    """Scores choices on one chunk.

    Those that differ in their gates alone share what was solved without one; those that differ in their trusts start
    from one another.
    """

    model: EnsembleForCausalLM
    log_probs: Float[Tensor, "n B v"]
    logits: Float[Tensor, "n B v"] | None
    targets: Int[Tensor, " B"]
    solved: dict[Settings, tuple[Solution, Scores]] = field(default_factory=dict)
    paths: dict[Settings, list[Solution]] = field(default_factory=lambda: defaultdict(list))

    def scores(self, settings: Settings) -> Scores:
        """Score a rule under some settings on the chunk, from what is solved already where that will do."""
        gate, plain = that_closes(settings.gate), settings.ungated()
        if gate is not None and plain not in self.solved:
            return _scored(self.model.combiner.combine_rows(self.log_probs, self.logits, settings), self.targets)
        if plain not in self.solved:
            solution = self._solve(plain)
            self.solved[plain] = solution, _scored(solution, self.targets)
        solution, scores = self.solved[plain]
        return scores if gate is None else self._gated(gate, settings, solution, scores)

    def _solve(self, settings: Settings) -> Solution:
        rule = settings.rule
        path = self.paths[settings.model_copy(update={"rule": None, "trust": ()})]
        known = self._known(settings, path) if rule.reads_heads else {}
        solution = self.model.combiner.combine_rows(self.log_probs, self.logits, settings, **known)
        if rule.tilts_pool:
            path.append(solution)
        return solution

    def _known(self, settings: Settings, path: list[Solution]) -> dict[str, Any]:
        """What was found on a path that spares a rule some work: where it starts, and what answers infeasible rows."""
        if not path or settings.on_infeasible == "raise":
            return {"start": path[-1]} if path else {}
        fallback, trust = rule_of(settings.on_infeasible), settings.relaxed().trust
        fits = [s for s in path if s.problem.settings.rule == fallback and s.problem.trust == trust]
        return {"start": path[-1], "relaxed": fits[0] if fits else None}

    def _gated(self, gate: Gate, settings: Settings, solution: Solution, scores: Scores) -> Scores:
        """From what was solved without the gate: only where it is closed is anything else answered."""
        closed = ~gate.open(solution.problem)
        if not closed.any():
            return scores
        logits = None if self.logits is None else self.logits[:, closed]
        there = _scored(
            self.model.combiner.combine_rows(self.log_probs[:, closed], logits, settings), self.targets[closed]
        )
        both = zip(_of_a_rule(scores), _of_a_rule(there), strict=True)
        return Scores(*(whole.masked_scatter(closed.cpu(), own) for whole, own in both))


def _scored(solution: Solution, targets: Int[Tensor, " B"]) -> Scores:
    passes, late = solution.num_passes.double(), solution.status == Status.NOT_CONVERGED
    found = _scores(solution.log_probs, targets, passes, solution.fallback, late, solution.gated)
    moved = None if that_closes(solution.problem.settings.gate) else Movement.of(solution)
    return found if moved is None else replace(found, movement=moved.table())


def _scores(log_p: Float[Tensor, "B v"], targets: Tensor, *ends: Tensor) -> Scores:
    best = log_p.max(-1)
    nats = -log_p.gather(-1, targets[:, None]).squeeze(-1).double()
    found = (nats, best.indices == targets, best.values.exp().double(), *ends)
    return Scores(*(values.cpu() for values in found))


def _of_a_rule(scores: Scores) -> list[Tensor]:
    return [value for name, value in vars(scores).items() if name not in ("work", "movement")]


def _joined(parts: Sequence[Scores]) -> Scores:
    """Those of several stretches of positions, in their order."""
    return Scores(*map(torch.cat, zip(*(vars(s).values() for s in parts), strict=True)))
