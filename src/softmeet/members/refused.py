"""Why a member is refused, each in a sentence that names it and says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from textwrap import shorten
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from softmeet.errors import CheckpointError, cannot_load
from softmeet.extras import install_line

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
