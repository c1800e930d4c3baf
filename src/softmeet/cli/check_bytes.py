"""``softmeet check`` of members with different tokenizers: what they share, and what reading them by bytes costs."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import options

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM

# Bytes of the text for each token that is asked for.
_BYTES = 4


def check_bytes(ensemble: Ensemble, text: str | None, tokens: int, *, as_json: bool) -> None:
    """Print what members share, and on a text how they read it.

    Args:
        ensemble: over bytes.
        text: None to compare vocabularies alone.
        tokens: a quarter of the bytes of the text to read.
        as_json: one JSON document in place of tables.
    """
    model: Any = ensemble.model
    names = [options.short(name) for name in ensemble.names]
    with options.status("comparing tokenizers"):
        facts = _facts(model, names, None if text is None else text.encode()[: _BYTES * tokens])
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _facts(model: ByteEnsembleForCausalLM, names: list[str], text: bytes | None) -> dict[str, Any]:
    from softmeet.members.spelling import shared_boundaries, shared_words

    members, pairs = [], []
    for name, reader in zip(names, model.readers, strict=True):
        spelling = reader.spelling
        megabytes = sum(p.numel() * p.element_size() for p in reader.model.parameters()) / 1e6
        own: dict[str, Any] = {"name": name, "tokens": len(spelling.words), "width": reader.head.d}
        own |= {"unwritable_bytes": len(spelling.unwritable), "megabytes": megabytes}
        members.append(own | ({} if text is None else _read(reader, text, model.window)))
    for i, j in itertools.combinations(range(len(names)), 2):
        one, other = model.readers[i].spelling, model.readers[j].spelling
        pair: dict[str, Any] = {"members": [names[i], names[j]], "shared_tokens": shared_words(one, other)}
        pairs.append(pair | ({} if text is None else {"shared_boundaries": shared_boundaries(one, other, text)}))
    advice = "Combine them over bytes, by logit-mean or prob-mean: softmeet evaluate says which is better on your text."
    if all(reader.spelling.words == model.readers[0].spelling.words for reader in model.readers[1:]):
        advice = "They spell the same tokens: over tokens (--vocabulary tokens) they cost less, and take every rule."
    return {"vocabulary": "bytes", "members": members, "pairs": pairs, "advice": advice}


def _read(reader: Any, text: bytes, window: int) -> dict[str, float]:
    """What a text costs one member, a byte, in windows that fit every context."""
    bits, costs = 0.0, {"own_tokens": 0.0, "tokens_run": 0.0, "dropped": 0.0}
    for start in range(0, len(text), window):
        piece = text[start : start + window]
        reading, log_probs, _ = reader.score(piece)
        bits -= log_probs[range(len(piece)), list(piece)].sum() / math.log(2)
        costs["own_tokens"] += len(reader.spelling.encode(piece))
        costs["tokens_run"] += reading.work.tokens
        costs["dropped"] += reading.work.dropped
    return {"bits_per_byte": bits / len(text)} | {f"{name}_per_byte": x / len(text) for name, x in costs.items()}


def _show(facts: dict[str, Any]) -> None:
    console, members = Console(), facts["members"]
    read = "bits_per_byte" in members[0]
    table = Table("member", "tokens", "width", "MB", title="combined over bytes")
    for name in ("bits/B", "own tokens/B", "run/B", "estimated/B") if read else ():
        table.add_column(name)
    for m in members:
        row = [escape(m["name"]), f"{m['tokens']:,}", str(m["width"]), f"{m['megabytes']:,.1f}"]
        if read:
            row += [f"{m['bits_per_byte']:.4f}", f"{m['own_tokens_per_byte']:.3f}", f"{m['tokens_run_per_byte']:.3f}"]
            row += [f"{m['dropped_per_byte']:.2%}"]
        table.add_row(*row)
    console.print(table)
    for pair in facts["pairs"]:
        one, other = map(escape, pair["members"])
        line = f"{one} and {other}: {pair['shared_tokens']:,} tokens in common"
        if "shared_boundaries" in pair:
            left, right = pair["shared_boundaries"]
            line += f"; {left:.0%} of the places where {one} cuts the text are {other}'s too, {right:.0%} the other way"
        console.print(line)
    console.print(f"[bold]{escape(facts['advice'])}")
