"""What an average costs beside its members alone: python benchmarks/price.py --threads 2 [-m A -m B --dtype bfloat16]

Each member generates by itself, by transformers' ``generate``, and then the ensemble, in turn, several times; the
figures are medians. *Of the sum* is the members' times together over the ensemble's: 1 if averaging costs nothing.
Without members, two of GPT-2 small's shape with random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from members import ensemble_of, save_pair
from report import median, now, show


def timed(run: Callable[[int], Any], few: int, many: int) -> float:
    """Milliseconds of a step: the difference of a long and a short run, over that of their steps."""
    taken = []
    for count in (few, many):
        start = now()
        run(count)
        taken.append(now() - start)
    return 1000 * (taken[1] - taken[0]) / (many - few)


def runs(names: list[str], rules: list[str], dtype: torch.dtype, ids: torch.Tensor) -> dict[str, Callable[[int], Any]]:
    """Functions of a number of new tokens, by what generates them."""
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": True}

    def alone(model: Any) -> Callable[[int], Any]:
        return lambda count: model.generate(ids, max_new_tokens=count, min_new_tokens=count, top_k=0, **options)

    def together(model: Any, rule: str) -> Callable[[int], Any]:
        chosen = model.settings.changed(rule=rule)
        return lambda count: model.generate(
            ids, settings=chosen, max_new_tokens=count, min_new_tokens=count, top_k=0, **options
        )

    members = [AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval() for name in names]
    ensemble = ensemble_of(names, members, rules[0])
    found = {f"member {k + 1}, alone": alone(model) for k, model in enumerate(members)}
    return found | {rule: together(ensemble, rule) for rule in rules}


def main(
    member: Annotated[list[str] | None, typer.Option("--member", "-m", help="Folders of two or more models.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batches: Annotated[str, typer.Option()] = "1,8",
    tokens: Annotated[int, typer.Option(help="New tokens in the longer of two runs.")] = 20,
    repeats: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = member or save_pair(Path(folder))
        rules = rule or ["logit-mean", "prob-mean"]
        for batch in (int(x) for x in batches.split(",")):
            generator = torch.Generator().manual_seed(1)
            ids = torch.randint(100, 10_000, (batch, 32), generator=generator)
            every = runs(names, rules, getattr(torch, dtype), ids)
            for run in every.values():
                run(2)
            taken = {name: list[float]() for name in every}
            for _ in range(repeats):
                for name, run in every.items():
                    taken[name].append(timed(run, 4, tokens))
            alone = [taken[name] for name in every if name not in rules]
            for name, own in taken.items():
                sums = [sum(each) / mine for *each, mine in zip(*alone, own, strict=True)]
                rows.append(
                    {
                        "batch": batch,
                        "who": name,
                        "ms a step": median(own),
                        "of the sum": median(sums) if name in rules else None,
                    }
                )
    show(f"a step of generation, {dtype}", rows, json)


if __name__ == "__main__":
    typer.run(main)
