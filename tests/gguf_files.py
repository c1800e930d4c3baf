"""GGUF files of tiny models of the Llama kind, with a byte-level tokenizer."""

from __future__ import annotations

import json

import gguf
import numpy as np


def write(path, model, tokenizer, *, bits=32):
    """Write a model and its tokenizer; with 8 bits, matrices are in blocks of 32 weights with a scale each (Q8_0)."""
    config, kind = model.config, model.config.model_type
    out = gguf.GGUFWriter(path, kind)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    for name, add in (
        ("rms_norm_eps", out.add_layer_norm_rms_eps),
        ("layer_norm_eps", out.add_layer_norm_eps),
        ("norm_epsilon", out.add_layer_norm_eps),
    ):
        if hasattr(config, name):
            add(getattr(config, name))
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(words) - 1))
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        value = weight.numpy()
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):  # llama.cpp has rotary pairs side by side
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        value, stored = np.ascontiguousarray(value), None
        if bits == 8 and value.ndim == 2 and value.shape[1] % 32 == 0:
            stored = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quants.quantize(value, stored)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value, raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
