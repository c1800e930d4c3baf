"""The seconds that files, retrieval and both cost: python benchmarks/files_seconds.py MODELS PROJECT.

Each way writes on behind the first bytes of the same held-out files, greedily, in one process and in turns. A line that
differs stands before each prompt, so that nothing of it was read before.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from held_files import Project
from report import named, show
from softmeet import Ensemble, Files

Taken = tuple[float, float, list[int]]


def written(ensemble: Ensemble, text: str, tokens: int, speculate: Any) -> Taken:
    """Write on; return the seconds to the first token, those of each further one, and the tokens."""
    prompt, told = ensemble.tokenizer(text, return_tensors="pt"), dict[str, Any](do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    out = ensemble.model.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True, **told)
    first = time.perf_counter()
    length = out.sequences.shape[1]
    made = ensemble.model.generate(
        out.sequences, cache=out.cache, max_new_tokens=tokens, speculate=speculate, eos_token_id=None, **told
    )
    return first - start, (time.perf_counter() - first) / tokens, made[0, length:].tolist()


def main(
    models: Annotated[str, typer.Argument(help="A model; several with commas between are an average.")],
    project: Annotated[str, typer.Argument(help="A folder.")],
    include: Annotated[str | None, typer.Option(help="A glob of files.")] = None,
    held: Annotated[int, typer.Option(help="How many files are written on.")] = 6,
    prompt: Annotated[int, typer.Option(help="How many bytes of each are the prompt.")] = 1200,
    tokens: Annotated[int, typer.Option(help="How many tokens are written.")] = 64,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the rows with the command and the machine.")
    ] = None,
) -> None:
    """Print the seconds to the first token and the milliseconds of each further one, by way."""
    texts, names, loaded = Project.of(project, held, include, "file"), models.split(","), dict[Any, Any]()
    how: dict[str, Any] = {"rule": "logit-mean", "weights": [1] * len(names), "loaded": loaded}
    alone = Ensemble.from_pretrained(names, **how)
    files = Files(*map(str, texts.kept.files), name="files")
    beside = Ensemble.from_pretrained([*names, files], **how)
    salt, ways = count(), dict[str, list[Taken]]()
    for path in texts.held:
        text = path.read_bytes()[:prompt].decode(errors="ignore")
        chunks = texts.retrieved(path, text)
        for way, ensemble, before, speculate in (
            ("alone", alone, "", 0),
            ("with files", beside, "", 0),
            ("alone, drafts", alone, "", "auto"),
            ("with files, drafts", beside, "", "auto"),
            ("retrieval", alone, chunks, 0),
            ("both", beside, chunks, 0),
            ("both, drafts", beside, chunks, "auto"),
        ):
            if len(names) > 1 or way != "alone, drafts":
                taken = written(ensemble, f"# {next(salt)}\n{before}{text}", tokens, speculate)
                ways.setdefault(way, []).append(taken)
                print(f"{path.name}: {way} {taken[0]:.2f} s, {taken[1] * 1000:.0f} ms", flush=True)
    plain = {"with files, drafts": "with files", "both, drafts": "both"}
    rows = [
        {
            "models": named(models), "project": texts.name.rpartition("+")[2], "way": way, "files": len(taken),
            "seconds to the first token": median(one[0] for one in taken),
            "milliseconds a token": 1000 * median(one[1] for one in taken),
            "times plain": median(b[1] / a[1] for a, b in zip(ways[plain.get(way, "alone")], taken, strict=True)),
            "same text": sum(a[2] == b[2] for a, b in zip(ways[plain.get(way, way)], taken, strict=True)),
        }
        for way, taken in ways.items()
    ]  # fmt: skip
    show("What files cost", rows, json)


if __name__ == "__main__":
    typer.run(main)
