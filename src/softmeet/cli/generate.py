"""``softmeet generate``: continue prompts."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softmeet.cli import options
from softmeet.cli.flags import flag, flags

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf import Recorder
    from softmeet.members.reading import Work


@dataclass
class SamplingFlags:
    """Flags for how tokens are drawn, named as in transformers."""

    max_new_tokens: int = flag(100, "Tokens to add to each prompt, at most.", min=1)
    do_sample: bool = flag(True, "Sample; else take the most probable token.")
    temperature: float | None = flag(None, "Of the ensemble's distribution.")
    top_k: int = flag(0, "Keep the k most probable tokens.", shown="all")
    top_p: float | None = flag(None, "Keep the most probable tokens up to this mass.")
    min_p: float | None = flag(None, "Keep tokens above this share of the largest.")
    repetition_penalty: float | None = flag(None, "Divide the scores of tokens that came before by this.")

    def arguments(self) -> dict[str, Any]:
        """Return the flags that are set as keyword arguments of ``Ensemble.generate``.

        If ``do_sample`` is False, temperature, top-k, top-p and min-p are left out; so is any flag that is None.
        """
        unused = () if self.do_sample else ("temperature", "top_k", "top_p", "min_p")
        return {name: value for name, value in vars(self).items() if value is not None and name not in unused}


@flags()
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - or none reads one from stdin.")] = None,
    file: list[Path] | None = flag(None, "A file that is one prompt.", "--file", "-f"),
    members: options.Members = None,
    sampling: SamplingFlags,
    prompt_weights: bool = flag(False, "Weigh members by their perplexity on the prompt.", "--prompt-weights"),
    seed: int | None = flag(None, "Prompt k draws from the generator (seed, k)."),
    loading: options.LoadingFlags,
    as_json: bool = flag(False, "One JSON document on stdout.", "--json"),
    summary: bool | None = flag(None, "A summary on stderr.", "--summary/--no-summary", shown="on a terminal"),
    **settings: Any,
) -> None:
    """Continue prompts, sampling from several models as one; a single prompt streams."""
    texts = [path.read_text(encoding="utf-8") for path in file or []]
    texts += [sys.stdin.read().rstrip("\n") if p == "-" else p for p in prompts or ([] if file else ["-"])]
    ensemble = loading.ensemble(members, settings)
    weights = [ensemble.prompt_weights(text) for text in texts] if prompt_weights else None
    from softmeet.hf import Recorder

    recorder, before, started = Recorder(), ensemble.model.spent, time.perf_counter()
    given = {"seed": seed, "recorder": recorder, **sampling.arguments()}
    each: list[dict[str, Any]] = [{}] * len(texts) if weights is None else [{"weights": own} for own in weights]
    completions: list[str] = []
    if len(texts) == 1 and not as_json:
        for piece in ensemble.stream(texts[0], **given, **each[0]):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        with options.err.status(f"generating from {len(texts)} prompts"):
            if weights is None:
                completions = ensemble.generate(texts, **given)
            else:
                completions = [ensemble.generate(texts[k], **given, **own) for k, own in enumerate(each)]
    facts = _facts(ensemble, recorder, time.perf_counter() - started, weights, before)
    if as_json:
        made = [{"prompt": p, "text": t, **own} for p, t, own in zip(texts, completions, each, strict=True)]
        typer.echo(json.dumps({"completions": made, **facts}, ensure_ascii=False, indent=2))
    else:
        for prompt, text in zip(texts, completions, strict=False):
            typer.echo(f"=== {prompt}\n{text}\n")
    if summary or (summary is None and sys.stderr.isatty()):
        (_show_over_bytes if facts["vocabulary"] == "bytes" else _show)(facts)


def _facts(
    ensemble: Ensemble, recorder: Recorder, seconds: float, weights: list[list[float]] | None, before: list[Work]
) -> dict[str, Any]:
    """Return a run's figures: each member's, the rule's, the gate's, and the speed, as JSON has them.

    Args:
        ensemble: the ensemble that generated.
        recorder: was passed to ``generate``, and has summed over all tokens (over bytes, all bytes).
        seconds: the time that generation took.
        weights: each prompt's own weights of the members, whose mean is then shown; None if all used the ensemble's.
        before: over bytes, each member's work before the run, which is subtracted.
    """
    from softmeet.hf.calibrated import gate_of

    config, rows, asked = ensemble.model.config, max(recorder.rows, 1), max(recorder.asked, 1)
    used = config.weights if weights is None else list(map(fmean, zip(*weights, strict=True)))
    disagreement, trusts = recorder.disagreement.tolist() or [0.0] * len(ensemble.names), config.settings.trusts()
    members: list[dict[str, Any]] = [
        {"name": options.short(name), "width": head.d, "weight": w, "trust": "/".join(f"{rho:g}" for rho in t)}
        for name, head, w, t in zip(ensemble.names, ensemble.model.member_heads, used, trusts, strict=True)
    ]
    for member, nats in zip(members, disagreement, strict=True):
        member["disagreement"] = nats / asked
    # Only members that are read byte by byte count their work.
    for member, old, new in zip(members, before, ensemble.model.spent, strict=False):
        member["forward_steps"] = (new.calls - old.calls) / rows
        member["tokens_run"] = (new.tokens - old.tokens) / rows
        member["dropped"] = (new.dropped - old.dropped) / rows
    return {
        "members": members,
        "rule": config.rule,
        "vocabulary": config.vocabulary,
        "tokens": recorder.rows,
        "tokens_per_second": recorder.rows / seconds,
        "head_passes_per_token": recorder.passes / rows,
        "fallbacks": recorder.fallbacks,
        "not_converged": recorder.unconverged,
        "largest_gap": recorder.largest_gap,
        "gate": gate_of(ensemble.model),
        "gated": recorder.gate.share,
        "seconds_saved": recorder.gate.saved,
    }


def _show_over_bytes(facts: dict[str, Any]) -> None:
    """Print a summary on stderr of a run of an ensemble over bytes."""
    columns = ("member", "weight", "disagreement (nats/byte)", "forward steps a byte", "tokens run a byte", "dropped")
    table = Table(*columns, title=f"rule: {facts['rule']}, over bytes")
    for m in facts["members"]:
        costs = [f"{m[name]:.4f}" for name in ("disagreement", "forward_steps", "tokens_run", "dropped")]
        table.add_row(escape(m["name"]), f"{m['weight']:.3g}", *costs)
    options.err.print(table)
    options.err.print(f"{facts['tokens']} bytes, {facts['tokens_per_second']:.1f} bytes/s")


def _show(facts: dict[str, Any]) -> None:
    """Print a summary on stderr of a run of an ensemble over tokens."""
    columns = ("member", "head width", "weight", "trust", "disagreement (nats/token)")
    table = Table(*columns, title=f"rule: {facts['rule']}")
    for m in facts["members"]:
        table.add_row(escape(m["name"]), str(m["width"]), f"{m['weight']:.3g}", m["trust"], f"{m['disagreement']:.4f}")
    options.err.print(table)
    options.err.print(
        f"{facts['tokens']} tokens, {facts['tokens_per_second']:.1f} tokens/s, "
        f"{facts['head_passes_per_token']:.1f} head passes a token, largest gap {facts['largest_gap']:.1e} nats"
        + (f", {facts['fallbacks']} answered by meet" if facts["fallbacks"] else "")
        + (f", {facts['not_converged']} not converged" if facts["not_converged"] else "")
    )
    if facts["gate"]:
        saved = "" if facts["seconds_saved"] is None else f", which saved about {facts['seconds_saved']:.1f} s"
        options.err.print(f"gate {facts['gate']}: closed at {facts['gated']:.1%} of the tokens{saved}")
