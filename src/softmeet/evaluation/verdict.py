"""The figures of ``softmeet advise``, and its verdict in a sentence."""

from __future__ import annotations

import math
from typing import Any

from softmeet.evaluation.advise import Advice, Alternative
from softmeet.evaluation.candidates import Candidate
from softmeet.evaluation.costs import SAME, larger
from softmeet.evaluation.intervals import Difference
from softmeet.evaluation.judged import Judged
from softmeet.evaluation.own_files import HEADER
from softmeet.members.member import short

# The share of the processors from which on others make measured times longer.
_BUSY = 0.1


def figures(advice: Advice) -> dict[str, Any]:
    """Return what is advised, and why, as a dictionary for JSON; losses and gains are in bits a byte.

    ``verdict`` is ``single``, ``average``, ``meet`` or ``gate``; ``rule``, ``weights`` and ``settings`` are those that
    are advised, None if a model that is no member is; ``gain`` is what they gain over the best member, with the 95 %
    ``interval``, on documents that took no part in fitting or choosing (for ``single``: what the best ensemble would
    gain); ``cost_ratio`` is the time of a byte over that of the best member; ``plainly`` says in a sentence what to do
    and whether it is worth it beside a larger model, as ``worth_it`` has it, ``says`` with which settings. ``members``
    has each one's ``bits_per_byte`` and ``ms_per_byte``, and how often it ``knows_better`` than all others;
    ``candidates`` each fit's settings, ``bits_per_byte``, ``gain`` and ``interval``. ``files`` has what files add to
    what is advised, as of :meth:`softmeet.evaluation.own_files.Beside.figures`; None without files. ``movement`` says
    how far ``meet`` moves the average, ``alternatives`` what single models make of the same text, ``cautions`` what may
    mislead.
    """
    judged, found = advice.judged, advice.judged.found
    gain = None if advice.nats is None else judged.gain(advice.nats)
    instead, best = advice.instead(), judged.times[judged.names.index(judged.best)]
    verdict, settings = ("single", None) if instead else (advice.verdict, advice.ensemble.model.config.settings.plain())
    return {
        "verdict": verdict,
        "rule": settings and settings["rule"],
        "weights": settings and settings["weights"],
        "settings": settings,
        "members_in_order": None if instead else [*advice.ensemble.names, *advice.ensemble.model.config.files],
        **_gained(gain),
        "cost_ratio": (instead[0].time if instead else advice.time) / best if best else None,
        "plainly": " ".join(filter(None, (on_files(advice), plainly(advice) if advice.judged.averages else ""))),
        "worth_it": is_worth_it(advice),
        "says": says(advice),
        "best_member": judged.best,
        "members": [
            {
                "name": name,
                "bits_per_byte": judged.bits(found.members[name].nats),
                "ms_per_byte": time,
                "knows_better": better,
            }
            for name, time, better in zip(judged.names, judged.times, judged.knows_better(), strict=True)
        ],
        "candidates": {own.name: _candidate(judged, own) for own in judged.fitted.candidates},
        "files": advice.files and advice.files.figures(),
        "meet": _meet(judged),
        "movement": _movement(judged),
        "gate": advice.gated and {"gate": advice.gated.gate, "alone": advice.gated.alone},
        "alternatives": [
            {
                "name": own.name,
                "bits_per_byte": own.nats.sum().item() / math.log(2) / own.sizes.sum().item(),
                "ms_per_byte": own.time,
                **_gained(advice.against(own)),
            }
            for own in advice.alternatives
        ],
        "disagreement": found.disagreement.mean().item(),
        "vocabulary": found.vocabulary,
        "tokens": len(found.positions),
        "bytes": int(found.positions.sizes.sum()),
        "documents": len(found.positions.document.unique()),
        "clusters": {"kind": judged.within.kind, "count": judged.within.count},
        "folds": len(judged.fitted.refits),
        "cautions": judged.cautions() + _loaded(advice),
    }


def _loaded(advice: Advice) -> list[str]:
    if advice.busy < _BUSY:
        return []
    return [
        f"Other programs took {advice.busy:.0%} of the processors while times were measured: these are too long, and "
        "their ratios are less sure."
    ]


def _gained(gain: Difference | None) -> dict[str, Any]:
    return {"gain": gain and gain.mean, "interval": gain and [gain.low, gain.high]}


def _candidate(judged: Judged, own: Candidate) -> dict[str, Any]:
    nats = judged.found.choices[own.label].nats
    return {**own.settings, "bits_per_byte": judged.bits(nats), **_gained(judged.gain(nats))}


def _movement(judged: Judged) -> dict[str, Any] | None:
    """Return how far ``meet`` with equal weights moves its pool; None where it cannot be measured."""
    compared = judged.unfitted_meet
    return None if compared is None else compared.choices["meet"].moved().figures()


def _meet(judged: Judged) -> dict[str, Any] | None:
    """Return the gain of ``meet`` over averages: fitted, by folds; else at trust 0.3 over its pool, at some places."""
    if judged.meets:
        averages = judged.worthwhile
        every, averaged = judged.elsewhere([*averages, *judged.meets]), judged.elsewhere(averages)
        return {"fitted": True, **_gained(judged.gain(every, averaged))}
    if (compared := judged.unfitted_meet) is None:
        return None
    return {"fitted": False, **_gained(judged.unfitted_gain(compared))}


