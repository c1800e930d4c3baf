"""Running code that a model has written, in a process of its own: this file, as a script.

The process has a few seconds, a bounded memory and an empty environment, sees no installed packages, and can write no
byte into any file; its folder is thrown away. These limits are against accidents. They are no prison for code that
wants to do harm: what a model writes runs as the user who asks it. They are those of Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Seconds of the processor, and of the clock, which is for code that waits: on a busy machine even good code does.
SECONDS, PATIENCE = 2, 30.0
MEMORY = 1 << 29
BEGUN = b"+"


def passes(code: str, tests: Sequence[str], *, seconds: int = SECONDS, patience: float = PATIENCE) -> bool:
    """Run code, and then its tests, in a process with few rights; whether all of them are true.

    Args:
        code: Python.
        tests: expressions, evaluated where ``code`` was run.
        seconds: of the processor.
        patience: seconds of the clock.

    Raises:
        RuntimeError: if the process has not come as far as the code.
    """
    secret = secrets.token_hex()
    asked = json.dumps({"code": code, "tests": list(tests), "seconds": seconds, "secret": secret})
    with (
        tempfile.TemporaryDirectory(prefix="softmeet-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).resolve())], cwd=folder, env={},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            said, _ = process.communicate(asked.encode(), timeout=patience)
        except subprocess.TimeoutExpired as error:
            said = error.output or b""
        finally:
            with contextlib.suppress(ProcessLookupError):  # else processes that it began would stay
                os.killpg(process.pid, signal.SIGKILL)
    if not said.startswith(BEGUN):
        raise RuntimeError(
            f"expected to run a function in a process with limits, which ended with {process.returncode}"
        )
    return said == BEGUN + secret.encode()


def _limit(seconds: int) -> None:
    limits = {"CPU": seconds, "AS": MEMORY, "CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 16}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def main() -> None:
    """Run what stdin has, and say the secret, which only this function knows, if all tests are true."""
    asked = json.load(sys.stdin.buffer)
    secret, out, nothing = asked["secret"].encode(), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    _limit(asked["seconds"])
    os.write(out, BEGUN)
    names: dict[str, Any] = {"__name__": "answer"}
    exec(compile(asked["code"], "answer", "exec"), names)  # noqa: S102
    if all(bool(eval(test, names)) for test in asked["tests"]):  # noqa: S307
        os.write(out, secret)


if __name__ == "__main__":
    main()
