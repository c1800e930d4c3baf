"""``softmeet serve`` as a process of its own, for benchmarks of the server, and ``transformers serve`` beside it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil

from softmeet.members import zoo

# Memory is judged from so many seconds of a process's life on, by a line through it over as many seconds or more.
SETTLED = 600.0
MEMBER = "wide/gpt2"
PROMPTS = ["And the king said unto", "In the beginning", "O my lord,", "The", "Thou shalt not", "What is", "Enter a"]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """``softmeet serve`` as a process; without a port, on a free one. What it prints is kept in a file."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._printed = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - it lives as long as the server
        command = [sys.executable, "-m", "softmeet.cli.main", "serve", *arguments, "--port", str(port), "--no-ui"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=self._printed, stderr=subprocess.STDOUT, env=environment)
        while (found := re.search(r"running on (http://\S+)", self.printed())) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{self.printed()}")
            time.sleep(0.05)
        self.url = found[1]

    def printed(self) -> str:
        """What the server has printed so far."""
        # A position of its own: the server writes where it is.
        size = os.fstat(self._printed.fileno()).st_size
        return os.pread(self._printed.fileno(), size, 0).decode(errors="replace")

    def megabytes(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    async def allocated(self) -> float:
        """Megabytes that are allocated and not freed, as the server says."""
        async with httpx.AsyncClient(timeout=30) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        return float(text.split("\nsoftmeet_allocated_bytes ")[1].split()[0]) / 1e6

    def end(self) -> str:
        """Send SIGTERM and wait; what was printed."""
        self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def kill(self) -> str:
        """Send SIGKILL and wait; what was printed."""
        self.process.kill()
        return self._ended()

    def _ended(self) -> str:
        self.process.wait(timeout=60)
        printed = self.printed()
        self._printed.close()
        return printed


class Rival:
    """``transformers serve`` with one model, by default a bundled member."""

    def __init__(self, model: str = "") -> None:
        port = free_port()
        self.model, self.url = model or zoo.locate(MEMBER), f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.5)
        raise RuntimeError("transformers serve did not start")

    def end(self) -> None:
        """Send SIGTERM and wait."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


class Site:
    """A server at one port: its process, which may be killed and started again, and what was seen of it."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name, self.port, self._arguments = name, free_port(), arguments
        self.url, self.up, self.kills = f"http://127.0.0.1:{self.port}", asyncio.Event(), 0
        # For each process, (seconds of its life, MB allocated, MB resident).
        self.memory: list[list[tuple[float, float, float]]] = []
        self.tracebacks = 0
        self._server: Server | None = None

    def _running(self) -> Server:
        assert self._server is not None, "start it first"
        return self._server

    async def start(self) -> None:
        """Start a process, and wait until it serves."""
        self._server, self._born = await asyncio.to_thread(Server, *self._arguments, port=self.port), time.monotonic()
        self.memory.append([])
        self.up.set()

    async def kill(self) -> None:
        """Kill the process without a warning."""
        self.up.clear()
        self.kills += 1
        self.tracebacks += "Traceback" in await asyncio.to_thread(self._running().kill)

    async def end(self) -> None:
        """Have the process end as it should."""
        self.tracebacks += "Traceback" in await asyncio.to_thread(self._running().end)

    def give_up(self) -> None:
        """Kill the process if it still runs, after an error of the benchmark itself."""
        if self._server is not None and self._server.process.poll() is None:
            self._server.kill()

    async def look(self) -> None:
        """Note the memory, if the server runs and says it."""
        if self.up.is_set():
            server, life, now = self._running(), self.memory[-1], time.monotonic() - self._born
            with suppress(httpx.TransportError, IndexError, psutil.NoSuchProcess):
                life.append((now, await server.allocated(), server.megabytes()))

    def growth(self) -> float | None:
        """MB an hour, by a line through the least that was allocated in each minute of the longest life.

        What requests hold comes and goes by hundreds of megabytes; what is never freed raises the least. None if the
        life was too short after it had settled.
        """
        seen = np.array([x for x in max(self.memory, key=len, default=[]) if x[0] >= SETTLED])
        if len(seen) < 2 or seen[-1, 0] - seen[0, 0] < SETTLED:
            return None
        minutes = seen[:, 0] // 60
        # Of the last minute there are only a few looks.
        parts = [seen[minutes == k] for k in np.unique(minutes)[:-1]]
        least = [part[part[:, 1].argmin()] for part in parts]
        times, sizes = np.array(least).T[:2]
        return float(np.polyfit(times, sizes, 1)[0] * 3600)
