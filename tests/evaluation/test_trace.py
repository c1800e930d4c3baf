"""Traces: what is stored is what the members computed, whatever stops the run that stores it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from commands import ran, refusal
from transformers import AutoTokenizer

from softmeet import Ensemble
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation import files
from softmeet.evaluation.documents import Document, read_documents
from softmeet.evaluation.positions import cut, observe_text, tokenize, windows
from softmeet.evaluation.trace import Trace, record
from softmeet.members import zoo

pytestmark = pytest.mark.checked

WORDS = "the quick brown fox jumps over the lazy dog. "
DOCUMENTS = [Document("a", WORDS * 5), Document("b", WORDS * 3), Document("c", "x"), Document("d", WORDS)]


def same(a, b):
    pairs = zip([*a.hidden, a.targets, a.document, a.sizes], [*b.hidden, b.targets, b.document, b.sizes], strict=True)
    return a.names == b.names and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 3), (64, 1), (7, 7)])
def test_every_token_but_the_first_is_predicted_once(ensemble, window, stride):
    documents = [replace(d, ids=torch.arange(len(d.ids))) for d in cut(ensemble, DOCUMENTS[:2])[0]]
    for k, document in enumerate(documents):
        own = [w for w in windows(documents, window, stride) if w.document == k]
        assert torch.cat([w.ids[-len(w) :] for w in own]).tolist() == list(range(1, len(document.ids)))
        assert torch.equal(torch.cat([w.sizes for w in own]), document.sizes)
        assert all(len(w) < len(w.ids) <= window + 1 for w in own)
        assert all(len(w.ids) - len(w) - 1 >= window - stride for w in own[1:])


def test_fp32_rebuilds_each_members_log_probabilities(ensemble, tmp_path):
    positions = record(ensemble, DOCUMENTS, tmp_path / "t", window=16).read()
    assert positions.names == ["a", "b", "d"]  # one token cannot be predicted from nothing
    rebuilt, _ = ensemble.model.combiner.own_log_probs(positions.hidden)
    start = 0
    for document in (DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]):
        ids = ensemble.tokenizer(document.text, return_tensors="pt")["input_ids"][0]
        for first in range(0, len(ids) - 1, 16):
            part = ids[first : first + 16][: len(ids) - 1 - first]
            for member, own in zip(ensemble.model.members, rebuilt, strict=True):
                with torch.no_grad():
                    expected = member(input_ids=part[None]).logits[0].log_softmax(-1)
                assert (own[start : start + len(part)] - expected).abs().max() < 1e-4
            assert positions.targets[start : start + len(part)].tolist() == ids[first + 1 : first + 17].tolist()
            start += len(part)
    assert start == len(positions)


def test_bytes_add_up_to_the_text():
    """The bundled vocabulary is of bytes: a character may take several tokens, and its bytes count once."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.locate("wide/gpt2"))
    text = "a é б 語 🙂 c"
    plain = tokenize(tokenizer, Document("d", text))
    assert len(plain.ids) > len(text)
    assert int(plain.sizes.sum()) == len(text.encode()) - 1
    assert int(plain.sizes.min()) == 0
    begun = tokenize(tokenizer, Document("d", text), bos=True)
    assert begun.ids[0] == tokenizer.bos_token_id
    assert begun.ids[1:].tolist() == plain.ids.tolist()
    assert int(begun.sizes.sum()) == len(text.encode())


def test_fp16_says_what_it_costs(ensemble, tmp_path):
    made = record(ensemble, DOCUMENTS, tmp_path / "t", dtype="float16")
    exact = record(ensemble, DOCUMENTS, tmp_path / "u").read()
    log_p = [ensemble.model.combiner.own_log_probs(p.hidden)[0] for p in (made.read(), exact)]
    error = (log_p[0] - log_p[1]).gather(-1, exact.targets.expand(2, -1)[..., None]).abs()
    assert made.float16_error()["largest"] == pytest.approx(error.max().item(), rel=1e-2)
    assert made.float16_error()["mean"] == pytest.approx(error.mean().item(), rel=1e-2)
    assert 0 < error.max() < 0.05
    made.document(1).write_bytes(b"{}")
    assert made.float16_error() is None


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_counted_twice(ensemble, tmp_path):
    documents = [Document(f"{k}", WORDS[k:]) for k in range(30)]
    expected = record(ensemble, documents, tmp_path / "whole", window=8).read()
    kept, killed, draw = tmp_path / "killed", 0, random.Random(0)
    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads at a fork: the child uses none
            child = os.fork()
        if child == 0:
            record(ensemble, documents, kept, window=8, on_progress=lambda positions: time.sleep(0.02))
            os._exit(0)
        time.sleep(0.05 + 0.3 * draw.random())
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed >= 3
    made = record(ensemble, documents, kept, window=8)
    assert same(made.read(), expected)
    # And nothing that was whole is made again.
    begun = []
    record(ensemble, documents, kept, window=8, on_start=lambda *sizes: begun.append(sizes))
    assert begun == [(len(expected), len(expected))]


