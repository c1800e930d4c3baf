"""Which files are read of a folder, a file or a glob."""

import os
import sys

import pytest

from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.readers.files.corpus import find_texts


@pytest.fixture
def folder(tmp_path):
    """A repository with what has to be left out, each of it once."""
    texts = {
        "README.md": "read me", "src/a.py": "a", "src/b.md": "b", "src/deep/er/c.py": "c", "notes [1].txt": "n",
        ".gitignore": "*.log\nbuild/\n", "src/.gitignore": "/made/*\n!/made/kept.py\n*.md\n!b.md\n",
        "run.log": "1", "build/out.py": "2", "src/made/gone.py": "3", "src/made/kept.py": "k", "src/x.md": "4",
        ".git/HEAD": "5", ".hidden/x.py": "6", "large.txt": "x" * 1_000_001,
        ".env": "7", ".env.local": "8", "id_rsa": "9", "server.PEM": "10", "credentials.json": "11",
        "credentials.py": "code", "keys.py": "code",
        "only/.gitignore": "*\n!*/\n!*.py\n!kept/\n", "only/a/b.py": "b", "only/a/x.md": "12", "only/kept/x.md": "13",
    }  # fmt: skip
    tmp_path /= "repository"  # above which another one may be, of this test alone
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "src" / "out").symlink_to("/")
    (tmp_path / "src" / "circle").symlink_to(tmp_path)
    (tmp_path / "link.md").symlink_to(tmp_path / "README.md")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def names(found, folder):
    return [path.relative_to(folder).as_posix() for path in found.files]


def test_a_folder_is_read_without_what_is_ignored_hidden_linked_large_or_a_key(folder):
    found = find_texts([str(folder), str(folder / "src")])
    assert names(found, folder) == [
        "README.md", "credentials.py", "keys.py", "notes [1].txt", "only/a/b.py", "src/a.py", "src/b.md",
        "src/deep/er/c.py", "src/made/kept.py",
    ]  # fmt: skip
    assert found.left_out == {
        "hidden": 5,  # three .gitignore, .git, .hidden
        "ignored by .gitignore": 6,  # run.log, build, gone.py, three x.md
        "names of keys and passwords": 5,
        "no regular files": 1,
        "over 1 MB": 1,
        "symbolic links": 3,
    }


@pytest.mark.parametrize(
    ("path", "include", "expected"),
    [
        ("", "*.md", ["README.md", "src/b.md"]),
        ("", "src/**/*.py", ["src/a.py", "src/deep/er/c.py", "src/made/kept.py"]),
        ("src", "deep/*/*", ["src/deep/er/c.py"]),
        ("src/*.py", None, ["src/a.py"]),
        ("**/*.py", "c.*", ["src/deep/er/c.py"]),
        ("only", None, ["only/a/b.py"]),
        ("s*/deep", None, ["src/deep/er/c.py"]),
        ("notes [1].txt", None, ["notes [1].txt"]),  # a file, though it looks like a glob
        ("run.log", None, ["run.log"]),  # what is named itself is taken, ignored, hidden, large, or a link
        ("build", None, ["build/out.py"]),
        (".hidden/x.py", None, [".hidden/x.py"]),
        ("large.txt", None, ["large.txt"]),
        ("link.md", None, ["README.md"]),
        ("id_rsa", None, []),  # but no key
        ("server.PEM", None, []),
    ],
)
def test_paths_and_globs(folder, path, include, expected):
    found = find_texts([str(folder / path)], include)
    assert names(found, folder) == expected
    assert all(file.is_absolute() for file in found.files)


def test_the_gitignores_of_the_folders_above_count_up_to_the_repository(folder):
    (folder / "src/deep/er/d.log").write_text("ignored above")
    (folder.parent / ".gitignore").write_text("*.py\n")  # of another repository, if of any
    found = find_texts([str(folder / "src/deep")])
    assert names(found, folder) == ["src/deep/er/c.py"]
    assert found.left_out == {"ignored by .gitignore": 1}


def test_the_home_folder_is_meant_by_a_tilde_and_others_from_where_one_is(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "src")
    assert find_texts(["~/src/deep"]) == find_texts(["deep"]) == find_texts([f"{folder}/src/deep/", "deep"])


def test_what_is_left_out_of_a_folder_is_taken_where_it_is_named_too(folder):
    found = find_texts([str(folder / "only"), str(folder / "only/a/x.md")])
    assert names(found, folder) == ["only/a/b.py", "only/a/x.md"]
    assert found.left_out == {"hidden": 1, "ignored by .gitignore": 1}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "found nothing there"),
        ("", "found nothing there"),
        ("a\0b", "found nothing there"),
        ("nowhere/*.py", "found nothing there"),
        ("src/*.rs", "found none of it in .*src"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(folder, path, said, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match=rf"expected a .*glob.*{said}"):
        find_texts([path])


@pytest.mark.parametrize("include", ["!", "[z-a]", "a\\"])
def test_a_glob_that_cannot_be_read_is_refused(folder, include):
    with pytest.raises(InvalidInputError, match="expected a glob"):
        find_texts([str(folder)], include)


def test_folders_are_walked_without_recursion(tmp_path):
    deep = tmp_path
    for _ in range(60):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("a")
    depth, frame = 0, sys._getframe()
    while frame:
        depth, frame = depth + 1, frame.f_back
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 50)
    try:
        found = find_texts([str(tmp_path)])
    finally:
        sys.setrecursionlimit(limit)
    assert found.files == (deep / "a.txt",)


def test_a_folder_that_is_to_be_left_out_is(folder):
    (folder / "linked").symlink_to(folder / "only")
    for without in folder / "only", folder / "linked":  # wherever one names it from
        found = find_texts(
            [str(folder), str(folder / "only"), str(folder / "only/a"), str(folder / "on*")], None, without
        )
        assert not [name for name in names(found, folder) if name.startswith("only")]
        assert found.left_out["indexes of softmeet's"] == 2  # the folder, and the one in it that is named
    kept = find_texts([str(folder)], None, folder / "on")
    assert "only/a/b.py" in names(kept, folder)
