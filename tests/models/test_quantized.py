"""Members whose heads cannot be read: averages of quantised, adapted and unknown ones equal averages by hand."""

import copy
import functools
import json
import re

import pytest
import serving
import tiny
import torch
import transformers as tf
from batches import generated, prompt, sequence
from byte_members import at_once, exhaustive, step_by_step
from quantised import GREEDY, WIDE, by_hand
from torch import nn
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import UnsupportedHeadError
from softmeet.evaluation.premise import premise_scores
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.checkpoint import assemble
from softmeet.hf.vocabulary import choose_vocabulary
from softmeet.members import names, quantized
from softmeet.members.heads import body_hash, head_of
from softmeet.members.huggingface import load_tokenizers, require_loadable
from softmeet.members.opaque import OpaqueHead
from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning

# Of an adapter beside a shared weight, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def loaded(name, quantization=None, **config):
    """A bundled member, loaded with a quantisation whose configuration may be changed."""
    found = None if quantization is None else quantized.config_of(quantization)
    for key, value in config.items():
        setattr(found, key, value)
    place = names.find(name)["pretrained_model_name_or_path"]
    return tf.AutoModelForCausalLM.from_pretrained(place, quantization_config=found, dtype=torch.float32).eval()


def head_name(model):
    return next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())


def with_int8_head(name):
    from torchao.quantization import quantize_

    model = loaded(name, "int8")
    quantize_(model, quantized.config_of("int8").quant_type, lambda layer, where: where == head_name(model))
    return model


def with_lora(name):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = loaded(name)
    config = LoraConfig(target_modules=[head_name(model)], init_lora_weights=False, r=4)
    return inject_adapter_in_model(config, model).eval()


class Shifted(tf.LlamaForCausalLM):
    """A model that does to its logits what no configuration says, and counts the most positions that it did it at."""

    positions = 0

    def forward(self, *args, logits_to_keep=0, **kwargs):
        out = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        self.positions = max(self.positions, out.logits.shape[1])
        out.logits = out.logits + torch.linspace(-2, 2, out.logits.shape[-1])
        return out


def of_unknown_form(name):
    if not name.endswith("llama"):
        return loaded(name)
    return Shifted.from_pretrained(names.find(name)["pretrained_model_name_or_path"], dtype=torch.float32)


KINDS = {"int8": with_int8_head, "LoRA": with_lora, "unknown": of_unknown_form}
WHY = {"int8": "is quantised (Int8Tensor)", "LoRA": "has an adapter (peft", "unknown": "is unknown (Shifted"}
every = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def of_kind(kind, name):
    """A member, which is made once: no test changes more of it than the positions that it counts."""
    return KINDS[kind](name)


def assembled(members, models, **settings):
    config = EnsembleConfig(list(members), **{"rule": "logit-mean", **settings})
    tokenizers = load_tokenizers(members)
    model = assemble(EnsembleForCausalLM, config, models, choose_vocabulary(config, tokenizers), tokenizers)
    model.generation_config.eos_token_id = None
    return model


def test_int8_really_quantises_and_leaves_a_head_that_is_read():
    for name in WIDE:
        model = quantized.ready(loaded(name, "int8"), name, "int8")
        kinds = {type(layer.weight).__name__ for layer in model.modules() if isinstance(layer, nn.Linear)}
        assert kinds == {"Int8Tensor", "Parameter"}
        assert head_of(model).weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        assert 0 < (model(torch.arange(9)[None]).logits - loaded(name)(torch.arange(9)[None]).logits).abs().max() < 1


@torch.inference_mode()
def test_rules_that_read_heads_take_members_whose_heads_are_not_quantised():
    models = [loaded(name, "int8") for name in WIDE]
    ids = torch.arange(100, 109)[None]
    meets = assembled(WIDE, models, rule="meet", trust=1.0)(input_ids=ids).logits
    assert (meets - assembled(WIDE, models)(input_ids=ids).logits).abs().max() > 1e-3


