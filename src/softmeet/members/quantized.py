"""Quantised members: the names by which a quantisation is asked for, and the sizes of what it makes of a model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from softmeet.errors import InvalidInputError, nearest
from softmeet.extras import install_line
from softmeet.members.placement import Device, computes_on_cpu

# The names, with the package that each needs.
QUANTIZATIONS = {"int8": "torchao", "int4": "torchao", "bnb-int8": "bitsandbytes", "bnb-nf4": "bitsandbytes"}
# The weights that share a scale under int4 and bnb-nf4. Widths of models are multiples of 32, but not all of 128.
_BLOCKS = {"torchao": 32, "bitsandbytes": 64}
# The dtype of the rest where none is asked for: in float32 torchao's kernel for CPUs runs token by token.
DTYPES = {"int4": "bfloat16"}
# Where torchao has four bits for CPUs.
_ON_CPU = "torchao.prototype.quantization.int4"
# The rows that bitsandbytes' kernel of four bits for CPUs takes at once.
_ROWS = 32
# The settings of a checkpoint's quantisation that list modules to leave as they are, by method; None leaves the head.
_LEFT_OUT = {"torchao": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules"}
_HEADS = ("head", "embed_out", "output")
_METHOD = "quant_method"


def require(name: str, device: Device = None) -> None:
    """Check that a quantisation exists, and can be had here, before anything is loaded.

    Args:
        name: ``"int8"`` or ``"int4"`` (torchao's, of weights alone), ``"bnb-int8"`` or ``"bnb-nf4"`` (bitsandbytes').
        device: where the member is to be, as ``load_members`` takes it.

    Raises:
        InvalidInputError: if there is no such quantisation, its package is not installed, or the device has no kernel
            for it.

    Example:
        >>> require("int9")
        Traceback (most recent call last):
        softmeet.errors.InvalidInputError: unknown quantization 'int9': did you mean int8? expected one of ...
    """
    package = QUANTIZATIONS.get(name)
    if package is None:
        near = nearest(name, QUANTIZATIONS)
        raise InvalidInputError(f"unknown quantization {name!r}: {near}expected one of {', '.join(QUANTIZATIONS)}")
    if missing := [one for one in (package, "accelerate") if find_spec(one) is None]:
        raise InvalidInputError(f"quantization={name} needs {' and '.join(missing)}: {install_line('quantized')}")
    if name == "int4" and computes_on_cpu(device) and find_spec(_ON_CPU) is None:
        raise InvalidInputError(
            "quantization=int4 on a CPU needs a torchao that has its kernel of four bits for CPUs, such as 0.18: "
            "install that, or choose int8 or bnb-nf4"
        )


def config_of(name: str, device: Device = None) -> Any:
    """Return the object that ``from_pretrained`` of transformers takes as ``quantization_config``.

    Output layers and embeddings are left as they are, so that rules can read the heads.

    Args:
        name: a quantisation that :func:`require` has accepted.
        device: where the member is to be: torchao has a format of four bits for CPUs alone.
    """
    import transformers

    if QUANTIZATIONS[name] == "bitsandbytes":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return transformers.BitsAndBytesConfig(**(four if name == "bnb-nf4" else {"load_in_8bit": True}))
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    # By default these change settings of torch for the whole process.
    kept: dict[str, Any] = {"set_inductor_config": False}
    if name == "int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig(**kept))
    kept["group_size"] = _BLOCKS["torchao"]
    if computes_on_cpu(device):
        return transformers.TorchAoConfig(import_module(_ON_CPU).PrototypeInt4WeightOnlyConfig(**kept))
    # A format that needs no package beside torch.
    return transformers.TorchAoConfig(Int4WeightOnlyConfig(**kept, int4_packing_format="tile_packed_to_4d"))


def ready(model: PreTrainedModel, name: str, quantization: str | None) -> PreTrainedModel:
    """Return a model that was just loaded, perhaps with a quantisation, ready to be run and to share its weights.

    Layers whose shapes bitsandbytes' kernel of four bits for CPUs does not take are set to run without it. Those of
    eight bits take from their weight what they would take when they run first: then none of several that share it is
    left without.

    Args:
        model: the model.
        name: its name, for the message.
        quantization: the name of the quantisation that was asked for; None for none.

    Raises:
        InvalidInputError: if no layer was quantised: torchao knows linear layers alone, and GPT-2's are convolutions.
    """
    if quantization is not None and all(type(own) in (nn.Parameter, Tensor) for own in model.parameters()):
        other = "bnb-int8" if QUANTIZATIONS[quantization] == "torchao" else "another member"
        raise InvalidInputError(
            f"quantization={quantization} finds no linear layer in {name} ({type(model).__name__}) beside its head, "
            f"and would leave it as it is: choose {other}, or load it unquantised"
        )
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False) and (
            layer.in_features % _BLOCKS["bitsandbytes"] or layer.out_features % _ROWS
        ):
            layer.support_avx512bf16_for_cpu = False
        if hasattr(layer, "init_8bit_state") and getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()
    return model


def method_of_head(config: PreTrainedConfig) -> str | None:
    """Return the method by which a checkpoint's head is quantised, such as "gptq", as far as its configuration tells.

    None if the head is not quantised, or the configuration does not tell; the loaded model does.
    """
    given = getattr(config, "quantization_config", None)
    plain: dict[str, Any] = given if isinstance(given, dict) else given.to_dict() if given is not None else {}
    method = str(getattr(plain.get(_METHOD), "value", plain.get(_METHOD)))
    if plain.get("lm_head") is True:
        return method
    left_out = plain.get(_LEFT_OUT.get(method, ""))
    # A head that shares its weight with the embeddings stays what those are.
    if left_out is None or getattr(config.get_text_config(decoder=True), "tie_word_embeddings", True):
        return None
    return None if any(part in name for name in left_out for part in _HEADS) else method


def parts_of(parameter: Tensor) -> list[Tensor]:
    """Return the plain tensors in which a parameter's numbers are kept: of a quantised one of torchao several."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name) for name in names]


