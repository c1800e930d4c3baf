"""Where texts stand in files: by a look at every place, and after files have changed."""

import json
import os
import random
from itertools import pairwise

import pytest
from commands import run

from softmeet.readers.files.corpus import find_texts
from softmeet.readers.files.index import Index
from softmeet.readers.files.reader import FilesReader


class Bytes:
    """An alphabet of the bytes of a text."""

    size, spelling = 256, None
    encode, decode = staticmethod(lambda text: list(text.encode())), staticmethod(bytes)


@pytest.fixture
def texts(tmp_path):
    chooser = random.Random(4)
    found = {
        f"{k}.txt": "".join(chooser.choices("ab\n", k=60)) + "a longer line that stands here alone\n" * (k == 1)
        for k in range(3)
    }
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    return found


def reader_of(folder):
    texts = find_texts([str(folder)])
    return FilesReader("it", Bytes(), Index.of(texts, lambda those: list(map(Bytes.encode, those)), 256, "b", None))


@pytest.fixture
def reader(texts, tmp_path):
    return reader_of(tmp_path)


def test_the_longest_match_stands_where_it_is_said_to(texts, reader, tmp_path):
    chooser = random.Random(5)
    for _ in range(40):
        text = "".join(chooser.choices("abc\n", k=14))
        longest = next((n for n in range(len(text), 0, -1) if any(text[-n:] in one for one in texts.values())), 0)
        found = reader.source(list(text.encode()))
        assert (found is None) == (longest == 0)
        if found is not None:
            lines = (tmp_path / found.path).read_text().split("\n")
            assert (found.end, found.end - found.start) == (len(text), longest)
            assert "\n".join(lines[found.line - 1 :]).find(text[-longest:]) in range(len(lines[found.line - 1]) + 1)


def test_stretches_do_not_overlap_and_files_that_have_changed_are_named(reader, tmp_path):
    said = "So a longer line that stands here, and again: longer line that stands here alone."
    found = reader.sources(said, least=12)
    stretches = [said[one.start : one.end] for one in found]
    assert stretches == ["a longer line that stands here", " longer line that stands here alone"]
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert not any(one.changed for one in found)
    (tmp_path / "1.txt").write_text("gone")
    assert all(one.changed for one in reader.sources(said, least=12))


@pytest.mark.parametrize(
    ("stretch", "before", "after"),
    [
        ("line, höhö", "two\n\nthe ", ", that is sought\nfive\nsix"),
        ("one\ntwo", "", "\n\nthe line, höhö, that is sought"),
        ("five\nsix", "\nthe line, höhö, that is sought\n", "\n" + 299 * "7"),
        ("78", 300 * "7", ""),
    ],
)
def test_the_lines_around_a_stretch_are_those_of_its_file(tmp_path, stretch, before, after):
    lines = ["one", "two", "", "the line, höhö, that is sought", "five", "six", 900 * "7" + "8"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("another")
    reader = reader_of(tmp_path)
    (one,) = reader.sources(f"§{stretch}", least=len(stretch))
    assert (one.before, one.after) == (before, after)
    assert reader.source(list(stretch.encode())).before == ""


def test_the_name_of_a_file_that_is_not_utf_8_is_spelled(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a longer line")
    found = reader_of(tmp_path).source(list(b"longer"))
    assert str(found) == f"{tmp_path}/caf\\udce9.txt:1 (6)"


def test_commands_say_where_it_stands(tmp_path):
    (tmp_path / "a.txt").write_text("\nZorblax went to Quixby and came home again with all.\n")
    beside = f"files:{tmp_path}"
    done = run("inspect", "Zorblax went to Quixby and", "wide/gpt2", beside, "--json")
    last = json.loads(done.stdout)["tokens"][-1]
    (source,) = last["sources"]
    assert (source["path"], source["line"], source["changed"]) == (str(tmp_path / "a.txt"), 2, False)
    assert "a.txt:2 (" in run("inspect", "Zorblax went to Quixby and", "wide/gpt2", beside).stdout
    chat = [
        "chat",
        "wide/gpt2",
        f"{beside}+weight=0.9+relevance=1",
        "--sources",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ]
    said = run(*chat, stdin="Zorblax went to Quixby and\n")
    assert (said.returncode, f"{tmp_path / 'a.txt'}:2 (" in said.stderr.replace("\n", "")) == (0, True), said.stdout
    assert "name them beside the models" in run("chat", "wide/gpt2", "wide/llama", "--sources").stderr
