"""What gates save and what they cost: curves of each gate, and the default gate beside none."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress, track

from report import JsonPath, Members, Threads, commands, keep, median, named, now, show
from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice, under_gates
from softmeet.evaluation.documents import read_documents
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.evaluation.scores import Evaluation
from softmeet.hf import Recorder
from softmeet.hf.sampling import RowSampler
from softmeet.rules.gates import confidence

app = commands(__doc__)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
PROMPT = 16
OPTIONS: dict[str, Any] = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
Row = dict[str, Any]
MEET = RuleChoice("meet", {"rule": "meet"})


@torch.inference_mode()
def gates_of(ensemble: Ensemble, positions: Positions) -> list[str]:
    """Return none, the default, gates that close at about these shares of positions, and those that always close."""
    model, found = ensemble.model, []
    log_p, logits = model.combiner.own_log_probs(positions.hidden)
    # No trust is solved for: the pool and the disagreement are the same at any rate.
    problem = model.combiner.combine_rows(log_p, logits, model.settings.changed(gate="disagreement:1e9")).problem
    for name, sizes, signs in (
        ("unsure", confidence(log_p[0]), [1 - share for share in SHARES]),
        ("disagreement", problem.pool_bound(), SHARES),
    ):
        cuts = torch.quantile(sizes.double(), torch.tensor(signs, dtype=torch.float64)).tolist()
        found += [f"{name}:{cut:.2g}" for cut in cuts]
    every = ["none", "auto", *found[: len(SHARES)], "unsure:0", *found[len(SHARES) :], "disagreement:100"]
    return list(dict.fromkeys(every))


@dataclass
class Run:
    """Seconds of the processor and of the clock to generate, and what the gate did."""

    spent: float
    passed: float
    recorder: Recorder

    @property
    def guess(self) -> float | None:
        """Of the time without a gate, the share that was saved, as the recorder guesses it."""
        saved = self.recorder.gate.saved
        return None if saved is None else saved / (saved + self.passed)


def written_under(ensemble: Ensemble, gate: str, prompts: torch.Tensor, tokens: int, batch: int) -> Run:
    """Generate ``tokens`` from each prompt."""
    recorder, options = Recorder(), OPTIONS | {"min_new_tokens": tokens, "max_new_tokens": tokens, "gate": gate}
    options["speculate"] = 0
    begun, start = time.process_time(), time.perf_counter()
    for k, ids in enumerate(prompts.split(batch)):
        keys = range(k * batch, k * batch + len(ids))
        ensemble.model.generate(
            ids, attention_mask=torch.ones_like(ids), row_sampler=RowSampler(1, keys), recorder=recorder, **options
        )
    return Run(time.process_time() - begun, time.perf_counter() - start, recorder)


def row(gate: str, found: Evaluation, run: Run, plain_run: Run, generated: int) -> dict[str, Any]:
    """Return one line of the table; ``plain_run`` is without a gate."""
    plain = found.choices[MEET.name]
    scores = plain if gate == "none" else found.choices[f"{MEET.name}:gate={float_text(gate)}"]
    difference = paired(scores.nats, plain.nats, clusters(found.positions.document))
    return {
        "gate": gate, "gated in text": 0.0 if scores.gated is None else scores.gated.double().mean().item(),
        "nats a token": scores.mean, "against no gate": difference.mean,
        "± (95 %)": (difference.high - difference.low) / 2, "gated in generation": run.recorder.gate.share,
        "tokens/s": generated / run.spent, "over no gate": plain_run.spent / run.spent,
        "time saved": 1 - run.spent / plain_run.spent, "as guessed": run.guess,
    }  # fmt: skip


def float_text(gate: str) -> str:
    """Return a gate as choices name it."""
    name, _, number = gate.partition(":")
    return f"{name}:{float(number)!r}" if number else name


def family_rows(family: str, per_book: int, prompts: int, tokens: int, batch: int) -> tuple[list[Row], dict[str, Any]]:
    """Return the table of a family, and what else is worth knowing."""
    ensemble = Ensemble.from_pretrained(family)
    positions = observe_text(ensemble, held_out_books(), bos=True, max_per_document=per_book)
    gates = gates_of(ensemble, positions)
    choices = under_gates([MEET], gates[1:])
    with Progress() as bars:
        task = bars.add_task(f"{family}: solving", total=len(positions))
        found = evaluate(ensemble, positions, choices, lambda count: bars.advance(task, count))
    starts = torch.stack([_inside(ensemble, book.text) for book in held_out_books()[:prompts]])
    written_under(ensemble, "none", starts[:batch], 2, batch)
    timed = {
        gate: written_under(ensemble, gate, starts, tokens, batch) for gate in track(gates, f"{family}: generating")
    }
    generated = len(starts) * tokens
    rows = [row(gate, found, timed[gate], timed["none"], generated) for gate in gates]
    alone = {name: scores.mean for name, scores in found.members.items()}
    return rows, {"positions": len(positions), "members": alone, "tokens": generated, "batch": batch}


def _inside(ensemble: Ensemble, text: str) -> torch.Tensor:
    """Return a prompt from where a book has got going."""
    ids: torch.Tensor = ensemble.tokenizer(text[2000:3000], return_tensors="pt")["input_ids"][0]
    return ids[:PROMPT]


def _draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Draw nats and speed against the share that is gated, a row of panels for each family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 2, squeeze=False)
    for (family, rows), (nats, rate) in zip(tables.items(), panels, strict=True):
        for name, color in (("unsure", "tab:orange"), ("disagreement", "tab:blue")):
            some = sorted((r for r in rows if r["gate"].startswith(name)), key=lambda r: r["gated in text"])
            x = [r["gated in text"] for r in some]
            nats.errorbar(x, [r["against no gate"] for r in some], [r["± (95 %)"] for r in some], marker="o", capsize=2,
                          color=color, label=name)  # fmt: skip
            some.sort(key=lambda r: r["gated in generation"])
            rate.plot([r["gated in generation"] for r in some], [r["tokens/s"] for r in some], "o-", color=color)
        nats.axhline(0, color="black", linewidth=0.8)
        rate.axhline(rows[0]["tokens/s"], color="black", linewidth=0.8)
        nats.set(title=f"{family}: quality", ylabel="nats a token against no gate", xlabel="share of tokens gated")
        rate.set(title=f"{family}: speed", ylabel="tokens/s (line: no gate)", xlabel="share of tokens gated")
        nats.legend(frameon=False)
        for axes in (nats, rate):
            axes.spines[["top", "right"]].set_visible(False)
        rate.set_yscale("log")
    figure.savefig(path, dpi=110)


@app.command()
def curves(
    families: Annotated[str, typer.Option()] = "narrow,wide",
    per_book: Annotated[int, typer.Option(help="Positions of each of the 20 books, at most.")] = 50,
    prompts: Annotated[int, typer.Option(help="To generate from, each from a book.")] = 8,
    tokens: Annotated[int, typer.Option(help="To generate from each.")] = 24,
    batch: Annotated[int, typer.Option(help="Sequences that are generated together.")] = 1,
    threads: Threads = 1,
    smoke: Annotated[bool, typer.Option("--smoke", help="A size that runs in a minute.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves here.")] = None,
    json: JsonPath = None,
) -> None:
    """Measure gates of all thresholds, by `meet` with the default trust on both bundled families; a table for each.

    Quality is read off held-out books, position by position: the rule is solved once everywhere, and each gate then
    only decides where its answer would have counted. Speed is measured by generating, one sequence at a time or in
    batches, from the same prompts under each gate, no ends of text; seconds are the process's own, which on one thread
    are those of an idle core, so that what else a machine does counts little.
    """
    if smoke:
        per_book, prompts, tokens = 3, 2, 6
    tables, every = {}, dict[str, Any]()
    for family in families.split(","):
        rows, facts = family_rows(family, per_book, prompts, tokens, batch)
        tables[family] = rows
        alone = ", ".join(f"{Path(name).name} {nats:.3f}" for name, nats in facts["members"].items())
        title = (
            f"{family}: {facts['positions']:,} positions; alone: {alone} nats; {facts['tokens']} tokens, batch {batch}"
        )
        show(title, rows, None)
        every[family] = facts
    if json is not None:
        found = [{"family": family} | row for family, rows in tables.items() for row in rows]
        keep(json, "what gates save and cost", found, families=every)
    if plot is not None:
        _draw(tables, plot)


WAYS: dict[str, dict[str, Any]] = {
    "logit-mean": {"rule": "logit-mean"},
    "meet, gate auto": {"rule": "meet", "gate": "auto"},
    "meet, no gate": {"rule": "meet", "gate": None},
}


@dataclass
class Total:
    """What one way took over all texts: seconds, tokens, what the rule read, and the ratio to the average of each."""

    seconds: float = 0.0
    tokens: int = 0
    recorder: Recorder = field(default_factory=Recorder)
    ratios: list[float] = field(default_factory=list)


@torch.inference_mode()
def _run(ensemble: Ensemble, prompt: str, way: str, tokens: int, seed: int, *, sample: bool, total: Total) -> float:
    """Generate from one prompt, add what it took to ``total``, and return the seconds."""
    settings = ensemble.model.settings.changed(**WAYS[way])
    start = now()
    ensemble.generate(
        prompt, settings=ensemble.model.combiner.resolved(settings), recorder=total.recorder, do_sample=sample,
        seed=seed if sample else None, speculate=0, min_new_tokens=tokens, max_new_tokens=tokens,
    )  # fmt: skip
    taken = now() - start
    total.seconds, total.tokens = total.seconds + taken, total.tokens + tokens
    return taken


def compare(
    name: str, ensemble: Ensemble, prompts: list[str], tokens: int, ways: list[str], *, sample: bool
) -> list[Row]:
    """Return a row for each way, by the sums over all prompts."""
    for way in ways:
        _run(ensemble, prompts[0], way, 2, 0, sample=sample, total=Total())
    totals = {way: Total() for way in ways}
    for k, prompt in enumerate(prompts):
        taken = {w: _run(ensemble, prompt, w, tokens, k, sample=sample, total=t) for w, t in totals.items()}
        for way, total in totals.items():
            total.ratios.append(taken[ways[0]] / taken[way])
    plain, rows = totals[ways[0]], []
    for way, total in totals.items():
        gate, each = total.recorder.gate, 1e3 * total.seconds / total.tokens
        rows.append(
            {
                "members": name, "drawn": "sampled" if sample else "greedy", "way": way, "ms a token": each,
                "gated": gate.share, "passes": total.recorder.passes / total.recorder.rows,
                "ms an open token takes more": 1e3 * (total.seconds - plain.seconds) / max(gate.rows - gate.gated, 1),
                "of logit-mean's speed": plain.seconds / total.seconds, "median": median(total.ratios),
                "from": min(total.ratios), "to": max(total.ratios),
            }
        )  # fmt: skip
    return rows


@app.command()
def speed(
    member: Members = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Files or patterns, for them.")] = None,
    documents: Annotated[int, typer.Option(help="So many of the texts are continued.")] = 8,
    prompt: Annotated[int, typer.Option(help="Characters of a text that are the prompt.")] = 300,
    tokens: Annotated[int, typer.Option(help="To generate from each.")] = 32,
    trust: Annotated[float, typer.Option()] = 0.3,
    threads: Threads = 1,
    gated_only: Annotated[bool, typer.Option("--gated-only", help="Leave out meet without its gate.")] = False,
    json: JsonPath = None,
) -> None:
    """Time `meet` beside `logit-mean` in generation, with the default gate and with none.

    From the beginning of each text, one sequence at a time, the average, `meet` with its gate and `meet` with none
    generate as many tokens, in turn, so that all three see the machine as it then is; ratios are of the sums of
    seconds. An *open* token is one at which the gate had the rule solved. Without members: the bundled families, on
    books that they have not seen.
    """
    given: list[tuple[str, Any, list[str]]] = []
    if member:
        if not text:
            raise typer.BadParameter("members need texts: --text 'FILES'")
        given.append((" + ".join(map(named, member)), member, [own.text for own in read_documents(text)]))
    else:
        books = [book.text[1000:] for book in held_out_books()]
        given += [(family, family, books) for family in ("narrow", "wide")]
    rows, ways = list[Row](), list(WAYS)[: 2 if gated_only else 3]
    for name, members, texts in given:
        ensemble = Ensemble.from_pretrained(members, trust=trust)
        prompts = [own[:prompt] for own in texts[:documents]]
        for sample in (True, False):
            rows += compare(name, ensemble, prompts, tokens, ways, sample=sample)
    show(f"generation, one sequence at a time, trust {trust:g}, {tokens} tokens from each prompt", rows, json)


if __name__ == "__main__":
    app()
