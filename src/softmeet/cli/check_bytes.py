"""What ``softmeet check`` says of members that are combined over bytes."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

from softmeet.cli import options
from softmeet.cli.progress import working
from softmeet.cli.tables import out, print_table

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# The last line of what is shown.
ADVISE = "Whether they are worth combining: softmeet advise."
# The option --tokens counts this many bytes as one token.
_BYTES_PER_TOKEN = 4


def facts(ensemble: Ensemble, text: str | None, tokens: int) -> dict[str, Any]:
    """Return facts about members with different tokenizers: the tokens that they share, and how they read a text.

    Args:
        ensemble: over bytes.
        text: a text, for shared token boundaries, bits and work per byte; None for none.
        tokens: a quarter of the most bytes of the text that are read.
    """
    from softmeet.engine.unread import averages
    from softmeet.members.quantized import stored
    from softmeet.members.spelling import shared_boundaries, shared_words

    model: Any = ensemble.model
    data = None if text is None else text.encode()[: _BYTES_PER_TOKEN * tokens]
    named = [(options.short(name), reader) for name, reader in zip(ensemble.names, model.readers, strict=True)]
    members, pairs = [], []
    with working("comparing tokenizers"):
        for name, reader in named:
            size = sum(part.nbytes for part in stored(reader.model)) / 1e6
            own: dict[str, Any] = {"name": name, "tokens": len(reader.spelling.words), "width": reader.head.d}
            own |= {"unwritable_bytes": len(reader.spelling.unwritable), "megabytes": size}
            members.append(own | ({} if data is None else _costs(reader, data, model.window)))
        for (one, first), (other, second) in combinations(named, 2):
            words = first.spelling, second.spelling
            pair: dict[str, Any] = {"members": [one, other], "shared_tokens": shared_words(*words)}
            pairs.append(pair | ({} if data is None else {"shared_boundaries": shared_boundaries(*words, data)}))
    notes = [f"They can be combined over bytes, by {averages()}."]
    if all(reader.spelling.words == model.readers[0].spelling.words for reader in model.readers[1:]):
        notes = ["They spell the same tokens: over tokens (--vocabulary tokens) they cost less, and take every rule."]
    return {"vocabulary": "bytes", "members": members, "pairs": pairs, "notes": notes}


def _costs(reader: Any, text: bytes, window: int) -> dict[str, float]:
    """Return one member's cross-entropy in bits, and its work, per byte of a text that it reads in windows.

    Args:
        reader: reads the member byte by byte.
        text: the text, of at least one byte.
        window: the number of bytes in a window, few enough for every member's context.

    Returns:
        ``bits_per_byte``; ``own_tokens_per_byte``, the text's length in the member's own tokens;
        ``tokens_run_per_byte``, the tokens that the member ran; ``dropped_per_byte``, the probability mass that was
        estimated, since its tokenizations were not followed.
    """
    bits, costs = 0.0, {"own_tokens": 0.0, "tokens_run": 0.0, "dropped": 0.0}
    for start in range(0, len(text), window):
        piece = text[start : start + window]
        reading, log_probs, _ = reader.score(piece)
        bits -= log_probs[range(len(piece)), list(piece)].sum() / math.log(2)
        costs["own_tokens"] += len(reader.spelling.encode(piece))
        costs["tokens_run"] += reading.work.tokens
        costs["dropped"] += reading.work.dropped
    return {"bits_per_byte": bits / len(text)} | {f"{name}_per_byte": x / len(text) for name, x in costs.items()}


def show(facts: dict[str, Any]) -> None:
    """Print the facts of an ensemble over bytes as tables and sentences."""
    console, members = out(), facts["members"]
    rows = [(m["name"], f"{m['tokens']:,}", str(m["width"]), f"{m['megabytes']:,.1f}") for m in members]
    print_table(console, ("member", "tokens", "head width", "MB"), [rows], title="The members, combined over bytes")
    if "bits_per_byte" in members[0]:
        costs = [
            (
                m["name"], f"{m['bits_per_byte']:.4f}", f"{m['own_tokens_per_byte']:.3f}",
                f"{m['tokens_run_per_byte']:.3f}", f"{m['dropped_per_byte']:.2%}",
            )
            for m in members
        ]  # fmt: skip
        columns = ("member", "bits", "own tokens", "tokens run", "probability estimated")
        print_table(console, columns, [costs], title="The text, as each member reads it; means per byte")
    for pair in facts["pairs"]:
        one, other = pair["members"]
        line = f"{one} and {other}: {pair['shared_tokens']:,} tokens in common"
        if "shared_boundaries" in pair:
            left, right = pair["shared_boundaries"]
            line += f"; {left:.0%} of the places where {one} cuts the text are {other}'s too, {right:.0%} the other way"
        console.print(line)
    for note in [*facts["notes"], ADVISE]:
        console.print(note)
