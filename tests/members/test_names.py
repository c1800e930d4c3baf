"""What a member's name is found to stand for, and what is said of one that stands for nothing. The Hub is played."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import constants, errors

from softmeet import Ensemble
from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.members import names, zoo
from softmeet.members.huggingface import load_members


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that adds a repository to an empty cache, and the Hub's answers: its ``error``, and what was asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "_unanswered", -1e9)
    names._ask.cache_clear()

    def add(repository):
        base, commit = tmp_path / "cache" / f"models--{repository.replace('/', '--')}", "a" * 40
        (base / "refs").mkdir(parents=True)
        (base / "refs" / "main").write_text(commit)
        return tiny.save(base / "snapshots" / commit, "llama")

    def ask(url):
        add.asked.append(url)
        if add.error is not None:
            raise add.error

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    add.asked, add.error = [], ConnectionError("no route to host")
    yield add
    names._ask.cache_clear()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("wid", "wide"), ("narow", "narrow"), ("narrow/opt-z", "opt-d"), ("wide/gpt3", "gpt2"), ("mixed/lama", "llama")],
)
def test_a_name_like_a_bundled_one_is_answered_at_once(name, nearest, hub):
    with pytest.raises(CheckpointError, match=rf"did you mean {nearest}\?"):
        Ensemble.from_pretrained([name])
    assert not hub.asked


@pytest.mark.parametrize("given", [(), ("wide",), (["narrow/opt-a"],), (["wide/gpt2", "mixed"],)])
def test_a_bundled_name_without_the_bundled_members_says_what_to_install(given, hub, monkeypatch):
    monkeypatch.setattr(zoo, "installed", lambda: None)
    with pytest.raises(CheckpointError, match=r"softmeet-zoo, which is not installed: \S+ .*install .*zoo.*; or name"):
        Ensemble.from_pretrained(*given)
    assert not hub.asked


def test_without_the_bundled_members_others_load(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(zoo, "installed", lambda: None)
    ensemble = Ensemble.from_pretrained([tiny.save(tmp_path / name, "llama") for name in "ab"], gate="auto")
    assert ensemble.generate("A", max_new_tokens=1, seed=1)
    with pytest.raises(CheckpointError, match=r"did you mean wide\?"):
        Ensemble.from_pretrained(["wid"])


def test_a_path_like_another_is_answered_at_once(tmp_path, hub, monkeypatch):
    (tmp_path / "models" / "llama-8b").mkdir(parents=True)
    for name, near in (("models/lama-8b", "models/llama-8b"), ("model", "models")):
        with pytest.raises(CheckpointError, match=rf"no such folder: did you mean {tmp_path / near}\?$"):
            names.find(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="no such file: check the path"):
        names.find(str(tmp_path / "absent.gguf"))
    assert not hub.asked
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean models/llama-8b\? it is neither here nor"):
        names.find("models/lama-8b")  # which may be a hub id


def test_without_a_network_one_question_is_asked_and_nothing_is_loaded(hub):
    seen = []
    with pytest.raises(CheckpointError, match=r"acme/nothing: it is neither here nor .* the Hub cannot be reached"):
        load_members(["wide/gpt2", "acme/nothing"], on_progress=seen.append)
    assert hub.asked == ["https://huggingface.co/acme/nothing/resolve/main/config.json"]
    assert not seen
    with pytest.raises(CheckpointError, match="neither here nor"):
        Ensemble.from_pretrained("acme/nothing@v2")
    assert hub.asked[1:] == ["https://huggingface.co/acme/nothing/resolve/v2/config.json"]


def test_without_a_network_the_cache_is_read_and_asked_for_once(hub):
    hub("acme/cached")
    with pytest.raises(CheckpointError, match=r"did you mean acme/cached\?"):
        names.find("acme/cachd")
    hub.asked.clear()
    names._unanswered = -1e9
    assert Ensemble.from_pretrained("acme/cached", "logit-mean").generate("a", max_new_tokens=1, do_sample=False)
    assert len(hub.asked) == 1
    hub.error = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        names.find("acme/other")


def test_what_the_hub_has_is_asked_for_once(hub):
    hub.error = None
    expected = {"pretrained_model_name_or_path": "acme/model", "revision": "v2"}
    assert names.find("acme/model@v2") == names.find("acme/model@v2") == expected
    assert names.find("acme/model/a.gguf") == {"pretrained_model_name_or_path": "acme/model", "gguf_file": "a.gguf"}
    assert [url.rpartition("/")[2] for url in hub.asked] == ["config.json", "a.gguf"]


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (errors.GatedRepoError, 403, "gated: ask for access at https://huggingface.co/acme/model, then log in with"),
        (errors.RepositoryNotFoundError, 401, "nor a public repository of the Hub: check the name, or.*HF_TOKEN"),
        (errors.RevisionNotFoundError, 404, "no revision v2 of it"),
        (errors.RemoteEntryNotFoundError, 404, "no config.json in it"),
        (errors.HfHubHTTPError, 404, "nor a public repository of the Hub"),
        (errors.HfHubHTTPError, 403, r"refuses it \(403\): log in with"),
        (errors.HfHubHTTPError, 503, "answered with the status 503: try again later"),
    ],
)
def test_what_the_hub_refuses(kind, status, message, hub):
    hub.error = kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    with pytest.raises(CheckpointError, match=f"cannot load acme/model@v2: .*{message}"):
        names.find("acme/model@v2")


def test_pickled_weights_on_the_hub_are_refused(hub):
    folder = hub("acme/pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cache alone.*no weights as safetensors, and a pickle could run code"):
        Ensemble.from_pretrained("acme/pickled", "logit-mean")


@pytest.mark.parametrize("members", [3, "", [""], ["wide/gpt2", None]])
def test_what_is_no_name(members):
    with pytest.raises(InvalidInputError, match="expected a member's name"):
        Ensemble.from_pretrained(members)
    with pytest.raises(CheckpointError, match="expected a hub id"):
        names.find("two words")
    with pytest.raises(CheckpointError, match=r"a file of the repository acme/model, got '\.\./x\.gguf'"):
        Ensemble.from_pretrained("acme/model+file=../x.gguf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trust": -1}, "trusts from 0 to inf"),
        ({"rule": "mete"}, "did you mean meet"),
        ({"weights": [0.5, 0.5]}, "3 in all, got 2"),
        ({"prune": 2}, "prune to be a share"),
        ({"prune": "x"}, "prune to be a share"),
        ({"vocabulary": "byte"}, "expected a vocabulary"),
        ({"dtype": ["float32"] * 2}, "3 in all, got 2"),
        ({"device": ["cpu"] * 2}, "3 in all, got 2"),
        ({"trst": 1}, "did you mean trust"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_looked_for(wrong, message, monkeypatch):
    monkeypatch.setattr(names, "find", None)
    with pytest.raises(InvalidInputError, match=message):
        Ensemble.from_pretrained("wide", **wrong)