@pytest.mark.unchecked
def test_a_full_disk_loses_nothing(ensemble, tmp_path, monkeypatch):
    written, replace = [], files.os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        TraceError, match=r"no room on the disk for .*document-00002.safetensors.* run the same command again"
    ):
        record(ensemble, DOCUMENTS, tmp_path / "t", window=8)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "document-00000.safetensors", "document-00001.safetensors", "trace.json",
    ]  # fmt: skip
    monkeypatch.undo()
    made = record(ensemble, DOCUMENTS, tmp_path / "t", window=8)
    assert same(made.read(), record(ensemble, DOCUMENTS, tmp_path / "u", window=8).read())


def test_ctrl_c_keeps_whole_documents(ensemble, tmp_path):
    def interrupt(positions, seen=[]):  # noqa: B006 - the count of calls
        seen.append(positions)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(ensemble, DOCUMENTS, tmp_path / "t", window=8, on_progress=interrupt)
    begun = []
    record(ensemble, DOCUMENTS, tmp_path / "t", window=8, on_start=lambda *s: begun.append(s))
    assert begun[0][0] == json.loads((tmp_path / "t" / "trace.json").read_text())["documents"][0]["positions"]


@pytest.fixture(scope="module")
def recorded(ensemble, tmp_path_factory):
    """A folder that is only read."""
    return record(ensemble, DOCUMENTS, tmp_path_factory.mktemp("recorded") / "t", window=8).folder


