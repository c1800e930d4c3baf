"""What is asked of a mixture: by whoever starts the server, in the environment, and by requests, in ``vllm_xargs``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from softmeet.engine.unread import AVERAGE, averages, reader_of
from softmeet.errors import InvalidInputError
from softmeet.rules.settings import Settings
from softmeet.rules.values import BY_SIZE

MEMBERS, RULE = "SOFTMEET_MEMBERS", "SOFTMEET_RULE"
# What a request may say, and the setting that it is.
FIELDS = {"softmeet_rule": "rule", "softmeet_weights": "weights", "softmeet_temperature": "rule_temperature"}
# The one average in which an impossible token stays so, whatever its probability was before it was forbidden.
_KEEPS_ZEROS = "logit-mean"


@dataclass(frozen=True)
class Mixed:
    """The mixture that a server makes unless a request asks for another one.

    Attributes:
        members: the models beside vLLM's own, as softmeet names members; empty where nothing is mixed.
        rule: how they are mixed, vLLM's own model first.
    """

    members: tuple[str, ...] = ()
    rule: str = AVERAGE

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Mixed:
        """Read ``SOFTMEET_MEMBERS`` (names as in a shell's line) and ``SOFTMEET_RULE``.

        Args:
            environment: the variables; None for those of this process.

        Example:
            >>> Mixed.of({"SOFTMEET_MEMBERS": "a.gguf 'b c.gguf'", "SOFTMEET_RULE": "prob-mean"})
            Mixed(members=('a.gguf', 'b c.gguf'), rule='prob-mean')
        """
        found = os.environ if environment is None else environment
        return cls(tuple(shlex.split(found.get(MEMBERS, ""))), found.get(RULE) or AVERAGE)

    def settings(self, given: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of a request, for vLLM's own model and these members, in this order.

        Args:
            given: the request's ``vllm_xargs``; names that do not begin with ``softmeet`` are somebody else's.

        Raises:
            InvalidInputError: if a field is unknown or has a wrong value, nothing is mixed here, or the rule is none
                that can be mixed in vLLM.

        Example:
            >>> Mixed(("b",)).settings({"softmeet_weights": [0.3, 0.7]}).weights
            (0.3, 0.7)
        """
        own = {name: value for name, value in (given or {}).items() if name.startswith("softmeet")}
        if own and not self.members:
            raise InvalidInputError(f"this server mixes nothing, got {next(iter(own))}: start it with {MEMBERS}")
        if unknown := sorted(own.keys() - FIELDS.keys()):
            raise InvalidInputError(f"expected {', '.join(FIELDS)} in vllm_xargs, got {unknown[0]}")
        values = tuple((FIELDS[name], tuple(x) if isinstance(x, list) else x) for name, x in sorted(own.items()))
        return _settings(self.rule, len(self.members) + 1, values)


@lru_cache(256)
def _settings(rule: str, n: int, given: tuple[tuple[str, Any], ...]) -> Settings:
    asked = {"rule": rule} | {name: list(x) if isinstance(x, tuple) else x for name, x in given}
    settings = Settings.of(asked)
    if settings.weights == BY_SIZE:
        raise InvalidInputError("expected a weight for each model, got weights=auto: vLLM does not tell sizes")
    settings = settings.for_members(n)
    if (reader := reader_of(settings)) is not None:
        raise InvalidInputError(f"{reader} reads output layers, which vLLM does not hand out: choose {averages()}")
    if settings.gate is not None:
        raise InvalidInputError(f"expected no gate in vLLM, which runs its model anyway, got {settings.gate}")
    return settings


def is_alone(settings: Settings) -> bool:
    """Return whether vLLM's own model has all the weight, so that no other one need read.

    Example:
        >>> is_alone(Mixed(("b",)).settings({"softmeet_weights": [1, 0]}))
        True
    """
    weights = settings.weights
    return settings.rule.is_average and isinstance(weights, tuple) and not any(weights[1:])


def require_possible(settings: Settings, params: Any, *, after_penalties: bool) -> None:
    """Check that vLLM's own options of a request keep their meaning in a mixture.

    Some of them change the logits of vLLM's model before these are mixed.

    Args:
        settings: how the request is mixed.
        params: vLLM's ``SamplingParams`` of the request.
        after_penalties: whether penalties and biases are applied before the mixture, as by vLLM's second runner.

    Raises:
        InvalidInputError: if an option would change one model where the mixture is meant.
    """
    masks = {
        "allowed_token_ids": params.allowed_token_ids, "bad_words": params.bad_words, "min_tokens": params.min_tokens,
        "structured_outputs": params.structured_outputs,
    }  # fmt: skip
    if settings.rule.name != _KEEPS_ZEROS and (named := [name for name, value in masks.items() if value]):
        raise InvalidInputError(
            f"{named[0]} forbids tokens before models are mixed, which the rule {settings.rule.name} would not know "
            f"the probability of: leave it out, or choose softmeet_rule={_KEEPS_ZEROS}"
        )
    if params.prompt_logprobs is not None and not (is_alone(settings) and settings.rule_temperature == 1):
        raise InvalidInputError(
            "prompt_logprobs, of which echo with logprobs is made, are those of vLLM's model alone: leave them out, or "
            "give it all the weight by softmeet_weights"
        )
    changes = {
        "logit_bias": params.logit_bias, "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty, "repetition_penalty": params.repetition_penalty != 1,
    }  # fmt: skip
    if after_penalties and (named := [name for name, value in changes.items() if value]):
        raise InvalidInputError(
            f"{named[0]} changes the logits of one model before the mixture in vLLM's second model runner: leave it "
            "out, or start vLLM with VLLM_USE_V2_MODEL_RUNNER=0"
        )
