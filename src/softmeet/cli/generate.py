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
from softmeet.cli.config import Config
from softmeet.cli.flags import flag, flags
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf import Recorder
    from softmeet.members.reading import Work


@dataclass
class Sampling:
    """How tokens are drawn, under transformers' names."""

    max_new_tokens: int = flag(100, "Tokens to add to each prompt, at most.", min=1)
    do_sample: bool = flag(True, "Sample; else take the most probable token.")
    temperature: float | None = flag(None, "Of the ensemble's distribution.")
    top_k: int = flag(0, "Keep the k most probable tokens.", shown="all")
    top_p: float | None = flag(None, "Keep the most probable tokens up to this mass.")
    min_p: float | None = flag(None, "Keep tokens above this share of the largest.")
    repetition_penalty: float | None = flag(None, "Divide the scores of tokens that came before by this.")

    def given(self) -> dict[str, Any]:
        """Give what ``generate`` takes: what truncates only where there is something to draw."""
        kept = vars(self).keys() - (() if self.do_sample else {"temperature", "top_k", "top_p", "min_p"})
        return {name: getattr(self, name) for name in kept if getattr(self, name) is not None}


@flags()
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - or none reads one from stdin.")] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A file that is one prompt.")] = None,
    members: options.Members = None,
    sampling: Sampling,
    prompt_weights: Annotated[
        bool, typer.Option("--prompt-weights", help="Weigh members by their perplexity on the prompt.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Prompt k draws from the generator (seed, k).")] = None,
    loading: options.Loading,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    summary: Annotated[
        bool | None, typer.Option("--summary/--no-summary", help="A summary on stderr.", show_default="on a terminal")
    ] = None,
    **settings: Any,
) -> None:
    """Continue prompts, sampling from several models as one; a single prompt streams."""
    texts = _prompts(prompts, file)
    ensemble = loading.ensemble(members, settings)
    if not all(texts) and not ensemble.model.over_bytes:
        raise InvalidInputError("expected a prompt of at least one token, got an empty one")
    own = [ensemble.prompt_weights(text) for text in texts] if prompt_weights else None
    _run(ensemble, texts, sampling.given(), own, seed, as_json=as_json, summary=summary)


def _prompts(prompts: list[str] | None, files: list[Path] | None) -> list[str]:
    found = [path.read_text(encoding="utf-8") for path in files or []]
    given = prompts or ([] if found else ["-"])
    found += [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in given]
    return found


def _run(
    ensemble: Ensemble,
    texts: list[str],
    given: dict[str, Any],
    weights: list[list[float]] | None,
    seed: int | None,
    *,
    as_json: bool,
    summary: bool | None,
) -> None:
    from softmeet.hf import Recorder

    recorder, before, started = Recorder(), ensemble.model.spent, time.perf_counter()
    given = {"seed": seed, "recorder": recorder, **given}
    each: list[dict[str, Any]] = [{}] * len(texts) if weights is None else [{"weights": own} for own in weights]
    if len(texts) == 1 and not as_json:
        for piece in ensemble.stream(texts[0], **given, **each[0]):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        completions: list[str] = []
    else:
        with options.status(f"generating from {len(texts)} prompts"):
            if weights is None:
                completions = ensemble.generate(texts, **given)
            else:
                pairs = zip(texts, each, strict=True)
                completions = [ensemble.generate(text, **given, **own) for text, own in pairs]
    seconds = time.perf_counter() - started
    facts = _facts(ensemble, recorder, seconds, weights)
    for member, costs in zip(facts["members"], _costs(before, ensemble.model.spent, recorder.rows), strict=False):
        member |= costs
    if as_json:
        made = [{"prompt": p, "text": t, **own} for p, t, own in zip(texts, completions, each, strict=True)]
        typer.echo(json.dumps({"completions": made, **facts}, ensure_ascii=False, indent=2))
    else:
        for prompt, text in zip(texts, completions, strict=False):
            typer.echo(f"=== {prompt}\n{text}\n")
    if summary or (summary is None and sys.stderr.isatty()):
        (_show_bytes if facts["vocabulary"] == "bytes" else _show)(facts)


def _facts(ensemble: Ensemble, recorder: Recorder, seconds: float, weights: list[list[float]] | None) -> dict[str, Any]:
    """``weights`` are those of each prompt, if it had its own: their mean is a member's weight then."""
    config, rows, asked = ensemble.model.config, max(recorder.rows, 1), max(recorder.asked, 1)
    used = config.weights if weights is None else list(map(fmean, zip(*weights, strict=True)))
    disagreement = recorder.disagreement.tolist() or [0.0] * len(ensemble.names)
    from softmeet.hf.calibrated import gate_of

    return {
        "members": [
            {
                "name": options.short(name),
                "width": head.d,
                "weight": w,
                "trust": "/".join(f"{rho:g}" for rho in t),
                "disagreement": x / asked,
            }
            for name, head, w, t, x in zip(
                ensemble.names, ensemble.model.member_heads, used, config.settings.trusts(), disagreement, strict=True
            )
        ],
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


def _costs(before: list[Work], after: list[Work], count: int) -> list[dict[str, float]]:
    """Each member's costs of so many bytes, prompts included: a byte."""
    return [
        {
            "forward_steps": (new.calls - old.calls) / max(count, 1),
            "tokens_run": (new.tokens - old.tokens) / max(count, 1),
            "dropped": (new.dropped - old.dropped) / max(count, 1),
        }
        for old, new in zip(before, after, strict=True)
    ]


def _show_bytes(facts: dict[str, Any]) -> None:
    columns = ("member", "weight", "disagreement (nats/byte)", "forward steps a byte", "tokens run a byte", "dropped")
    table = Table(*columns, title=f"rule: {facts['rule']}, over bytes")
    for m in facts["members"]:
        costs = [f"{m[name]:.4f}" for name in ("disagreement", "forward_steps", "tokens_run", "dropped")]
        table.add_row(escape(m["name"]), f"{m['weight']:.3g}", *costs)
    options.err.print(table)
    options.err.print(f"{facts['tokens']} bytes, {facts['tokens_per_second']:.1f} bytes/s")


def _show(facts: dict[str, Any]) -> None:
    table = Table(
        "member", "head width", "weight", "trust", "disagreement (nats/token)", title=f"rule: {facts['rule']}"
    )
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
        saved = facts["seconds_saved"]
        time_saved = "" if saved is None else f", which saved about {saved:.1f} s"
        options.err.print(f"gate {facts['gate']}: closed at {facts['gated']:.1%} of the tokens{time_saved}")
