"""Folders of results that several processes use, and files in them that were harmed, copied or swapped."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from softmeet import Ensemble
from softmeet.answers.asking import Answered
from softmeet.answers.room import Kept
from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.evaluation.files import PieceCache, replace_together, write_text


def together(work, count=8):
    """What ``work(k)`` returns in threads that begin at the same moment; errors are raised."""
    ready = threading.Barrier(count)

    def one(k):
        ready.wait(60)
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_a_file_that_several_write_at_once_is_one_of_theirs(tmp_path):
    texts = [f"{k}" * 100_000 for k in range(8)]

    def write(k):
        for _ in range(20):
            write_text(tmp_path / "one.txt", texts[k])

    together(write)
    assert (tmp_path / "one.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_pieces_that_several_compute_at_once_are_the_same_for_all(tmp_path):
    def compute(k):
        cache = PieceCache(tmp_path / "kept", {"a": 1})
        return [cache.get(f"p {n}", lambda n=n: {"x": torch.full((1000,), float(n))})["x"][0].item() for n in range(20)]

    assert together(compute) == [[float(n) for n in range(20)]] * 8


def test_two_that_save_at_once_leave_the_files_of_one(tmp_path):
    second, first = threading.Event(), threading.Event()

    def save(k):
        with replace_together(tmp_path / "out") as new:
            (new / "a").write_text(str(k))
            (first, second)[k].set()
            (second, first)[k].wait(60)  # both write before one has ended
            (new / "b").write_text(str(k))

    together(save, 2)
    assert (tmp_path / "out" / "a").read_text() == (tmp_path / "out" / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_answers_that_several_keep_at_once_are_whole(tmp_path):
    def keep(k):
        kept = Kept(tmp_path, {"a": 1})
        for n in range(10):
            kept.keep([Answered(f"{k}-{n}-{i}", "x" * 9000, True) for i in range(3)])

    together(keep)
    found = Kept(tmp_path, {"a": 1}).answers
    assert len(found) == 8 * 10 * 3
    assert {one.answer for one in found.values()} == {"x" * 9000}


def test_a_damaged_piece_and_one_that_is_another_pieces_is_computed_again(tmp_path):
    cache, kept = PieceCache(tmp_path, {"a": 1}), tmp_path / "p-0.safetensors"
    for k in range(2):
        cache.get(f"p {k}", lambda k=k: {"x": torch.full((3,), float(k))})
    shutil.copy(tmp_path / "p-1.safetensors", kept)
    assert PieceCache(tmp_path, {"a": 1}).get("p 0", lambda: {"x": torch.tensor([7.0])})["x"].tolist() == [7.0]
    whole = bytearray(kept.read_bytes())
    whole[-40] ^= 1
    for harmed in (whole, b""):
        kept.write_bytes(harmed)
        assert cache.get("p 0", lambda: {"x": torch.tensor([6.0])})["x"].tolist() == [6.0]
        assert cache.get("p 0", dict)["x"].tolist() == [6.0]
    other = PieceCache(tmp_path / "other", {"a": 2})
    shutil.copy(kept, tmp_path / "other")
    assert other.get("p 0", lambda: {"x": torch.tensor([8.0])})["x"].tolist() == [8.0]


@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 10_000])
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r"settings\.json is damaged"):
        PieceCache(tmp_path, {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved ensemble that is only read."""
    folder = tmp_path_factory.mktemp("saved")
    Ensemble.from_pretrained(["wide/gpt2", "wide/llama"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        None, [1], "[" * 10_000, '{"a":' * 10_000, {"members": None}, {"members": 5}, {"members": [None]},
        {"bands": 2}, {"vocabulary": 5}, {"prefixes": 5}, {"prefixes": [1, 2]},
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_refused_by_a_sentence(saved, tmp_path, changed):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    text = changed if isinstance(changed, str) else json.dumps(good | changed if isinstance(changed, dict) else changed)
    path.write_text(text)
    with pytest.raises(SoftmeetError, match=r"expected|damaged"):
        Ensemble.from_pretrained(tmp_path)
