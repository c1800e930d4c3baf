"""Counters for Prometheus, in a registry of their own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FINE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """What the engine and the API count; seconds, tokens, head passes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        within: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("softmeet_requests", "Requests answered.", ["path", "status"], **within)
        self.tokens = Counter("softmeet_tokens", "Tokens generated.", **within)
        self.prompt_tokens = Counter("softmeet_prompt_tokens", "Tokens of prompts.", **within)
        self.reused_tokens = Counter(
            "softmeet_reused_tokens", "Tokens of prompts that were not computed again.", **within
        )
        self.passes = Counter("softmeet_head_passes", "Reads of all heads by rules.", **within)
        self.gated = Counter("softmeet_gated_tokens", "Tokens at which a gate was closed.", ["gate"], **within)
        self.saved = Counter(
            "softmeet_gate_saved_seconds", "About what they would have taken with it open.", ["gate"], **within
        )
        self.rows = Gauge("softmeet_rows", "Sequences in the running batch.", **within)
        self.waiting = Gauge("softmeet_waiting", "Sequences in the queue.", **within)
        self.steps = Histogram("softmeet_step_seconds", "Time of a step.", buckets=_FINE, **within)
        self.first = Histogram("softmeet_first_token_seconds", "From request to first token.", buckets=_FINE, **within)
