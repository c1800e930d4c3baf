"""Structured output: python benchmarks/structured.py, with --answers, --masks or --served in place of it.

By default some 500 texts are written by several rules, over tokens and over bytes, greedily and drawn, and each is
judged by jsonschema, Python's re, or Lark. With --answers 528 come from a server, whole and streamed, some of them with
a stop string or too few tokens, which `finish_reason` has to say. With --masks the time of a mask is measured over
vocabularies of several sizes; with --served another stream's gaps, while structured and hostile requests come.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import httpx
import jsonschema
import lark
import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from report import show
from serve import gaps
from servers import Server
from softmeet import Ensemble, Structure
from softmeet.engine.masking import Mask
from softmeet.members import zoo
from softmeet.readers.byte_tokenizer import byte_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
        "kind": {"enum": ["king", "queen", "knave"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
DOCUMENT = '{"name": "Ada \\"x\\" été", "age": 36, "tags": ["math", "engine"], "kind": "king"}'
CLOCK = r"(\d{1,2}:[0-5]\d|noon|é{2,4})"
CHOICE = ["yea", "nay, my lord", "日本 é"]
SUMS = 'start: product ("+" product)*\nproduct: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
PROMPTS = ("And the king said", "O", "In the beginning", "Behold, the man's years are", "Then answered he")
# (members, rule, settings)
ENSEMBLES: list[tuple[str, str, dict[str, Any]]] = [
    ("narrow", "meet", {"trust": 1.0, "gate": "none"}), ("wide", "meet", {}), ("wide", "prob-mean", {}),
    ("narrow", "max-entropy", {}), ("mixed", "logit-mean", {"vocabulary": "bytes"}),
]  # fmt: skip
# Compiling sixteen patterns at once has no end.
ENDLESS = [{"pattern": f"(.*[a-{last}].{{{20 + k}}})"} for k, last in enumerate("bcdefghijklmnopq")]


def _is_valid(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def _parses(text: str) -> bool:
    return bool(lark.Lark(SUMS).parse(text))


JUDGES: dict[str, tuple[Structure, Callable[[str], Any]]] = {
    "JSON schema": (Structure.json_schema(SCHEMA), _is_valid),
    "regular expression": (Structure.regex(CLOCK), re.compile(CLOCK).fullmatch),
    "choice": (Structure.choice(CHOICE), CHOICE.__contains__),
    "grammar": (Structure.grammar(SUMS), _parses),
}


def judged(count: int, chosen: str) -> list[dict[str, Any]]:
    """Write texts, ``count`` of each structure by each rule that is ``chosen``, and judge those that are not cut."""
    found = []
    for members, rule, settings in [one for one in ENSEMBLES if chosen in f"{one[0]} {one[1]}"]:
        ensemble = Ensemble.from_pretrained(members, rule, **settings)
        for name, (structure, is_one) in JUDGES.items():
            texts: list[str] = []
            for k in range(count // len(PROMPTS)):
                how: dict[str, Any] = {"seed": k} if k else {"do_sample": False}
                texts += ensemble.generate(list(PROMPTS), structure=structure, max_new_tokens=100, **how)
            whole = [text for text in texts if structure.allows(text)]
            assert all(is_one(text) for text in whole)
            found.append(
                {"members": members, "rule": rule, "structure": name, "texts": len(texts), "valid": len(whole),
                 "cut": len(texts) - len(whole)}
            )  # fmt: skip
    return found


# The fields of requests that end whole, that a stop string may cut, and that a number of tokens cuts.
CUTS: dict[str, dict[str, Any]] = {
    "200 tokens": {"max_tokens": 200},
    "a stop string": {"max_tokens": 200, "stop": ["e"]},
    "6 tokens": {"max_tokens": 6},
}
_WIRE: dict[str, dict[str, Any]] = {
    "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    "regular expression": {"structured_outputs": {"regex": CLOCK}},
    "choice": {"structured_outputs": {"choice": CHOICE}},
    "grammar": {"structured_outputs": {"grammar": SUMS}},
}


async def _answer(client: httpx.AsyncClient, at_once: asyncio.Semaphore, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for one answer, streamed or not; its text, finish_reason and stop_reason."""
    async with at_once, client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        whole = (await response.aread()).decode()
    lines = [line[6:] for line in whole.splitlines() if line.startswith("data: {")] if body["stream"] else [whole]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return {**choices[-1], "text": "".join(choice["text"] for choice in choices)}


def _as_said(answer: dict[str, Any], body: dict[str, Any], name: str) -> str:
    """Check that an answer is valid, or that it says how it was cut; the way in which it ended."""
    structure, is_valid = JUDGES[name]
    if answer["stop_reason"] is not None:
        assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", "e")
        assert "e" not in answer["text"]
        return "cut by the stop string"
    if answer["finish_reason"] == "length":
        # The last of the tokens may have completed the text; what follows was only its end.
        assert not structure.allows(answer["text"]) or is_valid(answer["text"])
        return "cut by the number of tokens"
    assert answer["finish_reason"] == "stop"
    assert is_valid(answer["text"])
    return "valid"


