"""Adapters of peft's on a member's model: found and compared with the model before it is loaded, then put on a view.

A view of a model has modules of its own, and the model's parameters themselves. So members of one base, with an adapter
each or with none, take the memory of one base and run independently of each other.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError, cannot_load
from softmeet.extras import install_line
from softmeet.members.names import find_adapter
from softmeet.members.quantized import beside

# The two matrices of a low-rank adapter, whose sizes are those of the layer that they change.
_INPUT, _OUTPUT = ".lora_A.weight", ".lora_B.weight"
_BEFORE = "base_model.model."
_log = logging.getLogger("softmeet")


def require_adapter(name: str, source: str, shape: Any) -> None:
    """Check, before weights are loaded, that an adapter is there, and that it changes layers which its model has.

    Args:
        name: the adapter: a hub id, maybe with a revision, or a folder.
        source: the name of the model that it is put on.
        shape: a function of no arguments that returns the model without weights, or None if that cannot be had.

    Raises:
        InvalidInputError: if peft is not installed.
        CheckpointError: if the adapter cannot be found or read, is of a kind that changes no layers, or its layers are
            not those of the model.
    """
    if find_spec("peft") is None:
        raise InvalidInputError(f"the adapter {name} needs one more package, peft: {install_line('adapters')}")
    folder = find_adapter(name)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever damaged files bring about
        raise cannot_load(f"the adapter {name}", "its files are damaged: fetch it again") from error
    kind = str(config.get("peft_type"))
    if config.get("is_prompt_learning") or kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CARTRIDGE"):
        why = f"it is of the kind {kind}, which puts vectors before the text"
        raise cannot_load(f"the adapter {name}", f"{why}: expected one that changes layers, such as LoRA")
    model = shape()
    if model is not None:
        _require_layers(name, source, sizes, model)
    base = config.get("base_model_name_or_path")
    if base and Path(base).name != Path(source).name:
        _log.warning("the adapter %s was made for %s, and is put on %s", name, base, source)


def _require_layers(name: str, source: str, sizes: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    """Check that a low-rank adapter's matrices fit the model's layers of their names.

    Raises:
        CheckpointError: if a layer is missing, or has other sizes.
    """
    layers = dict(model.named_modules())
    for key, size in sizes.items():
        for ending, side in ((_INPUT, 1), (_OUTPUT, 0)):
            if not key.endswith(ending):
                continue
            layer = key.removeprefix(_BEFORE).removesuffix(ending)
            weight = getattr(layers.get(layer), "weight", None)
            if weight is None or size[side] not in weight.shape:
                there = "which has none of that name" if weight is None else f"where it is {tuple(weight.shape)}"
                raise cannot_load(
                    f"the adapter {name}",
                    f"it is of another base than {source}: it changes a layer {layer} of {size[side]} "
                    f"{'columns' if side else 'rows'}, {there}: name the base that it was made for",
                )


def adapted(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a view of a model with an adapter on it; the model itself, whose parameters are shared, is unchanged.

    Args:
        model: in evaluation mode, with all weights in memory.
        name: the adapter, which :func:`require_adapter` has checked.

    Raises:
        InvalidInputError: if weights of the model are offloaded.
        CheckpointError: if peft cannot load the adapter.
    """
    from peft import PeftModel

    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInputError(
            f"the adapter {name} needs a model whose weights are in memory: load it on one device, not on disk"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = PeftModel.from_pretrained(view(model), str(find_adapter(name))).get_base_model()
    except Exception as error:  # peft's errors are of many classes
        raise cannot_load(f"the adapter {name}", " ".join(str(error).split())[:300]) from error
    return found.eval()


def view(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model's modules that has the model's own tensors, not copies of them."""
    tensors = [*model.parameters(), *model.buffers(), *(one for m in model.modules() for one in beside(m).values())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
