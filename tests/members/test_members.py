"""Heads of real architectures, and loading members: what works, and what each failure says."""

import json
import re
import sys
from functools import wraps
from importlib.util import find_spec

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

from softmeet import Ensemble
from softmeet.errors import CheckpointError, InvalidInputError, VocabularyMismatchError
from softmeet.heads import SoftmaxHead
from softmeet.members import huggingface, zoo
from softmeet.members import names as known
from softmeet.members.heads import head_of
from softmeet.members.huggingface import dtype_of, load_members, load_tokenizers
from softmeet.members.trunk import last_hidden
from softmeet.members.vocabulary import common_vocabulary, surely_differ, token_ids, token_support

pytestmark = pytest.mark.checked


class Odd(nn.Linear):
    """A layer of a kind of its own, as adapters and quantisers put in place of a linear one."""


@pytest.mark.parametrize(
    ("layer", "why", "d"),
    [
        (Odd(32, tiny.V), r"is no plain linear layer \(test_members.Odd\)", 32),
        (nn.Sequential(nn.Linear(32, tiny.V)), "is no plain linear layer .*Sequential", 32),
        (nn.Sequential(nn.Linear(32, tiny.V), nn.Softplus()), "is no plain linear layer", 32),
    ],
)
@torch.inference_mode()
def test_layers_that_cannot_be_read_are_run(layer, why, d):
    model = tiny.build("llama")
    model.set_output_embeddings(layer.eval())
    head = head_of(model)
    assert re.match(why, head.why)
    assert (head.v, head.d, head.dtype, head.device.type) == (tiny.V, d, torch.float32, "cpu")
    ids = torch.arange(1, 9).view(2, 4)
    assert torch.allclose(head.logits(last_hidden(model, ids)), model(input_ids=ids).logits, atol=1e-6)


def no_layer(model, monkeypatch):
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)


def layer_elsewhere(model, monkeypatch):
    monkeypatch.setattr(model, "get_output_embeddings", lambda: nn.Linear(32, tiny.V, bias=False, device="meta"))


def factor_that_is_not_applied(model, monkeypatch):
    model.config.logit_scale = 0.5


@pytest.mark.parametrize("how", [no_layer, layer_elsewhere, factor_that_is_not_applied])
@torch.inference_mode()
def test_where_the_form_of_logits_is_unknown_they_stand_in_for_hidden_states(how, monkeypatch):
    model = tiny.build("llama")
    how(model, monkeypatch)
    head = head_of(model)
    assert "computes its logits in a way that softmeet does not know" in head.why
    assert head.d == head.v == tiny.V
    ids = torch.arange(1, 9).view(2, 4)
    own, asked = model(input_ids=ids).logits, []
    forward = model.forward
    monkeypatch.setattr(model, "forward", wraps(forward)(lambda **given: asked.append(given) or forward(**given)))
    for kept in (slice(None), slice(-2, None), torch.tensor([0, 2])):
        assert torch.allclose(head.logits(last_hidden(model, ids, kept)), own[:, kept], atol=1e-5)
    assert [given["logits_to_keep"] for given in asked[:2]] == [0, 2]
    assert asked[2]["logits_to_keep"].tolist() == [0, 2]


def test_a_member_that_gives_nan_is_named_for_that():
    model = tiny.build("llama")
    model.get_input_embeddings().weight.data[1] = torch.nan
    with pytest.raises(CheckpointError, match="expected logits from LlamaForCausalLM, got NaN"):
        head_of(model)