@every
@torch.inference_mode()
def test_over_tokens_averages_are_those_by_hand_alone_and_in_batches_with_a_cache_and_without(kind):
    models = [of_kind(kind, name) for name in WIDE]
    ours = assembled(WIDE, models)
    assert ours.member_heads[0].why.startswith(WHY[kind])
    texts = [prompt(k, length) for k, length in enumerate((3, 9, 5))]
    own = [by_hand(models, torch.tensor([text]), 6) for text in texts]
    for options in ({}, {"use_cache": False}, {}):
        for model in models:
            model.positions = 0  # it was tried once whether the models read trees
        ids = torch.tensor([[0] * (9 - len(text)) + list(text) for text in texts])
        mask = torch.tensor([[0] * (9 - len(text)) + [1] * len(text) for text in texts])
        found = ours.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert found[:, 9:].tolist() == own
    assert models[0].positions == (kind == "unknown")  # logits at the last positions alone


@every
@torch.inference_mode()
def test_the_gate_unsure_finds_others_behind(kind):
    models = [of_kind(kind, name) for name in reversed(WIDE)]
    ours = assembled(WIDE[::-1], models)
    ids = torch.tensor([prompt(0, 7), prompt(1, 7)])
    always, never = ours.generate(ids, gate="unsure:1", **GREEDY), ours.generate(ids, gate="unsure:0", **GREEDY)
    assert torch.equal(always, ours.generate(ids, **GREEDY))
    assert torch.equal(never, models[0].generate(ids, **GREEDY))


@every
def test_the_batcher_draws_what_generate_does_and_keeps_prompts(kind, serve, monkeypatch):
    monkeypatch.setattr("softmeet.readers.kv.PIECE", 32)
    ours = assembled(WIDE, [of_kind(kind, name) for name in WIDE])
    running = serve(ours)
    # Which is tried once, on a few calls, where texts are padded.
    assert all(reader._kv.reads_trees for reader in running.readers.values())
    ours.members[0].positions = 0
    asked = [sequence(ours, prompt(k, length), max_tokens=6) for k, length in enumerate((3, 20, 5, 100))]
    running.submit([one for one, _ in asked])
    found = [listener.tokens() for _, listener in asked]
    positions = ours.members[0].positions
    asked.append(sequence(ours, (*prompt(3, 100), 7), max_tokens=3))
    running.submit([asked[-1][0]])
    found.append(asked[-1][1].tokens())
    assert found == [generated(ours, one.prompt, max_tokens=one.max_tokens) for one, _ in asked]
    assert running.metrics.registry.get_sample_value("softmeet_reused_tokens_total") == 100
    assert positions == (kind == "unknown")  # of prompts, logits at each one's newest token alone


@every
@pytest.mark.parametrize("name", ["mixed/gpt2", "mixed/llama"])
def test_over_bytes_a_text_has_the_sum_over_all_of_its_tokenizations(kind, name):
    member = ByteMember(of_kind(kind, name), spelling_of(name, load_tokenizers([name])[0]), Pruning(0.0, None))
    assert isinstance(member.head, OpaqueHead) is (kind != "unknown" or name == "mixed/llama")
    for text in (b" the", b"th\n"):
        expected = exhaustive(member, text)
        assert step_by_step(member, text) == pytest.approx(expected, abs=1e-3)
        assert at_once(member, text) == pytest.approx(expected, abs=1e-3)


@every
def test_rules_and_settings_that_read_heads_refuse_them_by_name(kind):
    models = [loaded("wide/neox"), of_kind(kind, "wide/llama")]
    why = re.escape(WHY[kind])
    with pytest.raises(UnsupportedHeadError, match=f"the rule meet reads heads .* wide/llama {why}.*choose logit-mean"):
        assembled(("wide/neox", "wide/llama"), models, rule="meet")
    ours = assembled(("wide/neox", "wide/llama"), models)
    with pytest.raises(UnsupportedHeadError, match=f"the rule meet reads heads .* wide/llama {why}"):
        premise_scores(Ensemble(ours, ours.tokenizer), "In the beginning God created")
    with pytest.raises(UnsupportedHeadError, match="the rule max-entropy reads heads"):
        ours.combiner.solve_rows(
            [torch.zeros(1, head.d) for head in ours.member_heads], ours.settings.changed(rule="max-entropy")
        )


