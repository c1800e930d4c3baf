"""Model cards are in the Hub's schema: huggingface_hub reads them, and writes them again as they were."""

from __future__ import annotations

import json

import pytest
import tiny
from cards import checked
from huggingface_hub import constants

from softmeet import Ensemble
from softmeet.hf import card as cards
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members import zoo

BUNDLED = sorted(zoo.folder().glob("*/*/README.md"))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_cards_of_bundled_members(path):
    raw, name = checked(path), "/".join(path.parts[-3:-1])
    assert (raw["license"], raw["library_name"]) == ("cc-by-2.5", "transformers")
    (index,) = raw["model-index"]
    assert index["name"] == f"softmeet {name}"
    held_out = json.loads((path.parent / "training.json").read_text())["held_out_nats"]
    assert index["results"][0]["metrics"][0]["value"] == pytest.approx(held_out, abs=5e-5)
    assert f'from_pretrained(["{name}"])' in path.read_text()


def test_the_card_of_an_ensemble_of_bundled_members(narrow, tmp_path):
    narrow.save_pretrained(tmp_path)
    raw, text = checked(tmp_path / "README.md"), (tmp_path / "README.md").read_text()
    assert raw == {
        "library_name": "softmeet",
        "license": "cc-by-2.5",
        "pipeline_tag": "text-generation",
        "tags": ["softmeet", "ensemble"],
    }
    assert "softmeet-zoo" in text
    assert "import softmeet" in text
    assert "- A text has at most 256 tokens" in text


def test_the_card_names_no_path_of_this_machine(tmp_path):
    folders = [tiny.save(tmp_path / "members" / name, name) for name in ("gpt2", "llama")]
    (tmp_path / "members" / "gpt2" / "README.md").write_text("---\nlicense: mit\n---\n")
    ensemble = Ensemble.from_pretrained(folders, "logit-mean", weights=[1, 1])
    ensemble.save_pretrained(tmp_path / "ensemble")
    raw, text = checked(tmp_path / "ensemble" / "README.md"), (tmp_path / "ensemble" / "README.md").read_text()
    assert not {"base_model", "license"} & set(raw)  # one member names none
    assert str(tmp_path) not in text
    assert "| `../members/gpt2` | 0.5 |  | mit |" in text  # a mean has no trust
    assert "| `../members/llama` | 0.5 |  | not known here |" in text
    assert "begin with a dot" in text


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that puts a card into an empty cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def add(repository, text):
        base, commit = tmp_path / f"models--{repository.replace('/', '--')}", "a" * 40
        (base / "snapshots" / commit).mkdir(parents=True)
        (base / "refs").mkdir()
        for revision in ("main", "v1"):
            (base / "refs" / revision).write_text(commit)
        (base / "snapshots" / commit / "README.md").write_text(text)

    return add


def test_members_of_the_hub_are_base_models(cached, tmp_path):
    cached("org/a", "---\nlicense: apache-2.0\n---\n")
    cached("org/b", "---\nlicense: apache-2.0\nlanguage: en\n---\n# b\n")
    names = ["org/a", "org/b@v1", "org/a/model.gguf"]
    raw = cards.card(EnsembleConfig(names), names).data.to_dict()
    assert raw["base_model"] == ["org/a", "org/b"]
    assert (raw["base_model_relation"], raw["license"]) == ("merge", "apache-2.0")


@pytest.mark.parametrize(
    "other",
    [None, "# no metadata\n", "---\nlicense: mit\n---\n", "---\nlicense: [a\n---\n", "---\n- x\n---\n", "\xff"],
)
def test_a_licence_is_named_only_where_all_agree(other, cached):
    cached("org/a", "---\nlicense: apache-2.0\n---\n")
    if other is not None:
        cached("org/b", other)
    found = cards.card(EnsembleConfig(["org/a", "org/b"]), ["org/a", "org/b"])
    assert "license" not in found.data.to_dict()
    assert "| apache-2.0 |" in found.text


def test_other_is_no_licence_to_agree_on(cached):
    for name in ("org/a", "org/b"):
        cached(name, "---\nlicense: other\nlicense_name: own\n---\n")
    assert "license" not in cards.card(EnsembleConfig(["org/a", "org/b"]), ["org/a", "org/b"]).data.to_dict()
