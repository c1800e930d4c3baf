"""Loading members: any causal LM of transformers, by hub id, local folder, GGUF file or bundled name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import CheckpointError, InvalidInputError, cannot_load
from softmeet.extras import install_line
from softmeet.members import names as known
from softmeet.members import quantized, zoo
from softmeet.members.adapters import adapted, require_adapter
from softmeet.members.gguf_tokenizer import known_file
from softmeet.members.member import Member
from softmeet.members.native import has_reader, is_gguf, path_of, reader_of, require_hash, require_reader, with_engine
from softmeet.members.placement import Device, computes_on_cpu, device_map_of, require_device
from softmeet.members.reader_model import ReaderModel
from softmeet.members.zoo import Named

_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_NO_TOKENIZER = (
    "it has no tokenizer that can be read: expected tokenizer.json, or the files of its own kind such as "
    "tokenizer.model, beside config.json: write them with tokenizer.save_pretrained(folder)"
)
# What transformers says, and what is said in its place; a group of the pattern stands for {0}.
_SAID = (
    (r"custom code", "it comes with custom code: read that code, then pass trust_remote_code=True "
     "(--trust-remote-code)"),
    (r"meta device", "where the output layer shares its weights with the embeddings, put both in one place"),
    (r"has model type `(.*?)` but Transformers does not recognize",
     f"transformers {transformers.__version__} does not know its architecture {{0}}: if a newer one does, "
     "pip install -U transformers"),
    (r"Should have a `model_type` key", "its config.json names no model_type: expected a saved transformers model"),
    (r"is not a valid JSON file", "its config.json is not valid JSON: fetch it again"),
    (r"Unrecognized configuration class .*?(\w+)'>",
     "transformers has no causal language model for its {0}: expected a model that predicts the next token"),
    (r"requires the SentencePiece library|Error parsing line .* in .*tokenizer\.model",
     "its tokenizer needs more packages: pip install sentencepiece protobuf"),
    (r"requires the (\w+) library", "it needs one more package, {0}, which is not installed"),
    (r"packages that were not found in your environment: ([\w ,-]*\w)",
     "its own code needs packages that are not installed: {0}"),
    (r"`(\w+)` is required", "it needs one more package: pip install {0}"),
    (r"instantiate the backend tokenizer|Can't load tokenizer", _NO_TOKENIZER),
    (r"cannot be loaded with `safetensors`|file named pytorch_model.bin",
     "it has no weights as safetensors, and a pickle could run code: expected model.safetensors, which "
     "model.save_pretrained(folder) writes"),
    (r"couldn't find them in the cached files",
     "some of its files are missing, and the Hub cannot be reached: fetch it once with a network"),
    (r"gated repo",
     "it is gated: ask for access on its page of the Hub, then log in with `hf auth login`, or set HF_TOKEN"),
    (r"(?i)out of memory|(can't|cannot) allocate memory",
     "there is not enough memory on the device: choose another, a dtype such as bfloat16, or device='auto'"),
)  # fmt: skip


@contextmanager
def named_in_errors(name: str, where: Mapping[str, Any]) -> Iterator[None]:
    """Enter a context that turns errors of transformers about a member into a ``CheckpointError``.

    Its message names the member and says what to do; for errors that are not known here, it repeats transformers'.

    Args:
        name: the member's name.
        where: what :func:`softmeet.members.names.find` returned for it.
    """
    try:
        yield
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise cannot_load(name, f"its safetensors are damaged or truncated ({error}): fetch them again") from error
    except Exception as error:  # whatever a file that is not as transformers expects it brings about
        unasked = " (read from the local cache alone, as the Hub did not answer)" if "local_files_only" in where else ""
        raise cannot_load(f"{name}{unasked}", _explained(error)) from error


def _explained(error: Exception) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, JSONDecodeError):
        return f"one of its files is not valid JSON ({said}): fetch it again"
    for pattern, instead in _SAID:
        if found := re.search(pattern, said):
            return instead.format(*found.groups())
    kind = "" if isinstance(error, OSError | ValueError | ImportError | RuntimeError) and said else type(error).__name__
    return shorten(f"{kind}: {said}".strip(": "), 400, placeholder=" …")


def refuse_folder(folder: Path) -> None:
    """Check that a folder has a config.json and weights as safetensors.

    Raises:
        CheckpointError: if one is missing, or the weights are pickled, so that loading them could run code.
    """
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise cannot_load(folder, f"it is an adapter: name its base, and put +adapter={folder} behind it")
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        instead = f"name a file in it, such as {files[0]}" if files else "expected a saved transformers model"
        raise cannot_load(folder, f"it has no config.json: {instead}")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"refused to load {folder}: its weights are pickled ({pickles[0]}), and a pickle can run code: convert "
            "them with model.save_pretrained(folder), which writes safetensors"
        )
    raise cannot_load(folder, "it has no *.safetensors file: expected a saved transformers model")


def require_tokenizer(name: str, folder: Path) -> None:
    """Check that a member's folder has a file that may be a tokenizer's, since some classes do without in silence.

    Raises:
        CheckpointError: if there is none.
    """
    if not any(p for pattern in _TOKENIZERS for p in folder.glob(pattern)):
        raise cannot_load(name, _NO_TOKENIZER)


def require_gguf(name: str) -> None:
    """Check that the packages that read GGUF files are installed.

    Raises:
        CheckpointError: if they are not; the message says how to install them.
    """
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise cannot_load(name, f"GGUF files need more packages: {install_line('gguf')}")


def require_causal(name: str, config: PreTrainedConfig, *, remote: bool) -> None:
    """Check that a member predicts each token from those before it alone, with a class of transformers.

    Args:
        name: the member's name, for the message.
        config: its configuration.
        remote: whether code that comes with the checkpoint may run, and provide the class.

    Raises:
        CheckpointError: if it is an encoder with a decoder or an encoder alone, or there is no such class.
    """
    auto: Any = transformers.models.auto.modeling_auto
    expected, kind = "expected a causal language model, such as GPT-2 or Llama", type(config)
    if getattr(config, "is_encoder_decoder", False):
        raise cannot_load(
            name, f"{config.model_type} is an encoder with a decoder, which continues no text: {expected}"
        )
    if remote and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise cannot_load(name, f"transformers has no causal language model head for {config.model_type}: {expected}")
    # Classes that serve as encoders and as decoders say which in their configuration.
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        without = f"it is an encoder ({config.model_type} without is_decoder), which reads a text from both sides"
        raise cannot_load(name, f"{without}: {expected}")


Dtype = torch.dtype | str | None
# Those in which torch computes what a causal language model needs.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_members(
    names: Sequence[Named],
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

    Members that differ by prompt or name alone are one model, several times in the list. Those that differ by adapter
    share the parameters of their base.

    Args:
        names: the members, in any of the forms of :meth:`softmeet.Member.of`.
        dtype: of the weights: a torch dtype or its name, None for fp32 on CPU and the checkpoint's own elsewhere,
            ``"auto"`` for the checkpoint's own everywhere. One for all members, or a list of one for each; a member's
            own ``dtype`` goes first.
        device: where to put the weights: None for CPU, a device, ``"disk"``, ``"auto"`` or another strategy of
            accelerate, or a dict from modules' names to such devices or ``"disk"``. One for all members, or a list of
            one for each; a member's own ``device`` goes first.
        trust_remote_code: whether to run code that comes with a checkpoint.
        offload_folder: a folder for weights that are offloaded to disk and cannot be read from the checkpoint's files.
        on_progress: called in this thread with each single member's name before it is loaded; not called for members
            taken from ``loaded``, or whose weights the call has loaded already.
        on_loaded: called with each member's name and model before the next one is loaded; what it raises ends loading.
        loaded: a dict, at first empty, to pass to several calls: members found in it are used instead of being loaded
            again, and new ones are added, under keys of this function's own. None for a dict of this call's own.

    Raises:
        InvalidInputError, CheckpointError: as by :func:`require_loadable`, before the first member is loaded.
        CheckpointError: also if weights are missing, misshapen or truncated.
    """
    require_loadable(names, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    shared = {} if loaded is None else loaded
    members: list[PreTrainedModel] = []
    for member, own_dtype, own_device in placed(names, dtype, device):
        key, base = (_key(one, own_dtype, own_device) for one in (member.weights, member.base))
        if key not in shared:
            on_progress(str(member))
        if has_reader(member) and key not in shared:
            shared[key] = ReaderModel(member)
        if base not in shared and key not in shared:
            folder = None if offload_folder is None else Path(offload_folder) / str(len(members))
            shared[base] = _load(member.base, own_dtype, own_device, trust_remote_code, folder)
        if member.adapter is not None and key not in shared:
            shared[key] = adapted(shared[base], member.adapter)
        on_loaded(str(member), shared[key])
        members.append(shared[key])
    return members


def _key(member: Member, dtype: Dtype, device: Device) -> tuple[str, str, str]:
    """Return the key of a loaded model: what its weights follow from."""
    place = zoo.locate(member.source)
    real = os.path.realpath(place) if Path(place).exists() else place
    return str(replace(member, source=real, dtype=None, device=None)), str(dtype), str(device)


def placed(
    names: Sequence[Named], dtype: Dtype | Sequence[Dtype], device: Device | Sequence[Device]
) -> list[tuple[Member, Dtype, Device]]:
    """Return each member with the dtype and the device that it gets: its own, or those of the call.

    Args:
        names: the members, those of a bundled family by its name.
        dtype: as for :func:`load_members`.
        device: as for :func:`load_members`.

    Raises:
        InvalidInputError: if there is no member, or neither one dtype (or device) nor one for each member.
    """
    members = [Member.parse(name) for name in _expanded(names)]
    dtypes, devices = one_each(dtype, "dtype", len(members)), one_each(device, "device", len(members))
    return [
        (
            with_engine(member, changed=own is not None or str(place or "cpu") not in ("cpu", "cpu:0")),
            member.dtype or own or quantized.DTYPES.get(member.quantization or ""),
            member.device or place,
        )
        for member, own, place in zip(members, dtypes, devices, strict=True)
    ]


def with_engines(
    names: Sequence[Named], dtype: Dtype | Sequence[Dtype] = None, device: Device | Sequence[Device] = None
) -> list[str]:
    """Return each member as a line of text in which GGUF files name the engine that runs them.

    Args:
        names, dtype, device: as for :func:`load_members`.

    Raises:
        InvalidInputError, CheckpointError: as of :func:`softmeet.members.native.with_engine`.
    """
    return [str(member) for member, _, _ in placed(names, dtype, device)]


def require_loadable(
    names: Sequence[Named],
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
            one dtype (or device) nor one for each member, or a package that a device or adapter needs is not installed.
        CheckpointError: if a checkpoint or an adapter is missing, pickled, or no causal language model; if a
            configuration cannot be read; if an adapter does not fit its model; or if a checkpoint needs remote code
            that is not trusted.
    """
    members = placed(names, dtype, device)
    for member, own_dtype, own_device in members:
        require_device(own_device)
        dtype_of(own_dtype, own_device)
        if member.quantization is not None:
            quantized.require(member.quantization, own_device)
    methods: dict[Member, str | None] = {}
    for base in dict.fromkeys(member.base for member, _, _ in members):
        require_hash(base)
        if has_reader(base):
            require_reader(base)
            continue
        where = _checkpoint_of(base, trust_remote_code)
        if "gguf_file" not in where:  # of which reading the configuration alone takes as long as reading all
            with named_in_errors(base.checkpoint, where):
                config = transformers.AutoConfig.from_pretrained(**where)
            require_causal(base.checkpoint, config, remote=trust_remote_code)
            methods[base] = quantized.method_of_head(config)
    for member in dict.fromkeys(member.weights for member, _, _ in members if member.adapter is not None):
        require_adapter(str(member.adapter), member.source, lambda base=member.base: _shape(base, trust_remote_code))
    return {str(member): method for member, _, _ in members if (method := methods.get(member.base)) is not None}


def _shape(base: Member, trust_remote_code: bool) -> PreTrainedModel | None:
    """Return a member's model without weights; None for a GGUF file, whose configuration takes long to read."""
    if "gguf_file" in known.find(base):
        return None
    with torch.device("meta"):
        return random_member(str(base), trust_remote_code=trust_remote_code)


def _expanded(names: Sequence[Named]) -> list[str]:
    """Return the names of all members, those of bundled families in place of the family's name.

    Raises:
        InvalidInputError: if there is none.
    """
    if not names:
        raise InvalidInputError("expected at least one member: a hub id, a folder, or a bundled name such as 'wide'")
    return [path for name in names for path in zoo.expand(name)]


def load_tokenizers(names: Sequence[Named], *, trust_remote_code: bool = False) -> list[PreTrainedTokenizerBase]:
    """Load the members' tokenizers, one per member, in the order of ``names``; they pad at the left.

    Args:
        names: as in :func:`load_members`.
        trust_remote_code: whether to run code that comes with a checkpoint.

    Raises:
        InvalidInputError: if there is no name.
        CheckpointError: if a checkpoint is missing or its weights are pickled, its tokenizer cannot be read, or it
            needs remote code that is not trusted.
    """
    members = [Member.parse(name).base for name in _expanded(names)]
    found = {base: _tokenizer(base, trust_remote_code) for base in dict.fromkeys(members)}
    return [found[base] for base in members]


def _tokenizer(base: Member, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if is_gguf(base):
        return known_file(path_of(base), base.title)[1]
    if has_reader(base):
        return reader_of(base).alphabet.tokenizer
    where = _checkpoint_of(base, trust_remote_code)
    folder = _folder(where)
    if folder.is_dir() and "gguf_file" not in where:
        require_tokenizer(base.checkpoint, folder)
    with named_in_errors(base.checkpoint, where):
        return transformers.AutoTokenizer.from_pretrained(**where, padding_side="left")


def _folder(where: dict[str, Any]) -> Path:
    """Return the folder of a checkpoint on this machine; of one on the Hub, a path that does not exist."""
    return Path(where["pretrained_model_name_or_path"], where.get("subfolder", ""))


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
    with named_in_errors(name, where):
        config = transformers.AutoConfig.from_pretrained(**where)
        require_causal(name, config, remote=trust_remote_code)
        own = getattr(config, "dtype", None) or torch.float32
        chosen = own if dtype == "auto" else dtype or torch.get_default_dtype()
        return transformers.AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)


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


def _load(
    base: Member, dtype: Dtype, device: Device, trust_remote_code: bool, offload_folder: Path | None
) -> PreTrainedModel:
    """Load one member, without its adapter, in evaluation mode.

    Raises:
        CheckpointError: if it cannot be loaded, or weights are missing or have other shapes than the configuration
            says.
    """
    spread, wanted = device_map_of(device), dtype_of(dtype, device)
    placement: dict[str, Any] = {} if spread is None else {"device_map": spread}
    placement |= {} if offload_folder is None or spread is None else {"offload_folder": str(offload_folder)}
    if base.quantization is not None:
        placement["quantization_config"] = quantized.config_of(base.quantization, device)
        placement.setdefault("device_map", {"": str(device or "cpu")})
    name, where = base.checkpoint, _checkpoint_of(base, trust_remote_code)
    with named_in_errors(name, where), _without_bars():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            **where, **placement, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        absent = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        said = f"{len(absent)} weights are missing or misshapen (first: {absent[0]}): fetch it again"
        raise cannot_load(name, said)
    quantized.ready(model, name, base.quantization)
    with named_in_errors(name, where):
        return (model if placement else model.to("cpu" if device is None else device)).eval()


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


def _checkpoint_of(base: Member, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments by which transformers finds a member's checkpoint.

    Raises:
        CheckpointError: if there is none, or its weights are pickled, so that loading them could run code.
    """
    found = known.find(base)
    if "gguf_file" in found:
        require_gguf(base.checkpoint)
    elif _folder(found).is_dir():
        refuse_folder(_folder(found))
    return found | {"trust_remote_code": trust_remote_code}
