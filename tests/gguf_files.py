"""GGUF files of tiny models, with a byte-level tokenizer or one as SentencePiece's."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
import transformers as tf

_STORED = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
# The layers of GPT-2 whose weights are stored as they are multiplied, the other way round than elsewhere.
_TURNED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def write(path, model, tokenizer, *, bits=32, pre=None, said=()):
    """Write a model and its tokenizer; with 8 or 4 bits, matrices are in blocks of 32 weights with a scale each.

    ``pre`` is what is said of the tokenizer's pre-tokenizer; ``said`` are further keys, or others in place of those
    that are written, with texts, numbers or lists.
    """
    config, kind = model.config, model.config.model_type
    out = gguf.GGUFWriter(path, kind)
    _add_shape(out, config)
    _add_tokenizer(out, tokenizer, pre)
    for key, value in dict(said).items():
        written = gguf.GGUFValueType.UINT32 if isinstance(value, int) else gguf.GGUFValueType.get_type(value)
        out.kv_data[0][key] = gguf.GGUFValue(value, written)
    out.data_alignment = dict(said).get("general.alignment", out.data_alignment)
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    for name, weight in weights.items():
        value = weight.float().numpy()
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):  # llama.cpp has rotary pairs side by side
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if kind == "gpt2" and name.endswith(_TURNED):
            value = value.T
        if kind == "gemma" and name.endswith("norm.weight"):  # of which the model adds 1
            value = value + 1
        value, stored = np.ascontiguousarray(value), None
        if bits in _STORED and value.ndim == 2 and value.shape[1] % 32 == 0 and ".wpe." not in name:
            stored = _STORED[bits]
            value = gguf.quants.quantize(value, stored)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value, raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def written(path, tokenizer, pre="gpt-2", **said):
    """Write a tiny Llama with a tokenizer, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 32, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    write(path, tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval(), tokenizer, bits=8, pre=pre, **said)
    return path


def _add_shape(out, config):
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    if (wide := getattr(config, "head_dim", None)) is not None:
        out.add_key_length(wide)
        out.add_value_length(wide)
    for name, add in (
        ("rms_norm_eps", out.add_layer_norm_rms_eps),
        ("layer_norm_eps", out.add_layer_norm_eps),
        ("layer_norm_epsilon", out.add_layer_norm_eps),
        ("norm_epsilon", out.add_layer_norm_eps),
    ):
        if hasattr(config, name):
            add(getattr(config, name))
    if hasattr(config, "rope_parameters"):
        out.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(out, tokenizer, pre):
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_bytes = not described.get("byte_fallback")
    kinds = [gguf.TokenType.NORMAL] * len(words)
    for k, word in enumerate(words):
        if not by_bytes and word.startswith("<0x"):
            kinds[k] = gguf.TokenType.BYTE
        elif k in tokenizer.all_special_ids:
            kinds[k] = gguf.TokenType.UNKNOWN if word == "<unk>" else gguf.TokenType.CONTROL
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2" if by_bytes else "llama")
    if pre is not None:
        out.add_tokenizer_pre(pre)
    out.add_token_list(words)
    out.add_token_types(kinds)
    if by_bytes:
        out.add_token_merges([" ".join(pair) for pair in described["merges"]])
    else:
        # What is merged first has the highest score, as in SentencePiece's own files.
        first = {left + right: -float(k) for k, (left, right) in enumerate(described["merges"])}
        out.add_token_scores([first.get(word, -1e3) for word in words])
        out.add_add_space_prefix("Prepend" in tokenizer.backend_tokenizer.to_str())
    out.add_bos_token_id(tokenizer.bos_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