def stored(model: nn.Module) -> Iterator[Tensor]:
    """Yield the plain tensors in which a model's parameters are kept, scales of quantised ones included, each once."""
    seen = set()
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield from parts_of(parameter)
                if hasattr(parameter, "quant_state"):  # bitsandbytes' scales of 4 bits
                    yield parameter.quant_state.absmax
        yield from (part for name, part in beside(layer).items() if name == "SCB")


def beside(layer: nn.Module) -> dict[str, Tensor]:
    """Return what a layer of bitsandbytes of 8 bits holds beside parameters: the weight, CB, and its scales, SCB."""
    state = getattr(layer, "state", None)
    found = {name: getattr(state, name, None) for name in ("CB", "SCB")}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def quantizer_of(model: PreTrainedModel, quantization: Any) -> Any:
    """Return transformers' quantizer for a model on torch's meta device, in which its own layers then stand.

    Args:
        model: the model, whose layers are replaced.
        quantization: what :func:`config_of` returned, or what a configuration has as ``quantization_config``; None for
            none.

    Returns:
        The quantizer; None without a quantisation, and for methods other than torchao's and bitsandbytes'.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    plain = quantization if isinstance(quantization, dict) else {"quant_method": getattr(quantization, _METHOD, None)}
    if getattr(plain.get(_METHOD), "value", plain.get(_METHOD)) not in _BLOCKS:
        return None
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    return quantizer


def planned_bytes(model: PreTrainedModel, quantizer: Any) -> dict[str, int]:
    """Return the bytes that each parameter of a model will take once the model is loaded.

    Args:
        model: on torch's meta device.
        quantizer: what :func:`quantizer_of` returned for it.
    """
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.nbytes
        if quantizer is not None and quantizer.param_needs_quantization(model, name):
            size = quantizer.param_element_size(model, name, parameter)
            method = quantizer.quantization_config.quant_method.value
            # For each row, or of four bits for each block, bitsandbytes has a scale in fp32; torchao has one in the
            # weights' own dtype, and of four bits a zero point.
            scale = 4 if method == "bitsandbytes" else parameter.element_size() * (1 if size == 1 else 2)
            found[name] = int(
                parameter.numel() * (size + scale / (parameter.shape[-1] if size == 1 else _BLOCKS[method]))
            )
    return found


def rounds_coarsely(model: nn.Module) -> bool:
    """Return whether a model computes in half precision, or with quantised numbers.

    What it computes then depends noticeably on how many tokens it reads at once. A GGUF file's weights, which loading
    dequantises, are judged by their dtype.
    """
    if (reader := getattr(model, "reader", None)) is not None:
        return bool(reader.traits.rounding == "coarse")
    quantised = getattr(model, "quantization_method", None) not in (None, "gguf")
    small = any(own.dtype.itemsize < 4 for own in model.parameters())
    return quantised or small or any("quantized" in type(own).__module__ for own in model.modules())
