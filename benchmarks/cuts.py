"""Hostile texts that a GGUF file's tokenizer cuts as llama.cpp does: python benchmarks/cuts.py SMOLLM2.gguf"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from report import show
from softmeet.members.gguf_tokenizer import known_file
from softmeet.readers.llama_context import LlamaModel

WRITTEN = [
    "the king", " a  b   c", "\n\n\nx", "\t\ttab", "12345 67", "they'll", "THEY'LL", "don't", "é日本語🙂", "</s>",
    "<|endoftext|>", "<eos>", "a" * 50, " " * 50, "x = [1,2,3]\n    return x", "1.5e-3", "\u200b", "e\u0301",
    "\r\n\r\n", "\u00a0\u3000", "㐀㐁 㐂", "\ufb01 \ufb02", "Ωμέγα", "привет мир", '{"a": 1}', "https://x.y/z?q=1",
    "\u2019s \u2018t", "A.B.C.", "١٢٣", "🙂🙂🙂",
]  # fmt: skip
LETTERS = list("ab cd\n\t12.,'\"é日🙂\u00a0~<>|/")


def main(
    files: Annotated[list[Path], typer.Argument(help="GGUF files.")],
    count: Annotated[int, typer.Option(help="How many texts.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    chooser = random.Random(0)  # noqa: S311
    drawn = ["".join(chooser.choices(LETTERS, k=chooser.randrange(1, 40))) for _ in range(count - len(WRITTEN))]
    rows = list[dict[str, Any]]()
    for path in files:
        file, tokenizer = known_file(path, path.name)
        model = LlamaModel(file, path.name)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        other = [text for text in (*WRITTEN, *drawn) if tokenizer.encode(text, **options) != model.tokens(text)]
        rows.append({
            "file": path.name, "split as": file.said.get("tokenizer.ggml.pre"), "texts": count,
            "equal": count - len(other),
            "others": " ".join(repr(text)[1:25].strip() for text in other[:3]),
        })  # fmt: skip
    show("Texts that are cut as llama.cpp cuts them", rows, json)


if __name__ == "__main__":
    typer.run(main)
