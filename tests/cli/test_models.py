"""``softmeet models``."""

from __future__ import annotations

import json

import byte_tokenizers
import gguf_files
import transformers as tf
from commands import run
from typer.testing import CliRunner

from softmeet.cli.main import app

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip

CHAT = "tokenizer.chat_template"


def written(path, tokenizer, **said):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    gguf_files.write(path, model, tokenizer, bits=8, pre="gpt-2", **said)


def test_files_of_other_programs_are_listed_with_who_shares_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    one, other = byte_tokenizers.byte_level(), byte_tokenizers.llama()
    written(tmp_path / "ollama" / "blobs" / "sha256-12ab", one)
    manifest = tmp_path / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "qwen" / "0.5b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:12ab"}
    manifest.write_text(json.dumps({"layers": [layer, {"mediaType": "x", "digest": "sha256:cd"}]}))
    written(tmp_path / ".lmstudio" / "models" / "org" / "lm" / "lm.gguf", one)
    written(tmp_path / "hub" / "models--org--m" / "snapshots" / "1" / "hub.gguf", other, said={CHAT: "{{ messages }}"})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.gguf").write_bytes(b"GGUF")
    found = json.loads(CliRunner().invoke(app, ["models", str(tmp_path / "more"), "--json"]).stdout)
    assert [(row["from"], row["model"]) for row in found] == [
        ("Hub", "hub"), ("LM Studio", "lm"), ("folder", "broken"), ("ollama", "qwen:0.5b"),
    ]  # fmt: skip
    letters = {row["model"]: row["tokens"] for row in found}
    assert letters["lm"] == letters["qwen:0.5b"] != letters["hub"]
    assert letters["broken"] == ""
    assert [row["model"] for row in found if row["chat"]] == ["hub"]
    shown = CliRunner().invoke(app, ["models"]).stdout
    assert "mixed by tokens" in shown
    paths = [row["path"] for row in found if row["model"] in ("lm", "qwen:0.5b")]
    assert f"softmeet serve -m pair={paths[0]} -m pair={paths[1]}" in shown
    blob = next(row["path"] for row in found if row["from"] == "ollama")
    options = ["--max-new-tokens", "3", "--rule", "logit-mean"]
    assert CliRunner().invoke(app, ["generate", "the", "-m", blob, *options]).exit_code == 0


def test_where_there_is_nothing_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "No GGUF file was found: name a folder" in CliRunner().invoke(app, ["models"]).stdout
    done = run("models", tmp_path / "none.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.gguf: there is no such file or folder" in done.stderr
