"""GGUF files that llama.cpp runs as they are."""

from __future__ import annotations

import byte_tokenizers
import gguf_files
import pytest
import torch
import transformers as tf

from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.readers.llama_cpp import LlamaReader
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader

TEXT = "The king, 12 days later: “é” \n\n and the other so on"
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = {
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=v, **SHAPE)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=v, **SHAPE)),
    "gemma": lambda v: tf.GemmaForCausalLM(tf.GemmaConfig(vocab_size=v, head_dim=32, **SHAPE)),
    "gpt2": lambda v: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=v, n_positions=256, n_embd=64, n_layer=2, n_head=2)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that writes a file of a kind, of so many bits, once; returns (its path, the model)."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}

    def write(kind, bits=32, seed=0):
        if (kind, bits, seed) not in found:
            tokenizer = byte_tokenizers.llama() if kind == "llama" else byte_tokenizers.byte_level()
            torch.manual_seed(seed)
            model = KINDS[kind](len(tokenizer)).eval()
            with torch.no_grad():  # so that logits tell tokens apart
                model.get_output_embeddings().weight.mul_(8)
            path = folder / f"{kind}-{bits}-{seed}.gguf"
            gguf_files.write(path, model, tokenizer, bits=bits, pre="gpt-2")
            found[kind, bits, seed] = str(path), model
        return found[kind, bits, seed]

    return write


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_file_is_read_as_transformers_reads_the_same_weights(kind, made):
    path, model = made(kind)
    reader = LlamaReader(path, own=())
    ids = reader.alphabet.encode(TEXT)
    told = reader.read_whole([ids], [range(1, len(ids) + 1)]).log_probs()
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert (told - expected).abs().max() < 1e-3
    ours = Ensemble.from_pretrained(path, "logit-mean")
    new = ours.model.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    ids = torch.tensor([ids])
    for _ in range(12):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert new.tolist() == ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_files_obey_the_laws_of_readers(kind, bits, made):
    check_reader(LlamaReader(made(kind, bits)[0]))
