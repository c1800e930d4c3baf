"""An ensemble is a checkpoint: saved, moved, loaded by us and by transformers' Auto classes."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softmeet import Ensemble, startup
from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM

pytestmark = pytest.mark.checked


@pytest.fixture
def ours(tmp_path):
    folders = [tiny.save(tmp_path / "members" / name, name, seed) for seed, name in enumerate(("gpt2", "llama"))]
    return Ensemble.from_pretrained(
        folders, "meet", trust=[1.0, math.inf], weights=[0.25, 0.75], pool="prob-mean", tol=1e-5
    )


def answer(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def test_saved_and_loaded_equals_original(ours, tmp_path):
    ours.save_pretrained(tmp_path / "ensemble")
    written = json.loads((tmp_path / "ensemble" / "config.json").read_text())
    assert written["members"] == ["../members/gpt2", "../members/llama"]
    assert written["trust"] == [1.0, "inf"]
    assert not list((tmp_path / "ensemble").glob("*.safetensors"))
    assert "| `../members/llama` | 0.75 | inf |" in (tmp_path / "ensemble" / "README.md").read_text()
    for again in (
        Ensemble.from_pretrained(tmp_path / "ensemble").model,
        EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble"),
    ):
        assert isinstance(again, EnsembleForCausalLM)
        assert again.config.settings == ours.model.config.settings
        assert torch.equal(answer(again), answer(ours.model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ensemble")
    assert tokenizer.padding_side == "left"
    assert AutoConfig.from_pretrained(tmp_path / "ensemble").max_position_embeddings == 64


def test_settings_can_be_changed_when_loading(ours, tmp_path):
    ours.save_pretrained(tmp_path / "ensemble")
    by_us = Ensemble.from_pretrained(tmp_path / "ensemble", trust=0.0, pool="logit-mean")
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble", trust=0.0, pool="logit-mean")
    assert by_us.model.config.weights == [0.25, 0.75]
    assert torch.equal(answer(by_us.model), answer(by_auto))
    single = AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble", dtype=torch.float64)
    assert answer(single).dtype == torch.float64


def test_device_maps(ours, tmp_path):
    ours.save_pretrained(tmp_path / "e")
    for place in ("cpu", {"": "cpu"}, ["cpu", "cpu"], "auto", {"members.0": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "e", device_map=place)
        assert torch.equal(answer(model), answer(ours.model))
    for bad in ({"members.2": "cpu"}, {"members.0": "cpu", "lm_head": "cpu"}):
        with pytest.raises(InvalidInputError, match=r"members\.0 to members\.1"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "e", device_map=bad)


def test_a_moved_folder_and_a_missing_member(ours, tmp_path):
    ours.save_pretrained(tmp_path / "ensemble")
    together = tmp_path / "elsewhere"
    together.mkdir()
    shutil.copytree(tmp_path / "ensemble", together / "ensemble")
    with pytest.raises(CheckpointError, match=r"names a member \.\./members/gpt2, but there is no .*config\.json"):
        Ensemble.from_pretrained(together / "ensemble")
    shutil.move(tmp_path / "members", together / "members")
    assert torch.equal(answer(Ensemble.from_pretrained(together / "ensemble").model), answer(ours.model))
    with pytest.raises(CheckpointError, match="move the member there, or edit members in"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble")


def test_bundled_members_are_named_and_need_no_path(tmp_path):
    Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-b"]).save_pretrained(tmp_path / "e")
    assert json.loads((tmp_path / "e" / "config.json").read_text())["members"] == ["narrow/opt-a", "narrow/opt-b"]
    assert len(Ensemble.from_pretrained(tmp_path / "e").names) == 2


def test_an_ensemble_on_the_hub_is_told_from_a_model(monkeypatch, tmp_path):
    """The hub itself is out of reach: its answer to a request for config.json is played back."""
    from softmeet import ensemble
    from softmeet.members import names as members

    monkeypatch.setattr(members, "_ask", lambda *file: None)
    answers = {"org/ensemble": {"model_type": "softmeet", "members": ["a"]}, "org/model": {"model_type": "llama"}}
    asked = []

    def config_of(name, revision=None):
        asked.append((name, revision))
        if name not in answers:
            raise OSError("not found")
        return answers[name], {}

    monkeypatch.setattr(ensemble.EnsembleConfig, "get_config_dict", config_of)
    names = ("org/ensemble", "org/model", "org/absent", "wide", "wide/gpt2", "a.gguf", "org/ensemble@v2")
    assert [name for name in names if ensemble.saved_config(name)] == ["org/ensemble", "org/ensemble@v2"]
    assert asked == [("org/ensemble", None), ("org/model", None), ("org/absent", None), ("org/ensemble", "v2")]


def test_local_members_are_not_pushed(ours):
    with pytest.raises(InvalidInputError, match="members on the hub, got local folders"):
        ours.model.push_to_hub("someone/ensemble")


def test_auto_classes_that_are_there_already_are_told_at_once(monkeypatch):
    imported = []
    monkeypatch.setattr(startup, "import_module", imported.append)
    monkeypatch.setattr(sys, "meta_path", before := list(sys.meta_path))
    startup.register_auto_classes()
    assert imported == ["softmeet.hf"]
    monkeypatch.delitem(sys.modules, startup._AUTO_CLASSES)
    startup.register_auto_classes()
    assert imported == ["softmeet.hf"]
    assert isinstance(before[0], startup._AfterImport)


def test_an_ensemble_can_be_made_of_its_configuration_alone(ours, tmp_path):
    """Of the members' architectures, with random weights, as from_config means it for any model."""
    ours.save_pretrained(tmp_path / "ensemble")
    saved = AutoConfig.from_pretrained(tmp_path / "ensemble")
    for config in (saved, EnsembleConfig(ours.names, settings=ours.model.settings)):
        model = AutoModelForCausalLM.from_config(config)
        assert type(model) is EnsembleForCausalLM
        assert [type(one) for one in model.members] == [type(one) for one in ours.model.members]
        shapes = [{name: x.shape for name, x in one.state_dict().items()} for one in (model, ours.model)]
        assert shapes[0] == shapes[1]
        assert answer(model).shape == answer(ours.model).shape
        assert not torch.equal(answer(model), answer(ours.model))
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)
    single = AutoModelForCausalLM.from_config(saved, dtype=torch.float64)
    assert {one.dtype for one in single.members} == {torch.float64}
    with pytest.raises(CheckpointError, match="there is no such folder"):
        EnsembleForCausalLM(EnsembleConfig([str(tmp_path / "absent")]))


