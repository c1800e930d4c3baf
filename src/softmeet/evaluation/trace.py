"""Traces: every member runs over a text once, and its hidden states stay on disk for any number of rules.

A trace is a folder. ``trace.json`` holds the members (with hashes of their heads, of a sample of their weights and of
the tokenizer), a hash of the text, the windows, and the number of positions in each shard. The files
``shard-00000.parquet`` and so on hold the positions. The contents of each shard follow from the settings alone, so a
run that was stopped continues with the missing shards.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from pydantic import BaseModel, PositiveInt, TypeAdapter

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import turn_at, write_atomically, write_text
from softmeet.evaluation.positions import Positions, TokenizedDocument, Windowing, cut, grouped, join, observe
from softmeet.heads import SoftmaxHead
from softmeet.members.files import TRACED, refuse_files
from softmeet.members.heads import body_hash
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

FORMAT = 2
Dtype = Literal["float32", "float16"]
_CHUNK = 64
# Columns of a member that leaves out probability mass behind those of its hidden states.
_COSTS = 3
_FACTS = {"members", "tokenizer", "text", "bos", "window", "stride", "dtype", "documents", "shards"}


class _Float16Error(BaseModel):
    """The error that fp16 causes in the targets' log-probabilities in one shard.

    Attributes:
        largest: the largest absolute error, in nats, over positions and members.
        sum: the sum over positions of the absolute error, averaged over members, in nats.
        positions: the number of positions in the shard.
    """

    largest: float
    sum: float
    positions: PositiveInt


_ERRORS = TypeAdapter(dict[int, _Float16Error])


@dataclass(frozen=True)
class Trace:
    """An opened trace: a folder of files (shards) with the positions of a text and the members' hidden states there.

    Attributes:
        folder: the folder.
        facts: the contents of its ``trace.json``: ``members`` and ``tokenizer`` as :func:`identity` returns them,
            ``text`` (a hash), ``bos``, ``window`` and ``stride``, ``dtype`` (of the hidden states on disk),
            ``documents`` (of each its name and its numbers of positions and bytes) and ``shards`` (the number of
            positions in each).
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Trace:
        """Open an existing trace by reading its ``trace.json``; shards are not read.

        Raises:
            TraceError: if the folder is not a trace, ``trace.json`` is damaged, or its format is unknown to this
                version.
        """
        path = Path(folder) / "trace.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TraceError(
                f"expected a trace in {folder}, but there is no {path}: make it with softmeet trace"
            ) from None
        except ValueError:
            raise TraceError(f"{path} is damaged: it is not JSON; run softmeet trace again in another folder") from None
        given = facts.get("format") if isinstance(facts, dict) else f"a {type(facts).__name__}"
        if given != FORMAT:
            raise TraceError(f"expected a trace of format {FORMAT} in {path}, got {given}: trace again")
        if missing := sorted(_FACTS - facts.keys()):
            raise TraceError(f"{path} is damaged: it lacks {', '.join(missing)}; run softmeet trace in another folder")
        return cls(Path(folder), facts)

    @property
    def members(self) -> list[str]:
        """The names of the members that made the trace, in order."""
        return [member["name"] for member in self.facts["members"]]

    @property
    def key(self) -> str:
        """The SHA-256 of :attr:`facts`, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def shard_key(self, k: int) -> str:
        """Return what shard ``k`` holds as proof that it is that one, and of this trace."""
        return f"{self.key}-{k}"

    def shard(self, k: int) -> Path:
        """Return the path of shard ``k``, counted from 0, whether the file exists or not."""
        return self.folder / f"shard-{k:05d}.parquet"

    def _require_member(self, own: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Check one member; ``own`` and ``theirs`` are its facts here and in the trace, by :func:`identity`."""
        if own["body"] == theirs.get("body") and own["width"] != theirs["width"]:
            raise TraceError(
                f"{self.folder} keeps what {theirs['name']} predicts without its output layer (head), which a rule "
                "read here: evaluate it from the text, with --text and the members, or leave the rule out"
            )
        if own["head"] != theirs["head"]:
            dtype = theirs.get("dtype", own["dtype"])
            advice = "name the members that made it, in order" if dtype == own["dtype"] else f"try --dtype {dtype}"
            raise TraceError(
                f"{self.folder} was made by {theirs['name']} (head {theirs['head'][:12]}, {dtype}), but in its "
                f"place stands {own['name']} (head {own['head'][:12]}, {own['dtype']}): {advice}, or trace again"
            )
        if own["body"] != theirs.get("body", own["body"]):
            raise TraceError(
                f"{self.folder} was made by {theirs['name']}, but {own['name']} in its place has other weights "
                "below the same head: name the members that made it, in order, or trace again"
            )

    def require(self, ensemble: Ensemble) -> None:
        """Check that an ensemble has the trace's members, in order, their tokenizer, prompts and over bytes ``prune``.

        Raises:
            InvalidInputError: if files stand beside them.
            TraceError: if something differs; the message names the first difference.
        """
        refuse_files(ensemble.model.config.files, TRACED)
        here, made = identity(ensemble), self.facts
        if len(here["members"]) != len(made["members"]):
            raise TraceError(
                f"{self.folder} was made by {len(made['members'])} members ({', '.join(self.members)}), got "
                f"{len(here['members'])}: name those, in that order, or trace again"
            )
        for own, theirs in zip(here["members"], made["members"], strict=True):
            self._require_member(own, theirs)
        if here.get("prune") != made.get("prune"):
            over = [f"over bytes (prune {x['prune']})" if "prune" in x else "over tokens" for x in (made, here)]
            both = "prune" in here and "prune" in made
            advice = f"load them with prune {made['prune']}, or trace again" if both else "trace again"
            raise TraceError(f"{self.folder} was made {over[0]}, but these members are combined {over[1]}: {advice}")
        if here.get("prefixes") != made.get("prefixes"):
            raise TraceError(f"{self.folder} was made behind other prefixes than these members': trace again")
        if here["tokenizer"] != made["tokenizer"]:
            raise TraceError(f"{self.folder} was made with another tokenizer than these members': trace again")

    def read(self, on_damage: Callable[[str], None] | None = None) -> Positions:
        """Read the positions of all intact shards, in order, hidden states in fp32; others are left out.

        Args:
            on_damage: called with a sentence for each shard that is missing or damaged; None for a Python warning.

        Raises:
            TraceError: if no shard is intact.
        """
        return self.read_whole(on_damage or (lambda sentence: warnings.warn(sentence, stacklevel=4)))[0]

    def read_whole(
        self, on_damage: Callable[[str], None], on_progress: Callable[[int], None] = lambda positions: None
    ) -> tuple[Positions, list[int]]:
        """Read the positions of all intact shards, in order, hidden states in fp32, and list the other shards.

        Args:
            on_damage: called with a sentence for each shard that is missing or damaged.
            on_progress: called after each shard with the number of its positions.

        Returns:
            (the positions; the numbers, from 0, of the missing or damaged shards).

        Raises:
            TraceError: if no shard is intact.
        """
        says = "its {:,} positions are left out; softmeet trace, run as before, makes it again"
        found = dict[int, Positions | None]()
        for k, size in enumerate(self.facts["shards"]):
            found[k] = self.read_if_whole(k, on_damage, says.format(size))
            on_progress(size)
        if not (parts := [part for part in found.values() if part is not None]):
            raise TraceError(f"no shard of {self.folder} is whole: run softmeet trace as before")
        return join(parts, parts[0].names), [k for k, part in found.items() if part is None]

    def read_if_whole(self, k: int, on_damage: Callable[[str], None], says: str) -> Positions | None:
        """Read the positions of shard ``k``, hidden states in fp32, or return None if it is missing or damaged.

        Args:
            k: the shard's number, from 0.
            on_damage: called if the shard is missing or damaged, with a sentence that says so and ends in ``says``.
            says: the consequence, such as "it is made again".
        """
        from softmeet.evaluation.shards import read_shard  # which needs pyarrow

        names = [document["name"] for document in self.facts["documents"]]
        widths = [member["width"] for member in self.facts["members"]]
        dtype = getattr(torch, self.facts["dtype"])
        try:
            costs = _COSTS * ("prune" in self.facts)
            return read_shard(self.shard(k), self.shard_key(k), names, self.facts["shards"][k], widths, dtype, costs)
        except TraceError as error:
            on_damage(f"{error}: {says}")
            return None

    def float16_error(self) -> dict[str, float] | None:
        """Return the errors that fp16 causes in the targets' log-probabilities: ``largest`` and ``mean``, in nats.

        They are the largest and the mean, over positions and members, of |log p̂_i(target) from fp16 hidden states minus
        that from the original ones|. The result is None for a trace in fp32, or if ``float16.json``, which is written
        with the shards, is missing or damaged.
        """
        found = _float16_errors(self.folder / "float16.json").values()
        if self.facts["dtype"] == "float32" or not found:
            return None
        mean = sum(entry.sum for entry in found) / sum(entry.positions for entry in found)
        return {"largest": max(entry.largest for entry in found), "mean": mean}


