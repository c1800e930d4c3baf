"""Ensembles over bytes: members with different tokenizers, through generate, forward, checkpoints and refusals."""

from __future__ import annotations

import byte_tokenizers
import numpy as np
import pytest
import torch
import transformers as tf
from serving import serving_of
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError, UnsupportedHeadError, VocabularyMismatchError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.harness import harness_model
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.trace import record
from softmeet.hf.byte_modeling import WholeCharacters
from softmeet.hf.byte_tokenizer import byte_tokenizer
from softmeet.members.covers import END, SYMBOLS

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PROMPTS = ["the", "he t", "\u00e9t"]


def save(folder, kind, seed):
    tokenizer = byte_tokenizers.KINDS[kind]()
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if kind == "gpt2":
        config = tf.GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, **ids)
        model = tf.GPT2LMHeadModel(config)
    else:
        config = tf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=128, **ids,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [save(folder / kind, kind, seed) for seed, kind in enumerate(("gpt2", "llama"))]


@pytest.fixture(scope="module")
def ensemble(folders):
    """All tokenizations followed, of which short texts have few: to untrained members they make all the difference."""
    return Ensemble.from_pretrained(folders, vocabulary="bytes", prune=0.0, dtype=torch.float64)


@pytest.fixture(scope="module")
def pruned(folders):
    return Ensemble.from_pretrained(folders, "logit-mean", vocabulary="bytes")


def test_different_tokenizers_need_bytes(folders):
    with pytest.raises(VocabularyMismatchError, match="vocabulary='bytes'"):
        Ensemble.from_pretrained(folders)
    with pytest.raises(InvalidInputError, match="expected a vocabulary, tokens or bytes, got 'words'"):
        Ensemble.from_pretrained(folders, vocabulary="words")


def test_a_rule_that_reads_heads_is_refused_before_anything_is_loaded():
    with pytest.raises(UnsupportedHeadError, match=r"rule meet .* choose logit-mean or prob-mean"):
        Ensemble.from_pretrained(["nowhere/a", "nowhere/b"], "meet", vocabulary="bytes")


@pytest.mark.parametrize("rule", ["prob-mean", "logit-mean"])
def test_the_distribution_is_the_average_of_the_members(folders, rule):
    """At every byte, of a text that is read at once and of one that is read byte by byte."""
    ours = Ensemble.from_pretrained(
        folders, f"{rule}:weights=0.7/0.3", vocabulary="bytes", prune=0.0, dtype=torch.float64
    )
    text = b"the h\xc3\xa9"
    p = np.stack([reader.score(text)[1] for reader in ours.model.readers])
    if rule == "prob-mean":
        expected = np.log(0.7 * np.exp(p[0]) + 0.3 * np.exp(p[1]))
    else:
        expected = torch.from_numpy(0.7 * p[0] + 0.3 * p[1]).log_softmax(-1).numpy()
    ids = torch.tensor([list(text)])
    with torch.inference_mode():
        at_once = ours.model(input_ids=ids, use_cache=False).logits[0]
        cache, one_by_one = None, []
        for k in range(ids.shape[1]):
            out = ours.model(input_ids=ids[:, k : k + 1], cache=cache, use_cache=True)
            cache = out.cache
            one_by_one.append(out.logits[0, -1])
    assert np.abs(np.exp(at_once.numpy()) - np.exp(expected[1:])).sum(-1).max() < 1e-9
    assert np.abs(np.exp(torch.stack(one_by_one).numpy()) - np.exp(expected[1:])).sum(-1).max() < 1e-9


def test_generation_is_the_same_in_batches_alone_and_without_a_cache(ensemble):
    together = ensemble.generate(PROMPTS, **GREEDY)
    assert together == [ensemble.generate(prompt, **GREEDY) for prompt in PROMPTS]
    assert together == [ensemble.generate(prompt, use_cache=False, **GREEDY) for prompt in PROMPTS]
    assert together == [ensemble.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY) for prompt in PROMPTS]
    assert together == ["".join(ensemble.stream(prompt, **GREEDY)) for prompt in PROMPTS]


def test_pruned_generation_is_the_same_in_batches_alone_and_streamed(pruned):
    options = {"max_new_tokens": 12, "do_sample": False}
    prompts = ["the the", "he said: other ", "\u00e9t\u00e9"]
    together = pruned.generate(prompts, **options)
    assert together == [pruned.generate(prompt, **options) for prompt in prompts]
    assert together == ["".join(pruned.stream(prompt, **options)) for prompt in prompts]


def test_seeds_are_of_rows(ensemble):
    options = {"max_new_tokens": 4, "do_sample": True, "seed": 3}
    together = ensemble.generate(PROMPTS, **options)
    assert together[0] == ensemble.generate(PROMPTS[0], **options)
    assert ensemble.generate(PROMPTS, **options) == together
    assert ensemble.generate(PROMPTS, **(options | {"seed": 4})) != together


