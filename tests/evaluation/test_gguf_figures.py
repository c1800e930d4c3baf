"""What is measured of GGUF files, which llama.cpp runs: the same digits each time, and what they were made by."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import byte_tokenizers
import gguf_files
import pytest
import tiny
import torch
import transformers as tf
from commands import ran, refusal, run

from softmeet import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.members import reader_model
from softmeet.members.gguf_file import fingerprint
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


def test_heads_are_read_if_any_rule_reads_them_and_the_run_says_how_files_were_read(files, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    asked = [*tiny.each("-m", files), "--text", tmp_path / "a.txt", "--max-tokens", 9]
    done = ran("evaluate", *asked, "--rule", "power-mean", "--rule", "meet:trust=1", "--json", tmp_path / "a.json")
    assert "whatever the number of workers" in " ".join(done.stdout.split())
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["rules"]["meet:trust=1"]["passes"] > 0
    told = facts["run"]
    assert {version("llama-cpp-py-sync")} <= set(told["versions"].values())
    for one, path in zip(told["members"], files, strict=True):
        assert (one["engine"], one["quantization"], one["hash"]) == ("llama.cpp", "Q4_0", fingerprint(Path(path)))
        assert "dtype" not in one
    for one in told["rules"]["choices"]:
        assert {"trust", "weights", "tol"} <= one["settings"].keys()
    assert [one["options"] for one in told["rules"]["choices"][2:]] == [{"order": 0.5}, {"budget": None}]


def test_a_fit_reads_heads_of_files_if_a_rule_of_it_does(files, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] + TEXTS[1])
    asked = ["fit", *tiny.each("-m", files), "--text", tmp_path / "a.txt", "--max-tokens", 60, "--evaluations", 1]
    done = ran(*asked, "--rule", "logit-mean:trust=1", "--rule", "meet:trust=1", "--out", tmp_path / "out")
    assert "meet:trust=1" in done.stdout


def test_over_bytes_a_paper_has_how_much_was_estimated(files, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    asked = ["evaluate", *tiny.each("-m", files), "--text", tmp_path / "a.txt", "--vocabulary", "bytes"]
    done = ran(*asked, "--max-tokens", 20, "--table", "latex")
    said = [line for line in done.stdout.splitlines() if line.startswith("% ")]
    read = [line for line in said if re.search(r"read by llama\.cpp Q4_0, prune 0\.001: \d\.\d\d% of its mass", line)]
    assert len(read) == 2
    assert sum("plausibility=0.0" in line for line in said) == 1
    assert any(line.startswith("% softmeet evaluate -m ") for line in said)


def test_ways_that_cannot_all_be_followed_are_refused_before_anything_is_loaded(files, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXTS[1])
    monkeypatch.setattr(reader_model, "reader_of", None)
    assert "following all tokenizations of a text" in refusal(
        "evaluate", *tiny.each("-m", files), "--text", tmp_path / "a.txt", "--vocabulary", "bytes", "--prune", 0
    )


def test_a_trace_over_bytes_is_evaluated_with_its_prune(files, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[1])
    asked = [*tiny.each("-m", files), "--text", tmp_path / "a.txt", "--vocabulary", "bytes", "--max-tokens", 20]
    done = ran("trace", tmp_path / "t", *asked, "--prune", 0.02)
    assert "whatever the number of workers" in " ".join(done.stdout.split())
    traced, direct = (
        json.loads(run("evaluate", *more, "--json", "-").stdout)
        for more in (["--trace", tmp_path / "t", "--vocabulary", "bytes"], [*asked, "--prune", 0.02])
    )
    assert traced["run"]["prune"] == 0.02
    ours, theirs = ([row["nll"] for row in one["members"].values()] for one in (traced, direct))
    assert ours == pytest.approx(theirs, abs=1e-6)
