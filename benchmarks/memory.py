"""What memory an ensemble takes: as it is, as it was planned, in fewer bits; every figure by a process of its own."""

from __future__ import annotations

import gc
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from report import JsonPath, Members, Repeats, apart, commands, median, seconds, show
from softmeet import Ensemble
from softmeet.errors import SoftmeetError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.plan import plan as planned_memory
from softmeet.members.quantized import QUANTIZATIONS, stored

app = commands(__doc__)
Row = dict[str, Any]
# Logits of about this standard deviation give a few nats of entropy over 50,257 tokens.
_SHARPNESS = 3.6


def save_pair(folder: Path, shared: float = 0.97) -> list[str]:
    """Write two checkpoints of GPT-2 small's shape with random parameters, which have this correlation.

    So their predictions are near, too.
    """
    torch.manual_seed(0)
    first, second = GPT2LMHeadModel(GPT2Config()), GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            if a.ndim > 1:
                b.mul_((1 - shared**2) ** 0.5).add_(a, alpha=shared)
        for model in (first, second):
            scale = _SHARPNESS / (model.lm_head.weight.std() * model.config.n_embd**0.5)
            model.transformer.ln_f.weight.fill_(float(scale))
    names = [str(folder / name) for name in ("a", "b")]
    for name, model in zip(names, (first, second), strict=True):
        model.save_pretrained(name)
    return names


def load_pair(names: list[str]) -> list[PreTrainedModel]:
    """Return the models, in evaluation mode."""
    return [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in names]


def ensemble_of(names: list[str], models: list[PreTrainedModel], rule: str, trust: float = 0.3) -> EnsembleForCausalLM:
    """Return the two as one causal LM; they have no tokenizer, since every row of their heads is a token."""
    config = EnsembleConfig(members=names, rule=rule, trust=[trust] * len(names))
    model: EnsembleForCausalLM = EnsembleForCausalLM(config, models).eval()
    return model


def kilobytes() -> dict[str, int]:
    """Return the operating system's figures for this process, in units of 1,024 bytes, by name."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines if "kB" in line)}


def _generated(model: Any, batch: int, length: int, tokens: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **how)


WAYS = ("members alone", "logit-mean", "meet")


@torch.inference_mode()
def decoded(names: list[str], way: str, batch: int, tokens: int) -> float:
    """Return the peak of this process's resident MiB, after loading both members and decoding by one way."""
    torch.set_num_threads(2)
    models = load_pair(names)
    for model in models if way == WAYS[0] else [ensemble_of(names, models, way)]:
        _generated(model, batch, 32, tokens)
    return kilobytes()["VmHWM"] / 2**10


@app.command()
def peak(
    batch: Annotated[int, typer.Option()] = 1,
    tokens: Annotated[int, typer.Option()] = 4,
    json: JsonPath = None,
) -> None:
    """Measure the peak of an ensemble beside that of its members alone, by the operating system's figure."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as place:
        names = save_pair(Path(place))
        rows: list[Row] = [{"what": way, "peak, MiB": apart(decoded, names, way, batch, tokens)} for way in WAYS]
    for row in rows:
        row["over the members"] = row["peak, MiB"] / rows[0]["peak, MiB"]
    show(f"peak resident memory, two members of GPT-2 small's shape, batch {batch}", rows, json)


class Peak(threading.Thread):
    """Follows this process's own memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        """Look every 20 milliseconds."""
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, resident())

    def stop(self) -> int:
        """Return the most that was seen."""
        self._over.set()
        self.join()
        return max(self.bytes, resident())


def resident() -> int:
    """Return the bytes that belong to this process alone."""
    return int(psutil.Process().memory_full_info().uss)


def taken(folder: Path, places: tuple[str, str], batch: int, context: int) -> tuple[int, int]:
    """Return bytes once every weight was used, and the most while they decode, over the same with tiny members."""
    torch.set_num_threads(1)
    _taken([folder / "tiny", folder / "tiny"], places, 1, 24)
    before = resident()
    loaded, most = _taken([folder / "a", folder / "b"], places, batch, context)
    return loaded - before, most - before


@torch.inference_mode()
def _taken(folders: list[Path], places: tuple[str, str], batch: int, context: int) -> tuple[int, int]:
    models = [
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, **({"device_map": {"": "disk"}} if place == "disk" else {})
        ).eval()
        for path, place in zip(folders, places, strict=True)
    ]
    # Weights are mapped into memory when they are first used.
    for member in models:
        member(input_ids=torch.ones(1, 1, dtype=torch.int64))
    gc.collect()
    loaded, model, seen = resident(), ensemble_of([str(path) for path in folders], models, "meet"), Peak()
    seen.start()
    _generated(model, batch, context - 4, 4)
    return loaded, seen.stop()


