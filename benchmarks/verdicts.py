"""Does the verdict of ``softmeet advise`` hold on other text? python benchmarks/verdicts.py

Ten pairs of models that are equal, unequal, broken, the same twice, a fine-tuned copy of the other, or of other
tokenizers. Half of the held-out books are for advice; the other half, which took no part in it, is for the later
evaluation: what is advised, or for the verdict ``single`` the best average that was fitted, against the best member,
as it is or with a fitted temperature.
A verdict holds if it advises an ensemble where that gains, with a 95 % interval by book, and none where it does not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fit import shuffled
from report import show
from softmeet import Ensemble
from softmeet.evaluation.advise import Advice, advise, part, within_budget
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.held_out import HELD_OUT_KJV, held_out_books, kjv_works
from softmeet.evaluation.intervals import Difference, clusters, paired
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.evaluation.positions import observe_text
from softmeet.members import zoo
from softmeet.scaling.local import LocalEngine


def saved(name: str, folder: Path, change: Callable[[Any, Any], None]) -> str:
    """A copy of a bundled member, changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.locate(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo.locate(name))
    change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def damaged(model: Any, tokenizer: Any) -> None:
    """Noise of a tenth of each weight's spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)


def tuned(model: Any, tokenizer: Any) -> None:
    """Eighty steps on books that every bundled member has read."""
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


def pairs(scratch: Path) -> dict[str, list[str]]:
    """The members of each pair, by what it is."""
    return {
        "equal, narrow heads": ["narrow/opt-a", "narrow/opt-c"],
        "equal, narrow heads, others": ["narrow/opt-b", "narrow/opt-d"],
        "nearly equal": ["wide/llama", "wide/neox"],
        "unequal": ["wide/gpt2", "wide/neox"],
        "other tokenizers": ["mixed/gpt2", "mixed/llama"],
        "one broken": ["narrow/opt-a", shuffled("narrow/opt-b", scratch / "shuffled")],
        "one damaged copy of the other": ["wide/llama", saved("wide/llama", scratch / "noise", damaged)],
        "one damaged": ["wide/neox", saved("wide/gpt2", scratch / "other noise", damaged)],
        "the same twice": ["narrow/opt-a", "narrow/opt-a"],
        "a fine-tuned copy of the other": ["wide/gpt2", saved("wide/gpt2", scratch / "tuned", tuned)],
    }


def later(advice: Advice, documents: Sequence[Document]) -> Difference:
    """The gain in bits a byte, on other text, of what is advised, or else of the best average, over the best member.

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


def main(
    each: Annotated[int, typer.Option(help="Bytes of the text for advice.")] = 40_000,
    judged: Annotated[int, typer.Option(help="Bytes of the text for the later evaluation.")] = 40_000,
    only: Annotated[list[str] | None, typer.Option(help="Names of pairs; by default all.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON of all figures.")] = None,
) -> None:
    """Print a table."""
    rows = list[dict[str, Any]]()
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
    show(f"Verdicts that hold on other books: {sum(row['holds'] for row in rows)} of {len(rows)}", rows, out)


if __name__ == "__main__":
    typer.run(main)
