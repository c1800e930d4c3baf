"""What an ensemble costs beside its members alone: python benchmarks/price.py --threads 2 [-m A -m B --dtype bfloat16]

Each member generates by itself, by transformers' ``generate``, and then the ensemble, in turn, several times; the
figures are medians of milliseconds a token, *outside* those of them that are outside of bodies and heads. *Of the sum*
is the members' times together over the ensemble's: 1 if averaging costs nothing. *Of plain* is the time of the same
rule, token by token, over the speculative one's or that of one member a token. *Accepted* is the share of drafts that
were. Without members, two of GPT-2 small's shape, the second a noisy copy of the first. *In threads* runs the members
at the same time, each on its share of the cores. With ``--text``, prompts begin its files, which decides what
speculation can gain.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory import ensemble_of, save_pair
from report import JsonPath, Members, Repeats, Threads, median, named, show
from softmeet.engine import combine, pace
from softmeet.members import trunk, zoo
from softmeet.rules.settings import parse_rule

Run = Callable[[int], Any]
PROMPT = 64


class Drafts:
    """Counts of the drafts that were accepted, as the pace of speculation is told of them."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        original, told = pace.Share.add, self.told

        def add(share: pace.Share, accepted: bool) -> None:
            told.append(accepted)
            original(share, accepted)

        pace.Share.add = add  # type: ignore[method-assign, assignment]

    def taken(self) -> list[bool]:
        """Those since the last call."""
        found = list(self.told)
        self.told.clear()
        return found


class Inside:
    """The seconds that an ensemble spends in its members' bodies and heads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in ((trunk.Trunk, "__call__"), (combine, "native_logits")):
            setattr(owner, name, self._noted(getattr(owner, name)))

    def _noted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = original(*args, **options)
            self.seconds += time.perf_counter() - start
            return found

        return function


def timed(run: Run, few: int, many: int, seed: int, inside: Inside) -> tuple[float, float]:
    """Milliseconds of a token, and of them outside of an ensemble's bodies and heads.

    They are the differences of a long and a short run, over that of their tokens.
    """
    taken, outside = [], []
    for count in (few, many):
        torch.manual_seed(seed)
        start, inside.seconds = time.perf_counter(), 0.0
        run(count)
        taken.append(time.perf_counter() - start)
        outside.append(taken[-1] - inside.seconds)
    return 1000 * (taken[1] - taken[0]) / (many - few), 1000 * (outside[1] - outside[0]) / (many - few)


def prompts(text: str | None, name: str, batch: int, repeats: int) -> list[torch.Tensor]:
    """For each repetition the tokens of a batch of prompts, of one length."""
    if text is None:
        generator = torch.Generator().manual_seed(1)
        return list(torch.randint(100, 10_000, (repeats, batch, PROMPT), generator=generator))
    tokenizer = AutoTokenizer.from_pretrained(name)
    files = sorted(Path(text).parent.glob(Path(text).name))
    whole = [tokenizer(file.read_text(encoding="utf-8"))["input_ids"] for file in files]
    rows = [ids[:PROMPT] for ids in whole if len(ids) >= PROMPT]
    return [torch.tensor([rows[(k * batch + j) % len(rows)] for j in range(batch)]) for k in range(repeats)]


def in_threads(ensemble: Any, run: Run) -> Run:
    """A function that does the same with the members in threads of their own."""

    def parallel(count: int) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // len(ensemble.members)))
        ensemble.__dict__["apart"] = True
        try:
            return run(count)
        finally:
            ensemble.__dict__["apart"] = False
            torch.set_num_threads(threads)

    return parallel


def runs(
    names: list[str], rules: list[str], drafts: list[str], dtype: torch.dtype, ids: list[Any], *, parallel: bool = False
) -> dict[str, Run]:
    """Functions of a number of new tokens, by what generates them; the prompts are the last of ``ids``."""
    options: dict[str, Any] = {"pad_token_id": 0, "do_sample": True, "top_k": 0}

    def generating(model: Any, **more: Any) -> Run:
        model.generation_config.eos_token_id = None
        return lambda count: model.generate(
            ids[-1], attention_mask=torch.ones_like(ids[-1]), max_new_tokens=count, **options, **more
        )

    members = [AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval() for name in names]
    ensemble = ensemble_of(names, members, "logit-mean")
    found = {f"member {k + 1}, alone": generating(model) for k, model in enumerate(members)}
    for text in rules:
        rule, more = parse_rule(text)
        settings = ensemble.settings.changed(rule=rule, **more)
        found[text] = generating(ensemble, settings=settings, speculate=0)
        for count in drafts:
            speculate = count if count == "auto" else int(count)
            found[f"{text}, speculate {count}"] = generating(ensemble, settings=settings, speculate=speculate)
        if parallel:
            found[f"{text}, in threads"] = in_threads(ensemble, found[text])
        if rule.name == "prob-mean" and not more.get("rule_temperature"):
            found[f"{text}, one member"] = generating(ensemble, settings=settings, one_member=True)
    return found


def by_rule(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for a rule and a batch: tokens a second of each member alone, of the rule, and of each way to less."""
    found: list[dict[str, Any]] = []
    for row in rows:
        who, rate = row["who"], 1000 * row["batch"] / row["ms a token"]
        rule, _, way = who.rpartition(", ")
        if way == "alone":
            alone = [r for r in rows if r["batch"] == row["batch"] and r["who"].startswith("member ")]
        elif not way or not any(r["who"] == rule for r in rows):
            each = [1000 * r["batch"] / r["ms a token"] for r in alone]
            found.append({"batch": row["batch"], "rule": who, "each alone": each, "average": rate})
            found[-1] |= {"outside, ms": row["outside"], "of their sum": row["of the sum"]}
        else:
            found[-1] |= {way: rate, f"{way}, of plain": row["of plain"]}
            found[-1] |= {f"{way}, outside, ms": row["outside"], f"{way}, accepted": row["accepted"]}
    return found


