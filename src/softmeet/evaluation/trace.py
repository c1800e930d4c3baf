"""Traces: every member runs over a text once, and its hidden states stay on disk for any number of rules.

A trace is a folder: ``trace.json`` says which members made it (hashes of heads and tokenizer), of which text, in which
windows, and what each shard holds; ``shard-00000.parquet`` and so on hold the positions. What each shard will hold
follows from the settings alone, so a run that was stopped goes on with the shards that are not there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import write_text
from softmeet.evaluation.identity import identity
from softmeet.evaluation.positions import Positions, join, observe
from softmeet.evaluation.shards import read_shard, write_shard
from softmeet.evaluation.windows import cut, grouped, readings, text_hash, windows
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

FORMAT = 1
Dtype = Literal["float32", "float16"]
_CHUNK = 64
_FACTS = {"members", "tokenizer", "text", "bos", "window", "stride", "dtype", "documents", "shards"}
# What is noted of each shard of fp16.
_ERROR = ("largest", "sum", "positions")


@dataclass(frozen=True)
class Trace:
    """A folder of positions and what is known about it (``facts``, the contents of ``trace.json``)."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Trace:
        """A trace that is there.

        Raises:
            TraceError: it is not one, or of a format that this version does not know.
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
        """The names of the members that made it."""
        return [member["name"] for member in self.facts["members"]]

    @property
    def key(self) -> str:
        """What every shard of it carries."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def shard(self, k: int) -> Path:
        """The file of shard k."""
        return self.folder / f"shard-{k:05d}.parquet"

    def require(self, ensemble: Ensemble) -> None:
        """Check that an ensemble's members are those that made it.

        Raises:
            TraceError: they are not; the message names the first that differs.
        """
        found = identity(ensemble)
        if len(found["members"]) != len(self.facts["members"]):
            raise TraceError(
                f"{self.folder} was made by {len(self.facts['members'])} members ({', '.join(self.members)}), got "
                f"{len(found['members'])}: name those, in that order, or trace again"
            )
        for own, theirs in zip(found["members"], self.facts["members"], strict=True):
            if own["head"] != theirs["head"]:
                made_in = theirs.get("dtype", own["dtype"])
                advice = (
                    "name the members that made it, in order" if made_in == own["dtype"] else f"try --dtype {made_in}"
                )
                raise TraceError(
                    f"{self.folder} was made by {theirs['name']} (head {theirs['head'][:12]}, {made_in}), but in its "
                    f"place stands {own['name']} (head {own['head'][:12]}, {own['dtype']}): {advice}, or trace again"
                )
            if own["body"] != theirs.get("body", own["body"]):
                raise TraceError(
                    f"{self.folder} was made by {theirs['name']}, but {own['name']} in its place has other weights "
                    "below the same head: name the members that made it, in order, or trace again"
                )
        if found.get("prune") != self.facts.get("prune"):
            over = {facts.get("prune"): f"over bytes (prune {facts.get('prune')})" for facts in (found, self.facts)}
            made, here = (
                over[facts.get("prune")] if "prune" in facts else "over tokens" for facts in (self.facts, found)
            )
            raise TraceError(f"{self.folder} was made {made}, but these members are combined {here}: trace again")
        if found.get("prefixes") != self.facts.get("prefixes"):
            raise TraceError(f"{self.folder} was made behind other prefixes than these members': trace again")
        if found["tokenizer"] != self.facts["tokenizer"]:
            raise TraceError(f"{self.folder} was made with another tokenizer than these members': trace again")

    def read(self, on_damage: Callable[[str], None] | None = None) -> Positions:
        """All positions of shards that are whole.

        Args:
            on_damage: called with a sentence for each shard that is missing or damaged; a warning if None.

        Raises:
            TraceError: no shard is whole.
        """
        return self.read_whole(on_damage or (lambda sentence: warnings.warn(sentence, stacklevel=4)))[0]

    def read_whole(self, on_damage: Callable[[str], None]) -> tuple[Positions, list[int]]:
        """The same, and which shards are left out."""
        names = [document["name"] for document in self.facts["documents"]]
        parts, left_out = [], []
        for k, size in enumerate(self.facts["shards"]):
            try:
                parts.append(self._read(k, names))
            except TraceError as error:
                left_out.append(k)
                on_damage(
                    f"{error}: its {size:,} positions are left out; softmeet trace, run as before, makes it again"
                )
        if not parts:
            raise TraceError(f"no shard of {self.folder} is whole: run softmeet trace as before")
        return join(parts, names), left_out

    def _read(self, k: int, names: list[str]) -> Positions:
        widths = [member["width"] for member in self.facts["members"]]
        dtype = getattr(torch, self.facts["dtype"])
        return read_shard(self.shard(k), self.key, names, self.facts["shards"][k], widths, dtype)

    def float16_error(self) -> dict[str, float] | None:
        """The largest and the mean error of a target's log-probability under any member, nats.

        None for fp32, or where ``float16.json``, which is written with the shards, is gone or damaged.
        """
        found = _errors(self.folder / "float16.json").values()
        if self.facts["dtype"] == "float32" or not found:
            return None
        largest, total = max(entry["largest"] for entry in found), sum(entry["sum"] for entry in found)
        return {"largest": largest, "mean": total / sum(entry["positions"] for entry in found)}