def record(
    ensemble: Ensemble,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    dtype: Dtype = "float32",
    shard_size: int = 4096,
    engine: Engine | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int], None] = lambda positions: None,
    on_damage: Callable[[str], None] = lambda sentence: None,
    **windowing: Unpack[Windowing],
) -> Trace:
    """Run every member over a text and keep its hidden states in a trace, skipping shards that an earlier run finished.

    Args:
        ensemble: the members.
        documents: the text.
        folder: the trace's folder, made if there is none.
        dtype: of the hidden states on disk; ``"float16"`` halves the size, and its error in nats is measured.
        shard_size: the least number of positions in a shard; the last may have fewer.
        engine: runs the members, a shard in each call; None for this process.
        on_start: called once, before members run, with (the number of positions already on disk, the number in all).
        on_progress: called in this process each time that members have run over a shard, just before it is written,
            with the number of its positions.
        on_damage: called before ``on_start`` with a sentence about each damaged shard, which is made again.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as in
            :class:`softmeet.evaluation.positions.Windowing`.

    Raises:
        InvalidInputError: if the text is too short, windows do not fit, a value is bad, there are files or overflows.
        TraceError: if the folder holds another trace, or the disk is full.
    """
    from softmeet.evaluation.shards import write_shard

    refuse_files(ensemble.model.config.files, TRACED)
    if dtype not in ("float32", "float16") or shard_size < 1:
        raise InvalidInputError(f"expected float32 or float16 and a positive shard size, got {dtype} and {shard_size}")
    tokens, window, stride = cut(ensemble, documents, **windowing)
    groups = grouped(tokens, window, stride, shard_size, by_document=False)
    sizes = [sum(map(len, group)) for group in groups]
    trace = _prepare(
        Path(folder),
        {
            "format": FORMAT,
            **identity(ensemble),
            "text": _text_hash(tokens),
            "bos": windowing.get("bos", False),
            "window": window,
            "stride": stride,
            "dtype": dtype,
            "documents": [{"name": t.name, "positions": len(t.sizes), "bytes": int(t.sizes.sum())} for t in tokens],
            "shards": sizes,
        },
    )
    whole = [
        trace.shard(k).exists() and trace.read_if_whole(k, on_damage, "it is made again") is not None
        for k in range(len(groups))
    ]
    missing = [k for k in range(len(groups)) if not whole[k]]
    on_start(sum(sizes) - sum(sizes[k] for k in missing), sum(sizes))
    for place, positions in (engine or LocalEngine()).map(observe, ((ensemble, groups[k]) for k in missing)):
        k = missing[place]
        on_progress(len(positions))
        if dtype == "float16":
            _note_error(ensemble, trace, k, positions)
        write_shard(trace.shard(k), positions, getattr(torch, dtype), trace.shard_key(k))
    return trace


