"""The lines that install what is missing are right for where softmeet was installed from, and with what."""

import json
import sys
from types import SimpleNamespace

import pytest

from softmeet import extras

CLONE = {"url": "file:///home/me/soft%20meet", "dir_info": {"editable": True}}
WHEEL = {"url": "file:///home/me/softmeet-0.2.0-py3-none-any.whl", "archive_info": {}}

REPOSITORY = {"url": "https://somewhere.example/softmeet", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
BRANCH = REPOSITORY | {"vcs_info": REPOSITORY["vcs_info"] | {"requested_revision": "next"}}


@pytest.mark.parametrize(
    ("origin", "extra", "said"),
    [
        (REPOSITORY, "eval", "'softmeet[eval] @ git+https://somewhere.example/softmeet'"),
        (BRANCH, "zoo", "'softmeet-zoo @ git+https://somewhere.example/softmeet@next#subdirectory=zoo'"),
        (CLONE, "eval", "-e '/home/me/soft meet[eval]'"),
        (CLONE, "zoo", "-e '/home/me/soft meet/zoo'"),
        (WHEEL, "eval", "'softmeet[eval]'"),
        (WHEEL, "zoo", "'softmeet[zoo]'"),
        (None, "zoo", "'softmeet[zoo]'"),
    ],
)
@pytest.mark.parametrize("has_pip", [True, False])
def test_install_lines(origin, extra, said, has_pip, monkeypatch):
    read = SimpleNamespace(read_text=lambda name: origin and json.dumps(origin))
    monkeypatch.setattr(extras, "distribution", lambda name: read)
    monkeypatch.setattr(extras, "find_spec", lambda name: has_pip or None)
    pip = f"{sys.executable} -m pip install" if has_pip else f"uv pip install --python {sys.executable}"
    assert extras.install_line(extra) == f"{pip} {said}"
