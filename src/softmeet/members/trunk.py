"""Running a model without its head: the last hidden states, which the head turns into logits."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmeet.errors import InvalidInputError
from softmeet.members.placement import body, gives_logits, head_device, home
from softmeet.products import MOST, few_rows

_ALL = slice(None)
# What transformers calls a cache; 5.19, which vLLM 0.32 asks for, has ``past_key_values``.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def last_hidden(
    model: PreTrainedModel, input_ids: Int[Tensor, "B t"], kept: slice | Int[Tensor, " k"] = _ALL, **options: Any
) -> Float[Tensor, "B k d"]:
    """Run a model without its head, and return the last hidden states, the head's input, on the head's device.

    Of a model whose head is unknown (:func:`softmeet.members.heads.head_of`) its own logits are returned instead, and
    computed at the kept positions alone, if its ``forward`` takes ``logits_to_keep``.

    Args:
        model: a causal LM of transformers.
        input_ids: token ids, on any device.
        kept: the k positions whose states are returned: all, the last few as ``slice(-k, None)``, or indices.
        options: keyword arguments of the base model's ``forward``, tensors on any device; a cache among them, which
            the model has to take (:func:`require_cache`), is extended in place.
    """
    return Trunk(model)(input_ids, kept, **options)


class Trunk:
    """A model without its head, to be run many times: as of :func:`last_hidden`, which runs it once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._place, self._target, self._whole = home(model), head_device(model), gives_logits(model)
        self._run: Any = body(model)
        parameters = signature(self._run.forward).parameters
        self._keeps, self._cache = (
            self._whole and "logits_to_keep" in parameters,
            "cache" if "cache" in parameters else CACHE,
        )

    def __call__(
        self, input_ids: Int[Tensor, "B t"], kept: slice | Int[Tensor, " k"] = _ALL, **options: Any
    ) -> Float[Tensor, "B k d"]:
        """Return the last hidden states."""
        place = self._place
        for name, x in options.items():
            if isinstance(x, Tensor):
                options[name] = x.to(place)
        if "cache" in options:
            options[self._cache] = options.pop("cache")
        if self._keeps and kept is not _ALL:
            options["logits_to_keep"] = -(kept.start or 0) if isinstance(kept, slice) else kept.to(place)
            kept = _ALL
        with few_rows(self._run, place) if 1 < input_ids.numel() <= MOST else nullcontext():
            out = self._run(input_ids=input_ids.to(place), **options)
        if self._whole:
            return out.logits[:, kept]  # type: ignore[no-any-return]
        hidden: Tensor = out.last_hidden_state
        return hidden.to(self._target)[:, kept]


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether a model takes a cache of transformers; some leave it aside in silence, and would lose the text."""
    parameters = signature(body(model).forward).parameters
    # Those that hand everything on to another module name nothing.
    return not {CACHE, "cache"}.isdisjoint(parameters) or "input_ids" not in parameters


def require_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that takes a cache of transformers.

    Raises:
        InvalidInputError: if it does not take one.
    """
    if not takes_cache(model):
        raise InvalidInputError(
            f"expected members that continue from a cache, but {type(model).__name__} takes none: pass use_cache=False "
            "to generate, which reads the whole text for each token"
        )
    return model
