"""What every method writes behind one prompt, and what a token costs: python benchmarks/methods.py -m SMOLLM2 -m GEMMA

Greedily where a method can; decoders search, or draw from one seed. Members are loaded once a vocabulary.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from report import JsonPath, Models, show
from softmeet import Ensemble
from softmeet.errors import InvalidInputError

PROMPT = "The library was built in the year in which"
# (the method, its vocabulary, its rule, options of generate)
METHODS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("GaC, corrected", "union", "prob-mean", {}),
    ("GaC's threshold", "union", "prob-mean", {"gate": "unsure:0.5"}),
    ("SAFE on GaC", "union", "prob-mean", {"gate": "safe:0.5"}),
    ("UniTE, corrected", "union:k=10", "prob-mean", {}),
    ("UniTE as published", "union:k=10:as=unite", "prob-mean", {}),
    ("GaC as published", "union:as=gac", "prob-mean", {}),
    ("drop over the union", "union", "drop", {}),
    ("CoRE over the union", "union", "core", {}),
    ("pointwise-max over the union", "union", "pointwise-max", {}),
    ("pointwise-min over the union", "union", "pointwise-min", {}),
    ("prob-mean over bytes", "bytes", "prob-mean", {}),
    ("logit-mean over bytes", "bytes", "logit-mean", {}),
    ("CoRE over bytes", "bytes", "core", {}),
    ("particles, product, over bytes", "bytes", "logit-mean", {"decoder": "particles:n=16", "seed": 2}),
    ("particles, mean, over the union", "union", "prob-mean", {"decoder": "particles:n=16", "seed": 2}),
    ("ABE", "union", "logit-mean", {"decoder": "agreement:beam=5"}),
    ("AdaFuse, one candidate each", "union", "logit-mean", {"decoder": "spans"}),
]


def main(
    members: Models,
    tokens: Annotated[int, typer.Option(help="New tokens of each text.")] = 40,
    json: JsonPath = None,
) -> None:
    """Print a table: the text, and the time of a token as the first member's tokenizer cuts it."""
    rows, loaded = list[dict[str, Any]](), dict[Any, Any]()
    for name, vocabulary, rule, options in METHODS:
        try:
            how: dict[str, Any] = {"vocabulary": vocabulary, "weights": [1] * len(members), "loaded": loaded}
            ensemble = Ensemble.from_pretrained(members, rule, **how)
        except InvalidInputError as error:
            typer.echo(f"{name}: {error}", err=True)
            continue
        limit = {"max_new_tokens": tokens}
        if "decoder" in options and vocabulary == "bytes":
            limit = {"max_bytes": 4 * tokens}
        given = {**limit, **({} if "decoder" in options else {"do_sample": False, "speculate": 0}), **options}
        ensemble.generate(PROMPT, **{**given, **dict.fromkeys(limit, 8)})
        start = time.perf_counter()
        text = ensemble.generate(PROMPT, **given)
        took = time.perf_counter() - start
        count = max(1, len(ensemble.model.own_tokens(text)[0]))
        rows.append({"method": name, "ms a token": 1000 * took / count, "text": " ".join(text.split())})
    show(f"greedy texts of {tokens} tokens", rows, json, tokens=tokens)


if __name__ == "__main__":
    typer.run(main)
