"""What a hostile reader of members, prompts and passages found, each with what it should be."""

import json
from unittest.mock import Mock

import pytest
import tiny
import torch
import transformers as tf
from tokenizers import processors
from transformers.pytorch_utils import Conv1D

from softmeet import Ensemble, Member, Passage
from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.heads import product
from softmeet.members import trunk
from softmeet.members.trunk import few_rows
from softmeet.server.ensembles import Served
from softmeet.server.prompts import encoded
from softmeet.server.schemas import CompletionRequest, Extension

TEXTS = ["the quick fox", "and then it rains in spain"]
PROMPT = "a long tale. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    tiny.save(folder / "base", "llama", seed=0)
    tiny.save(folder / "other", "gpt2", seed=1)
    return folder


def pair(made, **options):
    lines = [str(made / "base"), f"{made / 'base'}+prompt={PROMPT}"]
    return Ensemble.from_pretrained(lines, "logit-mean", dtype="float64", **options)


def test_a_later_chunk_that_begins_as_the_prompt_does_is_read_whole(made):
    """With a cache, new tokens that are the prompt's first ones are not taken for the prompt."""
    ensemble = pair(made)
    ids = ensemble.tokenizer("the fox" + PROMPT + "x", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = ensemble.model(ids, logits_to_keep=1).logits
        cache = ensemble.model.new_cache()
        ensemble.model(ids[:, :7], cache=cache, use_cache=True)
        parts = ensemble.model(ids[:, 7:], cache=cache, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)


def test_kept_prompts_are_read_again_when_the_weights_have_changed(made):
    ensemble = pair(made)
    before = ensemble.next_token(TEXTS[0]).solution.log_probs
    ensemble.next_token(TEXTS[0])
    other = Ensemble.from_pretrained([str(tiny.save(made / "new", "llama", seed=5))] * 2, "logit-mean", dtype="float64")
    ensemble.model.load_state_dict(other.model.state_dict())
    found = ensemble.next_token(TEXTS[0]).solution.log_probs
    lines = [str(made / "new"), f"{made / 'new'}+prompt={PROMPT}"]
    fresh = Ensemble.from_pretrained(lines, "logit-mean", dtype="float64")
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, fresh.next_token(TEXTS[0]).solution.log_probs, atol=1e-9, rtol=0)


def test_passages_outlive_a_cast(made):
    base = Ensemble.from_pretrained(str(made / "base"), "prob-mean")
    behind = base.with_passages([Passage("a dog.", 1.0)])
    behind.generate("the", max_new_tokens=2, do_sample=False)
    base.model.double()
    behind.generate("the", max_new_tokens=2, do_sample=False)


def test_a_recurrent_member_stands_beside_a_prompt_and_takes_one(made):
    folder = made / "mamba"
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, **tiny.IDS)
    tf.MambaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    ensemble = Ensemble.from_pretrained([f"{made / 'base'}+prompt={PROMPT}", str(folder)], "logit-mean")
    assert isinstance(ensemble.generate("the", max_new_tokens=3, do_sample=False), str)
    alone, prompted = (Ensemble.from_pretrained([name], "logit-mean").model for name in (folder, f"{folder}+prompt=so"))
    ids = ensemble.tokenizer("the")["input_ids"]
    own, skipped = prompted.contexts.before(0, ids)
    assert own
    whole = torch.tensor([[*own, *ids[skipped:]]])
    with torch.inference_mode():
        (found,), (expected,) = prompted.hidden_states(torch.tensor([ids])), alone.hidden_states(whole)
    assert torch.allclose(found, expected[-len(found) :], atol=1e-6)


def test_a_chunk_of_padding_alone(made):
    ensemble, cache = pair(made), pair(made).model.new_cache()
    ids = ensemble.tokenizer("the", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ensemble.model(ids, cache=cache, use_cache=True)
    with torch.no_grad():  # and on from a cache that was begun in inference mode
        ensemble.model(ids[:, :1], cache=cache, use_cache=True)
        mask = torch.tensor([[1] * 4 + [0]])
        ensemble.model(ids[:, :1], attention_mask=mask, cache=cache, use_cache=True)


def test_a_folder_with_an_at_in_its_name_is_saved_and_loaded(made, tmp_path):
    folder = tiny.save(tmp_path / "c@v1", "llama", seed=0)
    Ensemble.from_pretrained([folder, folder], "logit-mean").save_pretrained(tmp_path / "saved")
    assert len(Ensemble.from_pretrained(tmp_path / "saved").names) == 2


def test_a_saved_ensemble_reads_no_files_but_its_members(made, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    pair(made).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["members"][1] = f"{made / 'base'}+prompt={tmp_path / 'secret.txt'}"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises((InvalidInputError, CheckpointError), match="expected the text of a prompt in a saved ensemble"):
        Ensemble.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": 5}, {"source": "m", "prompt": 5}, {"source": "m", "prompt": "a\ud800"}, {"source": "m\0"},
        {"source": "m", "prompt": "a\0b"}, {"source": "m", "prompt": "~nosuchuser/x.txt"},
    ],
)  # fmt: skip
def test_fields_that_are_no_texts(wrong):
    with pytest.raises(InvalidInputError):
        Member(**wrong)


