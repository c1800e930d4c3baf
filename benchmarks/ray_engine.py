"""The local engine beside Ray with one worker and two, on the same text: python benchmarks/ray_engine.py

Every engine has to give the same bytes. The last table is the plan that follows: the time of a billion positions on so
many cores, by the CPU that a position costs one worker (the first row) and the driver (the last), which is where linear
scaling ends. CPU seconds hold on a machine that also has other work to do; wall time does not.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from report import show
from softmeet import Ensemble
from softmeet.evaluation.choices import parse_choices, with_baselines
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.evaluation.report import summary
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine
from softmeet.scaling.ray_engine import RayEngine

POSITIONS = 10**9


def processors() -> float:
    """Seconds of CPU of this process and all that it started and that still run."""
    me = psutil.Process()
    return float(sum(x.user + x.system for x in (p.cpu_times() for p in [me, *me.children(recursive=True)])))


class Clock:
    """Wall time and this process's own, since the first piece was dealt out and since the beginning."""

    def __init__(self) -> None:
        self.started, self.spent = time.perf_counter(), processors()
        self.first, self.own, self.done = 0.0, 0.0, 0

    def begin(self, total: int) -> Any:
        """As ``evaluate_text`` calls it."""
        return self.advance

    def advance(self, count: int) -> None:
        """The first answer is not counted: a worker has to come up and to warm up for it."""
        if not self.first:
            self.first, self.own = time.perf_counter(), time.process_time()
        else:
            self.done += count


def measure(ensemble: Ensemble, rules: str, tokens: int, engine: Engine) -> tuple[dict[str, Any], str]:
    """(figures, the reduced JSON) of one run."""
    choices = with_baselines(parse_choices(rules.split(","), len(ensemble.names)))
    clock = Clock()
    with engine:
        found = evaluate_text(
            ensemble, held_out_books(), choices, max_per_document=tokens, engine=engine, begin=clock.begin
        )
        ended, own = time.perf_counter(), time.process_time() - clock.own
        facts, spent = summary(found), processors()
    row = {
        "s in all": time.perf_counter() - clock.started,
        "s of CPU, all processes": spent - clock.spent,
        "s to the first piece": clock.first - clock.started,
        "positions/s after it": clock.done / (ended - clock.first),
        "driver, ms of CPU a position": 1e3 * own / clock.done if isinstance(engine, RayEngine) else None,
        "bytes a position, sent": engine.sent / facts["tokens"] if isinstance(engine, RayEngine) else None,
        "received": engine.received / facts["tokens"] if isinstance(engine, RayEngine) else None,
    }
    return row, json.dumps(facts)


def plan(rate: float, driver: float, bytes_: float) -> list[dict[str, Any]]:
    """From positions a second of a worker's core, and seconds of the driver and bytes of each, to a billion of them."""
    limit = 1 / (rate * driver)
    rows = []
    for workers in sorted({1, 10, 100, 1000, int(limit)}):
        seconds = POSITIONS / min(rate * workers, 1 / driver)
        rows.append(
            {
                "workers": workers,
                "days": seconds / 86_400,
                "of linear": min(1.0, limit / workers),
                "driver busy": min(1.0, workers / limit),
                "MB/s at the driver": POSITIONS * bytes_ / seconds / 1e6,
            }
        )
    return rows


def main(
    family: Annotated[str, typer.Argument(help="A bundled family.")] = "narrow",
    rules: Annotated[str, typer.Option(help="As softmeet evaluate has them.")] = "meet:trust=1",
    tokens: Annotated[int, typer.Option(help="Of each of the 20 books, at most.")] = 250,
    workers: Annotated[str, typer.Option(help="Numbers of Ray workers.")] = "1,2",
    local: Annotated[str, typer.Option(help="Numbers of the local engine's threads.")] = "1,2",
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print two tables."""
    ensemble = Ensemble.from_pretrained(family)
    engines: list[tuple[str, Engine]] = [(f"local, {n}", LocalEngine(int(n))) for n in local.split(",")]
    engines += [(f"ray, {n}", RayEngine(ensemble, int(n))) for n in workers.split(",")]
    rows, expected = [], None
    for name, engine in engines:
        figures, document = measure(ensemble, rules, tokens, engine)
        expected = expected or document
        rows.append({"engine, workers": name} | figures | {"same bytes": "yes" if document == expected else "NO"})
    fastest = min(row["s in all"] for row in rows[: len(local.split(","))])
    for row in rows:
        row["over the fastest local"] = row["s in all"] / fastest
    title = f"{family}, {rules}: {json.loads(expected or '{}')['tokens']:,} positions"
    show(title, rows, json_to, rules=rules)
    last = rows[-1]
    rate = json.loads(expected or "{}")["tokens"] / rows[0]["s of CPU, all processes"]
    driver, bytes_ = last["driver, ms of CPU a position"] / 1e3, last["bytes a position, sent"] + last["received"]
    show(f"a billion positions ({title})", plan(rate, driver, bytes_), None)


if __name__ == "__main__":
    typer.run(main)
