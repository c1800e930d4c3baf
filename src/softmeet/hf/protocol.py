"""What the parts of an ensemble's model know of the model that they are parts of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softmeet.engine.ask import Members
from softmeet.engine.combine import Combiner
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.contexts import Contexts
from softmeet.members.opaque import Head
from softmeet.readers.reader import Reader, Row
from softmeet.rules.settings import Settings


class AnyEnsemble(Protocol):
    """An ensemble as a causal LM of transformers, over tokens or over bytes, loaded by whatever class of this room.

    Names that are not described here are those of :class:`softmeet.hf.EnsembleForCausalLM`, or of transformers' models.
    """

    members: nn.ModuleList
    combiner: Combiner
    garbage: deque[tuple[Reader, Row]]
    claimants: Sequence[Reader]
    config: EnsembleConfig
    contexts: Contexts
    tokenizer: PreTrainedTokenizerBase | None
    over_bytes: bool
    symbols_of_token: int
    begin: int | None
    cuts_alone: bool
    chat: Any
    generation_config: Any

    @property
    def settings(self) -> Settings:
        """The settings by which the members are combined."""

    @property
    def member_heads(self) -> list[Head]:
        """The members' own output layers."""

    @property
    def device(self) -> torch.device:
        """The device on which distributions are combined."""

    @property
    def apart(self) -> bool:
        """Whether members are on different devices."""

    @property
    def readers_of_members(self) -> Sequence[Reader]:
        """The readers of the members, in order."""

    @property
    def reading(self) -> Members:
        """Those who read texts for this ensemble."""

    def before(self, i: int, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return what member i reads of its own at the beginning of a text, and in place of how many of its tokens."""

    def before_claims(self, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return the symbols that readers which claim read before a text, and in place of how many of its tokens."""

    def without_claims(self) -> AbstractContextManager[None]:
        """Return a context in which members alone are asked."""

    parameters: Callable[[], Any]
    generate: Callable[..., Any]
    prepare_inputs_for_generation: Callable[..., Any]
    _update_model_kwargs_for_generation: Callable[..., Any]
    __call__: Callable[..., Any]

    def each(self, function: Callable[[int], Any], members: Sequence[int]) -> list[Any]:
        """Return [function(i) for i in members]."""

    def require(self, settings: Settings) -> None:
        """Check that the members can be combined by these settings."""

    def require_likelihood(self, what: str) -> None:
        """Check that a text has one likelihood, which ``what`` needs."""

    def hidden_states(self, input_ids: Int[Tensor, "1 t"], given: int | None = None) -> list[Float[Tensor, "t _"]]:
        """Run the members over one text, and return each one's last hidden states."""