def test_fields_that_are_empty_or_paths(tmp_path):
    (tmp_path / "x.txt").write_text("\ufeffHear. ")
    assert Member("m", prompt="", name="") == Member("m")
    assert Member("m", prompt=tmp_path / "x.txt").prompt == "Hear. "


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """An ensemble whose tokenizer puts the token 0 before texts; one member has a prompt, and one a template."""
    folder = tiny.save(tmp_path_factory.mktemp("begun") / "base", "llama", seed=0)
    words = tiny.tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    words.save_pretrained(folder)
    lines = [str(folder), f"{folder}+prompt=so", f"{folder}+prompt=we ask {{prompt}}?"]
    ensemble = Ensemble.from_pretrained(lines, "logit-mean")
    return Served("it", ensemble, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("given", "more", "read"),
    [
        ("abc", {}, [None, "<soabc", "<we ask abc?"]),
        ("abc", {"add_special_tokens": False}, [None, "soabc", "we ask abc?"]),
        ("<abc", {}, [None, "<soabc", "<we ask abc?"]),
        ("abcdef", {"truncate_prompt_tokens": 3}, [None, "<sodef", "<we ask def?"]),
    ],
)
def test_what_members_read_of_a_prompt(begun, given, more, read):
    """Told by letters, < for the token that begins a text; given with it, the prompt is token ids."""
    words = begun.ensemble.tokenizer

    def ids(text):
        plain = words(text.removeprefix("<"), add_special_tokens=False)["input_ids"]
        return tuple([0] * text.startswith("<") + plain)

    prompt = list(ids(given)) if given.startswith("<") else given
    body = CompletionRequest(prompt=prompt, **more)
    how = begun.combination(Extension(), ())
    (shared,), own = encoded(begun, how, [prompt], body, scored=False)
    assert words.decode(shared, skip_special_tokens=True) == ("def" if given == "abcdef" else "abc")
    assert own == (tuple(None if text is None else ids(text) for text in read),)


def test_prefixes_stay_with_the_members_that_a_request_names(made):
    base = str(made / "base")
    ensemble = Ensemble.from_pretrained([base, str(made / "other"), base], "logit-mean", prefixes=[None, None, [5, 6]])
    part = Served("it", ensemble, ("a", "b", "c")).combination(Extension(members=["a", "c"]), ("members",)).model
    assert part.contexts.prefixes == [(), (5, 6)]
    with pytest.raises(InvalidInputError, match="passages without prefixes"):
        ensemble.with_passages([Passage("a dog.", 1.0)])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1024, 1022], ids=["in parts", "not divisible"])
def test_products_of_few_rows(rows, threads, width, monkeypatch):
    """By layers that hold their matrix either way around, of which one is multiplied in parts where that is quicker."""
    torch.manual_seed(rows)
    x, in_parts = torch.randn(1, rows, width), Mock(side_effect=trunk.product_in_parts)
    monkeypatch.setattr(trunk, "product_in_parts", in_parts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for layer in torch.nn.Linear(width, 8192), Conv1D(2048, width):
        matrix = layer.weight.detach() if isinstance(layer, Conv1D) else layer.weight.detach().T
        wanted = (x.double() @ matrix.double()).float()
        with torch.no_grad(), few_rows(layer, torch.device("cpu")):
            torch.testing.assert_close(layer(x), wanted + layer.bias, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer(x[0]), (wanted + layer.bias)[0], atol=1e-4, rtol=1e-4)
        if isinstance(layer, torch.nn.Linear):
            torch.testing.assert_close(product(x[0], layer.weight.detach()), wanted[0], atol=1e-4, rtol=1e-4)
            in_parts.reset_mock()
    assert in_parts.called == (threads > 1 and 1 < rows < 5 and width == 1024)