def test_beams_find_what_is_at_least_as_likely(ensemble):
    """In batches as alone; the readings of beams change places with them."""
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "length_penalty": 0.0}
    together = ensemble.generate(PROMPTS, **options)
    assert together == [ensemble.generate(prompt, **options) for prompt in PROMPTS]

    def log_probability(prompt, text):
        ids = torch.tensor([list((prompt + text).encode())])
        with torch.inference_mode():
            log_p = ensemble.model(input_ids=ids).logits[0, :-1]
        return log_p.gather(-1, ids[0, 1:, None])[len(prompt.encode()) - 1 :].sum().item()

    compared = 0
    for prompt, beam in zip(PROMPTS, together, strict=True):
        greedy = ensemble.generate(prompt, **GREEDY)
        if len(beam.encode()) == len(greedy.encode()) == 4:
            compared += 1
            assert log_probability(prompt, beam) >= log_probability(prompt, greedy) - 0.05
    assert compared


def test_what_is_generated_is_utf8(pruned):
    out = pruned.model.generate(
        torch.tensor([list(b"the \xf0\x9f")]), max_new_tokens=40, do_sample=True, temperature=3.0, top_k=0
    )
    text = bytes(symbol for symbol in out[0].tolist() if symbol != END)
    text.decode() if out[0, -1] == END else text.decode(errors="ignore")
    # Whatever was cut off at the end is the beginning of a character.
    assert not text.decode(errors="replace")[:-1].count("\ufffd")


def test_which_bytes_may_follow():
    """Of all strings of up to four bytes, those that Python can decode, or go on to decode."""
    forbid, zeros = WholeCharacters(), torch.zeros(1, SYMBOLS)
    for character in ("a", "\u00e9", "\u20ac", "\U0001f642", "\u0800", "\ud7ff", "\U0010ffff"):
        text = character.encode()
        for k, byte in enumerate(text):
            allowed = forbid(torch.tensor([list(text[:k])], dtype=torch.int64), zeros)[0].isfinite()
            assert allowed[byte]
            assert allowed[END] == (k == 0)
    for text, byte in ((b"", 0x80), (b"", 0xC0), (b"", 0xF5), (b"\xe0", 0x80), (b"\xed", 0xA0), (b"\xf4", 0x90)):
        assert not forbid(torch.tensor([list(text)], dtype=torch.int64), zeros)[0].isfinite()[byte]


def test_it_is_saved_and_loaded(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "saved")
    again = Ensemble.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert again.generate(PROMPTS, **GREEDY) == ensemble.generate(PROMPTS, **GREEDY)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer("the", return_tensors="pt")
    out = model.generate(**ids, **GREEDY)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == ensemble.generate("the", **GREEDY)
    assert tokenizer("<|end|>")["input_ids"] == list(b"<|end|>")


def test_the_next_symbol(ensemble):
    found = ensemble.next_token("the the", top=3)
    assert len(found.top) == 3
    assert set(found.members) == set(ensemble.names)


def test_the_tokenizer_of_bytes_takes_text_as_it_is():
    tokenizer = byte_tokenizer()
    for text in ("a b  c\n", "\u05e9\u05dc \U0001f642\u200d", "<|end|>", "e\u0301"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_text_past_a_members_context_is_refused_by_name(pruned, folders):
    with pytest.raises(InvalidInputError, match=f"at most 128 tokens, the context of {folders[0]}"):
        pruned.generate("x" * 140, **GREEDY)


def test_what_bytes_are_not_there_for_says_so(pruned, folders, tmp_path):
    pruned.save_pretrained(tmp_path / "saved")
    documents = [Document("a", "the other the")]
    refusing = {
        "evaluation": lambda: observe_text(pruned, documents),
        "evaluation does": lambda: list(pruned.positions("the other", 5)),
        "a trace": lambda: record(pruned, documents, tmp_path / "trace"),
        "lm-eval": lambda: harness_model(pruned),
        "the server": lambda: serving_of({"bytes": pruned}),
        "check": lambda: CliRunner().invoke(commands, ["check", "-m", str(tmp_path / "saved")], catch_exceptions=False),
    }
    for what, use in refusing.items():
        with pytest.raises(InvalidInputError, match=f"{what} .*over bytes"):
            use()
    with pytest.raises(InvalidInputError, match="the gate 'unsure' is not for byte ensembles"):
        pruned.generate("the", gate="unsure:0.5", max_new_tokens=1)
    with pytest.raises(InvalidInputError, match="the gate 'unsure' is not for byte ensembles"):
        pruned.model(input_ids=torch.tensor([[65]]), gate="unsure:0.5", use_cache=False)
