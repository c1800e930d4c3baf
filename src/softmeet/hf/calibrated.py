"""The factor by which the gate ``movement`` predicts how far ``meet`` moves an ensemble's pool.

Below, p° is the answer of ``meet``, q the pool, p̂_i member i's distribution and ρ_i its trust. The gate predicts the
movement KL(p°‖q) as factor · Σ_i ρ_i KL(q‖p̂_i), so the factor is the mean of the one over the mean of the other. It
belongs to the members, the pool and the trusts. It is measured once, on text that the ensemble samples, and kept in
three places: in the ensemble's configuration, which checkpoints and replicas have; in a file of this machine, in
``$SOFTMEET_CACHE`` or the user's cache folder; and for the bundled families in a file that comes with them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.derived import file_of
from softmeet.hf.remembered import keep, known, members_hash
from softmeet.hf.sampling import RowSampler
from softmeet.members import zoo
from softmeet.rules.gates import PredictedMovement
from softmeet.rules.movement import Movement
from softmeet.rules.settings import GONE, Settings, rule_of

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

# Positions to measure at, those solved at once, and the seconds after which no more are begun: the factor is then
# taken from the positions solved so far.
_POSITIONS, _AT_ONCE, _SECONDS = 64, 16, 120.0
# Nats; solved to an estimated gap of this size, positions give the mean movement to a twentieth.
_TOL = 1e-3
# Nats; movements below this are of no interest.
_SMALL = 1e-5
# Where factors are kept, by members and settings (:func:`key_of`).
_FILE = "movement.json"
# The prompt and the seed of the text that an ensemble samples.
_PROMPT, _SEED = "The", 0
# The settings that the factor depends on, beside the members.
_SETTINGS = ("rule", "trust", "weights", "pool", "free_weights")
_log = logging.getLogger("softmeet")


def resolved(model: AnyEnsemble, settings: Settings, *, may_calibrate: bool = True) -> Settings:
    """Return the settings with the factor of their gate ``movement`` filled in; with another gate or none, unchanged.

    The factor turns Σ_i ρ_i KL(q‖p̂_i) into the predicted movement KL(p°‖q), as :func:`calibrate` says. The settings are
    returned without a gate if no factor is needed or can be had: if the gate's threshold is 0, so that it never closes;
    if the rule is not one like ``meet``, which tilts the pool by trusts, or is an average, as the members' heads are
    one (:meth:`Combiner.average`); if there are fewer than two trusts, only zeros, or an infinite one; if the factor
    is unknown and may not be measured, or measuring fails.

    Args:
        model: the ensemble, over tokens or bytes; the factor is added to ``movement`` of its configuration.
        settings: the settings to complete, for the ensemble's members (:meth:`Settings.for_members`).
        may_calibrate: whether to measure a factor that is kept nowhere, which takes as long as generating 64 tokens,
            and to keep it (:mod:`softmeet.hf.remembered`).
    """
    gate = settings.gate
    if not isinstance(gate, PredictedMovement) or gate.factor is not None:
        return settings
    if gate.never_closes or not moves_pool(settings) or model.combiner.average(settings):
        return settings.ungated()
    own = key_of(settings)
    factors: dict[str, float | None] = model.config.movement
    if own not in factors:
        factor = _kept(model, own)
        if factor is None and not may_calibrate:
            return settings.ungated()
        factors[own] = _calibrated(model, settings, own) if factor is None else factor
    factor = factors[own]
    found = None if factor is None else PredictedMovement(gate.threshold, factor, gate.auto)
    return settings.model_copy(update={"gate": found})


def gate_of(model: AnyEnsemble) -> str | None:
    """Return the gate of an ensemble as text, such as ``"unsure:0.5"``; None if it has none.

    A gate ``movement`` counts as none if :func:`resolved`, without calibration, leaves it out.
    """
    gate = resolved(model, model.settings, may_calibrate=False).gate
    return None if gate is None else str(gate)


def moves_pool(settings: Settings) -> bool:
    """Return whether the rule moves the pool, with two trusts or more, all of them finite and not all 0."""
    trust = settings.rule.effective_trust(settings.member_trust)
    return settings.rule.tilts_pool and any(trust) and not any(map(math.isinf, trust)) and len(trust) > 1


def _kept(model: AnyEnsemble, own: str) -> float | None:
    """Look up the factor of the key ``own`` in the file of the bundled families, then in this machine's."""
    who, bundled = members_hash(model), zoo.installed()
    for file in ([bundled / _FILE] if bundled else []) + [file_of(_FILE)]:
        found = known(file).get(who, {})
        if own in found:
            return float(found[own])
    return None


