"""What goes wrong in serving, as exceptions, and every error as the object that OpenAI's clients know.

::

    SoftmeetError
    ├── RequestError          a request that cannot be served as it stands (4xx)
    ├── BusyError             too many sequences are waiting (429)
    ├── TooLateError          the answer took longer than it may (504)
    ├── ClosingError          the server is shutting down (503)
    ├── ReplicaLostError      the replica that wrote the answer has died (503)
    └── InternalError         a defect of the server (500)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softmeet.errors import InvalidInputError, RuleError, SoftmeetError


class BusyError(SoftmeetError):
    """Too many sequences are waiting."""


class ClosingError(SoftmeetError):
    """The server is shutting down."""


class TooLateError(SoftmeetError):
    """The answer was not done in time."""


class ReplicaLostError(SoftmeetError):
    """The replica that wrote the answer has died, or there is none."""


class InternalError(SoftmeetError):
    """A defect of the server; the message says nothing that a stranger should not know."""


class RequestError(SoftmeetError):
    """A request that cannot be served as it stands.

    Args:
        message: what was expected, what came and what to do.
        status: of the HTTP response.
        param: the field to blame.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Problem:
    """An error as it is sent: an HTTP status and the fields of OpenAI's error object."""

    status: int
    message: str
    kind: str
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


# The first that an error is of says how it is sent: (status, type, code); the code None is the error's own name.
_SENT: tuple[tuple[type[SoftmeetError], int, str, str | None], ...] = (
    (BusyError, 429, "rate_limit_error", "busy"),
    (ClosingError, 503, "service_unavailable_error", "shutting_down"),
    (ReplicaLostError, 503, "service_unavailable_error", "replica_lost"),
    (TooLateError, 504, "timeout_error", "timeout"),
    (RuleError, 500, "server_error", "rule_failed"),
    (InvalidInputError, 400, "invalid_request_error", None),
    (SoftmeetError, 422, "invalid_request_error", None),
)


def problem(error: Exception) -> Problem:
    """Any error as it is sent."""
    if isinstance(error, RequestError):
        kinds = {401: "authentication_error", 404: "not_found_error"}
        kind = kinds.get(error.status, "invalid_request_error")
        return Problem(error.status, str(error), kind, error.code, error.param)
    for known, status, kind, code in _SENT:
        if isinstance(error, known) and not isinstance(error, InternalError):
            return Problem(status, str(error), kind, code or type(error).__name__)
    return Problem(500, "the server failed: its log says why", "server_error", "internal")
