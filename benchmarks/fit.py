"""Fits and verdicts on books of the King James Version, which no bundled member has seen."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from report import JsonPath, Threads, commands, show
from softmeet import Ensemble
from softmeet.evaluation.advise import Advice, advise, part, within_budget
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.held_out import HELD_OUT_KJV, held_out_books, kjv_works
from softmeet.evaluation.intervals import Difference, clusters, paired
from softmeet.evaluation.perplexity import evaluate, evaluate_text
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.evaluation.save import save, verdict
from softmeet.evaluation.scores import Evaluation
from softmeet.evaluation.trace import record
from softmeet.members import zoo
from softmeet.scaling.local import LocalEngine

app = commands(__doc__)
Row = dict[str, Any]
Family = Annotated[str, typer.Argument(help="A bundled family.")]
# Positions of each book for max-entropy, which takes many steps to prove that it has no answer.
FEW = 32


def held_out_documents() -> list[Document]:
    """Return the held-out books; each begins as the members' training texts did."""
    return [Document(book.name, "<|endoftext|>" + book.text) for book in held_out_books()]


def changed(name: str, folder: Path, change: Callable[[Any, Any], None]) -> str:
    """Save a copy of a bundled member, changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.locate(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo.locate(name))
    change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shuffled(model: Any, tokenizer: Any) -> None:
    """Have the head give each token the logit of another."""
    layer = model.get_output_embeddings()
    order = torch.randperm(len(layer.weight), generator=torch.Generator().manual_seed(0))
    layer.weight = torch.nn.Parameter(layer.weight.detach()[order].clone())
    model.config.tie_word_embeddings = False


def damaged(model: Any, tokenizer: Any) -> None:
    """Add noise of a tenth of each weight's spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)


def tuned(model: Any, tokenizer: Any) -> None:
    """Train for eighty steps on books that every bundled member has read."""
    texts = [work.text for work in kjv_works() if work.name not in HELD_OUT_KJV]
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for _ in range(80):
        starts = torch.randint(len(ids) - 129, (8,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + 128] for start in starts])
        adam.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    model.eval()


@app.command()
def family(
    name: Family = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each of the 20 books, at most.")] = 1000,
    meet_tokens: Annotated[int, typer.Option(help="Size of the subset that meet is fitted on.")] = 2000,
    evaluations: Annotated[int, typer.Option()] = 15,
    bad: Annotated[bool, typer.Option("--bad", help="Add a member with a shuffled head.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Keep the trace here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the ensemble here.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep what is found here, and go on from it.")] = None,
    threads: Threads = 2,
    json: JsonPath = None,
) -> None:
    """Fit a bundled family, as a user would.

    A document is a book. The members run once, into a trace; then the same as in `softmeet fit` is done.
    """
    with tempfile.TemporaryDirectory() as scratch:
        names = zoo.expand(name)
        names += [changed(names[0], Path(scratch) / "shuffled", shuffled)] if bad else []
        ensemble = Ensemble.from_pretrained(names)
        kept = trace or Path(scratch) / "trace"
        positions = record(ensemble, held_out_documents(), kept, max_per_document=tokens).read()
        options = Options(meet_positions=meet_tokens, evaluations=evaluations)
        settings = {"family": name, "tokens": tokens, "bad": bad, "threads": threads}
        started = time.perf_counter()
        fitted = fit(ensemble, positions, options, cache=PieceCache(resume, asdict(options) | settings))
        seconds = time.perf_counter() - started
        facts = save(ensemble, fitted, out or Path(scratch) / "ensemble")
    rows = list[Row]()
    for candidate, row in facts["candidates"].items():
        trust = " ".join(f"{rho:.3f}" for rho in row["trust"]) if row["rule"] == "meet" else ""
        rows.append({
            "candidate": Path(candidate).name, "test nats": row["test_nll"],
            "vs best baseline": f"{row['delta']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]",
            "weights": " ".join(f"{w:.3f}" for w in row["weights"]), "trust": trust, "T": row["rule_temperature"],
            "evaluations": row["evaluations"],
        })  # fmt: skip
    sizes = ", ".join(f"{own['tokens']:,} to {split}" for split, own in facts["splits"].items())
    title = f"{name}{' and a shuffled head' if bad else ''}: {sizes}; {seconds:.0f} s"
    show(title, rows, json, seconds=seconds, fit=facts)
    print(verdict(facts))


