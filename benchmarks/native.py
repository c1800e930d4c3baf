"""GGUF files run by llama.cpp: how fast, how exactly, and what a server tells of one.

Members of one tokenizer, or of several over bytes, stand against llama.cpp's own loop over each of them in the same
process, in turn; by --dequantised also against the same files under transformers.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from report import JsonPath, Models, commands, median, show
from softmeet import Ensemble
from softmeet.members.gguf_tokenizer import known_file
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.llama_context import LlamaContext, LlamaModel, RowTokens
from softmeet.readers.llama_cpp import LlamaReader
from softmeet.readers.reader import Read, Reader, finished
from softmeet.readers.remote import at

app = commands(__doc__)
Row = dict[str, Any]
Run = Callable[[], float]
Rounds = Annotated[int, typer.Option(help="Times that each is run, in turn.")]
Dequantised = Annotated[bool, typer.Option(help="Run the files under transformers, too.")]
PROMPT = "The library was built in the year in which the old bridge fell, and"
CODE = '"""Helpers for lists."""\n\n\ndef unique(items: list[int]) -> list[int]:\n    """Return'
SOURCES = Path(__file__).parents[1] / "src/softmeet"
# What is renamed in the first 60 lines of a file.
RENAMED = {"noise.py": "Noise", "engine/population.py": "Population", "engine/deferral.py": "Deferral"}


def own_loop(reader: Any, begun: Sequence[int], tokens: Sequence[int] | int, parts: int) -> Run:
    """Return what runs llama.cpp's own loop behind a prompt, and returns its seconds for each of so many parts.

    Args:
        reader: the member's.
        begun: the prompt's tokens, whose time is left out.
        tokens: those that follow, or how many, greedily.
        parts: the number by which seconds are divided.
    """
    context, given = LlamaContext(reader._model, 4096), None if isinstance(tokens, int) else tokens
    count = tokens if isinstance(tokens, int) else len(tokens)

    def run() -> float:
        context.cut(0, 0)
        told = context.run([RowTokens(0, 0, [*begun], [len(begun) - 1])])
        start = time.perf_counter()
        for k in range(count):
            token = int(told[0].argmax()) if given is None else given[k]
            told = context.run([RowTokens(0, len(begun) + k, [token], [0])])
        return (time.perf_counter() - start) / parts

    return run


def taken(ways: dict[Any, Run], rounds: int) -> dict[Any, float]:
    """Return the median of what each returns, all run in turn."""
    found: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
    return {way: median(own) for way, own in found.items()}


def edit(ensemble: Ensemble, file: str, word: str) -> str:
    """Return a prompt that asks for the first 60 lines of a file with a word in place of another."""
    source = "\n".join((SOURCES / file).read_text(encoding="utf-8").splitlines()[:60])
    asked = f"Write this file again with Crowd in place of {word}, and change nothing else.\n```python\n{source}\n```"
    told = ensemble.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    return f"{told}```python\n"


def writing(ensemble: Ensemble, tokens: int, prompt: str = PROMPT, **options: Any) -> Run:
    """Return what has an ensemble write behind a prompt, and returns its seconds a token, but the prompt's."""
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


def edited(ensemble: Ensemble, tokens: int) -> dict[str, Run]:
    """Return the editing of each file, by name."""
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


