"""What the gate ``movement`` knows of an ensemble: how far ``meet`` moves its pool, by how far the members disagree.

The factor belongs to the members, the pool and the trusts. It is found once, on text that the ensemble samples, and
kept in three places: in the ensemble's configuration, which checkpoints and replicas have; in a file of this machine,
under ``$SOFTMEET_CACHE`` or where caches are kept; and for the bundled families in a file that comes with them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.hf.sampling import RowSampler
from softmeet.members import zoo
from softmeet.members.identity import body_hash
from softmeet.rules.gates import PredictedMovement
from softmeet.rules.movement import Movement
from softmeet.rules.settings import Settings, rule_of

if TYPE_CHECKING:
    from softmeet.hf.modeling import EnsembleForCausalLM

# Positions in all, those solved at once, and seconds after which no more are begun: what was solved by then has to do.
_POSITIONS, _AT_ONCE, _SECONDS = 64, 16, 120.0
# By estimates of this size, without bounds, the mean movement is known to a twentieth.
_TOL = 1e-3
# Nats; what ``meet`` moves by less is of no interest.
_SMALL = 1e-5
# Of the text that an ensemble samples for itself.
_PROMPT, _SEED = "The", 0
# What the factor belongs to, beside the members.
_SETTINGS = ("rule", "trust", "weights", "pool", "rank", "bands", "free_radial", "free_weights")
_log = logging.getLogger("softmeet")


def resolved(model: EnsembleForCausalLM, settings: Settings, *, may_calibrate: bool = True) -> Settings:
    """Return settings whose gate ``movement`` knows its factor, or that have no gate where none can be known.

    Args:
        model: whose members are to be combined.
        settings: with any gate, or none.
        may_calibrate: find a factor that is nowhere kept, which takes as long as a few dozen tokens.
    """
    gate = settings.gate
    if not isinstance(gate, PredictedMovement) or gate.factor is not None:
        return settings
    if gate.never_closes or not _moves(settings):
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


def gate_of(model: EnsembleForCausalLM) -> str | None:
    """Return the gate of an ensemble as text; None where there is none that can close."""
    gate = resolved(model, model.settings, may_calibrate=False).gate
    return None if gate is None else str(gate)


def _moves(settings: Settings) -> bool:
    """Say whether the rule moves a pool, by finite trusts."""
    trust = settings.rule.effective_trust(settings.member_trust)
    return settings.rule.tilts_pool and any(trust) and not any(map(math.isinf, trust)) and len(trust) > 1


def _kept(model: EnsembleForCausalLM, own: str) -> float | None:
    """Look a factor up in the bundled families' file, and in this machine's."""
    who = members_hash(model)
    for file in (zoo.folder() / "movement.json", cache_file()):
        known = _read(file).get(who, {})
        if own in known:
            return float(known[own])
    return None


def key_of(settings: Settings) -> str:
    """Name the settings that a factor belongs to, as JSON."""
    plain = settings.plain()
    return json.dumps({name: plain[name] for name in _SETTINGS}, sort_keys=True)


def members_hash(model: EnsembleForCausalLM) -> str:
    """Compute SHA-256 of an ensemble's members, in order."""
    return hashlib.sha256("".join(map(body_hash, model.members)).encode()).hexdigest()


def _calibrated(model: EnsembleForCausalLM, settings: Settings, own: str) -> float | None:
    """Find a factor by sampling and solving, which is logged; None, logged too, where that cannot be done in time."""
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
        _keep(cache_file(), members_hash(model), own, factor)
    return factor


@torch.inference_mode()
def calibrate(model: EnsembleForCausalLM, settings: Settings) -> float | None:
    """Find the mean of KL(p°‖q) over that of Σ ρ_i KL(q‖p̂_i) on text of the ensemble's own.

    None where time runs out before anything is known.

    Args:
        model: of members over tokens.
        settings: with the rule, trusts and pool that the factor is to hold for.
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


def cache_file() -> Path:
    """Return the file in which this machine keeps factors."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SOFTMEET_CACHE") or Path(base) / "softmeet") / "movement.json"


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(file: Path, who: str, own: str, factor: float) -> None:
    """Add a factor to the file; nothing is lost but time where it cannot be written."""
    known = _read(file)
    known.setdefault(who, {})[own] = factor
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError:
        _log.debug("could not write %s", file)


@torch.inference_mode()
def own_text(model: EnsembleForCausalLM, count: int) -> list[Float[Tensor, "t _"]]:
    """Sample tokens from the pool of an ensemble over tokens, and return each member's hidden states before them.

    Args:
        model: which has a tokenizer.
        count: tokens; fewer where the shortest context ends.
    """
    tokenizer: Any = model.tokenizer
    ids = tokenizer(_PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    count = count if limit is None else min(count, limit - ids.shape[1])
    settings = model.settings.ungated().changed(rule=model.settings.pool, rule_temperature=1.0, bands=1, trust=0.0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), settings=settings, row_sampler=RowSampler(_SEED, [0]), do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=count, min_new_tokens=count,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return [states[ids.shape[1] - 1 :] for states in model.hidden_states(out[:, :-1])]


def _as_meet(settings: Settings) -> Settings:
    """Return the settings by which ``meet`` would answer everywhere, to a small tolerance, with finite trusts."""
    rule = settings.rule if settings.rule.tilts_pool and not settings.rule.is_feasible else rule_of("meet")
    plain = settings.ungated().relaxed()
    return plain.model_copy(update={"rule": rule, "rule_temperature": 1.0, "tol": min(_SMALL, plain.tol)})


@torch.inference_mode()
def moved(model: EnsembleForCausalLM, hidden: Sequence[Float[Tensor, "t _"]]) -> Movement:
    """Measure how far ``meet`` would move the pool at some positions, from each member's hidden states."""
    found = [Movement.of(solution) for _, solution in model.combiner.solve_in_chunks(hidden, _as_meet(model.settings))]
    return Movement.stacked(torch.cat([one.table() for one in found if one is not None]))
