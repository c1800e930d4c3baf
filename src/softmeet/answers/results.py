"""What a table of answers says: shares, differences from the best member, and what any member could have had right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from softmeet.answers.asking import Answered
from softmeet.answers.rates import auroc, difference, mcnemar, predicted, rate

# The row of questions that one member or another answers rightly.
ANY = "any member"


def figures(members: Sequence[str], answers: Mapping[str, Sequence[Answered]]) -> dict[str, Any]:
    """Return the figures of all who answered, as JSON has them.

    ``rows`` has for each ``name``, the share that is ``right``, its 95 % interval ``ci95`` (Wilson) and that of as many
    other questions, ``predicted95``, ``seconds`` and ``tokens`` a question where they are known, and, of all but the
    best single member, ``against``: the difference from it at the same questions with its interval (Bonett and Price)
    and McNemar's exact ``p``. The best member is the best on these very questions, so the baseline is, if anything, too
    good. Where several members were asked, a row ``any member`` has the questions that one of them answers rightly,
    which no ensemble is expected to reach. ``doubt`` has for each measure of :class:`softmeet.answers.doubt.Doubt` the
    area under the ROC curve for knowing that an answer is wrong (:func:`softmeet.answers.rates.auroc`).

    Args:
        members: the names of those who are single members.
        answers: by name the answers to the same questions, in the same order.
    """
    right = {name: [one.right for one in own] for name, own in answers.items()}
    alone = [name for name in members if name in right]
    best = max(alone, key=lambda name: sum(right[name]), default=None)
    rows = [_row(name, right, best) | _costs(answers[name]) | _doubts(answers[name]) for name in right]
    if len(alone) > 1:
        right[ANY] = [any(own) for own in zip(*(right[name] for name in alone), strict=True)]
        rows.append(_row(ANY, right, best))
    return {"questions": len(next(iter(right.values()))), "best_member": best, "rows": rows}


def _doubts(answers: Sequence[Answered]) -> dict[str, Any]:
    """Return, by the name of each measure of doubt, how well it tells wrong answers from right ones."""
    told = [(one.doubt.measures(), not one.right) for one in answers if one.doubt is not None]
    found = {
        name: auroc([own[name] for own, _ in told], [wrong for _, wrong in told])
        for name in (told[0][0] if told else ())
        if all(name in own for own, _ in told)
    }
    return {"doubt": {name: {"auroc": x.mean, "ci95": [x.low, x.high]} for name, x in found.items() if x is not None}}


def _row(name: str, right: Mapping[str, Sequence[bool]], best: str | None) -> dict[str, Any]:
    own = rate(right[name])
    found: dict[str, Any] = {
        "name": name,
        "right": own.mean,
        "ci95": [own.low, own.high],
        "predicted95": [*predicted(right[name])],
    }
    if best is not None and name != best:
        apart = difference(right[name], right[best])
        found["against"] = {
            "delta": apart.mean, "ci95": [apart.low, apart.high], "p": mcnemar(right[name], right[best]),
        }  # fmt: skip
    return found


def _costs(answers: Sequence[Answered]) -> dict[str, Any]:
    if not any(one.seconds for one in answers):
        return {}
    return {"seconds": fmean(one.seconds for one in answers), "tokens": fmean(one.tokens for one in answers)}


def lines(answers: Mapping[str, Sequence[Answered]]) -> list[dict[str, Any]]:
    """Return every answer, with the name of who gave it, as lines of JSON have them."""
    return [{"name": name, **asdict(one)} for name, own in answers.items() for one in own]
