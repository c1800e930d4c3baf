"""The exceptions of softmeet.

::

    SoftmeetError
    ├── InvalidInputError (ValueError)    an argument has the wrong shape, sign, length or value
    │   ├── NonFiniteError                NaN or +inf in one member's log-probabilities
    │   ├── DisjointSupportError          no token has positive probability under every member
    │   ├── VocabularyMismatchError       the members' tokenizers differ, or cannot be read as bytes
    │   └── TraceError                    a trace is damaged, of other members, or the disk is full
    ├── CheckpointError (OSError)         a member cannot be loaded
    ├── UnsupportedHeadError              a model whose output layer is not a plain softmax head
    ├── RuleError                         a rule of somebody's own failed, or gave no distribution
    ├── InfeasibleError                   no distribution has every member's moments (on_infeasible="raise")
    ├── NotConvergedError                 max_steps did not reach tol (throw=True)
    └── WorkerLostError                   workers of a cluster died, or none began

Each message says what was expected, what came and what to do.
"""


class SoftmeetError(Exception):
    """The base of all of softmeet's own errors."""


class InvalidInputError(SoftmeetError, ValueError):
    """An argument has the wrong shape, sign, length or value."""


class NonFiniteError(InvalidInputError):
    """One member's log-probabilities hold NaN or +inf, or are all -inf."""


class DisjointSupportError(InvalidInputError):
    """No token has positive probability under every member."""


class VocabularyMismatchError(InvalidInputError):
    """The members' tokenizers give the same ids to different tokens, or one of them cannot be read byte by byte."""


class TraceError(InvalidInputError):
    """A trace is missing, damaged, of other members or text, or does not fit the disk."""


class CheckpointError(SoftmeetError, OSError):
    """A member cannot be loaded: missing, truncated, not safetensors, or in need of remote code."""


class UnsupportedHeadError(SoftmeetError):
    """A model whose output layer is not a plain softmax head: quantised, offloaded, adapted or unknown."""


class RuleError(SoftmeetError):
    """A rule failed, gave something that is no distribution, or cannot be loaded from its package."""


class InfeasibleError(SoftmeetError):
    """No distribution has every member's moments, and ``on_infeasible="raise"`` was asked for."""


class NotConvergedError(SoftmeetError):
    """``max_steps`` did not reach ``tol``, and ``throw=True`` was asked for."""


class WorkerLostError(SoftmeetError):
    """The workers of a cluster died over the same piece of work, or none of them began."""
