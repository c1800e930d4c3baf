"""Run the README's shell commands as printed, from a fresh clone, without network: python tools/run_readme.py FOLDER.

The first command, which clones, is replaced with a clone of this repository into FOLDER, which is left there. Models
of the Hub are stood in for by bundled ones, put into a cache of their own. ``softmeet serve`` is asked for its models,
and then stopped. ``make test`` is left to those who run this.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = "http://127.0.0.1:8000"
# The models of the Hub that the README names; the two members of the bundled family mixed stand in for them.
FROM_THE_HUB = ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-Coder-0.5B")


def commands(page: str) -> list[str]:
    """Return the commands of a page's ``console`` blocks, without prompts and comments, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def stand_in(cache: Path) -> None:
    """Put the stand-ins where the Hub's client looks for models that it has fetched before."""
    members = sorted(path.parent for path in (ROOT / "zoo" / "softmeet_zoo" / "mixed").glob("*/config.json"))
    for name, member in zip(FROM_THE_HUB, members, strict=True):
        repository, commit = cache / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        shutil.copytree(member, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)


def serve(script: str, environment: dict[str, str]) -> None:
    """Start a server by a script whose last command it is, wait until it lists its models, and stop it."""
    server = subprocess.Popen(["bash", "-euc", script], env=environment)
    try:
        for _ in range(240):
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}")
            try:
                with urllib.request.urlopen(f"{SERVER}/v1/models", timeout=5) as answer:  # noqa: S310 - http
                    print(answer.read().decode(), flush=True)
                    return
            except OSError:
                continue
        raise SystemExit("the server gave no answer in two minutes")
    finally:
        server.terminate()
        server.wait(60)


def main(folder: Path) -> None:
    """Clone into a folder, and run the README's other commands there, each in a shell of its own."""
    clone, *others = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    if not clone.startswith("git clone "):
        raise SystemExit(f"expected the README's first command to clone, got {clone}")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    stand_in(folder.with_name(f"{folder.name}-hub"))
    left_out = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p)
    environment |= {"HF_HOME": str(folder.with_name(f"{folder.name}-hub")), "HF_HUB_OFFLINE": "1"}
    before = [f"cd {folder}"]
    for command in others:
        print(f"\n$ {command}", flush=True)
        started = time.monotonic()
        if command.startswith(". "):  # holds for the commands after it
            before.append(command)
        elif command.startswith("softmeet serve"):
            serve("\n".join([*before, f"exec {command}"]), environment)
        elif command != "make test":
            subprocess.run(["bash", "-euc", "\n".join([*before, command])], env=environment, check=True)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
