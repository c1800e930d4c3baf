"""Loading members: any causal LM of transformers, by hub id, local folder, GGUF file or bundled name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.members import names as known
from softmeet.members import refused, zoo
from softmeet.members.placement import (
    Device,
    body,
    computes_on_cpu,
    device_map_of,
    gives_logits,
    head_device,
    home,
    require_device,
)
from softmeet.members.quantized import method_of_head

Dtype = torch.dtype | str | None
_ALL = slice(None)
# Those in which torch computes what a causal language model needs.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_members(
    names: Sequence[str | Path],
    *,
    dtype: Dtype | Sequence[Dtype] = None,
    device: Device | Sequence[Device] = None,
    trust_remote_code: bool = False,
    offload_folder: str | Path | None = None,
    on_progress: Callable[[str], None] = lambda name: None,
    on_loaded: Callable[[str, PreTrainedModel], None] = lambda name, model: None,
    loaded: dict[Any, PreTrainedModel] | None = None,
) -> list[PreTrainedModel]:
    """Load models in the order of their names, in evaluation mode; a bundled family's name stands for all its members.

    Args:
        names: hub ids (``org/model`` or ``org/model@revision``), folders, ``.gguf`` files, or bundled names (``wide``,
            ``narrow``, ``mixed``, ``wide/gpt2``).
        dtype: of the weights: a torch dtype or its name, None for fp32 on CPU and the checkpoint's own elsewhere,
            ``"auto"`` for the checkpoint's own everywhere. One for all members, or a list of one for each.
        device: where to put the weights: None for CPU, a device, ``"disk"``, ``"auto"`` or another strategy of
            accelerate, or a dict from modules' names to such devices or ``"disk"``. One for all members, or a list of
            one for each.
        trust_remote_code: whether to run code that comes with a checkpoint.
        offload_folder: a folder for weights that are offloaded to disk and cannot be read from the checkpoint's files.
        on_progress: called in this thread with each single member's name before it is loaded; not called for members
            taken from ``loaded``.
        on_loaded: called with each member's name and model before the next one is loaded; what it raises ends loading.
        loaded: a dict, at first empty, to pass to several calls: members found in it are used instead of being loaded
            again, and new ones are added, under keys of this function's own. None to load each name anew, even one that
            occurs twice.

    Raises:
        InvalidInputError, CheckpointError: as by :func:`require_loadable`, before the first member is loaded.
        CheckpointError: also if weights are missing, misshapen or truncated.
    """
    require_loadable(names, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    expanded = _expanded(names)
    dtypes, devices = one_each(dtype, "dtype", len(expanded)), one_each(device, "device", len(expanded))
    members: list[PreTrainedModel] = []
    shared = {} if loaded is None else loaded
    for name, own_dtype, own_device in zip(expanded, dtypes, devices, strict=True):
        place = zoo.locate(name)
        key = (os.path.realpath(place) if Path(place).exists() else place, str(own_dtype), str(own_device))
        if loaded is None or key not in shared:
            on_progress(name)
            folder = None if offload_folder is None else Path(offload_folder) / str(len(members))
            shared[key] = _load(name, own_dtype, own_device, trust_remote_code, folder)
        on_loaded(name, shared[key])
        members.append(shared[key])
    return members


def require_loadable(
    names: Sequence[str | Path],
    *,
    dtype: Dtype | Sequence[Dtype] = None,
    device: Device | Sequence[Device] = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Check all that can be wrong with members before a tokenizer or weights are read: places, names, configurations.

    Args:
        names: of the members, as :func:`load_members` takes them.
        dtype: of the members, as it takes them.
        device: of the members, as it takes them.
        trust_remote_code: run code that comes with a checkpoint.

    Returns:
        For each member whose configuration says that its head is quantised, by its name, the method, such as "gptq".

    Raises:
        InvalidInputError: if there is no name, a dtype or device is unknown or not on this machine, there is neither
            one dtype (or device) nor one for each member, or a package that a device needs is not installed.
        CheckpointError: if a checkpoint is missing, pickled, or no causal language model; if its configuration cannot
            be read; or if it needs remote code that is not trusted.
    """
    expanded = _expanded(names)
    dtypes, devices = one_each(dtype, "dtype", len(expanded)), one_each(device, "device", len(expanded))
    for own_dtype, own_device in zip(dtypes, devices, strict=True):
        require_device(own_device)
        dtype_of(own_dtype, own_device)
    quantised = {}
    for name in dict.fromkeys(expanded):
        where = _checkpoint_of(name, trust_remote_code)
        if "gguf_file" not in where:  # of which reading the configuration alone takes as long as reading all
            with refused.named_in_errors(name, where):
                config = transformers.AutoConfig.from_pretrained(**where)
            refused.require_causal(name, config, remote=trust_remote_code)
            if (method := method_of_head(config)) is not None:
                quantised[name] = method
    return quantised


def _expanded(names: Sequence[str | Path]) -> list[str]:
    """Return the names of all members, those of bundled families in place of the family's name.

    Raises:
        InvalidInputError: if there is none.
    """
    if not names:
        raise InvalidInputError("expected at least one member: a hub id, a folder, or a bundled name such as 'wide'")
    return [path for name in names for path in zoo.expand(name)]


def load_tokenizers(names: Sequence[str], *, trust_remote_code: bool = False) -> list[PreTrainedTokenizerBase]:
    """Load the members' tokenizers, one per member, in the order of ``names``; they pad at the left.

    Args:
        names: as in :func:`load_members`; a bundled family's name stands for all its members.
        trust_remote_code: whether to run code that comes with a checkpoint.

    Raises:
        InvalidInputError: if there is no name.
        CheckpointError: if a checkpoint is missing or its weights are pickled, its tokenizer cannot be read, or it
            needs remote code that is not trusted.
    """
    found = []
    for name in _expanded(names):
        where = _checkpoint_of(name, trust_remote_code)
        folder = Path(where["pretrained_model_name_or_path"])
        if folder.is_dir() and "gguf_file" not in where:
            refused.require_tokenizer(name, folder)
        with refused.named_in_errors(name, where):
            found.append(transformers.AutoTokenizer.from_pretrained(**where, padding_side="left"))
    return found


