"""softmeet samples from several language models as one."""

from softmeet._version import __version__
from softmeet.heads import SoftmaxHead
from softmeet.rules.combine import combine
from softmeet.rules.registry import RULES
from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status

__all__ = ["RULES", "SoftmaxHead", "Solution", "Status", "__version__", "combine"]
