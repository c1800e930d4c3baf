"""Where an answer stands in the user's files, and how much these claimed of it, as fields of the server's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from softmeet.readers.reader import Reader
from softmeet.server.errors import RequestError
from softmeet.server.schemas import Extension
from softmeet.server.sequences import GenerationRequest, Token
from softmeet.server.texts import Places


def asks(ours: Extension, *, told: bool) -> bool:
    """Return whether a request asks for sources.

    Args:
        ours: its field ``softmeet``.
        told: whether the server tells any.

    Raises:
        RequestError: if it asks for some, and the server tells none.
    """
    if ours.sources and not told:
        raise RequestError(
            "this server does not say where answers stand in files: leave sources out, or start it with softmeet serve "
            "--sources",
            param="softmeet.sources",
        )
    return bool(ours.sources)


def told(asked: GenerationRequest, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return an answer's fields ``claims``, a mean share for each of the user's files, and ``sources``.

    Args:
        asked: the request.
        text: the whole answer.
        tokens: its tokens, with what was claimed at each.
    """
    shares = [fmean(own) for own in zip(*(token.claims for token in tokens), strict=True)]
    return {
        "claims": shares,
        "sources": [one for reader in asked.combination.model.claimants for one in _stretches(reader, text, asked)],
    }


def _stretches(reader: Reader, text: str, asked: GenerationRequest) -> Iterator[dict[str, Any]]:
    """Yield the stretches of a text that stand in some files; paths are told below the folder that was named alone."""
    places = Places(asked.tokenizer, special=True)
    starts = [*map(places.push, reader.alphabet.encode(text)), len(text)]
    for one in reader.sources(text):
        yield {
            "files": reader.name, "path": one.below, "line": one.line, "start": starts[one.start],
            "end": starts[one.end], "length": one.end - one.start, "changed": one.changed, "before": one.before,
            "after": one.after,
        }  # fmt: skip
