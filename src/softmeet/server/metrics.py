"""The server's counters, gauges and histograms for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FINE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """The server's counters, gauges and histograms for Prometheus, in a registry of their own.

    Attributes:
        registry: holds all of them, for export.
        requests: HTTP requests answered, refused ones included, by path (``other`` if it is not one of the API's) and
            status.
        tokens: tokens drawn and appended to sequences, end-of-text tokens included.
        prompt_tokens: tokens of the prompts that were run, a prompt of n choices n times.
        reused_tokens: prompt tokens, of those in ``prompt_tokens``, whose keys and values came from the cache of
            earlier prompts in every member, or under the gate ``unsure`` in the first.
        passes: reads of all heads by rules and the fallback, summed over draws of a token, gated or not; reading a part
            of the heads counts as that part. Scored tokens of prompts do not count.
        gated: draws of a token at which a gate was closed, by the gate's name, such as ``unsure``.
        saved: an estimate of the seconds that closed gates saved at these draws, by the gate's name.
        rows: sequences in the running batch, as of the last step, those that joined in it included.
        waiting: sequences in the queue, as of the last step.
        steps: seconds that a step took, in which every running sequence gets one token.
        first: seconds from a request's submission to its first drawn token, of whichever choice.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=_FINE)
        self.requests = counter("softmeet_requests", "Requests answered.", ["path", "status"])
        self.tokens = counter("softmeet_tokens", "Tokens generated.")
        self.prompt_tokens = counter("softmeet_prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = counter("softmeet_reused_tokens", "Tokens of prompts that were not computed again.")
        self.passes = counter("softmeet_head_passes", "Reads of all heads by rules.")
        self.gated = counter("softmeet_gated_tokens", "Tokens at which a gate was closed.", ["gate"])
        self.saved = counter("softmeet_gate_saved_seconds", "About what they would have taken with it open.", ["gate"])
        self.rows = gauge("softmeet_rows", "Sequences in the running batch.")
        self.waiting = gauge("softmeet_waiting", "Sequences in the queue.")
        self.steps = histogram("softmeet_step_seconds", "Time of a step.")
        self.first = histogram("softmeet_first_token_seconds", "From request to first token.")