def key_of(settings: Settings) -> str:
    """Return the settings that a factor depends on, as JSON text: the key under which the factor is kept.

    They are ``rule``, ``trust``, ``weights``, ``pool`` and ``free_weights``;
    ``settings`` come from :meth:`Settings.for_members`, so that weights and trusts have one form.
    """
    plain = settings.plain()
    # Settings that are gone stand in the keys of factors that were kept when they were not.
    return json.dumps(GONE | {name: plain[name] for name in _SETTINGS}, sort_keys=True)


def _calibrated(model: AnyEnsemble, settings: Settings, own: str) -> float | None:
    """Measure a factor and keep it under the key ``own``, or return None if that fails; log either as a warning."""
    if any(parameter.is_meta for parameter in model.parameters()) or model.tokenizer is None:
        _log.warning("the gate %s is off: calibrating it takes members in memory, and a tokenizer", settings.gate)
        return None
    _log.warning(
        "calibrating the gate %s for these members and trusts, once: %d tokens of their own", settings.gate, _POSITIONS
    )
    factor = calibrate(model, settings)
    if factor is None:
        _log.warning(
            "the gate %s is off: calibrating it took longer than %g s; meet is solved at every token, unless you say "
            "gate='disagreement:T'",
            settings.gate,
            _SECONDS,
        )
    else:
        keep(file_of(_FILE), members_hash(model), own, factor)
    return factor


@torch.inference_mode()
def calibrate(model: AnyEnsemble, settings: Settings) -> float | None:
    """Measure the factor of the gate ``movement``: the mean of KL(p°‖q) divided by the mean of Σ_i ρ_i KL(q‖p̂_i).

    p° is the rule's answer, q the pool, p̂_i member i's distribution and ρ_i its trust. The means are over 64 tokens
    that are sampled from the pool, or over those of them that are solved within 120 seconds.

    Args:
        model: an ensemble over tokens, with a tokenizer (``model.tokenizer``), to sample the text.
        settings: the rule, trusts and pool that the factor is to hold for, from :meth:`Settings.for_members`; their
            gate is ignored.

    Returns:
        The factor; None if no position was solved in time, the rule moves no pool or has an infinite trust, or no
        member differs from the pool.
    """
    started, hidden = time.monotonic(), own_text(model, _POSITIONS)
    plain = settings.ungated().model_copy(update={"rule_temperature": 1.0, "tol": min(_TOL, settings.tol)})
    moved, free = 0.0, 0.0
    for start in range(0, len(hidden[0]), _AT_ONCE):
        if time.monotonic() - started > _SECONDS:
            break
        _, solution = model.combiner.solve_rows([h[start : start + _AT_ONCE] for h in hidden], plain, proved=False)
        found = Movement.of(solution)
        if found is None:
            return None
        moved, free = moved + found.forward.sum().item(), free + found.free.sum().item()
    return moved / max(free, 1e-300) if free else None


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
    found = [Movement.of(solution) for _, solution in model.combiner.solve_in_chunks(hidden, _as_meet(model.settings))]
    return Movement.stacked(torch.cat([one.table() for one in found if one is not None]))