def test_heads_follow_a_cast_and_a_move(ours, monkeypatch):
    before = answer(ours.model)
    ours.model.to(torch.float64)
    assert all(head.weight.dtype == torch.float64 for head in ours.model.heads)
    assert all(
        head.weight is member.get_output_embeddings().weight
        for head, member in zip(ours.model.heads, ours.model.members, strict=True)
    )
    assert (answer(ours.model).exp() - before.exp()).abs().max() < 1e-4


def test_a_dtype_and_a_device_per_member(tmp_path, monkeypatch):
    folders = [tiny.save(tmp_path / name, name) for name in ("gpt2", "llama")]
    moved = []
    original = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: (moved.append(place), original(self, place))[1])
    model = Ensemble.from_pretrained(folders, dtype=[torch.bfloat16, torch.float64], device=["cpu", "cpu:0"]).model
    assert [m.dtype for m in model.members] == [torch.bfloat16, torch.float64]
    assert list(map(torch.device, moved)) == [torch.device("cpu"), torch.device("cpu:0")]
    assert answer(model).isfinite().all()
    with pytest.raises(InvalidInputError, match="one device, or one per member, 2 in all, got 3"):
        Ensemble.from_pretrained(folders, device=["cpu"] * 3)
    placed = Ensemble.from_pretrained(folders, device="auto").model
    assert torch.equal(answer(placed), answer(Ensemble.from_pretrained(folders).model))
