"""The rules that a study compares, each with its options."""

from __future__ import annotations

from typing import Any

from softmeet.evaluation.choices import RuleChoice
from softmeet.rules.registry import rule_names


def _entry(name: str, **options: Any) -> RuleChoice:
    """Make one entry of a study; the first word of its name is the rule."""
    return RuleChoice(name, {"rule": name.split()[0], **options})


BASELINES = tuple(map(_entry, ("logit-mean", "prob-mean", "one-hot")))
TRUSTS = (0.1, 0.3, 1.0, 2.0, 4.0, 10.0)
MEETS = tuple(_entry(f"meet {rho:g}", trust=rho) for rho in TRUSTS)
EXACT = (
    _entry("max-entropy"),
    _entry("least-squares"),
    _entry("least-squares raw", metric="raw"),
    _entry("min-cross-entropy"),
    _entry("min-cross-entropy vertex", vertex=True),
    _entry("min-squared-cross-entropy"),
    _entry("min-underestimation"),
    _entry("min-reverse-cross-entropy"),
)
_NAMED = {entry.settings["rule"] for entry in (*BASELINES, *MEETS, *EXACT)}
# Rules of installed packages, under their default options.
OTHERS = tuple(_entry(name) for name in rule_names() if name not in _NAMED)
ALL = (*BASELINES, *MEETS, *EXACT, *OTHERS)
