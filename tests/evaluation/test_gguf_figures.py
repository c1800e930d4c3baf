"""What is measured of GGUF files, which llama.cpp runs: the same digits each time, and what they were made by."""

from __future__ import annotations

import byte_tokenizers
import gguf_files
import pytest
import torch
import transformers as tf

from softmeet import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.scaling.local import LocalEngine

TEXTS = ["The king, 12 days later: “é” and the other so on. " * 4, "In the beginning was the word, and the word " * 5]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of one tokenizer, of 4 bits a weight, so that they round coarsely."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), byte_tokenizers.byte_level()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = tf.Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=96, max_position_embeddings=256,
        )  # fmt: skip
        model = tf.Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8)
        gguf_files.write(folder / f"{name}.gguf", model, tokenizer, bits=4, pre="gpt-2")
    return [str(folder / f"{name}.gguf") for name in "ab"]


@pytest.mark.parametrize("vocabulary", ["tokens", "bytes"])
def test_a_text_has_the_same_digits_whatever_was_read_before_and_by_whom(vocabulary, files):
    ensemble = Ensemble.from_pretrained(files, "logit-mean", vocabulary=vocabulary)
    documents = [Document(str(k), text) for k, text in enumerate(TEXTS)]
    last = evaluate_text(ensemble, documents[1:], [], window=64).members
    ensemble.generate(TEXTS[0][:40], max_new_tokens=3)  # which is kept for texts that begin alike
    for workers in (1, 2, 3):
        with LocalEngine(workers) as engine:
            both = evaluate_text(ensemble, documents, [], window=64, engine=engine).members
        for name, alone in last.items():
            assert torch.equal(both[name].nats[-len(alone.nats) :], alone.nats)
