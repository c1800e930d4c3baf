"""The places of a member's weights: one device, or several with CPU and disk among them, by accelerate's device map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.extras import install_line

T = TypeVar("T")
U = TypeVar("U")
# A device or "disk", one of accelerate's strategies, or a dict from modules' names to such places; None for CPU.
Device = torch.device | str | dict[Any, Any] | None
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_OFFLOADED = ("cpu", "disk")
# The attribute of a model whose logits stand in for its last hidden states.
LOGITS = "_softmeet_gives_logits"


def without_head(model: PreTrainedModel) -> nn.Module:
    """Return a causal LM's module that gives the last hidden states: its base model, by whatever name."""
    base: nn.Module = model.base_model
    # Llama 4 in transformers 5.24 names an attribute that its models over text alone do not have.
    return base if base is not model else getattr(model, "model", base)


def gives_logits(model: PreTrainedModel) -> bool:
    """Return whether a model's own logits stand in for its last hidden states: it computes them in an unknown way."""
    return LOGITS in vars(model)


def let_give_logits(model: PreTrainedModel) -> None:
    """Note of a model that its logits stand in for its last hidden states; its copies in other processes know it."""
    vars(model)[LOGITS] = True


def body(model: PreTrainedModel) -> nn.Module:
    """Return what is run of a causal LM: its base model, or all of it if it :func:`gives_logits`."""
    return model if gives_logits(model) else without_head(model)


def device_map_of(device: Device) -> str | dict[str, Any] | None:
    """Convert a member's ``device`` to the ``device_map`` with which transformers loads it.

    Returns:
        A strategy of accelerate unchanged; a dict from modules' names to places (for ``"disk"``, all modules to disk);
        None if one device holds the whole model.

    Raises:
        InvalidInputError: if ``device`` is not a device, ``"disk"``, a strategy of accelerate or a dict from modules'
            names to devices or ``"disk"``.
    """
    if isinstance(device, dict):
        if not device or not all(isinstance(name, str) for name in device):
            raise InvalidInputError(f"expected a device for each module by name, got {device!r}")
        return {name: _named(place) for name, place in device.items()}
    if isinstance(device, str) and device in STRATEGIES:
        return device
    if device == "disk":
        return {"": device}
    _named("cpu" if device is None else device)
    return None


def _named(place: Any) -> Any:
    """Return a place unchanged if it is a device, a device's number or ``"disk"``; refuse any other."""
    if place == "disk" or isinstance(place, int):
        return place
    try:
        torch.device(place)
    except (RuntimeError, TypeError):
        raise InvalidInputError(
            f"expected a device such as cpu or cuda:0, disk, or one of {', '.join(STRATEGIES)}, got {place!r}"
        ) from None
    return place


def require_device(device: Device) -> None:
    """Check that a member's ``device`` is on this machine, and that the package is installed that spreads weights.

    Args:
        device: as :func:`device_map_of` takes it.

    Raises:
        InvalidInputError: if it is not; the message says which devices there are.
    """
    spread = device_map_of(device)
    if spread is not None and find_spec("accelerate") is None:
        raise InvalidInputError(
            f"device={device!r} needs one more package, accelerate: {install_line('offload')}; or name one device"
        )
    one = "cpu" if device is None else device
    places = [one] if spread is None else list(spread.values()) if isinstance(spread, dict) else []
    for place in places:
        if place != "disk" and not _is_here(place):
            kind = str(place).partition(":")[0]
            count = torch.accelerator.device_count()
            here = ["cpu", *(f"{torch.accelerator.current_accelerator()}:{k}" for k in range(count))]
            other = f", or install a torch with {kind.upper()} (https://pytorch.org)" if kind in ("cuda", "xpu") else ""
            raise InvalidInputError(
                f"expected a device that torch finds on this machine ({', '.join(here)}), got {str(place)!r}: choose "
                f"one of these{'' if any(own.startswith(kind) for own in here) else other}"
            )


def _is_here(place: Any) -> bool:
    """Tell whether a device of torch is on this machine and can hold weights."""
    try:
        return not torch.empty(0, device=place).is_meta
    except (AssertionError, RuntimeError) as error:
        return "out of memory" in str(error)  # which loading will say, of a device that is here


def main_device(device_map: dict[str, Any]) -> torch.device:
    """Return the device on which offloaded weights compute: the first in the map that is not CPU or disk, else CPU.

    ``device_map`` is a dict from modules' names to devices or ``"disk"``.
    """
    return torch.device(next((place for place in device_map.values() if str(place) not in _OFFLOADED), "cpu"))


def computes_on_cpu(device: Device) -> bool:
    """Return whether a member placed so computes on the CPU; a strategy such as "auto" uses a GPU if there is one.

    Raises:
        InvalidInputError: if there is no such device, as by :func:`device_map_of`.
    """
    spread = device_map_of(device)
    if isinstance(spread, dict):
        return main_device(spread).type == "cpu"
    one: Any = "cpu" if device is None else device
    return not torch.cuda.is_available() if spread else torch.device(one).type == "cpu"


def home(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's inputs have to be on."""
    spread = getattr(model, "hf_device_map", None) or {}
    weights = next(model.parameters()).device
    return weights if len(set(map(str, spread.values()))) < 2 and weights.type != "meta" else main_device(spread)


def head_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model's last hidden states are wanted: its output layer's, or :func:`home`."""
    weight = None if gives_logits(model) else getattr(model.get_output_embeddings(), "weight", None)
    return home(model) if weight is None or weight.is_meta else weight.device


def whereabouts(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of all places that hold some of a model's weights, such as ``cuda:0``, ``cpu`` or ``disk``."""
    spread = getattr(model, "hf_device_map", None) or {}
    meta = any(p.is_meta for p in model.parameters())
    own = {str(p.device) for p in model.parameters() if not p.is_meta}
    return frozenset(own | ({str(place) for place in spread.values()} if meta else set()))


def in_memory(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's parameters by name; if some are offloaded, copies of all on the device that computes."""
    if not hasattr(layer, "_hf_hook") or not any(p.is_meta for p in layer.parameters()):
        return dict(layer.named_parameters())
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        return {name: p.detach().clone() for name, p in layer.named_parameters()}


def each_in_a_thread(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Apply a function to all items at once, a thread each, and return the results in the order of the items.

    Threads have the caller's inference and gradient modes. A single item is handled in the caller's own thread. If
    calls raise exceptions, that of the first item among them is raised here, once all calls have ended.
    """
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(item: T) -> U:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return function(item)

    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(run, items))
