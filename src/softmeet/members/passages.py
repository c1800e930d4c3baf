"""Retrieved passages: each gives a member of its own, which reads the passage before the text, and a weight (REPLUG).

Shi et al., "REPLUG: Retrieval-Augmented Black-Box Language Models" (2023): with passages d of scores s_d, a text's next
token has the probability Σ_d λ_d p(y | d, text), λ being the softmax of s_d / temperature.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.members.member import SLOT, Member

# The rule of REPLUG.
PASSAGE_RULE = "prob-mean"
# What is put between a passage and what follows it.
_BREAK = "\n\n"


@dataclass(frozen=True)
class Passage:
    """A passage of text that was retrieved for a prompt.

    Attributes:
        text: the passage.
        score: how relevant the retriever found it; larger is more.

    Raises:
        InvalidInputError: if the text is empty or holds ``{prompt}``, or the score is no finite number.
    """

    text: str
    score: float

    def __post_init__(self) -> None:
        """Check the text and the score."""
        if not isinstance(self.text, str) or not self.text.strip() or SLOT in self.text:
            raise InvalidInputError(f"expected a passage with a text, without {SLOT} in it, got {self.text!r:.80}")
        number = isinstance(self.score, int | float) and not isinstance(self.score, bool)
        if not (number and math.isfinite(self.score)):
            raise InvalidInputError(
                f"expected a passage with a score, a finite number, got {self.score!r} for {self.text!r:.60}"
            )


def read_passages(path: str | Path) -> list[Passage]:
    """Read passages from a file with one JSON object a line, with ``text`` and ``score``; other keys are ignored.

    Raises:
        InvalidInputError: if the file cannot be read or has no passage, or a line is not such an object; the message
            names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidInputError(f"cannot read the passages in {path}: {why}: check the path") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one: Any = json.loads(line)
        except ValueError:
            one = None
        if not isinstance(one, dict) or not {"text", "score"} <= one.keys():
            raise InvalidInputError(f'expected {{"text": …, "score": …}} in line {number} of {path}, got {line[:80]!r}')
        try:
            found.append(Passage(one["text"], one["score"]))
        except InvalidInputError as error:
            raise InvalidInputError(f"in line {number} of {path}: {error}") from error
    if not found:
        raise InvalidInputError(f"expected passages in {path}, one JSON object a line, got an empty file")
    return found


def passage_weights(passages: Sequence[Passage], temperature: float = 1.0) -> list[float]:
    """Compute each passage's weight: the softmax of scores / temperature.

    Raises:
        InvalidInputError: if there is no passage, or the temperature is not a positive number.

    Example:
        >>> [round(weight, 2) for weight in passage_weights([Passage("a", 1.0), Passage("b", 0.0)])]
        [0.73, 0.27]
    """
    if not passages:
        raise InvalidInputError("expected at least one passage, got none")
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InvalidInputError(f"expected a temperature of passages above 0, got {temperature!r}")
    top = max(one.score for one in passages)
    shares = [math.exp((one.score - top) / temperature) for one in passages]
    return [share / sum(shares) for share in shares]


def reading(members: Iterable[Member], passages: Sequence[Passage]) -> list[Member]:
    """Return each member once for each passage, member by member; it reads the passage before its own prompt.

    Example:
        >>> [member.title for member in reading([Member("wide/gpt2")], [Passage("a", 1.0), Passage("b", 0.0)])]
        ['wide/gpt2+passage1', 'wide/gpt2+passage2']
    """
    return [
        replace(member, prompt=f"{passage.text}{_BREAK}{member.prompt or ''}", name=f"{member.title}+passage{number}")
        for member in members
        for number, passage in enumerate(passages, 1)
    ]
