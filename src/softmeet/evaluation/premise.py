"""Test whether a member errs only because its head is too narrow (the premise), on held-out text, before any fitting.

The premise: member i's hidden state minimises the cross-entropy to the true distribution, so that the truth has the
member's moments. Let q be the pool, p̂_i the member's distribution, and s_i that distribution tilted by the member's
head (s_i ∝ p̂_i exp(W_i x) without a soft-cap) to have the moments of q. To first order in its trust, trusting member i
lowers the loss at a token y by log p̂_i(y) - log s_i(y) + KL(s_i‖p̂_i) nats. Under the premise the mean of this is
KL(s_i‖p̂_i) + KL(p̂_i‖s_i). The ratio of the two means is the *premise score*, 1 if the premise holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.hf.sampling import RowSampler
from softmeet.rules.movement import Movement
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.solution import Solution
from softmeet.simplex import kl
from softmeet.solvers.dual import iterate
from softmeet.solvers.minimise import full_hessian_pays, minimise_dual
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

_CHUNK = 64
_TOL = 1e-6
_STEPS, _POLISH = 100, 2
_COARSE = 1e-4
# Nats; movements below this are of no interest.
_SMALL = 1e-5
# The prompt and the seed of the text that an ensemble samples.
_PROMPT, _SEED = "The", 0


@dataclass(frozen=True)
class Premise:
    """The result of one member's premise test: whether trusting it lowers the loss, to first order in its trust.

    The premise is that the member errs only because its head is too narrow: then the truth has the member's moments.
    The formulas are in :mod:`softmeet.evaluation.premise`.

    Attributes:
        gain: the mean decrease of the loss from that of the pool by ``meet``, in nats per token and unit of the
            member's trust, for small trusts; negative if trust does harm.
        error: the standard error of ``gain`` over tokens; too small, since neighbouring tokens are not independent.
        score: ``gain`` divided by its expectation under the premise: 1 if the premise holds, 0 if trust does not help;
            NaN if the expectation is (nearly) 0.
        score_error: the standard error of ``score``.
    """

    gain: float
    error: float
    score: float
    score_error: float

    @property
    def verdict(self) -> str:
        """The conclusion: ``unclear`` if ``gain`` is within 2 ``error`` of 0, else ``trust`` or ``do not trust``."""
        if abs(self.gain) < 2 * self.error:
            return "unclear"
        return "trust" if self.gain > 0 else "do not trust"


@torch.inference_mode()
def premise_scores(ensemble: Ensemble, text: str, limit: int = 512) -> list[Premise]:
    """Test on a text whether trusting each member lowers the loss of the ensemble's pool.

    Args:
        ensemble: the members; its weights and pool are used, its rule and gate are not.
        text: a text of at least two tokens, on which no member should have been trained.
        limit: the most tokens to predict.

    Returns:
        A result for each member, in order; :class:`Premise` says what is tested.

    Raises:
        InvalidInputError: if the text has fewer than two tokens, or the ensemble is over bytes.
    """
    return premise_at(ensemble, ensemble.positions(text, limit))


@torch.inference_mode()
def premise_at(ensemble: Ensemble, stretches: Iterable[tuple[list[Tensor], Tensor]], **pool: Any) -> list[Premise]:
    """Test at given positions whether trusting each member lowers the loss of a pool.

    Args:
        ensemble: the members, over tokens; its rule and gate are not used.
        stretches: pairs of (each member's last hidden states, (t, d_i); the ids of the tokens that came, (t,)), as
            :meth:`Ensemble.positions` yields them; ``(positions.hidden, positions.targets)`` of ``Positions`` is one.
        pool: settings such as ``weights`` and ``pool``, by name, that replace the ensemble's.

    Returns:
        A result for each member, in order, from the positions of all pairs; :class:`Premise` says what is tested.

    Raises:
        InvalidInputError: if a setting in ``pool`` is unknown or has a bad value.
        UnsupportedHeadError: if a member's head cannot be read.
    """
    # Solve for the pool itself, whatever the ensemble's rule is.
    own = ensemble.model.settings.ungated().changed(**{**pool, "rule_temperature": 1.0, "trust": 0.0})
    ensemble.model.require(own.changed(rule="meet"))
    settings = own.changed(rule=own.pool)
    members, found = range(len(ensemble.names)), []
    for hidden, targets in stretches:
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            _, solution = ensemble.model.combiner.solve_rows([h[rows] for h in hidden], settings)
            found.append(torch.stack([torch.stack(_first_order(solution, i, targets[rows])) for i in members]))
    return [_summary(gain, expected) for gain, expected in torch.cat(found, -1)]


def _first_order(
    solution: Solution, i: int, targets: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return (the gain from trusting member ``i`` at each target, its expectation under the premise), nats, (B,)."""
    problem = solution.problem
    log_q, log_p = problem.log_pool, problem.log_p[i]
    # s_i is the I-projection of p̂_i onto the distributions with the moments of q, which stands for the truth.
    log_s, _ = moment_match(log_q, log_p, problem.views([i]), _TOL)
    gathered = (log_p - log_s).gather(-1, targets[:, None]).squeeze(-1)
    return gathered + kl(log_s, log_p), kl(log_s, log_p) + kl(log_p, log_s)


def _summary(gain: Float[Tensor, " t"], expected: Float[Tensor, " t"]) -> Premise:
    count, scale = len(gain), expected.mean().item()
    mean, error = gain.mean().item(), (gain.std() / math.sqrt(count)).item()
    if scale <= _TOL:
        return Premise(mean, error, math.nan, math.nan)
    score = mean / scale
    spread = ((gain - score * expected).std() / math.sqrt(count)).item() / scale
    return Premise(mean, error, score, spread)


def moment_match(
    log_truth: Float[Tensor, "B v"], log_start: Float[Tensor, "B v"], views: tuple[WhitenedHead, ...], tol: float
) -> tuple[Float[Tensor, "B v"], Float[Tensor, "B d"]]:
    """Tilt ``log_start`` by one head until it has the moments of ``log_truth``.

    The result s minimises KL(s‖start) among the distributions with those moments (the I-projection).

    Without a soft-cap the result is the s ∝ start · exp(W x) with Wᵀs = Wᵀtruth, W the head's matrix; with one, the
    rows of W are multiplied by its slopes.

    Args:
        log_truth: log-probabilities in nats, (B, v), fp64.
        log_start: log-probabilities in nats, (B, v), fp64.
        views: the head, whitened, for the same B rows, as a tuple of one: ``problem.views([i])`` for member i of a
            :class:`softmeet.rules.problem.Problem`, or ``(WhitenedHead(head, v, torch.float64, batch=B),)``.
        tol: the solver's tolerance in nats; raised to at least 10⁻⁴ for a head that is too large for the full Hessian.

    Returns:
        (log s in nats, fp64; x, which is added to the hidden state that gives the start, (B, d), fp64).
    """
    projection, newton = Projection(log_start, log_truth[:, None], views, (math.inf,), tol), DualNewton()
    if not full_hessian_pays(projection):
        coarse = replace(projection, tol=max(tol, _COARSE))
        found = minimise_dual(coarse, _STEPS, certify=False, rescue=False)
        return found.log_p, views[0].raw(found.nu)[0]
    state = iterate(newton, projection, _STEPS)
    # The dual's value stops changing while the moments are still off by the square root of round-off: take whole steps
    # that bring them to round-off.
    for _ in range(_POLISH):
        newton.aim(projection, state)
        state.nu, state.z = state.nu + state.direction, state.z + projection.scores(state.direction)
        state.log_p, state.log_r = projection.pooled(state.z), projection.corrected(state.z)
    return projection.pooled(state.z), views[0].raw(state.nu)[0]


def best_hidden(head: SoftmaxHead, log_truth: Float[Tensor, "B v"], tol: float = 1e-12) -> Float[Tensor, "B d"]:
    """Find the hidden states h, (B, d), fp64, at which a head's softmax distribution p_h minimises KL(truth‖p_h).

    These are the hidden states of a member that errs only because its head is too narrow.

    Args:
        head: without a soft-cap, since with one the moments do not determine the best h.
        log_truth: log-probabilities in nats, (B, v), over the head's v tokens; if some probabilities are 0, the best h
            may be at infinity.
        tol: the solver's tolerance, in nats.
    """
    B, v = log_truth.shape
    base = torch.zeros(v, dtype=torch.float64) if head.bias is None else head.bias.double() * head.scale
    views = (WhitenedHead(head, v, torch.float64, batch=B),)
    _, hidden = moment_match(log_truth.double(), base.log_softmax(-1).expand(B, v), views, tol)
    return hidden / head.scale


@torch.inference_mode()
def own_text(model: AnyEnsemble, count: int) -> list[Float[Tensor, "t _"]]:
    """Sample a text from an ensemble's pool, and return each member's last hidden states, (t, d_i).

    Row k is the state from which the k-th sampled token is predicted. The text continues "The" and has a fixed seed, so
    it is the same every time.

    Args:
        model: an ensemble over tokens, with a tokenizer.
        count: the number t of tokens to sample; fewer are sampled if the shortest member's context ends before.
    """
    tokenizer: Any = model.tokenizer
    ids = tokenizer(_PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    count = count if limit is None else min(count, limit - ids.shape[1])
    settings = model.settings.ungated().changed(rule=model.settings.pool, rule_temperature=1.0, trust=0.0)
    with model.without_claims():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), settings=settings, row_sampler=RowSampler(_SEED, [0]),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return [states[ids.shape[1] - 1 :] for states in model.hidden_states(out[:, :-1])]


def _as_meet(settings: Settings) -> Settings:
    """Return the settings with ``meet`` as the rule, no gate, a small tolerance, and finite trusts alone."""
    rule = settings.rule if settings.rule.tilts_pool and not settings.rule.is_feasible else rule_of("meet")
    plain = settings.ungated().relaxed()
    return plain.model_copy(update={"rule": rule, "rule_temperature": 1.0, "tol": min(_SMALL, plain.tol)})


@torch.inference_mode()
def moved(model: AnyEnsemble, hidden: Sequence[Float[Tensor, "t _"]]) -> Movement:
    """Measure how far ``meet`` moves the pool at each of t positions, in order.

    Args:
        model: the ensemble; its trusts, weights and pool are used, but no gate and no rule temperature. An infinite
            trust is replaced by the default trust.
        hidden: each member's last hidden states at the positions, (t, d_i), as :func:`own_text` returns them.

    Returns:
        The :class:`Movement`, with a row for each position.
    """
    found = [Movement.of(part.solved[1]) for part in model.combiner.combined(hidden, _as_meet(model.settings))]
    return Movement.stacked(torch.cat([one.table() for one in found if one is not None]))