def test_a_checkpoint_whose_head_is_quantised_is_refused_before_weights_are_loaded(quantised_folder, monkeypatch):
    assert require_loadable(quantised_folder) == {str(quantised_folder[1]): "torchao"}
    seen = []
    with pytest.raises(UnsupportedHeadError, match=r"the rule meet reads heads .*int8 is quantised \(torchao\)"):
        Ensemble.from_pretrained(quantised_folder, "meet", on_progress=seen.append)
    saved = quantised_folder[0].parent / "saved"
    Ensemble.from_pretrained(quantised_folder, "logit-mean").save_pretrained(saved)
    with pytest.raises(UnsupportedHeadError, match="the rule meet reads heads"):
        EnsembleForCausalLM.from_pretrained(saved, rule="meet")
    assert not seen
    # What the configuration does not tell is found when the member is loaded, before the next one is.
    monkeypatch.setattr("softmeet.members.quantized.method_of_head", lambda config: None)
    with pytest.raises(UnsupportedHeadError, match=r"is quantised \(Int8Tensor\)"):
        Ensemble.from_pretrained(quantised_folder[::-1], "meet", on_progress=seen.append)
    assert seen == [str(quantised_folder[1])]


@pytest.mark.parametrize("told", [True, False])
def test_without_a_rule_the_average_is_taken(told, quantised_folder, monkeypatch):
    if not told:
        monkeypatch.setattr("softmeet.members.quantized.method_of_head", lambda config: None)
    ensemble = Ensemble.from_pretrained(quantised_folder)
    assert ensemble.model.config.rule == "logit-mean"
    assert isinstance(ensemble.model.member_heads[1], OpaqueHead)


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"quant_method": "gptq", "lm_head": True}, "gptq"),
        ({"quant_method": "gptq", "lm_head": False}, None),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": None}, None),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}, None),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["model.norm"]}, "bitsandbytes"),
        ({"quant_method": "torchao", "modules_to_not_convert": []}, "torchao"),
        ({"quant_method": "awq", "modules_to_not_convert": []}, None),
        (None, None),
    ],
)
def test_what_a_configuration_tells_of_its_head(given, method):
    config = tf.LlamaConfig(tie_word_embeddings=False)
    if given is not None:
        config.quantization_config = given
    assert quantized.method_of_head(config) == method


def test_check_says_what_it_can(quantised_folder):
    def cli(*arguments):
        return CliRunner().invoke(commands, list(arguments), catch_exceptions=False)

    found = cli("check", "--json", *tiny.each("-m", quantised_folder))
    facts = json.loads(found.stdout)
    plain, other = facts["members"]
    assert (plain["unread"], other["unread"]) == (None, "is quantised (Int8Tensor)")
    assert (plain["rank"], other["rank"], facts["rank"], facts["pairs"]) == (32, None, None, [])
    assert other["megabytes"] < plain["megabytes"]
    assert facts["notes"][0].startswith(
        "They can be combined by logit-mean or prob-mean or power-mean: other rules read heads"
    )
    saved = quantised_folder[0].parent / "saved"
    Ensemble.from_pretrained(quantised_folder, "logit-mean").save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"rule": "meet"}))
    assert "unread" in cli("check", "-m", str(saved)).stdout


@every
def test_a_request_for_a_rule_that_reads_heads_gets_400_with_the_same_sentence(kind):
    models = [of_kind(kind, "wide/llama"), loaded("wide/neox")]
    model = assembled(WIDE, models)
    with serving.running(serving.serving_of({"two": Ensemble(model, model.tokenizer)})) as url:
        asked = {"model": "two", "prompt": "the", "max_tokens": 3, "temperature": 0}
        assert serving.http.post(f"{url}/v1/completions", json=asked).status_code == 200
        refused = serving.http.post(f"{url}/v1/completions", json={**asked, "softmeet": {"rule": "meet"}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "softmeet.rule"
        with pytest.raises(UnsupportedHeadError) as said:
            model.require(model.settings.changed(rule="meet"))
        assert refused.json()["error"]["message"] == str(said.value)


@every
def test_copies_and_other_processes_have_the_same_head(kind):
    from softmeet.scaling.packing import pack, parts, unpack

    model = assembled(WIDE, [of_kind(kind, name) for name in WIDE])
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        own = model(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, own)
        assert torch.equal(unpack(pack(model)[0])(input_ids=ids).logits, own)
    assert parts(None) == []


def test_hashes_tell_members_apart_by_what_quantised_weights_hold():
    one, two = loaded("wide/llama", "int8"), loaded("wide/llama", "int8")
    assert body_hash(one) == body_hash(two) != body_hash(loaded("wide/llama"))
    next(p for p in two.parameters() if hasattr(p, "__tensor_flatten__")).qdata[0, 0] += 1
    assert body_hash(one) != body_hash(two)
