"""The index of files: its order against a naive sort, what is encoded anew, and what a disk or a file may do to it."""

import errno
import os
import random
import resource
import threading
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from softmeet import extras
from softmeet.errors import InvalidInputError
from softmeet.readers.files import index as gathered
from softmeet.readers.files import kept
from softmeet.readers.files.corpus import find_texts
from softmeet.readers.files.index import Index, drop, indexes

SIZE = 257


class Encoder:
    """Bytes as symbols, with the texts that were asked for."""

    def __init__(self, step=1):
        self.texts, self.step = [], step

    def __call__(self, texts):
        self.texts += texts
        return [[byte * self.step for byte in text.encode()] for text in texts]


def written(folder, texts):
    """A folder of files that have not changed for an hour."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        write(folder / name, text)
    return folder


def write(path, text, age=3600.0):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    then = time.time_ns() - int(age * 1e9)
    os.utime(path, ns=(then, then))


def index_of(folder, where=None, encode=None, size=SIZE, **more):
    return Index.of(find_texts([str(folder)]), encode or Encoder(), size, "bytes", where, **more)


def check(index, texts, size=SIZE, step=1):
    """That an index is of these texts, and sorted as a naive sort does."""
    symbols = []
    for text in texts:
        symbols += [byte * step for byte in text.encode()] + [size]
    assert index.symbols.tolist() == symbols
    assert index.order.tolist() == sorted(range(len(symbols)), key=lambda place: symbols[place::-1])
    assert index.symbols.dtype == index.order.dtype == np.int32


@pytest.fixture
def toys(tmp_path):
    return written(tmp_path / "toys", TOYS)


TOYS = {"a.txt": "the king the king\nsaid the", "b.txt": "", "c.txt": "k", "d.txt": "the king", "e.txt": "the king"}


@pytest.mark.parametrize(
    "texts",
    [[], [""], ["", ""], ["a"], ["a", "a"], ["aaaa", "aa", ""], list(TOYS.values()), ["\u00e9\U0001f451", "\x01\x7f"]],
)
@pytest.mark.parametrize(("size", "step"), [(257, 1), (70_000, 255)])
def test_the_order_is_that_of_a_naive_sort(tmp_path, texts, size, step):
    folder = written(tmp_path / "texts", {f"{k}.txt": text for k, text in enumerate(texts)})
    check(index_of(folder, encode=Encoder(step), size=size), texts, size, step)


@pytest.mark.parametrize("symbols", [200, 300, 70_000])  # one, two and three bytes are sorted for each
def test_the_order_of_many_symbols(symbols):
    drawn = np.random.default_rng(0).integers(0, symbols, 3 * symbols, dtype=np.int32)
    drawn[symbols : 2 * symbols] = drawn[:symbols]
    order = gathered.in_order(drawn)
    assert sorted(order.tolist()) == list(range(len(drawn)))
    backwards = drawn.tolist()
    for before, after in random.Random(0).sample([*pairwise(order)], 500):
        assert backwards[before::-1] < backwards[after::-1]


def test_lines_of_long_files_are_counted_once(tmp_path):
    chooser = random.Random(2)
    text = "".join(chooser.choices("a\n", k=20_000))
    (tmp_path / "0.txt").write_text("x")
    (tmp_path / "1.txt").write_text(text)
    index, decoded = index_of(tmp_path), []
    for place in [chooser.randrange(len(text)) for _ in range(200)] + [0, 4096, len(text)]:
        line = index.line(2 + place, lambda symbols: (decoded.append(len(symbols)), bytes(symbols))[1])
        assert line == 1 + text[:place].count("\n")
    assert sum(decoded) < 203 * 4096 + len(text)


def test_what_is_no_text_is_left_out(tmp_path):
    folder = written(
        tmp_path / "texts", {"a.txt": "a", "b.bin": b"b\0", "c.bin": b"\xff\xfe", "e.txt": "e", ".env": ""}
    )
    for index in (index_of(folder), index_of(folder, tmp_path / "kept"), index_of(folder, tmp_path / "kept")):
        check(index, ["a", "e"])
        assert index.left_out == {"names of keys and passwords": 1, "not UTF-8 text": 2}


def test_only_what_has_changed_is_encoded(toys, tmp_path, monkeypatch):
    where, encode = tmp_path / "kept", Encoder()
    check(index_of(toys, where, encode), TOYS.values())
    assert encode.texts == list(TOYS.values())

    encode.texts.clear()
    with monkeypatch.context() as closed:  # nothing is read, encoded or sorted
        closed.setattr(gathered, "_read", None)
        closed.setattr("softmeet.readers.files.index.in_order", None)
        check(again := index_of(toys, where, encode), TOYS.values())
    assert isinstance(again.symbols.base, np.memmap)
    assert isinstance(again.order.base, np.memmap)

    write(toys / "c.txt", "queen")
    write(toys / "d.txt", "the king", age=7200)  # touched alone
    write(toys / "0.txt", TOYS["a.txt"])  # a copy
    (toys / "e.txt").unlink()
    read, real = [], gathered._read
    with monkeypatch.context() as watched:
        watched.setattr(gathered, "_read", lambda path: read.append(path.name) or real(path))
        anew = index_of(toys, where, encode)
    assert read == ["0.txt", "c.txt", "d.txt"]
    check(anew, [TOYS["a.txt"], TOYS["a.txt"], "", "queen", "the king"])
    assert encode.texts == ["queen"]
    check(again, TOYS.values())  # who has the former one still reads it
    assert len(list(where.rglob("*.npy"))) == 2

    with monkeypatch.context() as closed:  # another name, the same symbols
        closed.setattr("softmeet.readers.files.index.in_order", None)
        (toys / "d.txt").rename(toys / "f.txt")
        moved = index_of(toys, where, encode)
    assert moved.files[-1].name == "f.txt"
    assert encode.texts == ["queen"]

    before, every = sorted(where.rglob("*")), find_texts([str(toys)])  # without some files, for once
    fewer = Index.of(replace(every, files=every.files[2:]), encode, SIZE, "bytes", where, keep=False)
    check(fewer, ["", "queen", "the king"])
    assert encode.texts == ["queen"]
    assert sorted(where.rglob("*")) == before


def test_a_change_that_size_and_time_do_not_tell_is_seen(toys, tmp_path):
    write(toys / "c.txt", "k", age=0)
    state = (toys / "c.txt").stat()
    index = index_of(toys, tmp_path / "kept")
    (toys / "c.txt").write_text("q")  # within the same tick of a coarse clock
    os.utime(toys / "c.txt", ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert index.is_stale(toys / "c.txt")
    check(index_of(toys, tmp_path / "kept"), [*list(TOYS.values())[:2], "q", "the king", "the king"])


@pytest.mark.parametrize("how", ["written", "another in its place"])
def test_who_sets_the_time_of_a_change_back_is_seen(toys, tmp_path, how):
    index = index_of(toys, tmp_path / "kept")
    time.sleep(0.02)  # a tick of the clock that cannot be set
    if how == "written":
        write(toys / "c.txt", "q")
    else:
        write(tmp_path / "q", "q")
    state = next(entry for entry in index.entries if entry.path.endswith("c.txt"))
    os.utime(toys / "c.txt" if how == "written" else tmp_path / "q", ns=(state.modified, state.modified))
    if how != "written":
        (tmp_path / "q").rename(toys / "c.txt")
    assert index.is_stale(toys / "c.txt")
    check(index_of(toys, tmp_path / "kept"), [*list(TOYS.values())[:2], "q", "the king", "the king"])


def test_of_a_large_array_the_hash_is_looked_at_where_its_time_is_another(toys, tmp_path, monkeypatch):
    where = tmp_path / "kept"
    index_of(toys, where)
    monkeypatch.setattr(kept, "_QUICK", 0)
    looked_at, real = [], kept._sum
    monkeypatch.setattr(kept, "_sum", lambda file: looked_at.append(file) or real(file))
    monkeypatch.setattr("softmeet.readers.files.index.in_order", None)
    check(index_of(toys, where), TOYS.values())
    assert not looked_at
    for file in where.rglob("*.npy"):
        os.utime(file, ns=(0, 0))  # a copy
    for _ in range(2):
        check(index_of(toys, where), TOYS.values())
        assert len(looked_at) == 2


def test_long_texts_are_encoded_in_pieces_that_end_with_lines(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(gathered, "_AT_ONCE", 10)
    encode = Encoder()
    check(index_of(toys, encode=encode), TOYS.values())
    assert encode.texts == ["the king t", "he king\n", "said the", "", "k", "the king", "the king"]


def test_stale_files_are_told(toys):
    index = index_of(toys)
    assert not any(index.is_stale(path) for path in index.files)
    write(toys / "a.txt", TOYS["a.txt"], age=60)  # the same, at another time
    write(toys / "b.txt", "no longer empty")
    write(toys / "d.txt", "the kind", age=60)  # of the same size
    (toys / "e.txt").unlink()
    assert [path.name for path in index.files if index.is_stale(path)] == ["b.txt", "d.txt", "e.txt"]
    assert index.is_stale(toys / "unknown.txt")


@pytest.mark.parametrize("what", ["symbols", "order", "files.json"])
@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "empty"])
def test_a_damaged_index_is_made_anew(toys, tmp_path, what, harm):
    where = tmp_path / "kept"
    index_of(toys, where)
    (file,) = (file for file in where.rglob("*") if what in file.name)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"changed": bytes(content), "cut": content[: len(content) // 2], "empty": b""}[harm])
    for _ in range(2):
        check(index := index_of(toys, where), TOYS.values())
        assert isinstance(index.order.base, np.memmap)
    assert len(list(where.rglob("*.npy"))) == 2


def test_a_full_disk_leaves_the_former_index_and_an_index_in_memory(toys, tmp_path, caplog):
    """A limit on what a process may write is as a disk that is full at each moment."""
    where = tmp_path / "kept"
    index_of(toys, where)
    write(toys / "c.txt", "queen" * 20)
    texts = [TOYS["a.txt"], "", "queen" * 20, "the king", "the king"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {file: file.read_bytes() for file in where.rglob("*") if file.is_file()}
    for limit in (0, 100, 200, 1000):  # within the symbols, the order, the list
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            index = index_of(toys, where)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check(index, texts)
        assert "is not kept for the next time" in caplog.text
        assert before == {file: file.read_bytes() for file in where.rglob("*") if file.is_file()}
    check(index_of(toys, where), texts)
    assert len(list(where.rglob("*.npy"))) == 2


@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_disk_that_takes_nothing(toys, tmp_path, monkeypatch, call, caplog):
    def full(path, *arguments, **options):
        if str(path).startswith(str(tmp_path / "kept")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    real = getattr(Path, call)
    monkeypatch.setattr(Path, call, full)
    check(index_of(toys, tmp_path / "kept"), TOYS.values())
    assert "is not kept for the next time" in caplog.text
    assert not list((tmp_path / "kept").rglob("*.npy*")) or call == "replace"


@pytest.mark.parametrize("change", ["gone", "link", "pipe", "folder"])
def test_a_file_that_vanishes_or_is_replaced_while_others_are_read(toys, tmp_path, change):
    texts = find_texts([str(toys)])
    Index.of(texts, Encoder(), SIZE, "bytes", tmp_path / "kept")
    (toys / "a.txt").unlink()
    if change == "link":
        (toys / "a.txt").symlink_to("/etc/hostname")
    elif change == "pipe":
        os.mkfifo(toys / "a.txt")
    elif change == "folder":
        (toys / "a.txt").mkdir()
    index = Index.of(texts, Encoder(), SIZE, "bytes", tmp_path / "kept")
    check(index, list(TOYS.values())[1:])
    assert index.left_out == {"could not be read": 1}
    assert [path.name for path in index.files] == list(TOYS)[1:]


def _make(folder, where, slow):
    def encode(texts):
        time.sleep(slow)
        return [list(text.encode()) for text in texts]

    waited = []
    index = index_of(folder, where, encode, on_progress=lambda what, done, total: waited.append(what))
    check(index, TOYS.values())
    return waited


def test_two_processes_at_once_make_one_index(toys, tmp_path):
    with get_context("fork").Pool(2) as pool:
        told = pool.starmap(_make, [(toys, tmp_path / "kept", 0.3)] * 2)
    assert sorted("sorting" in what for what in told) == [False, True]
    assert any("waiting for another process" in what for what in told)


def test_threads_that_find_it_made_anew_read_the_one_or_the_other(toys, tmp_path):
    """Readers without a lock, while versions come and go."""
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                index = index_of(toys, tmp_path / "kept")
                assert index.order.tolist() == gathered.in_order(index.symbols).tolist()
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for k in range(30):
        write(toys / "c.txt", "queen" * k)
        index_of(toys, tmp_path / "kept")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_indexes_are_listed_and_dropped(toys, tmp_path, monkeypatch):
    where, other = tmp_path / "kept", written(tmp_path / "other", {"a.md": "other"})
    assert indexes(where) == []
    index = index_of(toys, where)
    Index.of(find_texts([str(other)], "*.md"), Encoder(), SIZE, "bytes", where)
    Index.of(find_texts([str(other)], "*.md"), Encoder(), SIZE, "another tokenizer", where)
    index_of(other, where)
    listed = {(one.paths, one.include, one.files, one.symbols) for one in indexes(where)}
    assert listed == {
        ((str(toys),), None, 5, len(index.symbols) - 5),
        ((str(other),), "*.md", 1, 5),
        ((str(other),), None, 1, 5),
    }
    with monkeypatch.context() as later:
        later.setattr(kept, "_FORM", -1)  # of another version
        assert [one.paths for one in indexes(where)] == [()] * 4
    with pytest.raises(InvalidInputError, match=rf"no index is named 'x': expected one of .*{indexes(where)[0].name}"):
        drop(where, "x")
    for one in indexes(where):
        assert one.bytes == sum(file.stat().st_size for file in (where / one.name).iterdir())
        assert 0 <= time.time() - one.time < 60
        drop(where, one.name)
    assert indexes(where) == []
    check(index, TOYS.values())
    with pytest.raises(InvalidInputError, match=r"no index is named '\.\.': none is kept"):
        drop(where, "..")


def test_other_symbols_than_was_said_are_refused(toys, monkeypatch):
    with pytest.raises(InvalidInputError, match="expected symbols from 0 to 99, got"):
        index_of(toys, size=100)
    monkeypatch.setattr(gathered, "_MOST", 20)
    with pytest.raises(InvalidInputError, match="at most 20 symbols"):
        index_of(toys)
    monkeypatch.setattr(gathered, "_MOST", 600)
    with pytest.raises(InvalidInputError, match="at most 300 symbols"):  # of two bytes each
        gathered.in_order(np.arange(301, dtype=np.int32))


@pytest.mark.parametrize("package", ["pathspec", "pydivsufsort"])
def test_a_package_that_is_missing_is_named_with_its_extra(toys, monkeypatch, package):
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(InvalidInputError, match=rf"needs {package}: .*\[files\]"):
        index_of(toys)


def test_a_lock_that_is_held_for_long_does_not_keep_one_waiting(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_PATIENCE", 0.1)
    shelf = kept.Shelf.of(tmp_path / "kept", "bytes", (str(toys),), None)
    told = []
    with shelf.alone(lambda: None):
        check(index_of(toys, tmp_path / "kept", on_progress=lambda *what: told.append(what[0])), TOYS.values())
    assert told[0] == "waiting for another process"