async def _answers(count: int) -> list[dict[str, Any]]:
    found = list[dict[str, Any]]()
    for members in ("wide", "mixed"):
        server = Server(members, "--threads", "1")
        try:
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                at_once = asyncio.Semaphore(16)
                for (name, fields), (cut, limits) in itertools.product(_WIRE.items(), CUTS.items()):
                    bodies = [
                        {
                            "prompt": PROMPTS[k % len(PROMPTS)], "seed": k, "temperature": float(k % 4 > 0),
                            "stream": k % 2 > 0, **fields, **limits,
                        }
                        for k in range(count)
                    ]  # fmt: skip
                    answers = await asyncio.gather(*(_answer(client, at_once, body) for body in bodies))
                    ends = Counter(_as_said(own, body, name) for own, body in zip(answers, bodies, strict=True))
                    found.append({"members": members, "structure": name, "with": cut} | ends)
        finally:
            server.end()
    ways = list(dict.fromkeys(way for row in found for way in row))
    return [{way: row.get(way, 0) for way in ways} for row in found]


def masks(folders: list[str]) -> list[dict[str, Any]]:
    """Time each vocabulary's reading, the schema's compiling, and the masks over a document."""
    tokenizers: list[PreTrainedTokenizerBase] = [byte_tokenizer()]
    tokenizers += [AutoTokenizer.from_pretrained(zoo.locate(name)) for name in folders]
    found, structure = [], JUDGES["JSON schema"][0]
    for name, tokenizer in zip(["bytes", *folders], tokenizers, strict=True):
        v, ends, times = len(tokenizer), (tokenizer.eos_token_id,), list[float]()
        started = time.perf_counter()
        Mask(structure, tokenizer, ends, v)
        read = time.perf_counter() - started
        started = time.perf_counter()
        row = Mask(structure, tokenizer, ends, v).begin()
        compiled = time.perf_counter() - started
        tokens = tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]
        for k, token in enumerate(tokens):
            started = time.perf_counter()
            allowed = row.allowed(tokens[:k])
            times.append(time.perf_counter() - started)
            assert allowed is not None
            assert allowed[token]
        found.append(
            {"vocabulary": name, "tokens": v, "once (s)": read, "compile (ms)": 1e3 * compiled,
             "mask: mean (µs)": 1e6 * fmean(times), "largest (µs)": 1e6 * max(times)}
        )  # fmt: skip
    return found


async def _served(seconds: float) -> list[dict[str, Any]]:
    server, found = Server("wide", "--rule", "logit-mean", "--threads", "1"), list[dict[str, Any]]()
    bodies: dict[str, Any] = {
        "nothing": None,
        "the same without a structure": {},
        "JSON of a schema": {"structured_outputs": {"json": SCHEMA}},
        "endless schemas": {"structured_outputs": {"json": {"type": "string", "allOf": ENDLESS}}},
    }
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            stream = {"prompt": "And the king said", "max_tokens": 200, "seed": 1}
            await gaps(client, stream)
            for name, body in bodies.items():
                waited: list[float] = []
                other = None if body is None else asyncio.create_task(_asked(client, body, waited))
                between, end = list[float](), time.monotonic() + seconds
                while time.monotonic() < end:
                    between += await gaps(client, stream)
                if other is not None:
                    other.cancel()
                    await asyncio.gather(other, return_exceptions=True)
                found.append(
                    {"beside": name, "gap: median (ms)": 1e3 * median(between), "largest (ms)": 1e3 * max(between),
                     "requests": len(waited), "longest of them (s)": max(waited, default=0.0)}
                )  # fmt: skip
    finally:
        server.end()
    return found


async def _asked(client: httpx.AsyncClient, body: dict[str, Any], waited: list[float]) -> None:
    """Send one request after the other until cancelled, and note how long each took; hostile ones differ."""
    for k in range(1 << 30):
        asked = json.loads(json.dumps(body).replace('"allOf"', f'"title": "{k}", "allOf"'))
        started = time.perf_counter()
        await client.post("/v1/completions", json={"prompt": "O", "max_tokens": 60, "seed": k, **asked})
        waited.append(time.perf_counter() - started)


def main(
    count: Annotated[int, typer.Option(help="Texts of each structure by each rule, a multiple of 5.")] = 25,
    chosen: Annotated[str, typer.Option(help="Members and a rule whose names have this part.")] = "",
    answers: Annotated[bool, typer.Option(help="Judge a server's answers, some of them cut.")] = False,
    with_masks: Annotated[bool, typer.Option("--masks", help="Measure the time of masks.")] = False,
    served: Annotated[bool, typer.Option(help="Measure what others wait.")] = False,
    folder: Annotated[list[str] | None, typer.Option(help="Further tokenizers to measure masks of.")] = None,
    seconds: Annotated[float, typer.Option(help="How long a stream is measured.")] = 15.0,
    output: Annotated[Path | None, typer.Option(help="A file for the figures as JSON.")] = None,
) -> None:
    """Judge structured output, or measure what it takes."""
    if answers:
        rows = asyncio.run(_answers(22))
    elif with_masks:
        rows = masks(["wide/gpt2", *(folder or [])])
    else:
        rows = asyncio.run(_served(seconds)) if served else judged(count, chosen)
    show("structured output", rows, output)


if __name__ == "__main__":
    typer.run(main)
