"""How long a token's path is, by the count of benchmarks/decode.py calls, which does not depend on the machine."""

from __future__ import annotations

import pytest

from decode import calls_a_token


@pytest.mark.parametrize(
    ("rule", "most"), [("logit-mean", 140), ("prob-mean", 140), ("power-mean", 140), ("meet", 450)]
)
def test_a_token_takes_few_calls(rule, most):
    found = calls_a_token("narrow", rule)
    assert 20 < sum(found.values()) <= most
    # Normalised once, where a problem is solved, and checked never.
    assert found.get("/rules/validate.py:normalised", 0) == (rule == "meet")
    checks = ("checked_", "parse_", "_resolved", "for_members")
    assert not [name for name in found if name.startswith("/rules/") and any(check in name for check in checks)]
