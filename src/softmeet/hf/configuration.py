"""The configuration of an ensemble: which members, and how they are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from softmeet.rules.gates import checked_gate
from softmeet.rules.registry import find_rule
from softmeet.rules.validate import (
    checked_count,
    checked_number,
    checked_on_infeasible,
    checked_options,
    checked_pool,
    checked_trust,
    checked_weights,
)

# What decides how members are combined, apart from their weights.
SETTINGS = (
    "rule", "trust", "pool", "tol", "max_steps", "free_weights", "on_infeasible", "rank", "free_radial", "metric",
    "slack", "vertex",
)  # fmt: skip


class EnsembleConfig(PreTrainedConfig):
    """Settings of an ensemble; the arguments of :func:`softmeet.combine` under their own names.

    ``rule_temperature`` is of the rule's answer, p^(1/T) normalised; that of generation comes on top.
    ``gate`` is of forward and generate: where members are not asked or the rule not solved (``softmeet.rules.gates``).
    With ``bands`` > 1 each member in turn has so many trusts, one per band of its head's principal directions; one
    trust per member serves all its bands.

    Raises:
        InvalidInputError: a setting is wrong; checked here, before any member is loaded or run.
    """

    model_type = "softmeet"

    def __init__(
        self,
        members: Sequence[str] = (),
        rule: str = "meet",
        weights: Sequence[float] | None = None,
        trust: float | Sequence[float | str] | None = None,
        pool: str = "logit-mean",
        tol: float = 1e-4,
        max_steps: int = 50,
        free_weights: bool = False,
        rule_temperature: float = 1.0,
        on_infeasible: str = "meet",
        rank: int | None = None,
        free_radial: bool = False,
        metric: str = "whitened",
        slack: float = 0.0,
        vertex: bool = False,
        bands: int = 1,
        gate: str | None = None,
        **kwargs: Any,
    ) -> None:
        n = len(members)
        self.members = [str(member) for member in members]
        self.rule = find_rule(rule).name
        self.weights = checked_weights(weights, n, free=free_weights) if n else None
        self.bands = checked_count("bands", bands)
        self.trust = list(checked_trust(trust, n, self.bands))
        self.pool = checked_pool(pool)
        self.tol = checked_number("tol", tol, positive=True)
        self.max_steps = checked_count("max_steps", max_steps)
        self.free_weights = free_weights
        self.gate = checked_gate(gate)
        self.rule_temperature = checked_number("rule_temperature", rule_temperature, positive=True)
        self.on_infeasible = checked_on_infeasible(on_infeasible)
        options = checked_options(rank=rank, free_radial=free_radial, metric=metric, slack=slack, vertex=vertex)
        for name, value in asdict(options).items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: an infinite trust is written ``"inf"``."""
        found: dict[str, Any] = super().to_dict()
        if isinstance(found.get("trust"), list):
            found["trust"] = ["inf" if math.isinf(rho) else rho for rho in found["trust"]]
        return found

    def trusts(self) -> list[list[float]]:
        """Each member's trusts, one per band."""
        return [self.trust[i : i + self.bands] for i in range(0, len(self.trust), self.bands)]

    def combine_arguments(self) -> dict[str, Any]:
        """What :func:`softmeet.combine` is to be called with."""
        return {name: getattr(self, name) for name in ("weights", *SETTINGS)}
