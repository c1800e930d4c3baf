"""The command line as the tests call it: in this process, or in one of its own."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from warnings import catch_warnings, simplefilter

import httpx
import pytest
from serving import http

from softmeet import freed_memory
from softmeet.cli import main as cli


def run(*arguments, stdin="", columns=120):
    """What ``softmeet`` does with these arguments, by the same entry point, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        simplefilter("ignore")
        patch.setattr(sys, "argv", ["softmeet", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())))
        patch.setattr(freed_memory, "keep", lambda: None)
        patch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as end:
            cli.main()
    return subprocess.CompletedProcess(arguments, end.value.code or 0, out.getvalue(), err.getvalue())


def serve(*arguments, meanwhile):
    """(what ``softmeet serve`` does in this process, what ``meanwhile(url)`` returns, which has to end it by a signal).

    The latter runs in a thread of its own, from when the server answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, ended = f"http://127.0.0.1:{port}", threading.Event()

    def leave(code):
        raise SystemExit(code)

    def visit():
        while not accepts(url):
            assert not ended.wait(0.05)
        try:
            return meanwhile(url)
        except BaseException:
            while not ended.wait(1):
                os.kill(os.getpid(), signal.SIGINT)
            raise

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", leave)
        visited = pool.submit(visit)
        done = run("serve", *arguments, "--port", port)
        ended.set()
        return done, visited.result()


def accepts(url):
    """Whether a server takes new connections."""
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def process(*arguments, stdin="", program=("-m", "softmeet"), **environment):
    """The same in a process of its own, which takes seconds to start, without lines on progress of a busy machine."""
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        input=stdin, capture_output=True, encoding="utf-8", check=False, timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
    )  # fmt: skip
    done.stderr = re.sub(r"^loading.*: \d+ s\n", "", done.stderr, flags=re.MULTILINE)
    return done
