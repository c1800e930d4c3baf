"""The server's counters, gauges and histograms for Prometheus."""

from __future__ import annotations

from collections.abc import Collection, Sized
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from softmeet import freed_memory

_FINE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """The server's counters, gauges and histograms for Prometheus, in a registry of their own.

    There their names begin with ``softmeet_``. The registry also has the figures of the process, where the system tells
    them (on Linux): memory, processor time and open files, under Prometheus' own names, such as
    ``process_resident_memory_bytes``.

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
        drafted: tokens that members drafted for a sequence that ran alone.
        accepted: those of them that the rule drew, too.
        gated: draws of a token at which a gate was closed, by the gate's name, such as ``unsure``.
        saved: an estimate of the seconds that closed gates saved at these draws, by the gate's name.
        rows: sequences in the running batch now, those whose prompts are running included; 0 when idle.
        waiting: sequences in the queue now.
        between: seconds from one token of a sequence to its next.
        unsolved: tokens drawn from a distribution that did not reach the tolerance, by status.
        kept_prompt_tokens: tokens of past prompts whose keys and values are kept now, summed over members.
        cache_bytes: bytes of all keys and values now: those of running sequences and of kept prompts.
        allocated_bytes: bytes that the process has allocated and not freed; None where the C library does not tell.
        first: seconds from a request's submission to its first drawn token, of whichever choice.
    """

    def __init__(self) -> None:
        # The times at which each series began would double the answer, and Prometheus reads none of them by default.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, namespace="softmeet", registry=self.registry)
        gauge = partial(Gauge, namespace="softmeet", registry=self.registry)
        histogram = partial(Histogram, namespace="softmeet", registry=self.registry, buckets=_FINE)
        self.requests = counter("requests", "HTTP requests that were answered or refused.", ["path", "status"])
        self.tokens = counter("tokens", "Tokens that were generated.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, reused ones included.")
        self.reused_tokens = counter(
            "reused_tokens", "Tokens of prompts taken from the cache of earlier prompts, not computed again."
        )
        self.passes = counter(
            "head_passes", "Times that rules read all of the members' output layers; parts count as parts."
        )
        self.drafted = counter("draft_tokens", "Tokens that members drafted while a single sequence ran.")
        self.accepted = counter("accepted_draft_tokens", "Drafted tokens that the rule drew, too.")
        self.gated = counter("gated_tokens", "Generated tokens for which a gate spared the rule, by gate.", ["gate"])
        self.saved = counter("gate_saved_seconds", "Estimated seconds that gates have saved, by gate.", ["gate"])
        self.rows = gauge("rows", "Sequences that are being generated now; at most --batch.")
        self.waiting = gauge("waiting", "Sequences that wait for a place in the batch now.")
        self.kept_prompt_tokens = gauge(
            "kept_prompt_tokens", "Tokens of past prompts whose keys and values are kept, summed over members."
        )
        self.cache_bytes = gauge("cache_bytes", "Bytes of keys and values, of running sequences and kept prompts.")
        self.allocated_bytes = None
        if freed_memory.in_use() is not None:
            self.allocated_bytes = gauge("allocated_bytes", "Bytes of memory that are allocated and not freed.")
            self.allocated_bytes.set_function(lambda: freed_memory.in_use() or 0)
        self.between = histogram("inter_token_latency_seconds", "Seconds from one token of a sequence to its next.")
        self.unsolved = counter(
            "unsolved_tokens", "Generated tokens at which the rule did not converge, by status.", ["status"]
        )
        self.first = histogram(
            "first_token_seconds", "Seconds from a request's arrival in the queue to its first token."
        )

    def watch(self, waiting: Sized, running: Sized, readers: Collection[Any]) -> None:
        """Tell from now on how many sequences wait and run, and what readers hold."""
        self.waiting.set_function(lambda: len(waiting))
        self.rows.set_function(lambda: len(running))
        self.kept_prompt_tokens.set_function(lambda: sum(getattr(one, "kept_tokens", 0) for one in readers))
        self.cache_bytes.set_function(lambda: sum(one.bytes for one in readers))
