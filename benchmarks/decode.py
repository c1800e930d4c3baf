"""What a token costs: of `meet`, by calls and draws, behind prompts, over bytes, and where it depends on no others."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import count as numbers
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import softmeet
from memory import ensemble_of, load_pair, save_pair
from report import JsonPath, Models, Repeats, Texts, Threads, commands, median, named, now, seconds, show
from servers import PROMPTS
from softmeet import Ensemble, Member, Passage
from softmeet.engine import ask, combine
from softmeet.engine.draw import Noise, choose
from softmeet.engine.recorder import Recorder
from softmeet.evaluation.documents import read_documents
from softmeet.hf import EnsembleConfig, modeling
from softmeet.members import zoo
from softmeet.simplex import entropy, kl, total_variation
from softmeet.solvers import dense

app = commands(__doc__)
Row = dict[str, Any]
Family = Annotated[str, typer.Option(help="A bundled family.")]
RULES = ("logit-mean", "prob-mean", "meet")


class Clock:
    """Sums the seconds spent in functions of modules and classes."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._watched = set[tuple[Any, str]]()

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Replace ``owner.name`` by itself with its time added up, once."""
        if (owner, name) in self._watched:
            return
        self._watched.add((owner, name))
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[label] += now() - start

        setattr(owner, name, timed)


@torch.inference_mode()
def run(
    model: modeling.EnsembleForCausalLM, rules: list[str], ids: torch.Tensor, tokens: int, repeats: int, clock: Clock
) -> list[Row]:
    """Decode greedily by every rule in turn, several times; medians, also of each turn's ratios to the first rule."""
    options: dict[str, Any] = {
        "do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0, "speculate": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    settings = {rule: model.settings.changed(rule=rule) for rule in rules}
    rows: dict[str, list[Row]] = {rule: [] for rule in rules}
    for own in settings.values():
        model.generate(ids, settings=own, **options | {"min_new_tokens": 2, "max_new_tokens": 2})
    for _ in range(repeats):
        for rule, own in settings.items():
            clock.spent.clear()
            recorder, start = Recorder(), now()
            model.generate(ids, settings=own, recorder=recorder, **options)
            rate, spent = len(ids) * tokens / (now() - start), {k: 1e3 * s / tokens for k, s in clock.spent.items()}
            rows[rule].append({
                "tokens/s": rate, "passes": recorder.passes / recorder.rows,
                "unsolved": recorder.statuses["NOT_CONVERGED"], "members, ms a step": spent["members"],
                "heads and rule, ms a step": spent["rows"], "of it directions, ms": spent.get("directions", 0.0),
                "coefficients": spent.get("coefficients", 0.0), "bounds": spent.get("bounds", 0.0),
                "of logit-mean's": rate / (rows[rules[0]][-1]["tokens/s"] if rule != rules[0] else rate),
            })  # fmt: skip
    return [
        {"batch": len(ids), "rule": rule} | {key: median([row[key] for row in found]) for key in found[0]}
        for rule, found in rows.items()
    ]


@torch.inference_mode()
def distance(model: modeling.EnsembleForCausalLM, rules: list[str], count: int = 16) -> dict[str, float]:
    """Return each rule's mean total variation to `meet` at a small tolerance, at some random prefixes."""
    ids = torch.randint(0, model.config.vocab_size, (count, 32), generator=torch.Generator().manual_seed(2))
    states = list(map(torch.cat, zip(*([h[-1:] for h in model.hidden_states(row[None])] for row in ids), strict=True)))
    _, exact = model.combiner.solve_rows(states, model.settings.changed(rule="meet", tol=1e-6, gate=None))
    found = {}
    for rule in rules:
        _, solution = model.combiner.solve_rows(states, model.settings.changed(rule=rule, gate=None), proved=False)
        found[rule] = total_variation(solution.log_probs.double(), exact.log_probs.double()).mean().item()
    return found


@app.command()
def meet(
    tokens: Annotated[int, typer.Option(help="To generate in each run.")] = 16,
    repeats: Repeats = 5,
    batches: Annotated[str, typer.Option()] = "1,8",
    rule: Annotated[list[str] | None, typer.Option(help="Beside logit-mean; may be repeated.")] = None,
    trust: Annotated[float, typer.Option()] = 0.3,
    threads: Threads = 1,
    shared: Annotated[float, typer.Option(help="Correlation of the members' parameters.")] = 0.97,
    json: JsonPath = None,
) -> None:
    """Time tokens of `meet` beside `logit-mean`, and say how near they come.

    Two members of GPT-2 small's shape with random weights, correlated and scaled to realistic entropies.
    """
    clock, rows = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        names = save_pair(Path(folder), shared)
        model = ensemble_of(names, load_pair(names), "meet", trust)
    clock.watch(ask.Members, "read_on", "members")
    clock.watch(combine.Combiner, "solve_rows", "rows")
    clock.watch(dense, "direction", "directions")
    clock.watch(dense, "_least", "coefficients")
    clock.watch(dense.DenseNewton, "_floor", "bounds")
    rules = ["logit-mean", *(rule or ["meet", "meet:budget=2"])]
    far = distance(model, rules)
    generator = torch.Generator().manual_seed(1)
    for batch in (int(x) for x in batches.split(",")):
        ids = torch.randint(0, model.config.vocab_size, (batch, 32), generator=generator)
        found = run(model, rules, ids, tokens, repeats, clock)
        rows += [row | {"TV to meet": far[row["rule"]]} for row in found]
    with torch.inference_mode():
        states = [h[-1:] for h in model.hidden_states(ids[:1])]
        log_p, _ = model.combiner.solve_rows(states, model.settings.changed(rule="logit-mean"))
    nats = [*entropy(log_p)[:, 0].tolist(), kl(log_p[0], log_p[1]).item()]
    facts = "entropies {:.1f} and {:.1f} nats, KL {:.2f}".format(*nats)
    show(f"decoding, two members of GPT-2 small's shape, trust {trust:g}; {facts}", rows, json)


def counted(ensemble: Ensemble, tokens: int) -> Counter[str]:
    """Return calls by function while so many tokens are generated."""
    found, folder = Counter[str](), str(Path(softmeet.__file__).parent)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            found[f"{code.co_filename.removeprefix(folder)}:{code.co_qualname}"] += 1

    sys.setprofile(note)
    try:
        ensemble.generate("And the king said", max_new_tokens=tokens, do_sample=False, speculate=0)
    finally:
        sys.setprofile(None)
    return found


def calls_a_token(family: str, rule: str) -> dict[str, float]:
    """Return calls a token of each function, the most frequent first."""
    ensemble = Ensemble.from_pretrained(family, rule, weights=[1] * len(zoo.expand(family)))
    counted(ensemble, 2)  # what is made once is made
    one, six = counted(ensemble, 1), counted(ensemble, 6)
    six.subtract(one)
    return {name: count / 5 for name, count in six.most_common() if count}


@app.command()
def calls(
    rules: Annotated[list[str] | None, typer.Option("--rule", help="Repeat it.")] = None,
    family: Family = "narrow",
    functions: Annotated[int, typer.Option(help="List so many functions of each rule.")] = 0,
    json: JsonPath = None,
) -> None:
    """Count calls of softmeet's own functions a token, by rule, greedily: how long a token's path is.

    A generation of six tokens less one of one, over five. Counted are calls of Python functions in softmeet's files,
    each comprehension and each turn of a generator expression included; compiled loops are not, nor what torch and
    transformers call. The number does not depend on the machine.
    """
    torch.set_num_threads(1)
    rows = []
    for rule in rules or RULES:
        found = calls_a_token(family, rule)
        files = {name.partition(":")[0] for name in found}
        rows.append({"rule": rule, "calls a token": sum(found.values()), "functions": len(found), "files": len(files)})
        for name, count in list(found.items())[:functions]:
            typer.echo(f"{count:7.1f}  {name}")
    show(f"calls of own functions a token, {family} family, greedy", rows, json)


@app.command()
def draws(threads: Threads = 1, repeats: Repeats = 41, json: JsonPath = None) -> None:
    """Time the draw of a token by noise, as every road draws, and by torch.multinomial, as transformers does.

    Both get scores, of one sequence or of eight, over the vocabulary of GPT-2 or of Qwen2.5, and return tokens.
    """
    rows, position = [], numbers()
    for v in (50_257, 151_936):
        for batch in (1, 8):
            scores, noise = 3 * torch.randn(batch, v), Noise.unseeded(batch)

            def by_noise(scores: torch.Tensor = scores, noise: Noise = noise) -> None:
                choose(scores, noise.at(next(position)))

            def by_torch(scores: torch.Tensor = scores) -> None:
                torch.multinomial(scores.softmax(-1), num_samples=1)

            own, other = (1000 * median(seconds(draw, repeats)) for draw in (by_noise, by_torch))
            row = {"tokens": v, "batch": batch, "noise": own, "torch.multinomial": other}
            rows.append({**row, "ratio": other / own})
    show("Milliseconds of a draw", rows, json)


_TEXT = "def fibonacci(n):\n    "
_WORDS = "The function returns what the caller asked for, and nothing else, in the order that was given. "


def _made(folder: str) -> str:
    """Write a model of GPT-2 small's shape with random weights, and return its folder."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.locate("wide/gpt2")).save_pretrained(folder)
    return folder


def _behind(ensemble: Ensemble, member: str, prompts: list[str]) -> Ensemble:
    """Return the ensemble's model once behind each prompt."""
    names = [Member(member, prompt=prompt) for prompt in prompts]
    config = EnsembleConfig(names, rule="logit-mean", vocabulary="tokens")
    return Ensemble(ensemble.model.part([0] * len(prompts), config), ensemble.tokenizer)


def _continued(ensemble: Ensemble, tokens: int) -> float:
    """Return the seconds that it takes to continue the text by so many tokens."""
    start = now()
    ensemble.generate(_TEXT, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, speculate=0)
    return now() - start


def _resident() -> float:
    """Return the process's resident memory in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def _told(model: str, what: str, own: list[float], one: list[float] | None = None) -> Row:
    """Return a line of the table: the median, and that of the ratios to measurements beside."""
    ratio = None if one is None else median(a / b for a, b in zip(own, one, strict=True))
    return {"model": model, "what": what, "ms": 1000 * median(own), "times the one": ratio}


@app.command()
def contexts(
    member: Annotated[str | None, typer.Option("--member", "-m", help="A hub id or folder.")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of prompts.")] = "1,4,10",
    words: Annotated[int, typer.Option(help="Repeat a sentence so often in each prompt and passage.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a measurement.")] = 32,
    repeats: Repeats = 5,
    threads: Threads = 2,
    json: JsonPath = None,
) -> None:
    """Time one model behind several prompts, which are rows of one batch, and behind passages.

    Steps of generation by one member, and by as many members as there are prompts; then one prompt of ten passages
    beside ten members behind a passage each. All are timed in turn, so that ratios hold on a busy machine, too. Without
    -m the member has GPT-2 small's shape and random weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        name, model = member or _made(folder), named(member) if member else "GPT-2 small's shape"
        alone = Ensemble.from_pretrained([name], "logit-mean")
        weights = sum(p.nbytes for p in alone.model.parameters()) / 1e6
        several = {
            n: _behind(alone, name, [f"{k}. {_WORDS * words}" for k in range(n)]) for n in map(int, counts.split(","))
        }
        before, taken = _resident(), {n: list[float]() for n in several}
        for _ in range(repeats):
            for n, ensemble in several.items():
                # What the prompt takes is in both.
                taken[n].append((_continued(ensemble, tokens + 1) - _continued(ensemble, 1)) / tokens)
        rows = [
            _told(model, f"a step, {n} prompt{'s' * (n > 1)}", own, taken[min(taken)] if n > min(taken) else None)
            for n, own in taken.items()
        ]
        added = _resident() - before
        passages = [alone.with_passages([Passage(f"{k}. {_WORDS * words}", 0.0) for k in range(10)])]
        passages.append(alone.with_passages([Passage(_WORDS * words * 10, 0.0)]))
        whole: list[list[float]] = [[], []]
        for _ in range(repeats):
            for own, ensemble in zip(whole, passages, strict=True):
                ensemble.model.forget_readers()  # passages are new to the model, as a request's are
                own.append(_continued(ensemble, tokens))
    rows.append(_told(model, f"{tokens} tokens behind ten passages, read anew", *whole))
    rows.append(_told(model, f"{tokens} tokens behind one passage as long as the ten", whole[1]))
    show("One model behind several prompts", rows, json, weights_mb=round(weights), added_mb=round(added))
    print(f"weights: {weights:.0f} MB; resident memory that all these prompts added: {added:.0f} MB")


# Bytes of a text from which the rest is generated or read.
_BEGINNING = 300


def by_bytes(ensemble: Ensemble, clock: Clock, prompt: str, count: int, seed: int) -> dict[str, float]:
    """Generate so many bytes behind a prompt whose cost is left out of the counts, and not of the time."""
    (reader,) = ensemble.model.readers
    prompted, before = reader.begin(prompt.encode()).work, reader.spent
    clock.spent.clear()
    start = now()
    text = ensemble.generate(prompt, seed=seed, do_sample=True, top_k=0, max_bytes=count, min_new_tokens=count)
    taken, spent = now() - start, clock.spent
    size, own = len(text.encode()), len(reader.spelling.encode(text.encode()))
    return {
        "ms/B": 1000 * taken / size, "reader alone ms/B": 1000 * (spent["reading"] - spent["model"]) / size,
        "loop and rule ms/B": 1000 * (taken - spent["reading"]) / size, "bytes a token": size / own,
        "calls a token": (reader.spent.calls - before.calls - prompted.calls) / own,
        "run a token": (reader.spent.tokens - before.tokens - prompted.tokens) / own,
    }  # fmt: skip


@torch.inference_mode()
def by_tokens(ensemble: Ensemble, prompt: str, count: int, seed: int) -> float:
    """Return milliseconds a byte of the member's own generation."""
    (reader,) = ensemble.model.readers
    ids = torch.tensor([[*reader.prefix, *reader.spelling.encode(prompt.encode())]])
    torch.manual_seed(seed)
    start = now()
    out = reader.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    taken = now() - start
    return 1000 * taken / max(1, len(reader.spelling.spelled(out[0, ids.shape[1] :].tolist())))


def read(ensemble: Ensemble, texts: list[bytes]) -> dict[str, float]:
    """Read the rest of each text byte by byte, behind its first ones."""
    (reader,) = ensemble.model.readers
    calls, run, own = 0, 0, 0
    for text in texts:
        reading = reader.begin(text[:_BEGINNING])
        before = reading.work
        for byte in text[_BEGINNING:]:
            (reading,) = reader.advance([reading], [byte])
        calls, run = calls + reading.work.calls - before.calls, run + reading.work.tokens - before.tokens
        own += len(reader.spelling.encode(text)) - len(reader.spelling.encode(text[:_BEGINNING]))
    return {"calls a token, texts": calls / own, "run a token, texts": run / own}


@app.command("bytes")
def over_bytes(
    members: Models,
    text: Texts,
    documents: Annotated[int, typer.Option(help="So many of the texts are read.")] = 6,
    length: Annotated[int, typer.Option(help="Characters of each text that are read, at most.")] = 2000,
    count: Annotated[int, typer.Option(help="Bytes to generate.")] = 240,
    repeats: Annotated[int, typer.Option(help="Seeds.")] = 3,
    prune: Annotated[float, typer.Option(help="As for every ensemble over bytes.")] = 0.01,
    threads: Threads = 1,
    json: JsonPath = None,
) -> None:
    """Time each member over bytes beside its own generation over tokens: a row for each, medians over seeds.

    Both are sampled with one seed, several times in turn, from the first text's beginning. Calls of the model and
    tokens run are set against the tokens that the member's own tokenizer makes of the same bytes: of what was
    generated, and of the texts, read byte by byte as if they were being generated.
    """
    rows, clock = [], Clock()
    some = [document.text[:length] for document in read_documents(text)[:documents]]
    prompt = some[0].encode()[:_BEGINNING].decode(errors="ignore")
    for name in members:
        ensemble = Ensemble.from_pretrained([name], vocabulary="bytes", prune=prune)
        (reader,) = ensemble.model.readers
        for method in ("advance", "log_probs", "begin", "run"):
            clock.watch(type(reader), method, "model" if method == "run" else "reading")
        clock.watch(type(reader.head), "logits", "model")
        by_bytes(ensemble, clock, prompt, 8, 0), by_tokens(ensemble, prompt, 2, 0)
        found = []
        for seed in range(1, repeats + 1):
            ours = by_bytes(ensemble, clock, prompt, count, seed)
            tokens = max(8, round(count / ours["bytes a token"]))
            found.append(ours | {"own ms/B": by_tokens(ensemble, prompt, tokens, seed)})
        rows.append(
            {"member": named(name), "text": " ".join(text)}
            | {key: median(row[key] for row in found) for key in found[0]}
            | read(ensemble, [one.encode() for one in some])
            | {"times the own": median(row["ms/B"] / row["own ms/B"] for row in found)}
        )
    show(f"Generation over bytes beside the members' own, prune {prune:g}", rows, json, repeats=repeats)


@app.command()
def reproducible(
    family: Family = "wide",
    tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 32,
    repeats: Repeats = 3,
    json: JsonPath = None,
) -> None:
    """Time `generate(reproducible=True)` beside a batch, side by side, for each rule and number of prompts.

    Averages, and `meet` with its default gate, over prompts of different lengths, none of which ends early.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    for rule in RULES:
        ensemble = Ensemble.from_pretrained(family, rule, weights=[1] * len(zoo.expand(family)))
        for number in (2, 8, 32):
            prompts = [PROMPTS[k % len(PROMPTS)] for k in range(number)]
            given = {"seed": 1, "max_new_tokens": tokens, "eos_token_id": None}
            ways = [partial(ensemble.generate, prompts, **given, reproducible=alone) for alone in (False, True)]
            batch, alone = (1000 * median(seconds(way, repeats)) / (tokens * number) for way in ways)
            row = {"rule": rule, "prompts": number, "batch, ms": batch, "alone, ms": alone, "times": alone / batch}
            rows.append(row)
    show(f"{family}: a token in a batch, and reproducible", rows, json)


if __name__ == "__main__":
    app()