def _prepare(folder: Path, facts: dict[str, Any]) -> Trace:
    """Make a trace's folder with its ``trace.json``; if the folder exists, check that it holds this trace."""
    path = folder / "trace.json"
    # Members that are files or folders get absolute paths, so that the trace can be used from any folder.
    for member in facts["members"]:
        if Path(member["name"]).exists():
            member["name"] = str(Path(member["name"]).absolute())
    folder.mkdir(parents=True, exist_ok=True)
    with turn_at(folder):
        there = Trace.open(folder) if path.exists() else None
        if there is None:
            write_text(path, json.dumps(facts, indent=1))
    if there is not None:
        own, found = (x | {"members": [m | {"name": ""} for m in x["members"]]} for x in (facts, there.facts))
        differing = sorted((key for key in own if own[key] != found.get(key)), key=lambda key: (key == "members", key))
        if differing:
            raise TraceError(
                f"{folder} holds another trace (it differs in {', '.join(differing)}): name another folder or remove it"
            )
        return there
    return Trace(folder, facts)


@torch.inference_mode()
def _note_error(ensemble: Ensemble, trace: Trace, k: int, positions: Positions) -> None:
    """Measure the errors that fp16 causes in the targets' log-probabilities in shard ``k``, for ``float16.json``."""
    largest, total = 0.0, 0.0
    for chunk in positions.chunks(_CHUNK):
        rounded = [hidden.to(torch.float16).to(hidden.dtype) for hidden in chunk.hidden]
        for name, hidden, there in zip(ensemble.names, chunk.hidden, rounded, strict=True):
            if not torch.equal(there.isfinite(), hidden.isfinite()):
                raise InvalidInputError(
                    f"hidden states of {name} do not fit fp16 (largest {hidden.abs().max():.3g}): trace in float32"
                )
        exact, found = (
            log_probs.gather(-1, chunk.targets.to(log_probs.device).expand(len(log_probs), -1)[..., None])
            for log_probs, _ in map(ensemble.model.combiner.own_log_probs, (chunk.hidden, rounded))
        )
        error = (exact - found).masked_fill(exact == found, 0.0).abs()  # over bytes both may be -inf
        largest, total = max(largest, error.max().item()), total + error.sum().item() / len(error)
    path = trace.folder / "float16.json"
    with turn_at(trace.folder):
        known = _float16_errors(path) | {k: _Float16Error(largest=largest, sum=total, positions=len(positions))}
        write_atomically(path, lambda file: file.write(_ERRORS.dump_json(dict(sorted(known.items())))))