def main(
    member: Members = None,
    rule: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    speculate: Annotated[list[str] | None, typer.Option(help="Numbers of drafts or auto; may be repeated.")] = None,
    text: Annotated[str | None, typer.Option(help="A pattern of files that begin with the prompts.")] = None,
    near: Annotated[float, typer.Option(help="How near the noisy copy is: the correlation of parameters.")] = 0.97,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    parallel: Annotated[bool, typer.Option(help="Run members in threads, too.")] = False,
    batches: Annotated[str, typer.Option()] = "1,8",
    tokens: Annotated[int, typer.Option(help="New tokens in the longer of two runs.")] = 20,
    repeats: Repeats = 5,
    threads: Threads = 2,
    json: JsonPath = None,
) -> None:
    """Print one table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = [str(zoo.locate(name)) for name in member or []] or save_pair(Path(folder), near)
        rules = rule or ["logit-mean", "prob-mean"]
        current: list[Any] = []
        every = runs(names, rules, speculate or [], getattr(torch, dtype), current, parallel=parallel)
        told, inside = Drafts(), Inside()
        for batch in (int(x) for x in batches.split(",")):
            taken, outside = ({name: list[float]() for name in every} for _ in range(2))
            accepted = {name: list[bool]() for name in every}
            each = prompts(text, names[0], batch, repeats)
            current.append(each[0])
            for run in every.values():
                run(2)
            told.taken()
            for k, ids in enumerate(each):
                current[-1] = ids
                for name, run in every.items():
                    whole, rest = timed(run, 4, tokens, k, inside)
                    taken[name].append(whole)
                    outside[name].append(rest)
                    accepted[name] += told.taken()
            alone = [taken[name] for name in every if name.startswith("member ")]
            for name, own in taken.items():
                plain = taken.get(name.rsplit(", ", 1)[0], own)
                ensemble, drafted = not name.startswith("member "), accepted[name]
                of_sum = [sum(x) / y for *x, y in zip(*alone, own, strict=True)]
                of_plain = [x / y for x, y in zip(plain, own, strict=True)]
                rows.append({
                    "batch": batch, "who": name, "ms a token": median(own),
                    "outside": median(outside[name]) if ensemble else None,
                    "of the sum": median(of_sum) if ensemble else None,
                    "of plain": median(of_plain) if plain is not own else None,
                    "accepted": sum(drafted) / len(drafted) if drafted else None,
                })  # fmt: skip
    label = " + ".join(map(named, member or [])) or f"two of GPT-2 small's shape, near {near:g}"
    found = [{"members": f"{label}, {dtype}"} | row for row in by_rule(rows)]
    show(f"tokens a second of generation, {dtype}", found, json, each=rows)


if __name__ == "__main__":
    typer.run(main)
