"""Products of a few rows with a large matrix, as in a step of generation for two to four sequences at once, on a CPU.

Libraries of linear algebra multiply one row at the speed of memory. For two to four rows in fp32 torch's x Wᵀ takes two
to four times as long, and (W xᵀ)ᵀ hardly longer than for one row: with several threads for all but small W, with one
if W has many more rows than columns, as a model's output layer has. GPT-2's layers hold Wᵀ: for two to four rows x Wᵀ
takes twice as long as for one, and as the sum of four products, each of a quarter of the columns of x, hardly longer,
as threads then share them (``benchmarks/few_rows.py``, which was run with one and two).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The least elements of W for which (W xᵀ)ᵀ is the faster form: with several threads; and with one, for which W also has
# to have so many rows for each column, and four rows of x need still more of them.
_LARGE, _LARGE_ALONE, _WIDE, _WIDER = 1 << 19, 1 << 22, 4, 16
# The most rows of x for which it can be.
MOST = 4
# The number of products in whose sum a layer that holds Wᵀ is computed.
_PARTS = 4
# Of models that were run, whether a matrix of a layer is large.
_has_large: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def product(x: Float[Tensor, "b d"], weight: Float[Tensor, "v d"]) -> Float[Tensor, "b v"]:
    """Return x Wᵀ in the faster of two forms, which round differently; both are of one dtype and device.

    >>> product(torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[2., 5.]])
    """
    return (weight @ x.T).T.contiguous() if _is_faster(x, weight, len(x)) else x @ weight.T


def product_in_parts(x: Float[Tensor, "b d"], transposed: Float[Tensor, "d v"]) -> Float[Tensor, "b v"]:
    """Return x Wᵀ from Wᵀ, whose rows are in four equal parts, as the sum of the products with each.

    >>> product_in_parts(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.eye(4))
    tensor([[1., 2., 3., 4.]])
    """
    parts = transposed.unflatten(0, (_PARTS, -1))
    return torch.bmm(x.unflatten(1, (_PARTS, -1)).transpose(0, 1), parts).sum(0)


def _is_faster_in_parts(x: Tensor, transposed: Tensor) -> bool:
    """Return whether a product with Wᵀ is faster in parts."""
    shared = 1 < len(x) <= MOST and torch.get_num_threads() > 1 and transposed.numel() >= _LARGE
    known = x.dtype == transposed.dtype == torch.float32 and transposed.device.type == "cpu"
    return shared and known and transposed.is_contiguous() and not len(transposed) % _PARTS


def _is_faster(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Return whether (W xᵀ)ᵀ is the faster form of the product of so many rows."""
    if not 1 < rows <= MOST or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    if torch.get_num_threads() > 1:
        return weight.numel() >= _LARGE
    wide = _WIDER if rows == MOST else _WIDE
    return weight.numel() >= _LARGE_ALONE and weight.shape[0] >= wide * weight.shape[1]


class _FewRows(TorchFunctionMode):
    """A mode in which linear layers multiply few rows in the faster form; it holds for the thread that enters it."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; in place of torch's linear layer, and of GPT-2's, the faster form."""
        if func is nn.functional.linear and not kwargs:
            x, weight, *bias = args
            if type(weight) is nn.Parameter and _is_faster(x, weight, x.numel() // x.shape[-1]):
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
        _has_large[model] = any(weight.numel() >= _LARGE for weight in matrices)
    return _FewRows() if _has_large[model] else nullcontext()
