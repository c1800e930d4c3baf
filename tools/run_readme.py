"""Run the README's shell commands as printed, from a fresh clone, without network: python tools/run_readme.py FOLDER.

The first command, which clones, is replaced with a clone of this repository into FOLDER, which is left there; what is
said behind ``&&`` holds for the commands after it. Bundled models stand in for its GGUF files, and the clone's guides
for the user's own files. ``softmeet chat`` is told a line, and ``softmeet serve`` is asked for its models, and then
stopped. ``make test`` is left to those who run this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = "http://127.0.0.1:8000"
# The GGUF files that the README names, and the bundled models that stand in for them.
FILES = {"a.gguf": "mixed/gpt2", "b.gguf": "mixed/llama"}
# The user's own files, and those that stand in for them.
OWN, GUIDES = "~/project", "docs/guides"
_WRITE = """
import sys
sys.path.insert(0, "tests")
import gguf_files
from transformers import AutoModelForCausalLM, AutoTokenizer
from softmeet.members.zoo import locate
model, tokenizer = (kind.from_pretrained(locate(sys.argv[1])) for kind in (AutoModelForCausalLM, AutoTokenizer))
gguf_files.write(sys.argv[2], model, tokenizer)
"""


def commands(page: str) -> list[str]:
    """Return the commands of a page's ``console`` blocks, without prompts and comments, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def stand_in(folder: Path, environment: dict[str, str]) -> None:
    """Write the stand-ins for GGUF files, by the clone's own environment."""
    for file, member in FILES.items():
        command = [str(folder / ".venv" / "bin" / "python"), "-c", _WRITE, member, file]
        subprocess.run(command, cwd=folder, env=environment, check=True)


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
    left_out = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p)
    environment |= {"HF_HOME": str(folder.with_name(f"{folder.name}-hub")), "HF_HUB_OFFLINE": "1"}
    before = [f"cd {folder}"]
    (folder / "mine.txt").write_text((folder / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for command in others:
        print(f"\n$ {command}", flush=True)
        started = time.monotonic()
        does, _, after = command.replace(OWN, GUIDES).partition(" && ")
        if does.startswith("softmeet serve"):
            serve("\n".join([*before, f"exec {does}"]), environment)
        elif does != "make test":
            script = "\n".join([*before, does])
            subprocess.run(
                ["bash", "-euc", script], env=environment, check=True, input="And the king said\n", text=True
            )
        if after:  # holds for the commands after it
            before.append(after)
        if does == "make install":
            stand_in(folder, environment)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