@pytest.mark.parametrize(
    "harm", ["truncated", "flipped", "missing", "foreign", "a name", "another document", "no file"]
)
def test_a_damaged_document_is_named_and_the_rest_kept(ensemble, recorded, tmp_path, harm):
    made = Trace.open(shutil.copytree(recorded, tmp_path / "t"))
    whole, path = made.read(), made.document(1)
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        data[-len(data) // 3] ^= 0x10
        path.write_bytes(data)
    elif harm in ("missing", "no file"):
        path.unlink()
    elif harm == "another document":
        shutil.copy(made.document(0), path)
    elif harm == "a name":
        path.write_bytes(data.replace(b"sizes", b"sizez"))
    else:
        other = record(ensemble, DOCUMENTS, tmp_path / "u", window=16)
        path.write_bytes(other.document(1).read_bytes())
    if harm == "no file":
        path.mkdir()
    said = []
    rest = made.read(said.append)
    assert len(said) == 1
    assert "document-00001.safetensors" in said[0]
    assert len(rest) == len(whole) - made.sizes[1]
    assert torch.equal(rest.hidden[0][: made.sizes[0]], whole.hidden[0][: made.sizes[0]])
    with pytest.warns(UserWarning, match="document-00001"):
        made.read()
    if harm == "no file":
        path.rmdir()
    said.clear()
    again = record(ensemble, DOCUMENTS, tmp_path / "t", window=8, on_damage=said.append)
    assert same(again.read(), whole)
    assert len(said) == (harm not in ("missing", "no file"))


@pytest.mark.unchecked
def test_a_trace_of_other_members_or_text_is_refused(ensemble, folders, tmp_path):
    made = record(ensemble, DOCUMENTS, tmp_path / "t")
    made.require(ensemble)
    swapped = Ensemble.from_pretrained(folders[::-1])
    with pytest.raises(TraceError, match=r"was made by .*gpt2 .*in its place stands .*llama"):
        made.require(swapped)
    with pytest.raises(TraceError, match="made by 2 members"):
        made.require(Ensemble.from_pretrained(folders[:1]))
    with pytest.raises(TraceError, match="differs in members"):
        record(swapped, DOCUMENTS, tmp_path / "t")
    with pytest.raises(TraceError, match="differs in documents, text"):
        record(ensemble, DOCUMENTS[:1], tmp_path / "t")
    with pytest.raises(TraceError, match="differs in stride, window"):
        record(ensemble, DOCUMENTS, tmp_path / "t", window=8)
    with pytest.raises(TraceError, match="there is no"):
        Trace.open(tmp_path)
    halved = record(Ensemble.from_pretrained(folders, dtype="bfloat16"), DOCUMENTS, tmp_path / "halved")
    with pytest.raises(TraceError, match=r"bfloat16\), but in its place stands .*float32\) .* try --dtype bfloat16"):
        halved.require(ensemble)
    # The hash is of numbers, not of names; of bodies, too.
    same = Ensemble.from_pretrained([shutil.copytree(folder, tmp_path / folder.name) for folder in folders])
    made.require(same)
    with torch.no_grad():
        next(p for n, p in same.model.members[0].named_parameters() if "attn" in n and p.ndim == 2).mul_(1.1)
    with pytest.raises(TraceError, match="with another body"):
        Trace.open(made.folder).require(same)
    for text, message in (
        ("{", "not JSON"), ("[1]", "got a list"), ('{"format": 3, "members": []}', "it lacks bos, documents, dtype"),
    ):  # fmt: skip
        (tmp_path / "t" / "trace.json").write_text(text)
        with pytest.raises(TraceError, match=message):
            Trace.open(tmp_path / "t")
    (tmp_path / "t" / "trace.json").write_text('{"format": 2}')
    for opened in (Trace.open, lambda folder: record(ensemble, DOCUMENTS, folder)):
        with pytest.raises(TraceError, match=r"got 2: make it anew with softmeet trace in another folder"):
            opened(tmp_path / "t")


def test_text_that_is_none(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"fine\nstra\xdfe")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("empty", "empty is empty|but it is empty"),
        ("latin", r"byte 9 \(line 2\) is not"),
        ("folder", "datasets.save_to_disk"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            read_documents([tmp_path / name])
    with pytest.raises(InvalidInputError, match="expected a text"):
        read_documents([])


def test_files_separators_and_datasets(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
    assert [d.text for d in read_documents([tmp_path / "a.txt"], separator="\n\n")] == ["one", "two", "three"]
    assert len(read_documents([tmp_path / "a.txt"])) == 1
    Dataset.from_dict({"body": ["x", "", "y"]}).save_to_disk(tmp_path / "d")
    assert [d.text for d in read_documents([tmp_path / "d"], column="body")] == ["x", "y"]
    with pytest.raises(InvalidInputError, match="no column 'text': expected one of body"):
        read_documents([tmp_path / "d"])
    Dataset.from_dict({"text": ["x", None]}).save_to_disk(tmp_path / "e")
    with pytest.raises(InvalidInputError, match="but row 1 holds None: leave such rows out"):
        read_documents([tmp_path / "e"])


@pytest.mark.parametrize("left", [0, 100, 2000])
def test_a_damaged_dataset_is_named(tmp_path, left):
    from datasets import Dataset

    Dataset.from_dict({"text": [WORDS] * 1000}).save_to_disk(tmp_path / "d")
    [file] = (tmp_path / "d").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InvalidInputError, match=r"the dataset in .*d is damaged \("):
        read_documents([tmp_path / "d"])


def test_windows_that_do_not_fit(ensemble):
    for window, stride, message in [(65, None, "window from 1 to 64"), (0, None, "window"), (8, 9, "stride from 1 to")]:
        with pytest.raises(InvalidInputError, match=message):
            observe_text(ensemble, DOCUMENTS, window=window, stride=stride)
    with pytest.raises(InvalidInputError, match="at least two tokens"):
        observe_text(ensemble, [Document("c", "x")])
    assert len(observe_text(ensemble, [Document("s", "ab")])) == 1


@pytest.mark.unchecked
def test_the_command(folders, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    command = ["trace", tmp_path / "t", *tiny.each("-m", folders), "--window", 16, "--stride", 8, "--store", "float16"]
    done = ran(*command, *tiny.each("--text", ("-", tmp_path / "a.txt")), stdin=WORDS * 2)
    assert "133 positions of 2 documents in windows of 16 tokens, 8 apart; " in done.stdout
    assert "float16 moves" in done.stdout
    facts = json.loads((tmp_path / "t" / "trace.json").read_text())
    assert [d["name"] for d in facts["documents"]] == ["stdin", str(tmp_path / "a.txt")]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    assert refusal(*command, "--text", tmp_path / "bad.txt").startswith("error: expected UTF-8 in ")
