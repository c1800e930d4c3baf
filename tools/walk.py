"""Walk the way of a token, a byte, a chat and an evaluation: the files that are entered, and changes between them.

Counted are calls of Python functions in softmeet's files, by sys.setprofile, in all threads; a change is a call in
another file than the call before. Of generation, a token's are those of six tokens less those of one, over five. All
members are bundled ones, once as models of transformers, and once as GGUF files that are made of them.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import softmeet
from softmeet.hf.chat import take_plain
from softmeet.members.zoo import expand, locate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import gguf_files
from commands import run
from serving import http, running, serving_of

FOLDER = str(Path(softmeet.__file__).parent)
PROMPT = "And the king said"


@contextmanager
def walked() -> Iterator[list[str]]:
    """Yield a list that gets softmeet's file of each call, in order, until the context ends."""
    found: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(FOLDER):
            found.append(name[len(FOLDER) + 1 :])

    threading.setprofile(note)  # of threads that begin meanwhile
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def changes(files: list[str]) -> int:
    return sum(a != b for a, b in pairwise(files))


def a_token(ensemble: softmeet.Ensemble) -> tuple[list[str], float]:
    """The files that a token enters, in order, and changes of file a token."""

    def run(tokens: int) -> list[str]:
        with walked() as files:
            ensemble.generate(PROMPT, max_new_tokens=tokens, do_sample=False, speculate=0)
        return files

    run(2)  # what is made once is made
    one, six = run(1), run(6)
    more = Counter(six)
    more.subtract(Counter(one))
    return [name for name in dict.fromkeys(six) if more[name] > 0], (changes(six) - changes(one)) / 5


def a_chat(ensemble: softmeet.Ensemble) -> tuple[list[str], float]:
    """The files that a chat of two tokens enters in the server, the second time that it is asked."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "temperature": 0}
    take_plain(ensemble.model)
    with walked() as files, running(serving_of({"it": ensemble})) as url:
        for _ in range(2):
            time.sleep(0.5)  # what comes after the answer
            files.clear()
            http.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
        found = list(files)
    return list(dict.fromkeys(found)), changes(found)


def an_evaluation(folder: Path) -> tuple[list[str], float]:
    """The files that a command enters which evaluates a text of 110 tokens, loading of the members included."""
    text = folder / "text.txt"
    text.write_text("And the king said unto him, Go, and do so. " * 8)
    with walked() as files:
        run("evaluate", "--text", text, "-m", "wide/gpt2", "-m", "wide/llama", "--rule", "logit-mean")
    return list(dict.fromkeys(files)), changes(files)


def pair_of_gguf(folder: Path) -> list[str]:
    """Write a bundled pair as GGUF files."""
    found = []
    for name in expand("wide")[:2]:
        path, model = folder / f"{Path(name).name}.gguf", locate(name)
        causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        gguf_files.write(path, causal_lm, AutoTokenizer.from_pretrained(model), bits=8, pre="gpt-2")
        found.append(str(path))
    return found


def main(files: Annotated[bool, typer.Option(help="List the files, too.")] = False) -> None:
    """Print how many files each way enters, and how often it changes between them."""
    torch.set_num_threads(1)
    pair = softmeet.Ensemble.from_pretrained("wide", "logit-mean")
    with tempfile.TemporaryDirectory() as folder:
        native = softmeet.Ensemble.from_pretrained(pair_of_gguf(Path(folder)), "logit-mean")
        ways = {
            "a token of two GGUF files": a_token(native),
            "a token of models of transformers": a_token(pair),
            "a byte": a_token(softmeet.Ensemble.from_pretrained("mixed")),
            "a chat of two tokens": a_chat(pair),
            "an evaluation": an_evaluation(Path(folder)),
        }
    for name, (entered, count) in ways.items():
        print(f"{name}: {len(entered)} files, {count:.0f} changes")
        if files:
            print("  " + " → ".join(entered))


if __name__ == "__main__":
    typer.run(main)
