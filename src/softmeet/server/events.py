"""Documents as compact JSON, and as the server-sent events of a stream."""

from __future__ import annotations

import json
from typing import Any

# Characters at which some clients, those of httpx and of str.splitlines among them, would cut an event's line.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
LAST_EVENT = "data: [DONE]\n\n"


def dumps(document: Any) -> str:
    """Return a document as compact JSON.

    Raises:
        ValueError: if it holds NaN or an infinity, for which JSON has no numbers.

    >>> dumps({"text": "é", "logprob": -0.5})
    '{"text":"é","logprob":-0.5}'
    """
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(document: Any) -> str:
    r"""Return a document as one server-sent event: its compact JSON after ``data:``, and an empty line.

    >>> event({"text": "a\u2028b"})
    'data: {"text":"a\\u2028b"}\n\n'
    """
    return f"data: {dumps(document).translate(_LINE_ENDS)}\n\n"
