"""What goes wrong in serving, as exceptions, and every error as the response that OpenAI's clients know.

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

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from softmeet.errors import InvalidInputError, RuleError, SoftmeetError


class BusyError(SoftmeetError):
    """Raised where too many sequences are waiting."""


class ClosingError(SoftmeetError):
    """Raised for requests while the server shuts down."""


class TooLateError(SoftmeetError):
    """Raised where an answer was not done in time."""


class ReplicaLostError(SoftmeetError):
    """Raised where the replica that wrote the answer has died, or there is none."""


class InternalError(SoftmeetError):
    """Raised for a defect of the server; clients are told nothing but that there is one."""


class RequestError(SoftmeetError):
    """Raised for a request that cannot be served as it stands.

    Args:
        message: what was expected, what came, and what to do.
        status: HTTP status of the response.
        param: the field of the request that is to blame.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


# The first class that an error is of says how it is sent: (status, type, code); the code None is the error's own name.
_SENT: tuple[tuple[type[SoftmeetError], int, str, str | None], ...] = (
    (InternalError, 500, "server_error", "internal"),
    (BusyError, 429, "rate_limit_error", "busy"),
    (ClosingError, 503, "service_unavailable_error", "shutting_down"),
    (ReplicaLostError, 503, "service_unavailable_error", "replica_lost"),
    (TooLateError, 504, "timeout_error", "timeout"),
    (RuleError, 500, "server_error", "rule_failed"),
    (InvalidInputError, 400, "invalid_request_error", None),
    (SoftmeetError, 422, "invalid_request_error", None),
)
_REQUEST_ERRORS = {401: "authentication_error", 404: "not_found_error"}


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status by which any error is sent, and OpenAI's error object as the body.

    >>> described(BusyError("ask again later"))[0]
    429
    >>> described(ZeroDivisionError("a secret"))[1]["error"]["message"]
    'the server failed: its log says why'
    """
    message, param = str(error), None
    if isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
        kind = _REQUEST_ERRORS.get(status, "invalid_request_error")
    else:
        known = error if isinstance(error, SoftmeetError) else InternalError()
        _, status, kind, code = next(sent for sent in _SENT if isinstance(known, sent[0]))
        code = code or type(error).__name__
        if isinstance(known, InternalError):
            message = "the server failed: its log says why"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the response that tells a client of any error; it says when to ask again where that may help."""
    status, body = described(error)
    retry = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(body, status, retry | (headers or {}))
