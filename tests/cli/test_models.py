"""``softmeet models``."""

import json
import shutil

import byte_tokenizers
import pytest
from commands import run
from gguf_files import written
from typer.testing import CliRunner

from softmeet import register_reader
from softmeet.cli.main import app
from softmeet.members import registered
from softmeet.members.local_names import known_names
from softmeet.members.zoo import expand
from softmeet.readers.files.corpus import find_texts
from softmeet.readers.files.index import Index
from softmeet.server.naming import named

CHAT = "tokenizer.chat_template"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A home with a file of ollama's, one of LM Studio's and one of the Hub's cache, and where they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "cache"))
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
    return {
        "manifests": tmp_path / "ollama" / "manifests", "blob": tmp_path / "ollama" / "blobs" / "sha256-12ab",
        "lm": tmp_path / ".lmstudio" / "models" / "org" / "lm" / "lm.gguf",
    }  # fmt: skip


@pytest.mark.usefixtures("elsewhere")
def test_files_of_other_programs_are_listed_with_who_shares_tokens(tmp_path):
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
    assert "softmeet chat lm qwen:0.5b" in shown


def test_names_in_the_list_are_members(elsewhere, monkeypatch):
    folder = elsewhere["manifests"] / "registry.ollama.ai"
    for name in ("library/qwen/latest", "me/mine/q4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "library" / "qwen" / "0.5b", folder / name)
    assert {"qwen", "qwen:0.5b", "me/mine:q4", "lm", "hub"} <= {*known_names()}
    assert [expand(name) for name in ("qwen", "me/mine:q4+prompt=Hi", "qwen:7b", "org/lm", "lm")] == [
        [f"{elsewhere['blob']}+name=qwen"], [f"{elsewhere['blob']}+prompt=Hi+name=me/mine:q4++prompt"],
        ["qwen:7b"], ["org/lm"], [f"{elsewhere['lm']}+name=lm"],
    ]  # fmt: skip
    assert named(["qwen:0.5b", "lm", "wide"]) == {"default": ["qwen:0.5b", "lm"], "wide": ["wide"]}
    done = run("generate", "the", "-m", "qwen:0.5b", "-m", "lm", "--max-new-tokens", 3, "--summary")
    assert done.returncode == 0, done.stderr
    assert "qwen:0.5b" in done.stderr
    register_reader("qwen", lambda rest: None)
    assert expand("qwen:0.5b") == ["qwen:0.5b"]
    monkeypatch.delitem(registered._registered, "qwen")
    done = run("chat", "qwen:05b", "lm")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean qwen:0.5b?" in done.stderr
    assert "ollama pull NAME" in done.stderr
    shutil.copy(elsewhere["lm"], elsewhere["lm"].parent.parent / "lm.gguf")
    assert "several files of that name" in run("chat", "lm").stderr
    assert str(elsewhere["lm"]) in run("models", "--json").stdout


def test_where_there_is_nothing_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = " ".join(CliRunner().invoke(app, ["models"]).stdout.split())
    assert "No GGUF file was found: ollama pull NAME" in said
    done = run("models", tmp_path / "none.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.gguf: there is no such file or folder" in done.stderr


@pytest.mark.usefixtures("elsewhere")
def test_indexes_of_files_are_listed_below_the_models_and_dropped(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abab")
    texts = find_texts([str(tmp_path / "texts")], "*.txt")
    Index.of(texts, lambda those: [list(one.encode()) for one in those], 257, "bytes", tmp_path / "cache" / "files")
    rows = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [row["model"] for row in rows] == ["hub", "lm", "qwen:0.5b", None]
    assert rows[-1].keys() > rows[0].keys()
    kept = {key: rows[-1][key] for key in ("kind", "paths", "include", "files", "symbols")}
    assert kept == {
        "kind": "index", "paths": [str(tmp_path / "texts")], "include": "*.txt", "files": 1, "symbols": 4,
    }  # fmt: skip
    assert f"softmeet models --drop {rows[-1]['name']}" in CliRunner().invoke(app, ["models"]).stdout
    done = run("models", "--drop", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no index is named 'x': expected one of {rows[-1]['name']}" in " ".join(done.stderr.split())
    dropped = CliRunner().invoke(app, ["models", "--drop", rows[-1]["name"]]).stdout
    assert f"Dropped the index of {tmp_path / 'texts'} (1 file" in dropped
    assert len(json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)) == 3