@app.command()
def plan(
    batch: Annotated[int, typer.Option()] = 4,
    context: Annotated[int, typer.Option()] = 256,
    json: JsonPath = None,
) -> None:
    """Set the memory plan beside what processes take, with members in memory or the second on disk.

    What a process takes is its own memory (unique set size) over what it took for the same with tiny members, so that
    libraries do not count. They decode by `meet`.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        names = save_pair(place)
        small = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(small).save_pretrained(place / "tiny")
        for way, places in (("in memory", ("cpu", "cpu")), ("the second on disk", ("cpu", "disk"))):
            loaded, most = (x / 2**20 for x in apart(taken, place, places, batch, context))
            planned = planned_memory(names, device=list(places), batch=batch, context=context)
            held = [part for part in planned.parts if part.device == "cpu" and part.what in ("body", "head")]
            total = planned.totals()["cpu"] / 2**20
            rows.append({
                "members": way, "weights in memory, planned, MiB": sum(part.bytes for part in held) / 2**20,
                "measured": loaded, "in all, planned": total, "measured at most": most, "of it planned": total / most,
                "on disk, planned": planned.totals().get("disk", 0) / 2**20,
            })  # fmt: skip
    show(f"two members of GPT-2 small's shape, meet, {batch} sequences of {context} tokens", rows, json)


# torchao's kernel of four bits for CPUs takes minutes for a prompt in float32.
LOADED = ("dtype=float32", "dtype=bfloat16", *(
    f"quantization={kind}+dtype={dtype}"
    for kind in QUANTIZATIONS for dtype in ("float32", "bfloat16") if (kind, dtype) != ("int4", "float32")
))  # fmt: skip


@torch.inference_mode()
def measured(line: str, tokens: int, prompt: int, repeats: int, threads: int) -> dict[str, float] | str:
    """Load a member; return megabytes of weights and memory, and tokens a second at batch 1 and 8, or the refusal."""
    import transformers  # noqa: F401 - so that libraries do not count

    torch.set_num_threads(threads)
    before = kilobytes()
    try:
        model = Ensemble.from_pretrained([line], "logit-mean").model
    except SoftmeetError as error:
        return str(error)
    found = {"weights, MB": sum(part.nbytes for part in stored(model)) / 1e6}
    for batch in (1, 8):
        ids = torch.randint(100, 4_000, (batch, prompt), generator=torch.Generator().manual_seed(1))
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

        def run(new: int, given: torch.Tensor = ids, options: dict[str, Any] = options) -> None:
            model.generate(given, min_new_tokens=new, max_new_tokens=new, **options)

        # What the prompt takes is in both, so that the difference is of tokens alone.
        long, short = (median(seconds(partial(run, new), repeats)) for new in (tokens + 1, 1))
        found[f"tokens/s, batch {batch}"] = batch * tokens / (long - short)
    for what, name in (("own, MB", "RssAnon"), ("of the file, MB", "RssFile"), ("peak, MB", "VmHWM")):
        found[what] = (kilobytes()[name] - before[name]) / 1e3
    return found


@app.command()
def quantized(
    member: Members = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are timed.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompts.")] = 32,
    repeats: Repeats = 3,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    json: JsonPath = None,
) -> None:
    """Measure speed and memory of members in fewer bits, side by side; ratios are to float32.

    Each row is a process, which loads one member and decodes greedily as an ensemble of that member alone.
    """
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for name in member or ["wide/gpt2", "wide/llama", "wide/neox"]:
        own: list[Row] = []
        for way in LOADED:
            found = apart(measured, f"{name.replace('+', '++')}+{way}", tokens, prompt, repeats, threads)
            kind = way.replace("dtype=", "").replace("quantization=", "").replace("+", ", ")
            own.append({"member": "/".join(Path(name).parts[-2:]), "as": kind})
            if isinstance(found, str):
                print(f"{own[-1]['member']} as {kind}: {found}")
            own[-1] |= {"weights, MB": "refused"} if isinstance(found, str) else found
            for batch in (1, 8) if "peak, MB" in own[-1] else ():
                key = f"tokens/s, batch {batch}"
                own[-1][f"of float32's, {batch}"] = own[-1][key] / own[0][key]
        rows += own
    show("members in fewer bits: decimal megabytes, beside the libraries' own", rows, json)


if __name__ == "__main__":
    app()