def read(ensemble: Ensemble, tokens: int) -> tuple[Positions, Positions]:
    """Return the first ``tokens`` of each held-out book, in halves: every other book to choose by, and the rest.

    Both halves hold narrative, poetry, prophecy and letters.
    """
    positions = observe_text(ensemble, held_out_documents(), max_per_document=tokens)
    first, second = (positions.take(positions.document % 2 == k) for k in (0, 1))
    return first, second


def meet(trust: float, n: int) -> RuleChoice:
    """Return ``meet`` with one trust for every member."""
    return RuleChoice(f"meet, trust {trust:g}", {"rule": "meet", "trust": [trust] * n})


def compare(ensemble: Ensemble, positions: Positions, choices: Sequence[RuleChoice]) -> Evaluation:
    """Evaluate every choice at every position, with a spinner on the terminal."""
    with Console(stderr=True).status("rules"):
        return evaluate(ensemble, positions, choices)


def choose_trust(ensemble: Ensemble, positions: Positions, trusts: Sequence[float]) -> float:
    """Return the trust, the same for every member, of the lowest loss."""
    choices = {rho: meet(rho, len(ensemble.names)) for rho in trusts}
    found = compare(ensemble, positions, list(choices.values())).choices
    return min(trusts, key=lambda rho: found[choices[rho].name].mean)


@app.command()
def rules(
    name: Family = "narrow",
    tokens: Annotated[int, typer.Option(help="Of each document, at most.")] = 512,
    trust: Annotated[str, typer.Option(help="Trusts to try, the same for every member.")] = "0.1,0.3,1,2,4",
    threads: Threads = 2,
    json: JsonPath = None,
) -> None:
    """Compare rules on a family.

    The trust is chosen on some books and judged on others; intervals are by document, paired against the uniform logit
    mean. Figures are in nats a token. A fit has weights and temperature, too, and a trust for each member.
    """
    ensemble = Ensemble.from_pretrained(name)
    tuning, test = read(ensemble, tokens)
    trusts = [float(rho) for rho in trust.split(",")]
    best = meet(choose_trust(ensemble, tuning, trusts), len(ensemble.names)).name
    choices = [RuleChoice(rule, {"rule": rule}) for rule in ("logit-mean", "prob-mean")]
    choices += [meet(rho, len(ensemble.names)) for rho in trusts]
    found = compare(ensemble, test, choices)
    within, baseline = clusters(test.document), found.choices["logit-mean"].nats
    rows = []
    for who, scores in {**found.members, **found.choices}.items():
        row: Row = {"who": Path(who).name, "nats/token": scores.mean}
        if who != "logit-mean":
            against = paired(scores.nats, baseline, within)
            row |= {"against logit-mean": against.mean, "from": against.low, "to": against.high}
        rows.append(row | {"chosen on other books": who == best})
    exact, few = RuleChoice("max-entropy", {"rule": "max-entropy"}), list(_first(test, FEW))
    infeasible = sum(evaluate(ensemble, part, [exact]).choices["max-entropy"].fallbacks for part in track(few))
    tried = sum(map(len, few))
    title = f"{name}: {len(test):,} positions of {within.count} {within.kind}"
    show(title, rows, json, positions=len(test), max_entropy={"infeasible": infeasible, "of": tried})
    typer.echo(f"max-entropy is infeasible, with proof, at {infeasible} of {tried} positions")


def _first(positions: Positions, count: int) -> list[Positions]:
    """Return the first positions of each document."""
    return [
        positions.take((positions.document == k).nonzero().squeeze(-1)[:count]) for k in positions.document.unique()
    ]


