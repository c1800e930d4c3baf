"""``softmeet check``: compare members' vocabularies, heads and memory before anything is generated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli import options
from softmeet.cli.flags import Flags, at_least_one, flag, flags, optional, switch
from softmeet.cli.progress import working
from softmeet.cli.tables import counted, out, print_table
from softmeet.errors import UnsupportedHeadError
from softmeet.evaluation.documents import read_documents
from softmeet.startup import quick_imports, uncollected

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# The last line of what is shown.
_ADVISE = "Whether they are worth combining: softmeet advise."
# The option --tokens counts this many bytes as one token.
_BYTES_PER_TOKEN = 4


class SampleFlags(Flags, panel="Text"):
    """Flags for the text on which members are compared."""

    text: Path | None = optional(
        "Text that the members were not trained on: a UTF-8 file, or a pattern in quotes. With it, check tests whether "
        "a member's errors come from an output layer (head) that is too narrow; those are the errors that meet "
        "corrects. Over bytes, it shows how each member splits the text.",
        "--text",
        "-t",
    )
    tokens: int = flag(512, "The most tokens of the text to read; over bytes, four times as many bytes.", min=2)
    sampled: int = flag(64, "Without --text: sample N tokens to see how far meet moves the average; 0 for none.", min=0)


@flags(only=("weights", "pool"))
def check(
    *,
    members: options.Members = None,
    sample: SampleFlags,
    plan: bool = switch(
        "Only print where weights, caches and buffers would be placed, and their sizes; no weights are loaded.",
        panel="Plan",
    ),
    batch: int = flag(1, "With --plan: how many sequences run at once.", min=1, panel="Plan"),
    context: int | None = at_least_one(
        "With --plan: the length of each sequence in tokens.",
        shown="the shortest context length among the members",
        panel="Plan",
    ),
    loading: options.LoadingFlags,
    as_json: bool = switch("Print one JSON document on stdout.", "--json", panel="Output"),
    **settings: Any,
) -> None:
    """Say which tokens models share, what else they have in common, and how much memory they take.

    With --text, it also tests whether each member's errors look like those of a narrow head. Whether members are worth
    combining is what softmeet advise says.

    If tokenizers differ, it shows how many tokens they share and, with --text, how similarly they split a text and how
    much work it takes to read it.

    Example: softmeet check -m wide/gpt2 -m wide/llama --text held-out.txt
    """
    members = options.named(members)
    if plan:
        facts, show = _planned(members, batch, context, loading), _show_plan
    else:
        documents, tokens = read_documents([sample.text]) if sample.text else [], sample.tokens
        text = "\n\n".join(document.text for document in documents) or None
        ensemble = _loaded(loading, members, settings)
        if ensemble.model.over_bytes:
            facts, show = _byte_facts(ensemble, text, tokens), _show_bytes
        else:
            facts, show = _facts(ensemble, text, tokens, sample.sampled), _show
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


def _loaded(loading: options.LoadingFlags, members: list[str], settings: Mapping[str, Any]) -> Ensemble:
    """Load an ensemble to be checked; by an average if its own rule reads heads, and a member has one unread."""
    loaded: dict[Any, Any] = {}
    try:
        return loading.ensemble(members, settings, loaded=loaded)
    except UnsupportedHeadError:
        return loading.ensemble(members, settings, loaded=loaded, rule="logit-mean")


def _facts(ensemble: Ensemble, text: str | None, tokens: int, sampled: int) -> dict[str, Any]:
    """Return what :func:`_heads` says, with notes, each member's premise score, and how far ``meet`` moves the pool.

    Args:
        ensemble: over tokens.
        text: a text for the premise scores and the movement; None for no scores, and movement on sampled tokens.
        tokens: the most tokens of the text that are read.
        sampled: without a text, how many tokens the ensemble samples for the movement; 0 for no movement.

    With a weight below 0 there are neither scores nor movement, as ``meet`` takes no such weight.
    """
    with working("comparing heads"):
        facts = _heads(ensemble)
    facts["notes"] = _notes(facts, ensemble.model.config.weights)
    if any(member["unread"] for member in facts["members"]) or min(ensemble.model.config.weights) < 0:
        return facts
    if text is not None:
        from softmeet.evaluation.premise import premise_scores

        with working("testing the premise"):
            scores = premise_scores(ensemble, text, tokens)
        for member, score in zip(facts["members"], scores, strict=True):
            member["premise"] = asdict(score) | {"verdict": score.verdict}
    if len(ensemble.names) > 1 and (text is not None or sampled):
        with working("seeing how far meet moves the pool"):
            facts["movement"] = _movement(ensemble, text, tokens, sampled)
    return facts


def _movement(ensemble: Ensemble, text: str | None, tokens: int, sampled: int) -> dict[str, Any]:
    """Return figures of how far ``meet`` moves the pool, on a text or on ``sampled`` tokens of the ensemble's own."""
    import torch

    from softmeet.evaluation.premise import moved, own_text

    if text is None:
        hidden = own_text(ensemble.model, sampled)
    else:
        stretches = [states for states, _ in ensemble.positions(text, tokens)]
        hidden = [torch.cat(own) for own in zip(*stretches, strict=True)]
    trust = "/".join(f"{rho:g}" for rho in dict.fromkeys(ensemble.model.settings.member_trust))
    return moved(ensemble.model, hidden).figures() | {"trust": trust}