def _float16_errors(path: Path) -> dict[int, _Float16Error]:
    """Read the errors of fp16 by shard; an empty dictionary if the file is missing or damaged."""
    try:
        return _ERRORS.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _head_hash(head: SoftmaxHead) -> str:
    """Compute the SHA-256 of a head's numbers as fp32, so that loading them in a wider dtype changes nothing."""
    digest = hashlib.sha256(repr((head.v, head.d, head.scale, head.soft_cap)).encode())
    for _, block in head.blocks(torch.float32, cut=True):
        digest.update(block.cpu().contiguous().numpy().tobytes())
    if head.bias is not None:
        digest.update(head.bias.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(ensemble: Ensemble) -> dict[str, Any]:
    """Return the facts by which a trace recognises the members that made it.

    Returns:
        ``members``, a list of each one's ``name``, ``width`` (of its columns in a shard), ``dtype`` (of its head), and
        SHA-256 hashes of its ``head`` and of a sample of all its weights (``body``); ``tokenizer``, a hash of the
        vocabulary with its ids; ``prefixes``, each member's prompt as ids of its tokens, if one has any; over bytes
        also ``prune``, as in the ensemble's configuration.
    """
    model, vocabulary = ensemble.model, sorted(ensemble.tokenizer.get_vocab().items())
    facts: dict[str, Any] = dict(model.pruning)
    if any(own := model.contexts.prefixes):
        facts["prefixes"] = [list(ids) or None for ids in own]
    members = zip(ensemble.names, model.combiner.heads, model.member_heads, model.members, strict=True)
    return facts | {
        "members": [
            {
                "name": name,
                "width": read.d + _COSTS * bool(model.pruning),
                "dtype": str(head.dtype).removeprefix("torch."),
                "head": _head_hash(head) if isinstance(head, SoftmaxHead) else body_hash(member),
                "body": body_hash(member),
            }
            for name, read, head, member in members
        ],
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
    }


def _text_hash(documents: Sequence[TokenizedDocument]) -> str:
    """Compute SHA-256 over the names, token ids and byte counts of documents."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0")
        digest.update(document.ids.numpy().tobytes())
        digest.update(document.sizes.numpy().tobytes())
    return digest.hexdigest()
