"""What the matrix tries: the values of each axis, what is refused where, and a table that has every pair of values."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from itertools import combinations, product

from softmeet.errors import InvalidInputError, UnsupportedHeadError

# "default" is what is shipped: the axis is then not named anywhere. By default the rule is meet, over bytes logit-mean.
AXES = {
    "vocabulary": ("tokens", "bytes", "symbols"),
    "rule": ("default", "logit-mean", "prob-mean", "power-mean", "max-entropy"),
    "gate": ("default", "none", "unsure", "disagreement"),
    "structure": ("none", "regex", "choice", "schema"),
    "sampling": ("greedy", "seeded", "tempered", "biased", "torch"),
    "speculation": ("default", "0", "4"),
    "files": ("none", "files"),
}
# Thresholds between the quartiles of what the members say, so that gates are open at some tokens and closed at others.
GATES = {
    "unsure": dict.fromkeys([*AXES["vocabulary"], "mixed"], "unsure:0.4"),
    "disagreement": {"tokens": "disagreement:0.75", "bytes": "disagreement:0.7", "symbols": "disagreement:0.03"},
}
AVERAGES = ("logit-mean", "prob-mean", "power-mean")
PYTHON, COMMAND, SERVER = "python", "command", "server"


@dataclass(frozen=True)
class Case:
    """One value of each axis; those of the axes that a refusal or a family's case leaves out are the shipped ones."""

    vocabulary: str = "tokens"
    rule: str = "default"
    gate: str = "default"
    structure: str = "none"
    sampling: str = "greedy"
    speculation: str = "default"
    files: str = "none"

    def __str__(self) -> str:
        return ", ".join(f"{name}={own}" for (name, own), usual in zip(self.named(), astuple(Case()), strict=True)
                         if own != usual or name == "vocabulary")  # fmt: skip

    def named(self) -> Iterator[tuple[str, str]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def pairs(self) -> set[tuple[tuple[str, str], ...]]:
        return set(combinations(self.named(), 2))

    @property
    def served(self) -> str:
        return self.vocabulary if self.files == "none" else f"{self.vocabulary}-files"

    @property
    def gate_text(self) -> str | None:
        """Return the gate as users write it; None for the shipped one."""
        return None if self.gate == "default" else GATES.get(self.gate, {}).get(self.vocabulary, self.gate)

    @property
    def rule_text(self) -> str | None:
        return None if self.rule == "default" else self.rule

    @property
    def unit(self) -> str:
        """Return what the limit counts: over bytes now these and now tokens."""
        return "bytes" if self.vocabulary == "bytes" and self.rule in ("default", "power-mean") else "tokens"

    @property
    def drawn(self) -> bool:
        return self.sampling != "greedy"


@dataclass(frozen=True)
class Refusal:
    """Values that do not go together on some roads, of which a regular expression tells what is said."""

    values: dict[str, tuple[str, ...]]
    roads: tuple[str, ...]
    match: str
    error: type[Exception] = InvalidInputError

    def holds(self, case: Case) -> bool:
        return all(getattr(case, axis) in own for axis, own in self.values.items())

    def cases(self) -> list[Case]:
        return [replace(Case(), **dict(zip(self.values, own, strict=True))) for own in product(*self.values.values())]


EVERYWHERE = (PYTHON, COMMAND, SERVER)
REFUSALS = (
    Refusal(
        {"vocabulary": ("bytes",), "rule": ("max-entropy",)}, EVERYWHERE, "reads the rows of softmax matrices",
        UnsupportedHeadError,
    ),
    Refusal(
        {"vocabulary": ("symbols",), "structure": ("regex", "choice", "schema")}, EVERYWHERE,
        "expected members whose tokens can be read as bytes for structured output",
    ),
    # A server speculates where it can: what a request asks for comes first.
    Refusal({"gate": ("unsure",), "speculation": ("4",)}, (PYTHON, COMMAND), "cannot be used with the gate unsure"),
    # Python takes a gate that never closes; in a request it would be a promise.
    Refusal(
        {"rule": AVERAGES, "gate": ("disagreement",)}, (SERVER,), "has no solve that the gate .* could save"
    ),
    Refusal(
        {"vocabulary": ("bytes",), "rule": ("default",), "gate": ("disagreement",)}, (SERVER,),
        "has no solve that the gate .* could save",
    ),
)  # fmt: skip
# What a kind of roads has no words for: a command and a request draw by a seed of their own, or by none, and the
# command has no penalties of OpenAI's.
UNSAID = {COMMAND: ("torch", "biased"), SERVER: ("torch",), PYTHON: ()}


def can(case: Case, road: str) -> bool:
    """Return whether a kind of roads can express a case, and does not refuse it."""
    refused = any(road in refusal.roads and refusal.holds(case) for refusal in REFUSALS)
    return not refused and case.sampling not in UNSAID[road]


def legal() -> list[Case]:
    every = (Case(*values) for values in product(*AXES.values()))
    return [case for case in every if any(can(case, road) for road in EVERYWHERE)]


# Every legal pair of values in Python and on the server, and every value on the command line: a test says what is
# missing. New cases stand at the end, since a case's place is its seed.
CASES = (
    Case("tokens", sampling="seeded"),
    Case("bytes", sampling="seeded"),
    Case("symbols", sampling="seeded"),
    Case("tokens", "default", "none", "choice", "torch", "default"),
    Case("tokens", "default", "disagreement", "regex", "seeded", "default"),
    Case("tokens", "default", "disagreement", "schema", "greedy", "4"),
    Case("tokens", "default", "disagreement", "regex", "greedy", "4"),
    Case("tokens", "default", "disagreement", "choice", "tempered", "0"),
    Case("tokens", "default", "disagreement", "schema", "biased", "4"),
    Case("tokens", "logit-mean", "default", "none", "greedy", "0"),
    Case("tokens", "logit-mean", "none", "choice", "biased", "4"),
    Case("tokens", "logit-mean", "disagreement", "schema", "torch", "4"),
    Case("tokens", "prob-mean", "default", "schema", "biased", "default"),
    Case("tokens", "prob-mean", "unsure", "choice", "torch", "default"),
    Case("tokens", "prob-mean", "disagreement", "none", "greedy", "4"),
    Case("tokens", "power-mean", "default", "choice", "seeded", "4"),
    Case("tokens", "power-mean", "default", "choice", "torch", "4"),
    Case("tokens", "power-mean", "disagreement", "choice", "biased", "default"),
    Case("tokens", "max-entropy", "none", "schema", "greedy", "0"),
    Case("tokens", "max-entropy", "unsure", "regex", "biased", "default"),
    Case("tokens", "max-entropy", "disagreement", "choice", "tempered", "default"),
    Case("bytes", "default", "default", "regex", "tempered", "0"),
    Case("bytes", "default", "none", "choice", "seeded", "4"),
    Case("bytes", "default", "unsure", "schema", "seeded", "default"),
    Case("bytes", "logit-mean", "none", "schema", "tempered", "0"),
    Case("bytes", "logit-mean", "unsure", "regex", "tempered", "default"),
    Case("bytes", "prob-mean", "none", "regex", "seeded", "0"),
    Case("bytes", "prob-mean", "unsure", "none", "biased", "4"),
    Case("bytes", "prob-mean", "unsure", "choice", "greedy", "0"),
    Case("bytes", "prob-mean", "disagreement", "regex", "torch", "0"),
    Case("bytes", "power-mean", "none", "regex", "biased", "0"),
    Case("bytes", "power-mean", "none", "schema", "tempered", "default"),
    Case("bytes", "power-mean", "disagreement", "none", "torch", "default"),
    Case("symbols", "default", "disagreement", "none", "biased", "0"),
    Case("symbols", "default", "disagreement", "none", "seeded", "default"),
    Case("symbols", "logit-mean", "unsure", "none", "seeded", "0"),
    Case("symbols", "logit-mean", "disagreement", "none", "biased", "0"),
    Case("symbols", "prob-mean", "none", "none", "tempered", "4"),
    Case("symbols", "power-mean", "unsure", "none", "greedy", "default"),
    Case("symbols", "max-entropy", "default", "none", "seeded", "4"),
    Case("symbols", "max-entropy", "disagreement", "none", "torch", "0"),
    # The bundled families, with all as it is shipped.
    Case("family", sampling="seeded"),
    Case("family", structure="regex"),
    Case("mixed", sampling="seeded"),
    Case("mixed", gate="unsure", sampling="tempered"),
    # Drafts of members that differ, with nothing that makes them right.
    Case("tokens", sampling="seeded", speculation="4"),
    Case("tokens", "logit-mean", sampling="tempered", speculation="4"),
    # Files beside members.
    Case("tokens", "logit-mean", "none", "regex", "seeded", "4", "files"),
    Case("tokens", "default", "unsure", "none", "greedy", "default", "files"),
    Case("tokens", "prob-mean", "default", "choice", "torch", "0", "files"),
    Case("tokens", "default", "disagreement", "schema", "greedy", "4", "files"),
    Case("symbols", "max-entropy", "disagreement", "none", "biased", "0", "files"),
    Case("bytes", "power-mean", "none", "schema", "tempered", "0", "files"),
    Case("bytes", "prob-mean", "unsure", "choice", "seeded", "default", "files"),
    Case("bytes", "default", "default", "none", "greedy", "default", "files"),
)