def pairs(scratch: Path) -> dict[str, list[str]]:
    """Return the members of each pair, by what it is."""
    return {
        "equal, narrow heads": ["narrow/opt-a", "narrow/opt-c"],
        "equal, narrow heads, others": ["narrow/opt-b", "narrow/opt-d"],
        "nearly equal": ["wide/llama", "wide/neox"],
        "unequal": ["wide/gpt2", "wide/neox"],
        "other tokenizers": ["mixed/gpt2", "mixed/llama"],
        "one broken": ["narrow/opt-a", changed("narrow/opt-b", scratch / "shuffled", shuffled)],
        "one damaged copy of the other": ["wide/llama", changed("wide/llama", scratch / "noise", damaged)],
        "one damaged": ["wide/neox", changed("wide/gpt2", scratch / "other noise", damaged)],
        "the same twice": ["narrow/opt-a", "narrow/opt-a"],
        "a fine-tuned copy of the other": ["wide/gpt2", changed("wide/gpt2", scratch / "tuned", tuned)],
    }


def later(advice: Advice, documents: Sequence[Document]) -> Difference:
    """Return the gain in bits a byte, on other text, of what is advised, or of the best average, over the best member.

    That is the best member on this other text, as it is or with the temperature that was fitted to it for the advice.
    """
    judged, ours = advice.judged, advice.ensemble
    if advice.verdict == "single":
        whole = range(len(judged.names))
        ours = part(judged.ensemble, list(whole), judged.best_of(judged.worthwhile).settings)
    singles = judged.fitted.candidates[: len(judged.names)]
    alone = [RuleChoice(f"{k} alone", own.settings) for k, own in enumerate(singles)]
    members = evaluate_text(judged.ensemble, documents, alone, engine=LocalEngine(2))
    chosen = {name: value for name, value in ours.model.settings.plain().items() if value is not None}
    found = evaluate_text(ours, documents, [RuleChoice("advised", chosen)], engine=LocalEngine(2))
    best = min([*members.members.values(), *members.choices.values()], key=lambda own: own.mean)
    within, scale = clusters(found.positions.document), math.log(2)
    return paired(best.nats / scale, found.choices["advised"].nats / scale, within, found.positions.sizes)


@app.command()
def verdicts(
    each: Annotated[int, typer.Option(help="Bytes of the text for advice.")] = 40_000,
    judged: Annotated[int, typer.Option(help="Bytes of the text for the later evaluation.")] = 40_000,
    only: Annotated[list[str] | None, typer.Option(help="Names of pairs; by default all.")] = None,
    json: JsonPath = None,
) -> None:
    """Ask whether the verdict of `softmeet advise` holds on other text.

    Ten pairs of models are equal, unequal, broken, the same twice, a fine-tuned copy of the other, or of other
    tokenizers. Half of the books are for advice; the other half, which took no part in it, is for the later evaluation:
    what is advised, or for the verdict `single` the best average that was fitted, against the best member, as it is or
    with a fitted temperature. A verdict holds if it advises an ensemble where that gains, with a 95 % interval by book,
    and none where it does not.
    """
    rows = list[Row]()
    books = held_out_books()
    with tempfile.TemporaryDirectory() as scratch:
        every = pairs(Path(scratch))
        for name, members in ((name, every[name]) for name in only or every):
            ensemble = Ensemble.from_pretrained(members)
            texts = within_budget(ensemble, books[::2], each)
            positions = observe_text(ensemble, texts, engine=LocalEngine(2))
            advice = advise(ensemble, texts, positions, engine=LocalEngine(2))
            predicted = None if advice.nats is None else advice.judged.gain(advice.nats)
            gain = later(advice, within_budget(ensemble, books[1::2], judged))
            rows.append(
                {
                    "pair": name, "verdict": advice.verdict, "predicted gain": str(predicted), "later": str(gain),
                    "holds": (advice.verdict != "single") == (gain.low > 0),
                }
            )  # fmt: skip
            typer.echo(f"{rows[-1]}", err=True)
    show(f"Verdicts that hold on other books: {sum(row['holds'] for row in rows)} of {len(rows)}", rows, json)


if __name__ == "__main__":
    app()
