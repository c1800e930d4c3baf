"""The command line as the tests call it: in this process, or in one of its own."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from warnings import catch_warnings, simplefilter

import pytest

from softmeet import freed_memory, suspended
from softmeet.cli import main as cli

_OWN, _END = os.getpid(), os._exit


def leave(code):
    """End as ``os._exit`` does, but go on in this process."""
    if os.getpid() == _OWN:
        raise SystemExit(code)
    _END(code)


def run(*arguments, stdin="", columns=120, stdout=None):
    """What ``softmeet`` does with these arguments, by the same entry point, in this process."""
    out, err = stdout or io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        simplefilter("ignore")
        patch.setattr(sys, "argv", ["softmeet", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())))
        patch.setattr(freed_memory, "keep", lambda: None)
        patch.setattr(suspended, "_came", threading.Event())
        patch.setattr(os, "_exit", leave)
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            cli.main()
    return subprocess.CompletedProcess(arguments, end.value.code or 0, stdout or out.getvalue(), err.getvalue())


def ran(*arguments, **how):
    """The same, which has to succeed."""
    done = run(*arguments, **how)
    assert done.returncode == 0, done.stderr
    return done


def refusal(*arguments, **how):
    """What it says, on one line, where it refuses."""
    done = run(*arguments, **how)
    assert done.returncode == 2
    return done.stderr.replace("\n", " ")


def facts_of(*arguments, **how):
    """What it writes as JSON."""
    return json.loads(ran(*arguments, "--json", "-", **how).stdout)


def process(*arguments, stdin="", program=("-m", "softmeet"), **environment):
    """The same in a process of its own, which takes seconds to start, without lines on progress of a busy machine."""
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        input=stdin, capture_output=True, encoding="utf-8", check=False, timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
    )  # fmt: skip
    done.stderr = re.sub(r"^loading.*: \d+ s\n", "", done.stderr, flags=re.MULTILINE)
    return done


def stages(monkeypatch, *modules):
    """What modules of the command line will tell of their progress: (name, total, the counts by which it advanced)."""
    found = []

    @contextmanager
    def progress():
        def begin(name, done, total):
            found.append((name, total, []))
            return found[-1][2].append

        yield begin

    for name in modules:
        monkeypatch.setattr(importlib.import_module(f"softmeet.cli.{name}"), "progress", progress)
    return found