def record(
    ensemble: Ensemble,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
    dtype: Dtype = "float32",
    shard_size: int = 4096,
    engine: Engine | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int], None] = lambda positions: None,
    on_damage: Callable[[str], None] = lambda sentence: None,
) -> Trace:
    """Run every member over a text and keep its hidden states; goes on where an earlier run of the same stopped.

    Args:
        ensemble: the members.
        documents: the text.
        folder: of the trace.
        window, stride, bos, max_tokens, max_per_document: as ``observe_text`` has them.
        dtype: of the hidden states on disk; fp16 halves the size, and its error in nats is measured.
        shard_size: positions in a shard, at least.
        engine: where to run the members; None for here.
        on_start: called with (positions that are there, positions in all).
        on_progress: called with the number of positions of each new shard.
        on_damage: called with a sentence about each shard that has to be made again.

    Raises:
        InvalidInputError: the text is too short, the windows do not fit, or hidden states overflow fp16.
        TraceError: the folder holds another trace, or the disk is full.
    """
    if dtype not in ("float32", "float16") or shard_size < 1:
        raise InvalidInputError(f"expected float32 or float16 and a positive shard size, got {dtype} and {shard_size}")
    if dtype == "float16":
        ensemble.model.require_tokens("a trace in float16")
    limits = {"bos": bos, "max_tokens": max_tokens, "max_per_document": max_per_document}
    tokens, size, step = cut(ensemble, documents, window=window, stride=stride, **limits)
    groups = grouped(windows(tokens, size, step), shard_size, by_document=False)
    trace = _prepare(
        Path(folder),
        {
            "format": FORMAT,
            **_located(identity(ensemble)),
            "text": text_hash(tokens),
            "bos": bos,
            "window": size,
            "stride": step,
            "dtype": dtype,
            "documents": [{"name": t.name, "positions": len(t.ids) - 1, "bytes": int(t.sizes.sum())} for t in tokens],
            "shards": [sum(map(len, group)) for group in groups],
        },
    )
    missing = [k for k in range(len(groups)) if not _is_whole(trace, k, on_damage)]
    total = sum(trace.facts["shards"])
    on_start(total - sum(trace.facts["shards"][k] for k in missing), total)
    read = ((ensemble, readings(tokens, groups[k])) for k in missing)
    for place, positions in (engine or LocalEngine()).map(observe, read):
        k = missing[place]
        on_progress(len(positions))
        if dtype == "float16":
            _note_error(ensemble, trace, k, positions)
        write_shard(trace.shard(k), positions, getattr(torch, dtype), trace.key)
    return trace


def _located(found: dict[str, Any]) -> dict[str, Any]:
    """Members that are files or folders by their whole paths, so that the trace can be used from anywhere."""
    for member in found["members"]:
        if Path(member["name"]).exists():
            member["name"] = str(Path(member["name"]).absolute())
    return found


def _prepare(folder: Path, facts: dict[str, Any]) -> Trace:
    """The folder with its ``trace.json``, which is as it was if this is the trace that is there."""
    path = folder / "trace.json"
    if path.exists():
        there = Trace.open(folder).facts
        names = [{**m, "name": ""} for m in facts["members"]], [{**m, "name": ""} for m in there["members"]]
        differing = sorted(key for key in facts if key != "members" and facts[key] != there.get(key))
        differing += ["members"] if names[0] != names[1] else []
        if differing:
            raise TraceError(
                f"{folder} holds another trace (it differs in {', '.join(differing)}): name another folder or remove it"
            )
        return Trace(folder, there)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(facts, indent=1))
    return Trace(folder, facts)


def _is_whole(trace: Trace, k: int, on_damage: Callable[[str], None]) -> bool:
    if not trace.shard(k).exists():
        return False
    try:
        trace._read(k, [])
    except TraceError as error:
        on_damage(f"{error}: it is made again")
        return False
    return True


@torch.inference_mode()
def _note_error(ensemble: Ensemble, trace: Trace, k: int, positions: Positions) -> None:
    """Measure what fp16 does to each target's log-probability, and add it to ``float16.json``."""
    largest, total = 0.0, 0.0
    for i, head in enumerate(ensemble.model.heads):
        for chunk in positions.chunks(_CHUNK):
            hidden = chunk.hidden[i]
            rounded = hidden.to(torch.float16)
            if not rounded.isfinite().all():
                raise InvalidInputError(
                    f"hidden states of {ensemble.names[i]} do not fit fp16 (largest {hidden.abs().max():.3g}): "
                    "trace in float32"
                )
            pair = [head.log_probs(h.to(head.weight.device)) for h in (hidden, rounded.to(hidden.dtype))]
            error = (pair[0] - pair[1]).gather(-1, chunk.targets[:, None]).abs()
            largest, total = max(largest, error.max().item()), total + error.sum().item() / len(ensemble.names)
    path = trace.folder / "float16.json"
    known = _errors(path)
    known[str(k)] = {"largest": largest, "sum": total, "positions": len(positions)}
    write_text(path, json.dumps(known, sort_keys=True))


def _errors(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {k: entry for k, entry in entries if isinstance(entry, dict) and _is_error(entry)}


def _is_error(entry: dict[str, Any]) -> bool:
    return all(isinstance(entry.get(name), int | float) for name in _ERROR) and entry["positions"] > 0
