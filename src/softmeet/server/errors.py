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

from softmeet.errors import InvalidInputError, SoftmeetError


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


def problem(error: Exception) -> Problem:
    """Any error as it is sent."""
    text = str(error)
    match error:
        case RequestError():
            kinds = {401: "authentication_error", 404: "not_found_error"}
            return Problem(
                error.status, text, kinds.get(error.status, "invalid_request_error"), error.code, error.param
            )
        case BusyError():
            return Problem(429, text, "rate_limit_error", "busy")
        case ClosingError():
            return Problem(503, text, "service_unavailable_error", "shutting_down")
        case ReplicaLostError():
            return Problem(503, text, "service_unavailable_error", "replica_lost")
        case TooLateError():
            return Problem(504, text, "timeout_error", "timeout")
        case InvalidInputError():
            return Problem(400, text, "invalid_request_error", type(error).__name__)
        case SoftmeetError() if not isinstance(error, InternalError):
            return Problem(422, text, "invalid_request_error", type(error).__name__)
    return Problem(500, "the server failed: its log says why", "server_error", "internal")