@app.command()
def speed(
    members: Models,
    tokens: Annotated[int, typer.Option(help="New tokens of each run.")] = 40,
    rounds: Rounds = 5,
    dequantised: Dequantised = False,
    edits: Annotated[bool, typer.Option(help="Have source files edited, too, in four times as many tokens.")] = False,
    busy: Annotated[int, typer.Option(help="Busy processes beside.")] = 0,
    json: JsonPath = None,
) -> None:
    """Time members of one tokenizer, as an ensemble and alone.

    --edits has them rename a word in source files, where an answer repeats its prompt.
    """
    before = time.perf_counter()
    ensemble = Ensemble.from_pretrained(members, "logit-mean")
    loaded = time.perf_counter() - before
    ids = ensemble.tokenizer(PROMPT)["input_ids"]
    ways = {
        f"{Path(name).stem}, llama.cpp's own loop": own_loop(model.reader, ids, tokens, tokens)
        for name, model in zip(members, ensemble.model.members, strict=True)
    }
    alone = list(ways)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 0.7}
    for what, prompt, how in (
        ("", PROMPT, {"do_sample": False}),
        ("drawn, ", PROMPT, drawn),
        ("code, ", CODE, {"do_sample": False}),
    ):
        ways[f"logit-mean, {what}plain"] = writing(ensemble, tokens, prompt, **how, speculate=0)
        ways[f"logit-mean, {what}by default"] = writing(ensemble, tokens, prompt, **how)
    ways |= edited(ensemble, 4 * tokens) if edits else {}
    mean = Ensemble.from_pretrained(members, "prob-mean", weights=[1] * len(members))
    ways["prob-mean, one member a token"] = writing(mean, tokens, do_sample=True, one_member=True)
    if dequantised:
        floats = Ensemble.from_pretrained([f"{name}+engine=transformers" for name in members], "logit-mean")
        ways["the same under transformers, float32, plain"] = writing(floats, tokens, do_sample=False, speculate=0)
    beside = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(busy)]
    for one in beside:
        one.start()
    taken(ways, 1)
    times = taken(ways, rounds)
    for one in beside:
        one.kill()
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


def log_probs(ensemble: Ensemble, ids: Tensor) -> list[Float[Tensor, "t v"]]:
    """Return what each member predicts behind each token but the last, and what their logit mean does."""
    with torch.inference_mode():
        own = [member(ids).logits[0, :-1].float().log_softmax(-1) for member in ensemble.model.members]
    v = min(one.shape[1] for one in own)
    own = [one[:, :v] for one in own]
    return [*own, torch.stack(own).mean(0).log_softmax(-1)]


