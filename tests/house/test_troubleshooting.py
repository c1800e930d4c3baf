"""The guide to troubleshooting quotes messages as they are: their fixed words stand in the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from softmeet import Status

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
# The first cell of a table's line, if it begins with code: a message, in which an ellipsis stands for what differs.
QUOTED = re.compile(r"^\| (`+)(.+?)\1(?: \(\d+\)| with| followed|,|) ", re.MULTILINE)
ALSO = re.compile(r"followed by `(.+?)`")
# Not ours: the operating system's, a rule's name, and a status, which has a test of its own.
OTHERS = {"Cannot allocate memory", "meet", *Status.__members__}


@pytest.fixture(scope="module")
def told():
    """The texts in the source but for docstrings, zeros between them; what is put into one stands as a line end."""
    found = []
    for file in (ROOT / "src" / "softmeet").rglob("*.py"):
        tree = ast.parse(file.read_text())
        silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\n" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
                found.append(node.value)
    return "\0".join(found)


MESSAGES = [text for _, text in QUOTED.findall(PAGE) if text not in OTHERS] + ALSO.findall(PAGE)


def test_the_page_quotes_many_messages():
    assert len(MESSAGES) > 50


@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_page_quotes_stands_in_the_source(message, told):
    # Some sentences are put together from a statement and advice, at the colon.
    parts = [part.strip() for part in re.split(r"…|: ", message) if part.strip(" :,.()")]
    assert not [part for part in parts if part not in told]


@pytest.mark.parametrize("status", Status)
def test_every_status_is_explained(status):
    assert f"| `{status.name}` | " in PAGE
    assert str(status) in PAGE