def random_member(
    name: str, dtype: torch.dtype | str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a member from its configuration alone, with random weights, on torch's default device, in training mode.

    Args:
        name: as in :func:`load_members`, but not a family's.
        dtype: of the weights: a torch dtype or its name, None for torch's default, ``"auto"`` for the checkpoint's own.
        trust_remote_code: whether to run code that comes with a checkpoint.

    Raises:
        CheckpointError: if the configuration cannot be read or is of no causal language model, or remote code is needed
            that is not trusted.
    """
    where = known.find(name) | {"trust_remote_code": trust_remote_code}
    with refused.named_in_errors(name, where):
        config = transformers.AutoConfig.from_pretrained(**where)
        refused.require_causal(name, config, remote=trust_remote_code)
        own = getattr(config, "dtype", None) or torch.float32
        chosen = own if dtype == "auto" else dtype or torch.get_default_dtype()
        return transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)


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
    run: Any = body(model)
    place, whole = home(model), gives_logits(model)
    moved = {k: x.to(place) if isinstance(x, Tensor) else x for k, x in options.items()}
    if whole and kept is not _ALL and "logits_to_keep" in signature(run.forward).parameters:
        moved["logits_to_keep"] = -(kept.start or 0) if isinstance(kept, slice) else kept.to(place)
        kept = _ALL
    out = run(input_ids=input_ids.to(place), **moved)
    hidden: Tensor = out.logits if whole else out.last_hidden_state
    return hidden.to(head_device(model))[:, kept]


def require_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that takes a cache of transformers; some leave one aside in silence, and would lose the text.

    Raises:
        InvalidInputError: if it does not take one.
    """
    parameters = signature(body(model).forward).parameters
    # Those that hand everything on to another module name nothing.
    if "cache" not in parameters and "input_ids" in parameters:
        raise InvalidInputError(
            f"expected members that continue from a cache, but {type(model).__name__} takes none: pass use_cache=False "
            "to generate, which reads the whole text for each token"
        )
    return model


def one_each(value: Any, what: str, n: int) -> list[Any]:
    """Return a list of n values: the given list of n, or one given value n times.

    Args:
        value: a list or tuple of n values, or one value.
        what: the noun for a value in the message, such as ``"dtype"``.
        n: the number of members.

    Raises:
        InvalidInputError: if a list has another length.
    """
    values = list(value) if isinstance(value, list | tuple) else [value] * n
    if len(values) != n:
        raise InvalidInputError(f"expected one {what}, or one per member, {n} in all, got {len(values)}")
    return values


def dtype_of(dtype: Dtype, device: Device) -> torch.dtype | str:
    """Choose the dtype in which to load a member: ``dtype`` unless it is None, else fp32 if the member computes on CPU.

    If ``dtype`` is None and the member does not compute on CPU, ``"auto"`` is returned: the checkpoint's own dtype.

    Args:
        dtype: one member's, as in :func:`load_members`.
        device: that member's, as in :func:`load_members`.

    Raises:
        InvalidInputError: if ``dtype`` is not one in which models are run, or it is None and ``device`` is unknown.
    """
    if dtype is not None:
        found = getattr(torch, dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
        if not (found == "auto" or found in _DTYPES):
            allowed = [str(one).removeprefix("torch.") for one in _DTYPES]
            raise InvalidInputError(
                f"expected a dtype of {', '.join(allowed)}, or auto for the checkpoint's own, got "
                f"{str(dtype).removeprefix('torch.')!r}"
            )
        return found
    return torch.float32 if computes_on_cpu(device) else "auto"


def _one(device: Any) -> torch.device:
    return torch.device("cpu" if device is None else device)


def _load(
    name: str, dtype: Dtype, device: Device, trust_remote_code: bool, offload_folder: Path | None
) -> PreTrainedModel:
    """Load one member, in evaluation mode.

    Raises:
        CheckpointError: if it cannot be loaded, or weights are missing or have other shapes than the configuration
            says.
    """
    spread, wanted = device_map_of(device), dtype_of(dtype, device)
    placement: dict[str, Any] = {} if spread is None else {"device_map": spread}
    placement |= {} if offload_folder is None or spread is None else {"offload_folder": str(offload_folder)}
    where = _checkpoint_of(name, trust_remote_code)
    with refused.named_in_errors(name, where), _without_bars():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            **where, **placement, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        absent = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise CheckpointError(
            f"cannot load {name}: {len(absent)} weights are missing or misshapen (first: {absent[0]}): fetch it again"
        )
    whole = None if isinstance(device, dict) or placement else _one(device)
    with refused.named_in_errors(name, where):
        return (model if whole is None else model.to(whole)).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Enter a context without transformers' bars, one for the weights of each member; downloads show theirs."""
    shown, downloads = transformers.utils.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _checkpoint_of(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments by which transformers finds a member's checkpoint.

    Raises:
        CheckpointError: if there is none, or its weights are pickled, so that loading them could run code.
    """
    found = known.find(name)
    if "gguf_file" in found:
        refused.require_gguf(name)
    elif Path(found["pretrained_model_name_or_path"]).is_dir():
        refused.refuse_folder(Path(found["pretrained_model_name_or_path"]))
    return found | {"trust_remote_code": trust_remote_code}
