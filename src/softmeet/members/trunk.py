"""Running a model without its head: the last hidden states, which the head turns into logits."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmeet.errors import InvalidInputError
from softmeet.heads import LARGE, MOST, is_faster_turned, product
from softmeet.members.placement import body, gives_logits, head_device, home

_ALL = slice(None)
# GPT-2's layers hold Wᵀ: for two to four rows torch's x Wᵀ takes twice as long as for one, and as the sum of so many
# products, each of a part of the columns of x, hardly longer, as threads then share them.
_PARTS = 4
# Of models that were run, whether a matrix of a layer is large.
_has_large: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
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


def product_in_parts(x: Float[Tensor, "b d"], transposed: Float[Tensor, "d v"]) -> Float[Tensor, "b v"]:
    """Return x Wᵀ from Wᵀ, whose rows are in four equal parts, as the sum of the products with each.

    >>> product_in_parts(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(4))
    tensor([[1., 2., 3., 4.]])
    """
    parts = transposed.unflatten(0, (_PARTS, -1))
    return torch.bmm(x.unflatten(1, (_PARTS, -1)).transpose(0, 1), parts).sum(0)


def _is_faster_in_parts(x: Tensor, transposed: Tensor) -> bool:
    """Return whether a product with Wᵀ is faster in parts."""
    shared = 1 < len(x) <= MOST and torch.get_num_threads() > 1 and transposed.numel() >= LARGE
    known = x.dtype == transposed.dtype == torch.float32 and transposed.device.type == "cpu"
    return shared and known and transposed.is_contiguous() and not len(transposed) % _PARTS


class _FewRows(TorchFunctionMode):
    """A mode in which linear layers multiply few rows in the faster form; it holds for the thread that enters it."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; in place of torch's linear layer, and of GPT-2's, the faster form."""
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            if type(weight) is nn.Parameter and is_faster_turned(x, weight, x.numel() // x.shape[-1]):
                found = product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
                return found + bias[0] if bias and bias[0] is not None else found
        if func is torch.addmm and not kwargs:
            bias, x, transposed = args
            if type(transposed) is nn.Parameter and _is_faster_in_parts(x, transposed):
                return product_in_parts(x, transposed) + bias
        return func(*args, **(kwargs or {}))


def few_rows(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a model multiplies few rows fast, where that is possible and it has large layers.

    Args:
        model: the model.
        device: where it runs.
    """
    if device.type != "cpu" or torch.is_grad_enabled():
        return nullcontext()
    if model not in _has_large:
        others = (one for one in model.modules() if not isinstance(one, nn.Embedding))
        matrices = (p for one in others for p in one.parameters(recurse=False) if p.dim() == 2)
        _has_large[model] = any(weight.numel() >= LARGE for weight in matrices)
    return _FewRows() if _has_large[model] else nullcontext()