def test_load_members_in_order_with_progress(tmp_path):
    folders = [tiny.save(tmp_path / name, name) for name in ("gpt2", "llama")]
    seen = []
    members = load_members(folders, on_progress=seen.append)
    assert seen == [str(f) for f in folders]
    assert [type(m).__name__ for m in members] == ["GPT2LMHeadModel", "LlamaForCausalLM"]
    assert all(p.dtype == torch.float32 for m in members for p in m.parameters())
    assert load_members(folders[:1], dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(InvalidInputError, match="at least one member"):
        load_members([])


def failing(tmp_path, damage):
    folder = tiny.save(tmp_path / "member", "llama")
    damage(folder)
    return folder


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_it(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def bring_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "newfangled", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")


ENCODERS = {
    "encoder with a decoder": [tf.BartConfig(), tf.MarianConfig(), tf.T5Config()],
    "reads a text from both sides": [tf.BertConfig(), tf.XLMRobertaConfig()],
    "no causal language model head": [tf.ViTConfig(), tf.DistilBertConfig()],
}


@pytest.mark.parametrize(("why", "config"), [(why, config) for why, some in ENCODERS.items() for config in some])
def test_what_predicts_no_next_token_is_refused_by_its_configuration(why, config, tmp_path):
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # which is never read
    with pytest.raises(CheckpointError, match=f"{config.model_type}.*expected a causal language model") as caught:
        Ensemble.from_pretrained([tmp_path])
    assert why in str(caught.value)


def of_kind(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def without_tokenizer(folder, kind=None):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    if kind:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))


def another_vocabulary(folder):
    without_tokenizer(folder, "BertGenerationTokenizer")
    (folder / "spiece.model").write_bytes(b"?")


NO_TOKENIZER = r"expected tokenizer\.json.*: write them with tokenizer\.save_pretrained\(folder\)$"


# What is found when weights are read.
READ = [(truncate, "damaged or truncated"), (drop_a_weight, "1 weights are missing or misshapen .*model.norm.weight")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *READ,
        (pickle_it, "pickled.*save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*.safetensors file"),
        (lambda f: (f / "config.json").unlink(), "no config.json: expected a saved"),
        (lambda f: (f / "config.json").rename(f / "a.gguf"), r"no config.json: name a file in it, such as .*a\.gguf"),
        (without_tokenizer, NO_TOKENIZER),
        (lambda f: (of_kind(model_type="gemma")(f), without_tokenizer(f)), NO_TOKENIZER),
        (lambda f: (f / "tokenizer.json").unlink(), NO_TOKENIZER),
        (lambda f: (f / "tokenizer.json").write_text('{"a'), r"not valid JSON \(.*\): fetch it again$"),
        (lambda f: (f / "config.json").write_text('{"a'), "config.json is not valid JSON: fetch it again$"),
        (lambda f: (f / "config.json").write_text("[1]"), "cannot load .*: ."),
        (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
        (of_kind(model_type="newfangled"), "know its architecture newfangled.*pip install -U transformers$"),
        (bring_code, "custom code.*trust_remote_code=True"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_a_whole_sentence(tmp_path, damage, message, monkeypatch):
    if (damage, message) not in READ:
        monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", None)
    folder = failing(tmp_path, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        Ensemble.from_pretrained([folder])
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="for where the package is missing")
def test_a_package_that_a_tokenizer_needs_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs more packages: pip install sentencepiece protobuf$"):
        load_tokenizers([str(failing(tmp_path, another_vocabulary))])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("You are trying to access a gated repo.\nMake sure to have access."), "it is gated: ask for access"),
        (OSError("We couldn't connect to 'hub', and couldn't find them in the cached files.\nX"), "some of its files"),
        (ImportError("`tiktoken` is required to read a `tiktoken` file.\nInstall it"), "pip install tiktoken$"),
        (
            ImportError("packages that were not found in your environment: flash_attn, einops. Run"),
            ": flash_attn, einops$",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf"), "a dtype such as bfloat16"),
        (RuntimeError("unable to mmap 2 bytes from file: Cannot allocate memory (12)"), "a dtype such as bfloat16"),
        (ValueError("This is\ncut into\nlines"), "cannot load me: This is cut into lines$"),
        (ValueError("word " * 200), "word …$"),
        (KeyError("rope"), "KeyError: 'rope'$"),
        (MemoryError(), "cannot load me: MemoryError$"),
    ],
)
def test_what_transformers_says_is_said_in_a_whole_sentence(error, message):
    with pytest.raises(CheckpointError, match=message) as caught, huggingface.named_in_errors("me", {}):
        raise error
    assert caught.value.__cause__ is error


def test_gguf_files_need_packages(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"GGUF files need more packages: .*\[gguf\]'"):
        load_members([f"{tmp_path / 'a.gguf'}+engine=transformers"])


@pytest.mark.parametrize("dtype", ["foo", "int8", "float8_e4m3fn", torch.int8, 3, ["float32", "bf16"]])
def test_dtypes_that_no_member_can_have(dtype, monkeypatch):
    monkeypatch.setattr(known, "find", None)  # nothing is looked for
    with pytest.raises(InvalidInputError, match="expected a dtype of float32, bfloat16, float16, float64, or auto"):
        load_members(["wide/gpt2", "wide/llama"], dtype=dtype)
    assert dtype_of("half", None) == dtype_of("torch.float16", None) == torch.float16


def test_bundled_names():
    assert zoo.expand("wide") == ["wide/gpt2", "wide/llama", "wide/neox"]
    assert len(zoo.expand("narrow")) == 4
    assert zoo.locate("wide/gpt2") == str(zoo.folder() / "wide" / "gpt2")
    assert zoo.expand("org/model") == ["org/model"]
    assert zoo.locate("org/model") == "org/model"


def test_a_folder_that_holds_no_model_hides_no_bundled_member(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "narrow" / "opt-a").mkdir(parents=True)
    assert len(zoo.expand("narrow")) == 4
    assert zoo.locate("narrow/opt-a") == str(zoo.folder() / "narrow" / "opt-a")
    (tmp_path / "narrow" / "opt-a" / "config.json").write_text("{}")
    assert zoo.locate("narrow/opt-a") == "narrow/opt-a"
    (tmp_path / "narrow" / "config.json").write_text("{}")
    assert zoo.expand("narrow") == ["narrow"]


def test_different_vocabularies_say_which_tokens_differ():
    ours, other = tiny.tokenizer(), tiny.tokenizer(60)
    assert common_vocabulary(["a", "b"], [ours, tiny.tokenizer()]).ids == set(range(64))
    said = r"a \(64 tokens\) and b \(60 tokens\) differ in 4 ids \(id 60: '&' and None"
    with pytest.raises(VocabularyMismatchError, match=said):
        common_vocabulary(["a", "b"], [ours, other])
    assert surely_differ([ours, other])


def test_vocabularies_may_differ_in_padding_and_added_tokens():
    plain, chat, padded = tiny.tokenizer(60), tiny.tokenizer(60), tiny.tokenizer(60)
    chat.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    padded.add_tokens([f"[PAD{k}]" for k in range(60, 70)])
    for pair in ([plain, chat], [chat, padded], [padded, plain]):
        found = common_vocabulary(["a", "b"], pair)
        assert not surely_differ(pair)
        assert not surely_differ(pair[::-1])
        assert found.ids == set(range(60))
        assert found.tokenizer is (plain if padded in pair and plain in pair else pair[0])
    chat.eos_token = "<|turn|>"
    with pytest.raises(VocabularyMismatchError, match=r"differ in 1 ids \(id 60: None and '<\|turn\|>'\)"):
        common_vocabulary(["a", "b"], [plain, chat])


def test_a_tokenizer_that_would_make_tokens_of_its_own_is_not_the_common_one():
    plain, more = tiny.tokenizer(60), tiny.tokenizer(60)
    more.add_tokens(["the"])
    assert common_vocabulary(["a", "b"], [more, plain]).tokenizer is plain
    other = tiny.tokenizer(60)
    other.add_tokens(["and"])
    with pytest.raises(VocabularyMismatchError, match="differ in 1 ids"):
        common_vocabulary(["a", "b"], [more, other])


def test_padded_rows_are_no_tokens():
    head = SoftmaxHead(torch.randn(70, 3))
    assert token_support(token_ids(tiny.tokenizer()), ["a"], [head]).tolist() == [True] * 64 + [False] * 6
    assert token_support(token_ids(tiny.tokenizer()), ["a"], [SoftmaxHead(torch.randn(64, 3))]) is None
    with pytest.raises(VocabularyMismatchError, match="each of the tokenizer's 64 ids, but small has 60"):
        token_support(token_ids(tiny.tokenizer()), ["small"], [SoftmaxHead(torch.randn(60, 3))])