def _heads(ensemble: Ensemble) -> dict[str, Any]:
    """Return each member's head, the principal angles between any two heads, and the solver's memory per row.

    Of a head that cannot be read, ``unread`` says why, and what only its weight tells is None, as is what the solver
    needs.
    """
    from softmeet.heads import SoftmaxHead
    from softmeet.hf.plan import solver_bytes
    from softmeet.members.heads import principal_cosines, same_column_space
    from softmeet.members.opaque import width_of
    from softmeet.members.quantized import stored

    heads, names = ensemble.model.member_heads, [options.short(name) for name in ensemble.names]
    members: list[dict[str, Any]] = []
    for name, head, model in zip(names, heads, ensemble.model.members, strict=True):
        own, reader = head if isinstance(head, SoftmaxHead) else None, getattr(model, "reader", None)
        size = sum(part.nbytes for part in stored(model)) if reader is None else reader.traits.cost
        members.append(
            {
                "name": name,
                "rows": head.v,
                "width": width_of(head),
                "rank": own and own.whitening().rank,
                "bias": own and own.bias is not None,
                "scale": head.scale,
                "soft_cap": head.soft_cap,
                "megabytes": size / 1e6,
                "unread": getattr(head, "why", None),
            }
        )
    read = [(name, head) for name, head in zip(names, heads, strict=True) if isinstance(head, SoftmaxHead)]
    pairs = []
    for (one, first), (other, second) in combinations(read, 2):
        cosines = principal_cosines(first, second)
        pairs.append(
            {
                "members": [one, other],
                "median_cosine": cosines.median().item() if len(cosines) else math.nan,
                "cosines_above_0.9": int((cosines > 0.9).sum()),
                "of": len(cosines),
                "shared": same_column_space(first, second),
            }
        )
    tokens = len(ensemble.tokenizer.get_vocab())
    width = sum(head.whitening().rank for _, head in read) if len(read) == len(heads) else None
    return {
        "vocabulary": "tokens",
        "members": members,
        "pairs": pairs,
        "tokens": tokens,
        "rank": width,
        "share": width and width / tokens,
        "average": ensemble.model.combiner.average(ensemble.model.settings),
        "solver_megabytes_per_row": width and solver_bytes(tokens, len(heads), width, 1) / 1e6,
    }


def _notes(facts: dict[str, Any], weights: Sequence[float]) -> list[str]:
    """Return sentences on which rules these members can take, and where ``meet`` is an average; perhaps none.

    Args:
        facts: as :func:`_heads` returns them.
        weights: the ensemble's, one for each member.
    """
    if unread := [f"that of {m['name']} {m['unread']}" for m in facts["members"] if m["unread"]]:
        from softmeet.engine.unread import averages

        return [f"They can be combined by {averages()}: other rules read heads, and {', '.join(unread)}."]
    if len(facts["members"]) == 1:
        return ["There is one member: every rule returns its own distribution."]
    if min(weights) < 0:
        return ["A weight is below 0, which only averages of logits take: meet is not compared."]
    if facts["average"]:
        shown = ", ".join(f"{w:.3g}" for w in facts["average"])
        return [
            f"All members have one head, so meet is logit-mean with weights {shown} here, and costs no more than it."
        ]
    if all(pair["shared"] for pair in facts["pairs"]):
        return ["All heads span one column space, so meet can only be averaging, at a higher cost."]
    return []


