"""The exceptions of the server, and the HTTP response, with OpenAI's error object, to any exception.

::

    SoftmeetError
    ├── RequestError          a request is invalid or not allowed (4xx)
    ├── BusyError             the queue has no room (429)
    ├── TooLateError          an answer took longer than it may (504)
    ├── ClosingError          the server is shutting down (503)
    └── InternalError         a defect of the server (500)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from softmeet.errors import InvalidInputError, ReaderError, RuleError, SoftmeetError

_log = logging.getLogger("softmeet.server")


class BusyError(SoftmeetError):
    """Raised if the batch and the queue have no room for all of a request's sequences (status 429)."""


class ClosingError(SoftmeetError):
    """Raised for requests that come, or have not ended in time, while the server shuts down (status 503)."""


class TooLateError(SoftmeetError):
    """Raised if an answer was not complete before its deadline (status 504)."""


class InternalError(SoftmeetError):
    """Raised for a defect of the server (status 500); the client sees no details, which are in the server's log."""


class RequestError(SoftmeetError):
    """Raised if a request is invalid or asks for something that the server does not offer.

    Args:
        message: the expectation, the value that came, and advice; it is sent to the client.
        status: the HTTP status of the response, from 400 to 499.
        param: the name of the request's field at fault; None if there is no such field.
        code: a machine-readable word for the kind of error, such as ``model_not_found``; None for none.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def absent(what: str, name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Return the message on a name that there is not: the nearest known one, and all of them if there are more.

    Args:
        what: the beginning of the message.
        name: the name that was asked for.
        known: the names that there are, at least one.
        cutoff: how like a known name has to be to be suggested, from 0 to 1 (equal).

    >>> absent("there is no model 'dou'", "dou", ["duo"])
    "there is no model 'dou': did you mean duo?"
    """
    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    parts = [f"did you mean {near[0]}?"] if near else []
    if near != [*known]:
        parts.append(f"expected one of {', '.join(known)}")
    return f"{what}: {' '.join(parts)}"


class ErrorDetail(BaseModel):
    """An error: a message for people, its type, the request's field at fault and a machine-readable code, or null."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response whose status is 400 or more."""

    error: ErrorDetail


# (class, status, type, code): the first entry whose class an error belongs to counts.
_SENT: tuple[tuple[type[SoftmeetError], int, str, str | None], ...] = (
    (InternalError, 500, "server_error", "internal"),
    (BusyError, 429, "rate_limit_error", "busy"),
    (ClosingError, 503, "service_unavailable_error", "shutting_down"),
    (TooLateError, 504, "timeout_error", "timeout"),
    (RuleError, 500, "server_error", "rule_failed"),
    (ReaderError, 500, "server_error", "reader_failed"),
    (InvalidInputError, 400, "invalid_request_error", "invalid_value"),
    (SoftmeetError, 422, "invalid_request_error", None),
)
_REQUEST_ERRORS = {401: "authentication_error", 404: "not_found_error"}


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status that an exception is answered with, and the body: a dict with OpenAI's error object.

    Exceptions that are not SoftmeetErrors, and InternalErrors, get status 500 and a message that reveals nothing.

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
        if isinstance(known, InternalError):
            message = "the server failed: its log says why"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def for_clients(error: Exception) -> SoftmeetError:
    """Return what may be told to clients of an exception that ended a sequence.

    A ReaderError, which may hold what a server of somebody else's says and where it is, is logged, and told without
    details. What is no SoftmeetError becomes an InternalError.
    """
    if isinstance(error, ReaderError):
        _log.error("a member failed: %s", error)
        return ReaderError("a member failed: the server's log says why")
    return error if isinstance(error, SoftmeetError) else InternalError("the server failed: see its log")


def error_response(error: Exception, headers: Mapping[str, str] | None = None, path: str = "") -> JSONResponse:
    """Return the JSON response to an exception, as :func:`described` has it, or as ollama does to requests of its API.

    Args:
        error: any exception.
        headers: further headers. With status 429 or 503 the response also has ``Retry-After: 1``.
        path: the path that was asked for.
    """
    status, body = described(error)
    if path.startswith("/api/"):
        body = {"error": body["error"]["message"]}
    retry = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(body, status, {**retry, **(headers or {})})
