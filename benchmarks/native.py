"""GGUF files run by llama.cpp: python benchmarks/native.py -m QWEN05 -m QWEN15

Members of one tokenizer as an ensemble, against llama.cpp's own loop over each of them in the same process, in turn; by
`--dequantised`, against the same files under transformers, too. `--edits` has them rename a word in source files,
where an answer repeats its prompt. `--busy 2` runs everything beside so many busy processes.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer

from report import show
from softmeet import Ensemble
from softmeet.readers.llama_context import LlamaContext, RowTokens

PROMPT = "The library was built in the year in which the old bridge fell, and"
CODE = '"""Helpers for lists."""\n\n\ndef unique(items: list[int]) -> list[int]:\n    """Return'
SOURCES = Path(__file__).parents[1] / "src/softmeet"
# What is renamed in the first 60 lines of a file.
RENAMED = {"noise.py": "Noise", "engine/population.py": "Population", "engine/deferral.py": "Deferral"}


def own_loop(reader: Any, ids: list[int], tokens: int) -> Callable[[], float]:
    """What runs llama.cpp's own loop over one member, greedily, and returns its seconds a token."""
    context = LlamaContext(reader._model, 4096)

    def run() -> float:
        context.cut(0, 0)
        told = context.run([RowTokens(0, 0, ids, [len(ids) - 1])])
        start = time.perf_counter()
        for k in range(tokens):
            told = context.run([RowTokens(0, len(ids) + k, [int(told[0].argmax())], [0])])
        return (time.perf_counter() - start) / tokens

    return run


def edit(ensemble: Ensemble, file: str, word: str) -> str:
    """A prompt that asks for the first 60 lines of a file with a word in place of another."""
    source = "\n".join((SOURCES / file).read_text(encoding="utf-8").splitlines()[:60])
    asked = f"Write this file again with Crowd in place of {word}, and change nothing else.\n```python\n{source}\n```"
    told = ensemble.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    return f"{told}```python\n"


def writing(ensemble: Ensemble, tokens: int, prompt: str = PROMPT, **options: Any) -> Callable[[], float]:
    """What has an ensemble write behind a prompt, and returns its seconds a token without those of the prompt."""
    ends: dict[str, Any] = {} if "one_member" in options else {"eos_token_id": None}
    text = prompt

    def run() -> float:
        prompt, ticks = ensemble.tokenizer(text, return_tensors="pt"), [time.perf_counter()]
        for _ in ensemble.stream(text, max_new_tokens=2, **options):
            pass
        ticks.append(time.perf_counter())
        made = ensemble.model.generate(**prompt, max_new_tokens=2 + tokens, top_k=0, **ends, **options)
        ticks.append(time.perf_counter())
        count = int(made.shape[1]) - prompt["input_ids"].shape[1]
        return (ticks[2] - ticks[1] - (ticks[1] - ticks[0])) / max(1.0, float(count) - 2)

    return run


def edited(ensemble: Ensemble, tokens: int) -> dict[str, Callable[[], float]]:
    """Editing of each file, by name."""
    return {
        f"logit-mean, {Path(file).name} edited, {way}": writing(
            ensemble, tokens, edit(ensemble, file, word), do_sample=False, **how
        )
        for file, word in RENAMED.items()
        for way, how in (("plain", {"speculate": 0}), ("by default", {}))
    }


def spin() -> None:
    """Be busy."""
    while True:
        pass


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="GGUF files of one tokenizer.")],
    tokens: Annotated[int, typer.Option(help="New tokens of each run.")] = 40,
    rounds: Annotated[int, typer.Option(help="Times that each is run, in turn.")] = 5,
    dequantised: Annotated[bool, typer.Option(help="Run the files under transformers, too.")] = False,
    edits: Annotated[bool, typer.Option(help="Have source files edited, too, in four times as many tokens.")] = False,
    busy: Annotated[int, typer.Option(help="Busy processes beside.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    before = time.perf_counter()
    ensemble = Ensemble.from_pretrained(members, "logit-mean")
    loaded = time.perf_counter() - before
    ids = ensemble.tokenizer(PROMPT)["input_ids"]
    ways = {
        f"{Path(name).stem}, llama.cpp's own loop": own_loop(model.reader, ids, tokens)
        for name, model in zip(members, ensemble.model.members, strict=True)
    }
    alone = list(ways)
    ways |= {
        "logit-mean, plain": writing(ensemble, tokens, do_sample=False, speculate=0),
        "logit-mean, by default": writing(ensemble, tokens, do_sample=False),
        "logit-mean, drawn, plain": writing(ensemble, tokens, do_sample=True, temperature=0.7, speculate=0),
        "logit-mean, drawn, by default": writing(ensemble, tokens, do_sample=True, temperature=0.7),
        "logit-mean, code, plain": writing(ensemble, tokens, CODE, do_sample=False, speculate=0),
        "logit-mean, code, by default": writing(ensemble, tokens, CODE, do_sample=False),
    }
    ways |= edited(ensemble, 4 * tokens) if edits else {}
    mean = Ensemble.from_pretrained(members, "prob-mean", weights=[1] * len(members))
    ways["prob-mean, one member a token"] = writing(mean, tokens, do_sample=True, one_member=True)
    if dequantised:
        floats = Ensemble.from_pretrained([f"{name}+engine=transformers" for name in members], "logit-mean")
        ways["the same under transformers, float32, plain"] = writing(floats, tokens, do_sample=False, speculate=0)
    beside = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(busy)]
    for one in beside:
        one.start()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(run())
    for one in beside:
        one.kill()
    times = {name: median(own) for name, own in seconds.items()}
    together = sum(times[name] for name in alone)
    rows = [
        {
            "what": name, "ms a token": 1000 * own, "tokens/s": 1 / own,
            "of the members' own speed": None if name in alone else together / own,
            "of the largest member's": None if name in alone else max(times[one] for one in alone) / own,
            "over plain": times[name.replace("by default", "plain")] / own if "by default" in name else None,
        }
        for name, own in times.items()
    ]  # fmt: skip
    info, size = psutil.Process().memory_full_info(), sum(Path(name).stat().st_size for name in members)
    facts = {
        "loaded in, s": loaded, "resident, MB": info.rss / 1e6, "files, MB": size / 1e6, "busy processes": busy,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    show(f"{len(members)} GGUF files by llama.cpp, batch 1, {busy} busy processes beside", rows, json, **facts)
    print(facts)


if __name__ == "__main__":
    typer.run(main)
