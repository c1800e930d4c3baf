"""The exceptions of softmeet.

::

    SoftmeetError
    ├── InvalidInputError (ValueError)    an argument has the wrong shape, sign, length or value
    │   ├── NonFiniteError                NaN or +inf in one member's log-probabilities
    │   ├── DisjointSupportError          no token has positive probability under every member
    │   ├── ContextError                  a prompt does not fit into a member's context
    │   ├── VocabularyMismatchError       the members' tokenizers differ, or cannot be read as bytes
    │   └── TraceError                    a trace is damaged, of other members, or does not fit the disk
    ├── CheckpointError (OSError)         a member cannot be loaded
    ├── UnsupportedHeadError              a rule reads heads, and a member's cannot be read
    ├── RuleError                         a rule failed, or returned something other than distributions
    ├── ReaderError                       a reader of a member failed, or answered otherwise than it was asked
    ├── InfeasibleError                   no distribution has every member's moments (on_infeasible="raise")
    ├── NotConvergedError                 a row's gap is above tol at the end (throw=True)
    └── WorkerLostError                   workers of a cluster died, or none started

Each message names the expected and the actual value, and a remedy.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class SoftmeetError(Exception):
    """The base class of all errors that softmeet defines."""


class InvalidInputError(SoftmeetError, ValueError):
    """The error for an argument of the wrong shape, sign, length or value."""


class ContextError(InvalidInputError):
    """The error for a prompt that does not fit into a member's context."""


class NonFiniteError(InvalidInputError):
    """The error for a member whose log-probabilities or logits hold NaN or +inf, or are all -inf in a row."""


class DisjointSupportError(InvalidInputError):
    """The error for a row in which no token (in ``support``, if given) has positive probability under every member."""


class VocabularyMismatchError(InvalidInputError):
    """The error for members whose tokenizers differ in the token of some id, or cannot be read byte by byte."""


class TraceError(InvalidInputError):
    """The error for a trace (a folder of the members' hidden states over a text) that cannot be used or written.

    It is missing, damaged, of other members or another text than those given, or too large for the disk.
    """


class CheckpointError(SoftmeetError, OSError):
    """The error for a member that cannot be loaded: missing, truncated, not safetensors, or in need of remote code."""


class UnsupportedHeadError(SoftmeetError):
    """The error for a rule or setting that reads heads, of a member whose head is quantised, has LoRA or is unknown."""


class RuleError(SoftmeetError):
    """The error for a rule that fails, returns something other than distributions, or cannot be loaded."""


class ReaderError(SoftmeetError):
    """The error for a reader of a member that raises what it should not, or answers otherwise than it was asked."""


class InfeasibleError(SoftmeetError):
    """The error for rows in which no distribution has every member's moments, if ``on_infeasible="raise"``."""


class NotConvergedError(SoftmeetError):
    """The error for rows whose gap is above ``tol``, in nats, when steps, their progress or the time ended.

    Only :func:`softmeet.combine` with ``throw=True`` raises it; else such rows have the status NOT_CONVERGED or BUDGET.
    """


class WorkerLostError(SoftmeetError):
    """The error for a Ray cluster whose workers died repeatedly at the same piece of work, or of which none started."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean X? "`` for the known name that is most like an unknown one; ``""`` if none is like it.

    Example:
        >>> nearest("gtp2", ["gpt2", "llama"]), nearest("bert", ["gpt2", "llama"])
        ('did you mean gpt2? ', '')
    """
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C brought an error about: transformers makes one of its own of what ends an import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def cannot_load(name: str | Path, why: str) -> CheckpointError:
    """Return the error that says why a member, or an adapter of one, cannot be loaded."""
    return CheckpointError(f"cannot load {name}: {why}")
