"""What docs/reference/architectures.md says: a test for each of its columns, on a tiny random model of each row."""

import functools
from contextlib import nullcontext

import byte_tokenizers
import gguf_files
import pytest
import tiny
import torch
import transformers as tf
from batches import generated, prompt, sequence
from byte_members import at_once, step_by_step, summed
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

import softmeet
from softmeet import Ensemble
from softmeet.errors import InvalidInputError, UnsupportedHeadError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM, Recorder
from softmeet.hf.prompts import states_behind
from softmeet.members.heads import head_of
from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning
from softmeet.server.batcher import Batcher
from softmeet.server.ensembles import readers_of
from softmeet.server.limits import Limits
from softmeet.server.metrics import Metrics
from update_architectures import ARCHITECTURES, COLUMNS, PAGE, VOCABULARY, page

PROMPTS = torch.tensor([[0, 0, 0, 7, 8], [9, 10, 11, 12, 30], [0, 5, 6, 7, 5]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [1] * 5, [0] + [1] * 4])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}
TEXT = b"\n\nthe"
every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@functools.cache
def model_of(architecture, seed=0):
    """Its tiny model, in float32: not all of them run in float64."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(architecture.config()).eval()
    with torch.no_grad():
        layer = model.get_output_embeddings()
        layer.weight.mul_(4.0)
        if layer.bias is not None:
            layer.bias.normal_()
    return model


def other():
    return model_of(next(a for a in ARCHITECTURES if a.kind == "llama"), seed=1)


def ensemble_of(*models, rule="logit-mean"):
    config = EnsembleConfig(members=[f"member {k}" for k in range(len(models))], rule=rule, trust=1.0, tol=1e-4)
    found = EnsembleForCausalLM(config, list(models)).eval()
    found.generation_config.eos_token_id = None
    return found


def column(test):
    """Run a test on every architecture; where the page says that one is refused, expect just that."""
    key = test.__name__.removeprefix("test_")
    assert key in {one.key for one in COLUMNS}

    def checked(architecture):
        refused = architecture.refused.get(key)
        with pytest.raises(InvalidInputError, match=refused.error) if refused else nullcontext():
            test(architecture)

    checked.__name__ = test.__name__
    return every(checked)


@column
def test_alone(architecture):
    model = model_of(architecture)
    together = ensemble_of(model, model).generate(PROMPTS[:2], attention_mask=MASK[:2], **GREEDY)
    for row, prompt_, mask in zip(together, PROMPTS[:2], MASK[:2], strict=True):
        own = prompt_[mask.bool()][None]
        assert row[len(prompt_) :].tolist() == model.generate(own, **GREEDY)[0, own.shape[1] :].tolist()


@column
def test_head(architecture):
    model = model_of(architecture)
    head = head_of(model)
    ids = PROMPTS[1:]
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits
        base = model.model if model.base_model is model else model.base_model
        ours = head.logits(base(input_ids=ids, use_cache=False).last_hidden_state)
    assert own.std() > 0.01
    assert torch.allclose(ours, own, atol=1e-5)
    brought = {
        "bias": head.bias is not None,
        "scale": head.scale != 1,
        "soft-cap": head.soft_cap is not None,
        "projection to fewer columns": head.d < model.config.hidden_size,
    }
    assert ", ".join(name for name, there in brought.items() if there) == architecture.brings


@column
@torch.inference_mode()
def test_meet(architecture):
    models, ids = (other(), model_of(architecture)), PROMPTS[1:2, :2]
    ours = ensemble_of(*models, rule="meet")(input_ids=ids).logits[0]
    logits = torch.stack([model(input_ids=ids, use_cache=False).logits[0] for model in models])
    options = {"logits": logits, "trust": 1.0, "tol": 1e-4}
    found = softmeet.combine(logits.log_softmax(-1), [head_of(model) for model in models], "meet", **options)
    assert (found.status == softmeet.Status.OPTIMAL).all()
    assert found.gap_is_certified.all()
    assert torch.allclose(ours, found.log_probs, atol=1e-3)
    assert not torch.allclose(ours, logits.log_softmax(-1).mean(0).log_softmax(-1), atol=0.01)  # it is not the pool


@column
def test_gates(architecture):
    ours, recorder = ensemble_of(other(), model_of(architecture)), Recorder()
    options = {"attention_mask": MASK[:2], "gate": "unsure:0.012", **GREEDY}
    gated = ours.generate(PROMPTS[:2], recorder=recorder, **options)
    assert 0 < recorder.gate.share < 1
    assert torch.equal(gated, ours.generate(PROMPTS[:2], use_cache=False, **options))


@column
def test_served(architecture):
    ours = ensemble_of(model_of(architecture))
    batcher = Batcher(readers_of([ours], [["a member"]]), Limits(), Metrics())
    batcher.start()
    try:
        asked = [sequence(ours, prompt(k, n), seed=k, max_tokens=2) for k, n in enumerate((9, 1))]
        batcher.submit([one for one, _ in asked])
        for k, (one, listener) in enumerate(asked):
            assert listener.tokens() == generated(ours, one.prompt, seed=k, max_tokens=2)
    finally:
        batcher.close(0)
        batcher.join()


@functools.cache
def spelling():
    tokenizer = byte_tokenizers.byte_level()
    assert len(tokenizer) == VOCABULARY
    return spelling_of("a member", tokenizer)


@column
def test_bytes(architecture):
    member = ByteMember(model_of(architecture), spelling(), Pruning(0.0, None))
    expected = summed(member, TEXT, end=True)
    assert step_by_step(member, TEXT) == pytest.approx(expected, abs=1e-4)
    assert at_once(member, TEXT) == pytest.approx(expected, abs=1e-4)


def test_the_page_is_what_the_list_says():
    assert PAGE.read_text() == page(), "run: python tools/update_architectures.py"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.gguf == "tested"], ids=lambda a: a.name)
@torch.inference_mode()
def test_gguf_files_are_dequantised_into_the_models_that_they_are_of(architecture, tmp_path):
    model, logits = model_of(architecture), {}
    for bits in (32, 8):
        path = tmp_path / f"{bits}.gguf"
        gguf_files.write(path, model, byte_tokenizers.byte_level(), bits=bits)
        ours = Ensemble.from_pretrained([f"{path}+engine=transformers"], "logit-mean")
        ids = ours.tokenizer(" the other", return_tensors="pt")["input_ids"]
        assert ids.tolist() == byte_tokenizers.byte_level()(" the other", return_tensors="pt")["input_ids"].tolist()
        logits[bits] = ours.model(input_ids=ids).logits
    own = model(input_ids=ids).logits.log_softmax(-1)
    assert torch.allclose(logits[32], own, atol=1e-5)
    assert 1e-4 < (logits[8] - own).abs().max() < 0.1


def test_gguf_files_that_are_refused_are_those_that_transformers_does_not_read():
    for one in ARCHITECTURES:
        read = one.kind.removesuffix("_text") in GGUF_SUPPORTED_ARCHITECTURES
        assert one.gguf.startswith("refused") is not read, one.name


@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt"])
def test_those_without_a_cache_generate_without_one(kind):
    model = model_of(next(a for a in ARCHITECTURES if a.kind == kind))
    ours = ensemble_of(model).generate(PROMPTS[1:2], use_cache=False, **GREEDY)
    assert torch.equal(ours, model.generate(PROMPTS[1:2], use_cache=False, **GREEDY))


@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt"])
@torch.inference_mode()
def test_those_without_a_cache_are_evaluated(kind):
    """No reader can be had of them, nor of the members beside them."""
    models = [model_of(next(a for a in ARCHITECTURES if a.kind == kind)), other()]
    ensemble = ensemble_of(*models)
    for model, states in zip(models, ensemble.hidden_states(PROMPTS[1:2]), strict=True):
        own = model(input_ids=PROMPTS[1:2], use_cache=False).logits[0]
        assert torch.allclose(head_of(model).logits(states), own, atol=1e-5)
    inputs = {"input_ids": PROMPTS[1:2], "attention_mask": MASK[1:2]}
    last = [states[-1:] for states in ensemble.hidden_states(PROMPTS[1:2])]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(states_behind(ensemble, inputs), last, strict=True))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    "config",
    [
        tf.BertConfig(**SMALL, is_decoder=True),
        tf.ModernBertDecoderConfig(**SMALL, **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 0)),
        tf.RecurrentGemmaConfig(**SMALL, lru_width=32),
        tf.xLSTMConfig(vocab_size=64, hidden_size=32, num_heads=4, num_blocks=2),
    ],
    ids=lambda config: config.model_type,
)
def test_members_of_an_unknown_form_of_logits_are_averaged_and_rules_that_read_heads_refuse_them(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    ids = torch.arange(1, 7)[None]
    both = [tiny.build("llama"), model]
    ours = EnsembleForCausalLM(EnsembleConfig(["a", "b"], rule="logit-mean"), both).eval()
    with torch.inference_mode():
        own = torch.stack([one(input_ids=ids, use_cache=False).logits.log_softmax(-1) for one in both])
        assert torch.allclose(ours(input_ids=ids, use_cache=False).logits, own.mean(0).log_softmax(-1), atol=1e-4)
    said = f"the rule meet reads heads .* b is unknown .{type(model).__name__}"
    with pytest.raises(UnsupportedHeadError, match=said):
        EnsembleForCausalLM(EnsembleConfig(["a", "b"], rule="meet"), both)
