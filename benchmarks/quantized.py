"""Speed and memory of members in fewer bits, side by side: python benchmarks/quantized.py [--member PATH]

Each row runs in a process of its own, which loads one member and decodes greedily as an ensemble of that member alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from report import median, seconds, show
from softmeet import Ensemble
from softmeet.members.quantized import QUANTIZATIONS, stored

# torchao's kernel of four bits for CPUs takes minutes for a prompt in float32.
WAYS = ("dtype=float32", "dtype=bfloat16", *(
    f"quantization={kind}+dtype={dtype}"
    for kind in QUANTIZATIONS for dtype in ("float32", "bfloat16") if (kind, dtype) != ("int4", "float32")
))  # fmt: skip
BUNDLED = ["wide/gpt2", "wide/llama", "wide/neox"]


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, those of files that it has mapped, and the most that both were."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {
        name: int(value.split()[0]) / 1e3 for name, value in (line.split(":", 1) for line in lines if "kB" in line)
    }
    return {"own, MB": found["RssAnon"], "of the file, MB": found["RssFile"], "peak, MB": found["VmHWM"]}


@torch.inference_mode()
def measure(line: str, tokens: int, prompt: int, repeats: int) -> dict[str, float]:
    """Load a member, and return megabytes of weights and memory, and tokens a second at batch 1 and 8."""
    import transformers  # noqa: F401 - so that libraries do not count

    before = memory()
    model = Ensemble.from_pretrained([line], "logit-mean").model
    found = {"weights, MB": sum(part.nbytes for part in stored(model)) / 1e6}
    for batch in (1, 8):
        ids = torch.randint(100, 4_000, (batch, prompt), generator=torch.Generator().manual_seed(1))
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

        def run(new: int, given: torch.Tensor = ids, options: dict[str, Any] = options) -> None:
            model.generate(given, min_new_tokens=new, max_new_tokens=new, **options)

        # What the prompt takes is in both, so that the difference is of tokens alone.
        long, short = (median(seconds(partial(run, new), repeats)) for new in (tokens + 1, 1))
        found[f"tokens/s, batch {batch}"] = batch * tokens / (long - short)
    return found | {what: size - before[what] for what, size in memory().items()}


def row_of(member: str, way: str, options: list[str]) -> dict[str, Any]:
    """Measure one row in a process of its own; of a member that is refused, the reason is printed."""
    command = [sys.executable, __file__, "--one", f"{member.replace('+', '++')}+{way}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {
        "member": "/".join(Path(member).parts[-2:]),
        "as": way.replace("dtype=", "").replace("quantization=", "").replace("+", ", "),
    }
    if done.returncode:
        print(f"{row['member']} as {row['as']}: {done.stderr[done.stderr.rfind('softmeet.errors') :]}")
        return row | {"weights, MB": "refused"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | found


def main(
    member: Annotated[list[str] | None, typer.Option(help="Checkpoints in place of the bundled members.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are timed.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompts.")] = 32,
    repeats: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int, typer.Option()] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print one table; ratios are to float32."""
    torch.set_num_threads(threads)
    if one:
        print(json.dumps(measure(one, tokens, prompt, repeats)))
        return
    options = [f"--tokens={tokens}", f"--prompt={prompt}", f"--repeats={repeats}", f"--threads={threads}"]
    rows: list[dict[str, Any]] = []
    for name in member or BUNDLED:
        own = [row_of(name, way, options) for way in WAYS]
        for row in own:
            for batch in (1, 8) if "peak, MB" in row else ():
                key = f"tokens/s, batch {batch}"
                row[f"of float32's, {batch}"] = row[key] / own[0][key]
        rows += own
    show("members in fewer bits: decimal megabytes, beside the libraries' own", rows, json_)


if __name__ == "__main__":
    typer.run(main)
