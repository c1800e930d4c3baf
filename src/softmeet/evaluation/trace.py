"""Traces: every member runs over a text once, and its hidden states stay on disk for any number of rules.

A trace is a folder. ``trace.json`` holds the members (with hashes of their heads, of a sample of their weights and of
the tokenizer), a hash of the text, the windows, and the number of positions in each document. The files
``document-00000.safetensors`` and so on hold the positions, a file a document, with a checksum. What is in each follows
from the settings alone, so a run that was stopped continues with the missing documents.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import load_tensors, save_tensors, turn_at, write_text
from softmeet.evaluation.positions import (
    PIECE,
    Positions,
    TokenizedDocument,
    Window,
    Windowing,
    cut,
    from_tensors,
    grouped,
    join,
    observe,
)  # fmt: skip
from softmeet.heads import SoftmaxHead
from softmeet.members.files import TRACED, refuse_files
from softmeet.members.heads import body_hash
from softmeet.scaling.base import Engine
from softmeet.scaling.local import LocalEngine

FORMAT = 3
Dtype = Literal["float32", "float16"]
_CHUNK = 64
_FACTS = {"members", "tokenizer", "text", "bos", "window", "stride", "dtype", "documents"}
# In a document's file, the largest error that fp16 causes in its targets' log-probabilities, and their sum.
_ERROR = "float16"


@dataclass(frozen=True)
class Trace:
    """An opened trace: a folder with the positions of a text and the members' hidden states there, a file a document.

    Attributes:
        folder: the folder.
        facts: the contents of its ``trace.json``: ``members`` and ``tokenizer`` as :func:`identity` returns them,
            ``text`` (a hash), ``bos``, ``window`` and ``stride``, ``dtype`` (of the hidden states on disk) and
            ``documents`` (of each its name and its numbers of positions and bytes).
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Trace:
        """Open an existing trace by reading its ``trace.json``; no positions are read.

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
            raise TraceError(
                f"expected a trace of format {FORMAT} in {path}, got {given}: make it anew with "
                "softmeet trace in another folder"
            )
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

    @property
    def sizes(self) -> list[int]:
        """The number of positions of each document."""
        return [document["positions"] for document in self.facts["documents"]]

    def document(self, k: int) -> Path:
        """Return the path of the file of document ``k``, counted from 0, whether the file exists or not."""
        return self.folder / f"document-{k:05d}.safetensors"

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
            if differing := [key for key in ("head", "width", "body") if own[key] != theirs[key]]:
                advice = f"try --dtype {theirs['dtype']}, or name the members that made it, in order"
                if "body" not in differing and own["dtype"] == theirs["dtype"]:
                    advice = "only one of both read its head, as some rules do: leave the rule out, or name --text"
                raise TraceError(
                    f"{self.folder} was made by {theirs['name']} ({theirs['dtype']}), but in its place stands "
                    f"{own['name']} ({own['dtype']}) with another {' and '.join(differing)}: {advice}, or trace again"
                )
        if here.get("prune") != made.get("prune"):
            over = [f"over bytes (prune {x['prune']})" if "prune" in x else "over tokens" for x in (made, here)]
            raise TraceError(
                f"{self.folder} was made {over[0]}, but these members are combined {over[1]}: load them as there, or "
                "trace again"
            )
        if differing := [key for key in ("prefixes", "tokenizer") if here.get(key) != made.get(key)]:
            raise TraceError(f"{self.folder} was made with other {differing[0]} than these members': trace again")

    def read(
        self,
        on_damage: Callable[[str], None] = lambda sentence: warnings.warn(sentence, stacklevel=3),
        on_progress: Callable[[int], None] = lambda positions: None,
    ) -> Positions:
        """Read the positions of all intact documents, in order, hidden states in fp32; others are left out.

        Args:
            on_damage: called with a sentence for each document that is missing or damaged; by default a Python warning.
            on_progress: called after each document with the number of its positions.

        Raises:
            TraceError: if no document is intact.
        """
        parts = list[Positions]()
        for k, size in enumerate(self.sizes):
            if (part := self.read_document(k)) is not None:
                parts.append(part)
            else:
                on_damage(
                    f"{self.document(k)} is missing or damaged: its {size:,} positions are left out; softmeet trace, "
                    "run as before, makes it again"
                )
            on_progress(size)
        if not parts:
            raise TraceError(f"no document of {self.folder} is whole: run softmeet trace as before")
        return join(parts, parts[0].names)

    def read_document(self, k: int) -> Positions | None:
        """Return the positions of document ``k``, hidden states in fp32; None if its file is missing or damaged."""
        found = load_tensors(self.document(k), f"{self.key} {k}")
        if found is None:
            return None
        found = {name: one.float() if name.startswith("hidden") else one for name, one in found.items()}
        return from_tensors(found, [document["name"] for document in self.facts["documents"]])

    def write_document(self, k: int, positions: Positions, error: Tensor | None = None) -> None:
        """Write the positions of document ``k``, and the error that fp16 causes there, if there is one.

        Raises:
            TraceError: if the disk is full.
        """
        dtype, found = getattr(torch, self.facts["dtype"]), positions.tensors()
        found = {name: one.to(dtype) if name.startswith("hidden") else one for name, one in found.items()}
        save_tensors(self.document(k), found | ({} if error is None else {_ERROR: error}), f"{self.key} {k}")

    def float16_error(self) -> dict[str, float] | None:
        """Return the errors that fp16 causes in the targets' log-probabilities: ``largest`` and ``mean``, in nats.

        They are the largest and the mean, over positions and members, of |log p̂_i(target) from fp16 hidden states minus
        that from the original ones|. The result is None for a trace in fp32, or if a document is missing or damaged.
        """
        if self.facts["dtype"] == "float32":
            return None
        found = []
        for k in range(len(self.sizes)):
            try:
                with safe_open(self.document(k), "pt") as file:
                    found.append(file.get_tensor(_ERROR))
            except (OSError, SafetensorError):
                return None
        largest, sums = torch.stack(found).unbind(1)
        return {"largest": largest.max().item(), "mean": sums.sum().item() / sum(self.sizes)}


def record(
    ensemble: Ensemble,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    dtype: Dtype = "float32",
    engine: Engine | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int], None] = lambda positions: None,
    on_damage: Callable[[str], None] = lambda sentence: None,
    **windowing: Unpack[Windowing],
) -> Trace:
    """Run every member over a text and keep its hidden states in a trace, skipping documents that are there already.

    Args:
        ensemble: the members.
        documents: the text.
        folder: the trace's folder, made if there is none.
        dtype: of the hidden states on disk; ``"float16"`` halves the size, and its error in nats is measured.
        engine: runs the members, about 256 positions of a document in each call; None for this process.
        on_start: called once, before members run, with (the number of positions already on disk, the number in all).
        on_progress: called in this process each time that members have run over a piece of a document, just before the
            document is written if it is the last one, with the number of the piece's positions.
        on_damage: called before ``on_start`` with a sentence about each damaged document, which is made again.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as in
            :class:`softmeet.evaluation.positions.Windowing`.

    Raises:
        InvalidInputError: if the text is too short, windows do not fit, a value is bad, there are files or overflows.
        TraceError: if the folder holds another trace, or the disk is full.
    """
    refuse_files(ensemble.model.config.files, TRACED)
    if dtype not in ("float32", "float16"):
        raise InvalidInputError(f"expected the dtype float32 or float16, got {dtype}")
    tokens, window, stride = cut(ensemble, documents, **windowing)
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
        },
    )
    missing = {k for k in range(len(tokens)) if not _is_whole(trace, k, on_damage)}
    on_start(sum(size for k, size in enumerate(trace.sizes) if k not in missing), sum(trace.sizes))
    groups = grouped(tokens, window, stride, PIECE, by_document=True)
    _make(ensemble, trace, [group for group in groups if group[0].document in missing], engine, on_progress)
    return trace


def _is_whole(trace: Trace, k: int, on_damage: Callable[[str], None]) -> bool:
    """Return whether document ``k`` is on the disk, and call ``on_damage`` if it is, but damaged."""
    whole = trace.read_document(k) is not None
    if not whole and trace.document(k).exists():
        on_damage(f"{trace.document(k)} is damaged: it is made again")
    return whole


def _make(
    ensemble: Ensemble,
    trace: Trace,
    groups: Sequence[Sequence[Window]],
    engine: Engine | None,
    on_progress: Callable[[int], None],
) -> None:
    """Run the members over groups of windows, each of one document; write a document once its last group is done."""
    left, parts = Counter(group[0].document for group in groups), defaultdict[int, dict[int, Positions]](dict)
    for place, found in (engine or LocalEngine()).map(observe, ((ensemble, group) for group in groups)):
        k = groups[place][0].document
        parts[k][place] = found
        on_progress(len(found))
        if len(parts[k]) == left[k]:
            whole = join([part for _, part in sorted(parts.pop(k).items())], [])
            trace.write_document(
                k, whole, _float16_error(ensemble, whole) if trace.facts["dtype"] != "float32" else None
            )


def _prepare(folder: Path, facts: dict[str, Any]) -> Trace:
    """Make a trace's folder with its ``trace.json``; if the folder exists, check that it holds this trace."""
    # Members that are files or folders get absolute paths, so that the trace can be used from any folder.
    for member in facts["members"]:
        if Path(member["name"]).exists():
            member["name"] = str(Path(member["name"]).absolute())
    folder.mkdir(parents=True, exist_ok=True)
    with turn_at(folder):
        if not (folder / "trace.json").exists():
            write_text(folder / "trace.json", json.dumps(facts, indent=1))
    there = Trace.open(folder)
    own, found = (x | {"members": [m | {"name": ""} for m in x["members"]]} for x in (facts, there.facts))
    differing = sorted((key for key in own if own[key] != found.get(key)), key=lambda key: (key == "members", key))
    if differing:
        raise TraceError(
            f"{folder} holds another trace (it differs in {', '.join(differing)}): name another folder or remove it"
        )
    return there


@torch.inference_mode()
def _float16_error(ensemble: Ensemble, positions: Positions) -> Tensor:
    """Return the largest error that fp16 causes in targets' log-probabilities, and their mean sum, in nats, (2,)."""
    errors = []
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
        errors.append(
            (exact - found).masked_fill(exact == found, 0.0).abs().double().cpu()
        )  # over bytes both may be -inf
    error = torch.cat(errors, 1)  # (n, N)
    return torch.stack((error.max(), error.mean(0).sum()))


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
        ``members``, a list of each one's ``name``, ``width`` (of its hidden states), ``dtype`` (of its head), and
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
                "width": read.d,
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
