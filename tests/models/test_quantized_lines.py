"""Members asked for in a quantisation by their lines: what is refused, what runs, and what a plan says of its size."""

from importlib.util import find_spec
from pathlib import Path

import byte_tokenizers
import gguf_files
import pytest
import tiny
import torch
import transformers as tf
from batches import prompt
from quantised import GREEDY, WIDE, by_hand
from torch import nn

from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.hf.plan import plan
from softmeet.members import quantized
from softmeet.members.huggingface import load_members


def test_names_are_checked_before_anything_is_loaded(monkeypatch):
    with pytest.raises(InvalidInputError, match="unknown quantization 'int-8': did you mean int8"):
        Ensemble.from_pretrained(["wide/llama+quantization=int-8"], on_progress=pytest.fail)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if "int4" in name else find_spec(name))
    with pytest.raises(InvalidInputError, match="quantization=int4 on a CPU needs a torchao that has its kernel"):
        Ensemble.from_pretrained(["wide/llama+quantization=int4"], on_progress=pytest.fail)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for name, package in quantized.QUANTIZATIONS.items():
        with pytest.raises(InvalidInputError, match=rf"{name} needs {package} and accelerate: .*quantized\]"):
            Ensemble.from_pretrained([f"wide/llama+quantization={name}"], on_progress=pytest.fail)


def test_a_member_that_torchao_would_leave_as_it_is_is_refused():
    with pytest.raises(InvalidInputError, match=r"finds no linear layer in wide/gpt2 .*choose bnb-int8"):
        load_members(["wide/gpt2+quantization=int8"])


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about float16
@pytest.mark.parametrize("kind", ["int8", "int4", "bnb-int8", "bnb-nf4"])
@torch.inference_mode()
def test_members_asked_for_by_their_lines_are_quantised_and_averaged(kind):
    lines = [f"{name}+quantization={kind}" for name in (*WIDE, *(["wide/gpt2"] if kind.startswith("bnb") else []))]
    ensemble = Ensemble.from_pretrained(lines, "logit-mean")
    for model in ensemble.model.members:
        assert any(type(parameter) not in (nn.Parameter, torch.Tensor) for parameter in model.parameters())
    ensemble.model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt(4, 9)])
    told = ensemble.model.generate(ids, **GREEDY, weights=[1] * len(lines))
    assert told[0, 9:].tolist() == by_hand(ensemble.model.members, ids, 6)
    plain = Ensemble.from_pretrained([line.partition("+")[0] for line in lines], "logit-mean").model
    assert 0.01 < (ensemble.model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() < 5
    assert ensemble.model.config.weights == plain.config.weights  # by size, however it is stored


def test_four_bits_of_torchao_are_loaded_in_the_dtype_in_which_they_are_fast():
    default, asked = load_members(["wide/llama+quantization=int4", "wide/llama+quantization=int4+dtype=float32"])
    assert (default.dtype, asked.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [
    *(f"{name}+quantization={kind}" for name in WIDE for kind in ("int8", "int4", "bnb-int8", "bnb-nf4")),
    *(f"wide/gpt2+quantization={kind}" for kind in ("bnb-int8", "bnb-nf4")),
    "wide/llama+dtype=bfloat16+quantization=int8",
])  # fmt: skip
def test_a_plan_has_the_bytes_of_what_is_loaded(line):
    parts = {part.what: part for part in plan([line]).parts if part.owner == line}
    (model,) = load_members([line])
    own = sum(part.nbytes for part in quantized.stored(model))
    assert parts["body"].bytes + parts["head"].bytes == pytest.approx(own, rel=0.05)
    whole = sum(part.bytes for part in plan([line.partition("+")[0]]).parts[:2])
    assert own < 0.9 * whole
    assert parts["body"].dtype == line.rpartition("=")[2]


def test_a_plan_counts_what_a_checkpoint_says_of_itself_and_what_is_dequantised(quantised_folder, tmp_path):
    (model,) = load_members([quantised_folder[1]])
    parts = plan([quantised_folder[1]]).parts
    own = sum(part.nbytes for part in quantized.stored(model))
    assert sum(part.bytes for part in parts if part.what in ("body", "head")) == pytest.approx(own, rel=0.05)
    file = str(tmp_path / "eight.gguf")
    tokenizer = byte_tokenizers.byte_level()
    config = tf.LlamaConfig(**{**tiny.SMALL, "vocab_size": len(tokenizer)})
    gguf_files.write(file, tf.LlamaForCausalLM(config), tokenizer, bits=8)
    native = plan([f"{file}+engine=llama.cpp"]).parts
    assert [part.what for part in native] == ["body", "cache"]  # it is averaged without a solver
    assert native[0].bytes == Path(file).stat().st_size
    parts = plan([f"{file}+engine=transformers"]).parts
    (model,) = load_members([f"{file}+engine=transformers"])
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(part.bytes for part in parts if part.what in ("body", "head")) == dense


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "int4", "bnb-int8", "bnb-nf4"])
@torch.inference_mode()
def test_members_of_one_quantised_base_share_its_weights_and_run_independently(kind, tmp_path):
    torch.manual_seed(0)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_members(["wide/llama"])[0], config).save_pretrained(tmp_path)
    base, ids = f"wide/llama+quantization={kind}", torch.tensor([prompt(4, 9)])
    lines = [f"{base}+adapter={tmp_path}", base]
    alone = [load_members([line])[0](input_ids=ids).logits for line in lines]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    adapted, plain = load_members(lines)
    assert torch.equal(adapted(input_ids=ids).logits, alone[0])
    assert torch.equal(plain(input_ids=ids).logits, alone[1])
    layers = [model.model.layers[0].self_attn.q_proj for model in (adapted, plain)]
    own, base_own = (getattr(layer, "base_layer", layer) for layer in layers)
    assert own.weight is base_own.weight
    assert all(part is quantized.beside(base_own)[name] for name, part in quantized.beside(own).items())