def _show(facts: dict[str, Any]) -> None:
    """Print the facts of an ensemble over tokens as tables and sentences."""
    console, members = out(), facts["members"]
    rows = [
        (
            m["name"], f"{m['rows']:,}", str(m["width"] or "unread"), *(
                ("unread", "") if m["unread"] else (str(m["rank"]), "yes" if m["bias"] else "no")
            ), f"{m['soft_cap']:g}" if m["soft_cap"] else "no", f"{m['megabytes']:,.1f}",
        )
        for m in members
    ]  # fmt: skip
    columns = ("member", "rows", "width", "rank", "bias", "soft-cap", "MB")
    print_table(console, columns, [rows], title=f"The heads (output layers), over {facts['tokens']:,} common tokens")
    if "premise" in members[0]:
        tested = [(m["name"], m["premise"]) for m in members]
        scores = [
            (name, f"{p['score']:.2f} ± {p['score_error']:.2f}", f"{p['gain']:+.4f} ± {p['error']:.4f}", p["verdict"])
            for name, p in tested
        ]
        titles = ("member", "premise score", "gain (nats per unit of trust)", "verdict")
        print_table(console, titles, [scores], title="Do errors look like those of a narrow head?", texts=(0, 3))
        console.print(
            "A score of 1 says that all of a member's errors come from a head that is too narrow, 0 that none do. The "
            "gain is that of a small trust over the average; ± is one standard error."
        )
    for pair in facts["pairs"]:
        console.print(
            f"{' and '.join(pair['members'])}: median principal cosine {pair['median_cosine']:.2f}, "
            f"{pair['cosines_above_0.9']} of {pair['of']} above 0.9" + (", one column space" if pair["shared"] else "")
        )
    if facts["rank"] is not None:
        console.print(
            f"Together {facts['rank']} directions for {facts['tokens']:,} tokens ({facts['share']:.1%}); the solver "
            f"needs about {facts['solver_megabytes_per_row']:,.1f} MB a row beside the models."
        )
    if "movement" in facts:
        trust, moved = facts["movement"]["trust"], facts["movement"]
        console.print(f"On {moved['positions']} tokens, at trust {trust}, {moved['says']}")
    for note in [*facts["notes"], _ADVISE]:
        console.print(note)


def _byte_facts(ensemble: Ensemble, text: str | None, tokens: int) -> dict[str, Any]:
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


def _show_bytes(facts: dict[str, Any]) -> None:
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
    for note in [*facts["notes"], _ADVISE]:
        console.print(note)


def _planned(members: list[str], batch: int, context: int | None, loading: options.LoadingFlags) -> dict[str, Any]:
    """Return which weights, caches and buffers go on which device, and their sizes in bytes, without loading weights.

    Args:
        members: the members' names, or one saved ensemble or bundled family.
        batch: the number of sequences at once.
        context: the number of tokens of each; None for the shortest context.
        loading: the flags for dtype and devices.
    """
    with working("reading configurations"):
        with uncollected(), quick_imports():
            from softmeet.ensemble import member_names
            from softmeet.hf.plan import plan

        where = {name: loading.arguments()[name] for name in ("dtype", "device", "trust_remote_code")}
        named = member_names(members[0] if len(members) == 1 else members)
        found = plan(named, batch=batch, context=context, **where)
    return asdict(found) | {"totals": found.totals()}


def _show_plan(facts: dict[str, Any]) -> None:
    """Print a plan as a table, with sizes in MB."""
    title = f"{counted(facts['batch'], 'sequence')} of {facts['context']:,} tokens"
    if any(part["owner"] == "solver" for part in facts["parts"]):
        title += f"; {counted(facts['rows_at_once'], 'token')} solved at once"
    parts = [
        (options.short(p["owner"]) or p["owner"], p["what"], p["device"], p["dtype"], f"{p['bytes'] / 1e6:,.2f}")
        for p in facts["parts"]
    ]
    totals = [("together", "", place, "", f"{size / 1e6:,.2f}") for place, size in facts["totals"].items()]
    console, columns = out(), ("member", "what", "where", "dtype", "MB")
    print_table(console, columns, [parts, totals], title=title, texts=(0, 1, 2, 3))
    for name, size in facts["cache_bytes_per_token"].items():
        console.print(f"{options.short(name)} keeps {size / 1e3:,.1f} kB for each token of a sequence.")
    console.print("Beside this come Python with its libraries, some 500 MB, and activations while a prompt is run.")
