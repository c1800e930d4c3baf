"""What a mixture inside vLLM costs: python benchmarks/inside_vllm.py FOLDER OTHER

It runs in an environment of vLLM with softmeet-vllm. FOLDER is the checkpoint that vLLM runs, OTHER the member that is
mixed in. Milliseconds a token of the mixture, over the sum of those of vLLM's model, in the same engine by a request
that gives it all the weight, and of the other one in this process.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import JsonPath, Repeats, median, show

# New tokens of the shorter and of the longer of two runs, whose difference leaves prompts out.
SHORT, LONG = 4, 28
PROMPT = "def greatest(numbers):\n    "


def by_vllm(engine: Any, batch: int, weights: list[float], repeats: int) -> float:
    """Milliseconds of a step of vLLM's in which a batch gets a token each."""
    from vllm import SamplingParams

    taken = []
    for k in range(repeats):
        seconds = []
        for count in (SHORT, LONG):
            params = SamplingParams(
                temperature=0, max_tokens=count, ignore_eos=True, extra_args={"softmeet_weights": weights}
            )
            prompts = [f"# {k} {j}\n{PROMPT}" for j in range(batch)]
            start = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        taken.append(1000 * (seconds[1] - seconds[0]) / (LONG - SHORT))
    return median(taken)


def by_reader(member: str, batch: int, repeats: int) -> float:
    """Milliseconds of a step of a member's reader in which a batch gets a token each."""
    from softmeet import Ensemble
    from softmeet.readers.reader import Read, finished

    ensemble = Ensemble.from_pretrained([member], "logit-mean")
    (reader,) = ensemble.model.readers_of_members
    ids, taken = ensemble.tokenizer(PROMPT)["input_ids"], []
    with torch.inference_mode():
        rows = [reader.open() for _ in range(batch)]
        told = finished(reader.read([Read(row, ids, [len(ids)]) for row in rows])).logits()
        for _ in range(repeats * (LONG - SHORT)):
            start = time.perf_counter()
            asked = [Read(row, [int(token)], [1]) for row, token in zip(rows, told.argmax(-1), strict=True)]
            told = finished(reader.read(asked)).logits()
            taken.append(time.perf_counter() - start)
    for row in rows:
        reader.close(row)
    return 1000 * median(taken)


def main(
    folder: Annotated[Path, typer.Argument(help="The checkpoint that vLLM runs.")],
    other: Annotated[str, typer.Argument(help="The member that is mixed in.")],
    dtype: Annotated[str, typer.Option(help="In which vLLM runs.")] = "bfloat16",
    repeats: Repeats = 3,
    json: JsonPath = None,
) -> None:
    """Print a table."""
    os.environ |= {"SOFTMEET_MEMBERS": other, "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    engine = vllm.LLM(str(folder), dtype=dtype, max_model_len=256, block_size=32, max_num_seqs=8)
    rows = list[dict[str, Any]]()
    for batch in (1, 8):
        own, both = (by_vllm(engine, batch, weights, repeats) for weights in ([1.0, 0.0], [0.5, 0.5]))
        rows.append({"batch": batch, "vLLM's model, ms": own, "mixture, ms": both})
    engine.llm_engine.engine_core.shutdown()
    for row in rows:
        row["other, ms"] = by_reader(other, row["batch"], repeats)
        row["mixture over the sum"] = row["mixture, ms"] / (row["vLLM's model, ms"] + row["other, ms"])
        row["vllm"] = vllm.__version__
    show("a mixture inside vLLM", rows, json)


if __name__ == "__main__":
    typer.run(main)
