"""Tokens a second of `meet` beside `logit-mean`, and how near it comes: python benchmarks/decode.py

Two members of GPT-2 small's shape with random weights, correlated and scaled to realistic entropies.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from members import ensemble_of, load_pair, save_pair
from report import median, now, show
from softmeet.engine import ask, combine
from softmeet.engine.recorder import Recorder
from softmeet.hf import modeling
from softmeet.simplex import entropy, kl, total_variation
from softmeet.solvers import dense


class Clock:
    """Sums the seconds spent in functions of modules and classes."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Replace ``owner.name`` by itself with its time added up."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[label] += now() - start

        setattr(owner, name, timed)


@torch.inference_mode()
def run(
    model: modeling.EnsembleForCausalLM, rules: list[str], ids: torch.Tensor, tokens: int, repeats: int, clock: Clock
) -> list[dict[str, Any]]:
    """Greedy decoding by every rule in turn, several times; medians, also of each turn's ratios to the first rule."""
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "pad_token_id": 0,
        "speculate": 0,
        "attention_mask": torch.ones_like(ids),
    }
    settings = {rule: model.settings.changed(rule=rule) for rule in rules}
    rows: dict[str, list[dict[str, Any]]] = {rule: [] for rule in rules}
    for own in settings.values():
        model.generate(ids, settings=own, **options | {"min_new_tokens": 2, "max_new_tokens": 2})
    for _ in range(repeats):
        for rule, own in settings.items():
            clock.spent.clear()
            recorder, start = Recorder(), now()
            model.generate(ids, settings=own, recorder=recorder, **options)
            rate, spent = len(ids) * tokens / (now() - start), {k: 1e3 * s / tokens for k, s in clock.spent.items()}
            rows[rule].append(
                {
                    "tokens/s": rate,
                    "passes": recorder.passes / recorder.rows,
                    "unsolved": recorder.statuses["NOT_CONVERGED"],
                    "members, ms a step": spent["members"],
                    "heads and rule, ms a step": spent["rows"],
                    "of it directions, ms": spent.get("directions", 0.0),
                    "coefficients": spent.get("coefficients", 0.0),
                    "bounds": spent.get("bounds", 0.0),
                    "of logit-mean's": rate / (rows[rules[0]][-1]["tokens/s"] if rule != rules[0] else rate),
                }
            )
    return [
        {"batch": len(ids), "rule": rule} | {key: median([row[key] for row in found]) for key in found[0]}
        for rule, found in rows.items()
    ]


@torch.inference_mode()
def distance(model: modeling.EnsembleForCausalLM, rules: list[str], count: int = 16) -> dict[str, float]:
    """Mean total variation of each rule's answer to that of `meet` at a small tolerance, at some random prefixes."""
    ids = torch.randint(0, model.config.vocab_size, (count, 32), generator=torch.Generator().manual_seed(2))
    states = list(map(torch.cat, zip(*([h[-1:] for h in model.hidden_states(row[None])] for row in ids), strict=True)))
    _, exact = model.combiner.solve_rows(states, model.settings.changed(rule="meet", tol=1e-6, gate=None))
    found = {}
    for rule in rules:
        _, solution = model.combiner.solve_rows(states, model.settings.changed(rule=rule, gate=None), proved=False)
        found[rule] = total_variation(solution.log_probs.double(), exact.log_probs.double()).mean().item()
    return found


def main(
    tokens: Annotated[int, typer.Option(help="To generate in each run.")] = 16,
    repeats: Annotated[int, typer.Option()] = 5,
    batches: Annotated[str, typer.Option()] = "1,8",
    rule: Annotated[list[str] | None, typer.Option(help="Beside logit-mean; may be repeated.")] = None,
    trust: Annotated[float, typer.Option()] = 0.3,
    threads: Annotated[int, typer.Option()] = 1,
    shared: Annotated[float, typer.Option(help="Correlation of the members' parameters.")] = 0.97,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    clock, rows = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        names = save_pair(Path(folder), shared)
        model = ensemble_of(names, load_pair(names), "meet", trust)
    clock.watch(ask.Members, "read_on", "members")
    clock.watch(combine.Combiner, "solve_rows", "rows")
    clock.watch(dense, "direction", "directions")
    clock.watch(dense, "_least", "coefficients")
    clock.watch(dense.DenseNewton, "_floor", "bounds")
    rules = ["logit-mean", *(rule or ["meet", "meet:budget=2"])]
    far = distance(model, rules)
    generator = torch.Generator().manual_seed(1)
    for batch in (int(x) for x in batches.split(",")):
        ids = torch.randint(0, model.config.vocab_size, (batch, 32), generator=generator)
        found = run(model, rules, ids, tokens, repeats, clock)
        rows += [row | {"TV to meet": far[row["rule"]]} for row in found]
    with torch.inference_mode():
        states = [h[-1:] for h in model.hidden_states(ids[:1])]
        log_p, _ = model.combiner.solve_rows(states, model.settings.changed(rule="logit-mean"))
    nats = [*entropy(log_p)[:, 0].tolist(), kl(log_p[0], log_p[1]).item()]
    facts = "entropies {:.1f} and {:.1f} nats, KL {:.2f}".format(*nats)
    show(f"decoding, two members of GPT-2 small's shape, trust {trust:g}; {facts}", rows, json)


if __name__ == "__main__":
    typer.run(main)
