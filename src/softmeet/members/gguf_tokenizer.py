"""The tokenizer that a GGUF file holds, as one of transformers'."""

from __future__ import annotations

import hashlib
import json
from copy import copy
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import tokenizers
import transformers
from huggingface_hub import cached_assets_path
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

from softmeet.derived import derived
from softmeet.errors import cannot_load
from softmeet.members.gguf_file import GgufFile, content_of, fingerprint, read_gguf

# To be raised when other things are derived from the same files.
_FORM = 2
# From smaller files everything is derived at once.
_SMALL = 1 << 24


def folder_for(path: Path) -> Path | None:
    """Return the folder for what is derived from a file; None if that is small, or no folder can be made.

    It is another one when the file, transformers or tokenizers has changed.
    """
    try:
        state = path.stat()
        if state.st_size < _SMALL:
            return None
        said = _FORM, fingerprint(path), state.st_mtime_ns, transformers.__version__, tokenizers.__version__
        return cached_assets_path("softmeet", "gguf", hashlib.sha256(repr(said).encode()).hexdigest()[:16])
    except (OSError, ValueError):
        return None


def folder_of(tokenizer: Any) -> Path | None:
    """Return the folder for what is derived from the GGUF file that a tokenizer was read from; None of any other."""
    _, _, folder = vars(tokenizer).get("_softmeet_file", (None, None, None))
    return folder  # type: ignore[no-any-return]


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# SentencePiece's space; and how texts are split where a whole word that is a token is one, whatever is merged.
_SPACE = "\u2581"
_WHOLE_WORDS = frozenset((
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
))  # fmt: skip
# The kinds of tokens that are found whole in a text, by their numbers: those that control, and those of users.
_CONTROL, _USERS = 3, 4
# By the state of a file, and by all that files say of their tokenizers: those of one family often say the same.
_made: WeakValueDictionary[Any, PreTrainedTokenizerFast] = WeakValueDictionary()
_files: WeakValueDictionary[Any, GgufFile] = WeakValueDictionary()


def known_file(path: Path, name: str) -> tuple[GgufFile, PreTrainedTokenizerFast]:
    """Return what a GGUF file says, without long lists, and its tokenizer, the same while they are in use.

    Args:
        path: the file, which is read again if it was changed.
        name: the member's, for messages.

    Raises:
        CheckpointError: if the file cannot be read, or describes no tokenizer that can be.
    """
    state = path.stat() if path.is_file() else None
    key = (path.resolve(), state.st_mtime_ns, state.st_size) if state else (path, 0, 0)
    file, known = _files.get(key), _made.get(key)
    if file is None or known is None:
        whole = read_gguf(path, name)
        file, said, folder = whole.without_lists(), content_of(whole), folder_for(path)
        if (first := _made.get(said)) is None:
            known = _made[said] = gguf_tokenizer(whole, name, folder)
        else:  # which shares all but what is said here
            known = copy(first)
            known.chat_template = whole.template
        # Whoever has the tokenizer keeps what is known of the file, and of the tokenizer whose parts it shares.
        vars(known)["_softmeet_file"] = file, first, folder
        _files[key], _made[key] = file, known
    return file, known


def gguf_tokenizer(file: GgufFile, name: str, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Make the tokenizer that a GGUF file describes, which pads at the left.

    Args:
        file: what the file says.
        name: the member's, for messages.
        folder: where it is kept for the next time; None for nowhere.

    Raises:
        CheckpointError: if it describes none, or one of a kind that transformers does not know.
    """
    said = file.said
    found = {
        group: {into: said[f"tokenizer.{key}"] for key, into in names.items() if f"tokenizer.{key}" in said}
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    described, options = found["tokenizer"], found["tokenizer_config"] | {"chat_template": file.template}
    tokens = described.get("tokens")
    if not (isinstance(tokens, list) and tokens and all(isinstance(one, str) for one in tokens)):
        raise cannot_load(name, "it has no tokens: expected a GGUF file with its tokenizer")
    if described.get("tokenizer_type") == "llama":
        options.setdefault("add_bos_token", True)  # as llama.cpp does where a file says nothing
    for into, key in _NAMED.items():
        if isinstance(k := said.get(f"tokenizer.ggml.{key}_token_id"), int) and 0 <= k < len(tokens):
            options[into] = tokens[k]

    def made() -> Tokenizer:
        try:
            core = _with_own_tokens(convert_gguf_tokenizer(file.architecture, described)[0], file)
        except Exception as error:  # tokenizers raises nothing narrower
            kind = described.get("tokenizer_type")
            raise cannot_load(name, f"its tokenizer, of the kind {kind!r}, cannot be read ({error})") from error
        _follow_llama_cpp(core, file)
        return core

    core = derived(
        folder, "tokenizer.json", made,
        lambda core: core.to_str().encode(), lambda kept: Tokenizer.from_str(kept.decode()),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=_Uncopied(core), padding_side="left", clean_up_tokenization_spaces=False, **options
    )


class _Uncopied:
    """A tokenizer that transformers takes as it is: it copies what it is given, a second's work of a large one."""

    def __init__(self, core: Tokenizer) -> None:
        self._core = core

    def __deepcopy__(self, known: dict[int, Any]) -> Tokenizer:
        return self._core


def _with_own_tokens(core: Tokenizer, file: GgufFile) -> Tokenizer:
    """Return a tokenizer with a file's own tokens alone, and with those that are found whole in a text as it has them.

    Behind a vocabulary without them, as Llama 3's, transformers adds tokens of GPT-2's, such as ``<|endoftext|>``. And
    tokens such as DeepSeek's, with characters that stand for no byte, it spells by their bytes, so that no text has
    them.
    """
    said, tokens = file.said, file.said["tokenizer.ggml.tokens"]
    named = {said.get(f"tokenizer.ggml.{key}_token_id") for key in _NAMED.values()}
    kinds = dict(enumerate(said.get("tokenizer.ggml.token_type") or ()))
    whole = [k for k in range(len(tokens)) if kinds.get(k) in (_CONTROL, _USERS) or k in named]
    bytewise = said.get("tokenizer.ggml.model") == "gpt2"
    respelled = {core.id_to_token(k): k for k in whole if core.id_to_token(k) != tokens[k]} if bytewise else {}
    foreign = {one.content for one in core.get_added_tokens_decoder().values()}.difference(tokens)
    if not respelled and not foreign:
        return core
    described = json.loads(core.to_str())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["content"] not in foreign]
    if described["model"].get("unk_token") in foreign:
        unknown = said.get("tokenizer.ggml.unknown_token_id")
        described["model"]["unk_token"] = tokens[unknown] if unknown in range(len(tokens)) else None
    for word, k in respelled.items():
        described["model"]["vocab"][tokens[k]] = described["model"]["vocab"].pop(word)
    core = Tokenizer.from_str(json.dumps(described))
    core.add_tokens([
        AddedToken(tokens[k], normalized=False, special=kinds.get(k) != _USERS) for k in respelled.values()
    ])  # fmt: skip
    return core


def _follow_llama_cpp(core: Tokenizer, file: GgufFile) -> None:
    """Change what of a tokenizer cuts texts otherwise than llama.cpp does."""
    kind, split = file.said.get("tokenizer.ggml.model"), file.said.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split in _WHOLE_WORDS:
        core.model.ignore_merges = True
    if kind == "llama" and not file.architecture.startswith("gemma"):
        # transformers puts no space before a text that begins with one.
        before = [normalizers.Prepend(_SPACE)] if file.said.get("tokenizer.ggml.add_space_prefix", True) else []
        core.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
        core.pre_tokenizer = None
        back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        core.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if before else [])])
