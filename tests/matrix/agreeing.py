"""What the roads of one case have to agree in: its golden text, and the log-probabilities of its tokens."""

from functools import lru_cache

import pytest
import roads
from cases import CASES, COMMAND, PYTHON, SERVER, Case, can
from roads import Asked

SAYS = {road: [case for case in CASES if can(case, road)] for road in (PYTHON, COMMAND, SERVER)}


def some(cases: list[Case], step: int, start: int = 0) -> list[Case]:
    """Return every so many of the cases, and of the others those that bring a value of an axis that these have not.

    So a road that goes the same way as another for the most part is taken with every value, if not with every pair.
    """
    chosen = cases[start::step]
    seen = {own for case in chosen for own in case.named()}
    for case in cases:
        if not seen.issuperset(case.named()):
            chosen.append(case)
            seen.update(case.named())
    return chosen


def near(log_probs, asked, *, kept=False):
    """Return log-probabilities to compare with; those that are kept have six digits, or are transformers' own.

    In double precision they agree to 1e-9, in single precision to 1e-6 or the last two digits; but a rule that has a
    solver then makes more of what is rounded, and agrees to its tolerance.
    """
    settings = asked.ensemble.model.settings
    if asked.world.dtype == "float64":
        return pytest.approx(log_probs, abs=1e-6 if kept else 1e-9, rel=2.5e-7 if kept else 0)
    return pytest.approx(log_probs, abs=1e-6 if settings.rule.is_average else settings.tol, rel=2.5e-7)


@lru_cache
def exactly(asked: Asked, tokens):
    """Return the log-probabilities of a text's tokens, which are read one by one."""
    return roads.read_one_by_one(asked, list(tokens))


def differences(asked: Asked, known, found):
    """Return what roads wrote that is not the golden text, or not by its tokens."""
    expected = {"texts": known["text"], "tokens": known["tokens"], "spelled": roads.spell(asked, known["tokens"])}
    wrong = []
    for road, written in found.items():
        six = [known["text"], *known["six"]][: len(written.texts)]
        if written.texts != six:
            wrong.append((road, written.texts, six))
        told = {what: getattr(written, what) for what in ("tokens", "spelled")}
        wrong += [(road, own, expected[what]) for what, own in told.items() if own not in (None, expected[what])]
    return wrong