@app.command()
def bits(
    members: Models,
    texts: Annotated[Path, typer.Argument(help="What benchmarks/recent_texts.py has written.")],
    tokens: Annotated[int, typer.Option(help="Of each document, at most.")] = 256,
    documents: Annotated[int, typer.Option(help="How many, at most.")] = 24,
    json: JsonPath = None,
) -> None:
    """Measure what llama.cpp's arithmetic changes: bits a byte of documents, and how far predictions are apart.

    Files of one tokenizer, and their uniform logit mean, are run by llama.cpp, and by transformers, dequantised to
    single precision.
    """
    native, floats = (
        Ensemble.from_pretrained([f"{name}+engine={one}" for name in members], "logit-mean", weights=[1] * len(members))
        for one in ("llama.cpp", "transformers")
    )
    paths = sorted(texts.glob("*/*.txt"))
    chosen = paths[:: max(1, len(paths) // documents)][:documents]
    who = [*(Path(name).stem for name in members), "logit-mean"]
    count, size = 0, 0
    nats, apart = torch.zeros(2, len(who), dtype=torch.float64), torch.zeros(len(who), dtype=torch.float64)
    for path in track(chosen, "reading"):
        ids = native.tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :tokens]
        found, drawn = [log_probs(own, ids) for own in (native, floats)], ids[0, 1:, None]
        for k, (ours, theirs) in enumerate(zip(*found, strict=True)):
            v = min(ours.shape[1], theirs.shape[1])
            apart[k] += (ours[:, :v].exp() - theirs[:, :v].exp()).abs().sum().item() / 2
            for way, own in enumerate((ours, theirs)):
                nats[way, k] -= own.gather(1, drawn).double().sum()
        count += len(drawn)
        size += len(native.tokenizer.decode(ids[0, 1:]).encode())
    nats = nats / math.log(2) / size
    rows: list[Row] = [
        {
            "what": name, "llama.cpp, bits a byte": nats[0, k].item(), "dequantised": nats[1, k].item(),
            "more, %": 100 * (nats[0, k] / nats[1, k] - 1).item(), "total variation": apart[k].item() / count,
        }
        for k, name in enumerate(who)
    ]  # fmt: skip
    show(f"{count:,} tokens of {len(chosen)} documents", rows, json)


def _texts(ensemble: Ensemble, size: int) -> dict[str, bytes]:
    """Return a text that the ensemble writes, greedily, and some code of this repository."""
    parts = ensemble.stream(PROMPT, max_bytes=size, min_new_tokens=size, do_sample=False, speculate=0)
    code = Path(__file__).with_name("recent_texts.py").read_text(encoding="utf-8")
    return {"they write": "".join(parts).encode(), "unknown code": code.encode()[-size:]}


def by_bytes(member: ByteMember, text: bytes) -> Run:
    """Return what reads a text byte by byte, and returns its seconds a byte."""

    def run() -> float:
        reading = member.begin(PROMPT.encode())
        start = time.perf_counter()
        for byte in text:
            member.log_probs([reading])
            (reading,) = member.advance([reading], [byte])
        return (time.perf_counter() - start) / len(text)

    return run


@app.command("bytes")
def over_bytes(
    members: Models,
    size: Annotated[int, typer.Option(help="Bytes of each text.")] = 300,
    rounds: Rounds = 5,
    dequantised: Dequantised = False,
    json: JsonPath = None,
) -> None:
    """Time files of different tokenizers over bytes.

    A text is read byte by byte, as an ensemble reads what it writes: one that the members write themselves, which they
    know, and code that none of them does. Beside it is llama.cpp's own loop over the members' own tokens.
    """
    start = time.perf_counter()
    ensemble = Ensemble.from_pretrained(members, "logit-mean")
    loaded = time.perf_counter() - start
    ways: dict[tuple[str, str, str], Run] = {}
    floats = [f"{name}+engine=transformers" for name in members]
    others = Ensemble.from_pretrained(floats, "logit-mean") if dequantised else None
    for kind, text in _texts(ensemble, size).items():
        for k, name in enumerate(Path(name).stem for name in members):
            member, model = ensemble.model.readers[k], ensemble.model.members[k]
            begun, tokens = ([*map(int, member.spelling.encode(own))] for own in (PROMPT.encode(), text))
            ways[kind, name, "own"] = own_loop(model.reader, [*member.prefix, *begun], tokens, len(text))
            ways[kind, name, "bytes"] = by_bytes(member, text)
            if others is not None:
                ways[kind, name, "float32"] = by_bytes(others.model.readers[k], text)
    each = {way: 1000 * own for way, own in taken(ways, rounds).items()}
    rows = list[Row]()
    for kind in dict.fromkeys(kind for kind, _, _ in each):
        names = [Path(name).stem for name in members]
        for name, parts in [*((own, [own]) for own in names), ("both", names)]:
            own, ours, theirs = (
                sum(each.get((kind, part, how), 0.0) for part in parts) for how in ("own", "bytes", "float32")
            )
            rows.append({
                "text": kind, "what": name, "own tokens, ms a byte": own, "ms a byte": ours, "over its own": ours / own,
                "under transformers": theirs or None, "times faster": theirs / ours or None,
            })  # fmt: skip
    show(f"{len(members)} GGUF files over bytes by llama.cpp, batch 1", rows, json, **{"loaded in, s": loaded})


WRITTEN = [
    "the king", " a  b   c", "\n\n\nx", "\t\ttab", "12345 67", "they'll", "THEY'LL", "don't", "é日本語🙂", "</s>",
    "<|endoftext|>", "<eos>", "a" * 50, " " * 50, "x = [1,2,3]\n    return x", "1.5e-3", "\u200b", "e\u0301",
    "\r\n\r\n", "\u00a0\u3000", "㐀㐁 㐂", "\ufb01 \ufb02", "Ωμέγα", "привет мир", '{"a": 1}', "https://x.y/z?q=1",
    "\u2019s \u2018t", "A.B.C.", "١٢٣", "🙂🙂🙂",
]  # fmt: skip
LETTERS = list("ab cd\n\t12.,'\"é日🙂\u00a0~<>|/")


@app.command()
def cuts(
    files: Annotated[list[Path], typer.Argument(help="GGUF files.")],
    count: Annotated[int, typer.Option(help="How many texts.")] = 200,
    json: JsonPath = None,
) -> None:
    """Count hostile texts that a file's tokenizer, as transformers reads it, cuts as llama.cpp does."""
    chooser = random.Random(0)  # noqa: S311
    drawn = ["".join(chooser.choices(LETTERS, k=chooser.randrange(1, 40))) for _ in range(count - len(WRITTEN))]
    rows = list[Row]()
    for path in files:
        file, tokenizer = known_file(path, path.name)
        model = LlamaModel(file, path.name)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        other = [text for text in (*WRITTEN, *drawn) if tokenizer.encode(text, **options) != model.tokens(text)]
        rows.append({
            "file": path.name, "split as": file.said.get("tokenizer.ggml.pre"), "texts": count,
            "equal": count - len(other),
            "others": " ".join(repr(text)[1:25].strip() for text in other[:3]),
        })  # fmt: skip
    show("Texts that are cut as llama.cpp cuts them", rows, json)


# Log-probabilities may differ so far where a file is read in other calls, by whichever build of the library.
ROUNDING = 0.5


def told(reader: Reader, text: list[int]) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Return log-probabilities behind each token, read one by one, bounds of those that are not told, and seconds."""
    row, start = reader.open(), time.perf_counter()
    found = [finished(reader.read([Read(row, [token], [1])])) for token in text]
    taken = time.perf_counter() - start
    reader.close(row)
    most = [one.bounds() for one in found]
    bounds = None if most[0] is None else torch.cat([one for one in most if one is not None])
    return torch.cat([one.log_probs() for one in found]).double(), bounds, taken


@app.command()
def remote(
    url: Annotated[str, typer.Argument(help="The server's address.")],
    member: Annotated[str, typer.Argument(help="The GGUF file that it serves.")],
    text: Annotated[Path, typer.Option(help="A file, of which the beginning is read.")] = Path("docs/theory/index.md"),
    tokens: Annotated[int, typer.Option(help="How many tokens are read.")] = 64,
    json: JsonPath = None,
) -> None:
    """Compare what a server tells of a model with the same file here.

    A text is read token by token, by the server's k likeliest tokens and by llama.cpp in this process: the total
    variation between what is taken for the distribution and the whole one, what is dropped, and whether bounds hold.
    """
    native = LlamaReader(member)
    read = native.alphabet.encode(text.read_text(encoding="utf-8"))[:tokens]
    exact, _, alone = told(native, read)
    rows = list[Row]()
    for top in ("20", "100", "all"):
        found, bounds, taken = told(at(url, member, top), read)
        apart = (found.exp() - exact.exp()).abs().sum(-1) / 2
        others = exact.masked_fill(~found.isneginf(), -torch.inf).amax(-1)
        broken = 0 if bounds is None else int((others > bounds + ROUNDING).sum())
        unseen = exact.exp().masked_fill(~found.isneginf(), 0).sum(-1)
        rows.append(
            {
                "told": top, "TV, mean": apart.mean().item(), "TV, largest": apart.max().item(),
                "not told, mean": unseen.mean().item(), "bounds broken": broken, "places": len(read),
                "ms a token": 1000 * taken / len(read), "ms a token here": 1000 * alone / len(read),
            }
        )  # fmt: skip
    show("a model behind llama.cpp's server beside its file here", rows, json, tokens=tokens)


if __name__ == "__main__":
    app()
