"""Fixtures of the members' tests."""

import pytest
import tiny
import transformers as tf

from softmeet.members import quantized


@pytest.fixture
def quantised_folder(tmp_path):
    """(a plain tiny member; one whose configuration says that its head is quantised)."""
    plain = tiny.save(tmp_path / "plain", "llama")
    config = quantized.config_of("int8")
    config.modules_to_not_convert = []
    model = tf.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    tiny.tokenizer().save_pretrained(tmp_path / "int8")
    return plain, tmp_path / "int8"