def _gain_and_time(advice: Advice) -> tuple[float, float]:
    """Return how many percent fewer bits what is advised needs than the best member, and the ratio of their times."""
    judged = advice.judged
    gain = 0.0 if advice.nats is None else judged.gain(advice.nats).mean
    return 100 * gain / judged.bits(judged.base), advice.time / judged.times[judged.names.index(judged.best)]


def is_worth_it(advice: Advice) -> bool:
    """Return whether an ensemble is advised that gains more than a larger model does for such a time."""
    if advice.verdict == "single" or advice.instead():
        return False
    fewer, ratio = _gain_and_time(advice)
    return _rather(advice) is None and (ratio < SAME or fewer >= larger(ratio))


def _bits_of_advice(advice: Advice) -> float:
    """Return the bits a byte of what is advised."""
    return advice.judged.bits(advice.losses)


def _rather(advice: Advice) -> Alternative | None:
    """Return the model that gains the most over what is advised, if it gains more than a larger one does elsewhere."""
    ours = _bits_of_advice(advice)
    better = [
        own for own in advice.alternatives
        if advice.against(own).low > 0
        and 100 * advice.against(own).mean / ours >= larger(max(own.time / advice.time, 1.0))
    ]  # fmt: skip
    return max(better, key=lambda own: advice.against(own).mean, default=None)


def plainly(advice: Advice) -> str:
    """Return what to do, and whether it is worth it, in a sentence without a term of the field."""
    best = short(advice.judged.best)
    if instead := advice.instead():
        return f"Use {short(instead[0].name)} alone: it predicts the text better, in no more time."
    if advice.nats is None:
        return f"Use {best}: there is one model."
    if advice.verdict == "single":
        return f"Use {best} alone: no way to combine the models is shown to predict the text better."
    fewer, ratio = _gain_and_time(advice)
    if rather := _rather(advice):
        than = 100 * advice.against(rather).mean / _bits_of_advice(advice)
        longer = 100 * (rather.time / advice.time - 1)
        return f"Use {short(rather.name)} alone: {than:.1f} % fewer bits than all together, for {longer:+.0f} % time."
    if ratio < SAME:
        return f"Combine them: {fewer:.1f} % fewer bits than {best} alone, in no more time."
    found = f"{fewer:.1f} % fewer bits than {best} alone for {100 * (ratio - 1):.0f} % more time"
    if is_worth_it(advice):
        return f"Combine them: {found}, more than a larger model has given; --instead MODEL compares one of yours."
    if advice.judged.times[advice.judged.names.index(advice.judged.best)] < max(advice.judged.times):
        return f"{found}: keep {best}."
    return (
        f"{found}: keep {best}, or try a larger model by --instead MODEL: Qwen2.5-Coder's gave about "
        f"{larger(ratio):.0f} % for such a time."
    )


def on_files(advice: Advice) -> str:
    """Return whether to have the files beside what is advised, in a sentence; an empty one if there are none."""
    if (files := advice.files) is None:
        return ""
    it = "them" if advice.verdict != "single" else short(advice.judged.best)
    where = f"on {files.held_out} of their own, each read without itself" if files.held_out else "on this text"
    names, whole, late = " and ".join(files.names), files.whole, files.late
    if whole.gain.low <= 0:
        return f"Leave {names} out: beside {it} no gain is shown {where}."
    behind = ""
    if late is not None:
        shown = f"{late.percent:.1f} %" if late.gain.low > 0 else "none is shown"
        behind = f" ({shown} behind the first {HEADER} bytes)"
    took = "in no more time" if files.ratio < SAME else f"for {100 * (files.ratio - 1):.0f} % more time"
    gains = f"{whole.percent:.1f} % fewer bits {where}{behind}, {took}"
    return f"Put {names} beside {it}: {gains}." if files.pays else f"Leave {names} out: beside {it} {gains}."


def says(advice: Advice) -> str:
    """Return the verdict as a sentence."""
    judged, best = advice.judged, short(advice.judged.best)
    if instead := advice.instead():
        model, gain = instead
        return (
            f"Use {short(model.name)} alone: it takes {model.time:.3g} ms a byte, no more than the ensemble "
            f"({advice.time:.3g}), and {_bits(gain)} less."
        )
    if advice.nats is None:
        return f"Use {best}: there is one member."
    gain = judged.gain(advice.nats)
    ratio = advice.time / judged.times[judged.names.index(judged.best)]
    if advice.verdict == "single":
        return (
            f"Use {best} alone: the best ensemble's predicted gain over it, {_bits(gain)}, has an interval that does "
            "not exclude zero."
        )
    weights = ", ".join(
        f"{short(name)} {w:.2f}"
        for name, w in zip(judged.ensemble.names, advice.candidate.settings["weights"], strict=True)
    )
    what = {
        "average": f"Average by {advice.candidate.settings['rule']} with weights {weights}",
        "meet": f"Use meet at trust {advice.candidate.settings['trust'][0]:g}, as it pays, with weights {weights}",
        "gate": f"Average by {advice.candidate.settings['rule']} with weights {weights}, behind a gate",
    }[advice.verdict]
    gated = advice.gated
    alone = "" if gated is None else (
        f" {short(judged.ensemble.names[gated.member])} answers alone where it gives a token at least "
        f"{gated.threshold:g} ({gated.alone:.0%} of {judged.found.vocabulary})."
    )  # fmt: skip
    return f"{what}: predicted gain over {best} alone {_bits(gain)}, at {ratio:.2f} times its time.{alone}"


def _bits(gain: Difference) -> str:
    return f"{gain.mean:.4f} [{gain.low:.4f}, {gain.high:.4f}] bits a byte"
