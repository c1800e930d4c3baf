"""Requests that a server has to refuse, and what schemathesis makes of its OpenAPI document."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

# Seconds after which an answer counts as never coming.
PATIENCE = 120.0


def malformed(generator: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body that must be refused, and its headers."""
    headers = {"content-type": "application/json"}
    fields: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
    kind = generator.randrange(7)
    if kind == 0:
        return bytes(generator.randrange(256) for _ in range(generator.randrange(200))) + b"\xff", headers
    if kind == 1:
        return json.dumps(fields).encode()[: generator.randrange(1, 20)], headers
    if kind == 2:
        number = generator.choice(["NaN", "-Infinity", "1e400", "9" * 5000, "01", "0x1"])
        return f'{{"prompt":"a","temperature":{number}}}'.encode(), headers
    if kind == 3:
        depth = generator.randrange(300, 100_000)
        return b'{"prompt":' + b"[" * depth + b"]" * depth + b"}", headers
    if kind == 4:
        return json.dumps(fields | {generator.choice(["tools", "x", "softmet", "\u2603" * 300]): 1}).encode(), headers
    if kind == 5:
        return b'{"prompt":"' + b"x" * generator.randrange(2_000_000) + b'","temperature":9}', headers
    name = generator.choice(
        ["max_tokens", "n", "temperature", "stop", "logit_bias", "softmeet", "seed", "stream", "echo"]
    )
    bad = {"seed": ["x", [], {}, 2**70, 1.5], "stop": [1, {}, "", [""], True]}.get(
        name, ["x", -1, [-1], [[]], 2**70, "\u0000"]
    )
    return json.dumps(fields | {name: generator.choice(bad)}).encode(), headers


def hostile(generator: random.Random) -> dict[str, Any]:
    """A well-formed request that asks for as much as it can: refused or answered, but never a defect."""
    fields: dict[str, Any] = {"prompt": "And the king said", "max_tokens": 8, "softmeet": {"rule": "logit-mean"}}
    words = "and it came to pass in those days that "
    return fields | generator.choice(
        [
            {"n": 128}, {"n": 16, "max_tokens": 32}, {"max_tokens": 1 << 62}, {"prompt": ["a"] * 200},
            {"logit_bias": {str(k): (-1) ** k * 100 for k in range(1024)}}, {"logit_bias": {"999999999": 1}},
            {"prompt": words * 2000}, {"prompt": words * 20, "max_tokens": 60}, {"prompt": [[1] * 200] * 8},
            {"echo": True, "logprobs": 5, "prompt": words * 12, "softmeet": {"report": 20}},
            {"stop": ["\u00e9" * 200] * 16}, {"softmeet": {"trust": [1.0] * 64}}, {"prompt": "\x00\ud83d"},
            {"temperature": 2, "presence_penalty": 2, "frequency_penalty": -2, "top_p": 1e-9},
        ]
    )  # fmt: skip


# The most that valid requests of ``fuzz`` ask for.
_MOST = {"max_tokens": 40, "max_completion_tokens": 40, "max_output_tokens": 40, "n": 2, "best_of": 3, "min_tokens": 20}

# Endpoints at which an answer may be as long as the context, and the field that bounds it.
_ENDLESS = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}


def fuzz(
    url: str, examples: int, seed: int = 0, is_over: Callable[[], bool] = lambda: False, patience: float = PATIENCE
) -> Counter[str]:
    """What schemathesis makes of the OpenAPI document: valid and invalid requests to every operation.

    Counted are those that were ``answered``, ``refused``, and ``wrong``: with a status of 500, a body that is no error
    object, or not in ``patience`` seconds. ``is_over`` says when to make no more of them.
    """
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    seen: Counter[str] = Counter()
    quiet = settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def check(case: Any) -> None:
        if not is_over():
            seen[_outcome(case, patience)] += 1

    def check_possible(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = _possible(case.path, case.body)
        check(case)

    for operation in (
        found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()
    ):
        for mode, checked in ((GenerationMode.POSITIVE, check_possible), (GenerationMode.NEGATIVE, check)):
            try:
                hypothesis.seed(seed)(quiet(given(case=operation.as_strategy(generation_mode=mode))(checked)))()
            except Unsatisfiable:
                seen["nothing to make"] += 1
    return seen


def _possible(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a valid body without names that cannot be guessed from a schema, and with few tokens.

    Many choices of hundreds of tokens each would take a busy server longer than PATIENCE.
    """
    body = {k: x for k, x in body.items() if k not in ("model", "softmeet", "logit_bias")}
    body |= {k: min(body[k], most) for k, most in _MOST.items() if isinstance(body.get(k), int)}
    if path in _ENDLESS and not any(isinstance(body.get(k), int) for k in _MOST if "max" in k):
        body[_ENDLESS[path]] = 40
    return body


def _outcome(case: Any, patience: float) -> str:
    import requests

    try:
        response = case.call(timeout=patience)
    except requests.exceptions.Timeout:
        return _wrong(case, "no answer")
    if (400 <= response.status_code < 500 or response.status_code == 503) and set(response.json()) == {"error"}:
        return "refused"
    if response.status_code != 200:
        return _wrong(case, f"status {response.status_code}")
    return "answered"


def _wrong(case: Any, what: str) -> str:
    """Print a request that was answered wrongly, on stderr."""
    print(f"{case.method} {case.path}: {what}: {str(case.body)[:500]}", file=sys.stderr)
    return "wrong"
