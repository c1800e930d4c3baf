"""Reading bytes one by one, as if they were generated: softmeet and genlm-bytes on one model.

    python benchmarks/byte_rival.py softmeet MODEL TEXT...
    OTHER/bin/python benchmarks/byte_rival.py genlm MODEL TEXT...

genlm-bytes needs an environment of its own (`python -m venv OTHER; OTHER/bin/pip install genlm-bytes`), and the model
is a folder. The first bytes of each text are read and not counted. Prints bits a byte, and bytes a second with all that
the model takes.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

# Bytes of a text that are read before, and that are counted.
_BEFORE, _COUNTED = 100, 300
_BEAM = 5


def softmeet(model: str, texts: list[bytes]) -> Iterator[tuple[float, float]]:
    """Bits and seconds of every text, with the default pruning, behind the tokenizer's BOS as the other has it."""
    from transformers import AutoTokenizer

    from softmeet import Ensemble

    (reader,) = Ensemble.from_pretrained([model], vocabulary="bytes").model.readers
    begin = AutoTokenizer.from_pretrained(model).bos_token_id
    for text in texts:
        reading, bits = reader.begin(text[:_BEFORE], None if begin is None else [begin]), 0.0
        start = time.perf_counter()
        for byte in text[_BEFORE:]:
            bits -= float(reader.log_probs([reading])[0, byte]) / math.log(2)
            (reading,) = reader.advance([reading], [byte])
        yield bits, time.perf_counter() - start


def genlm(model: str, texts: list[bytes]) -> Iterator[tuple[float, float]]:
    """Bits and seconds of every text, with a beam of five, as its documentation has it."""
    from genlm.backend import load_model_by_name
    from genlm.bytes import BeamParams, ByteBeamState

    llm = load_model_by_name(model, backend="hf", llm_opts={"hf_opts": {"torch_dtype": torch.float32}})

    async def read(text: bytes) -> tuple[float, float]:
        beam = await ByteBeamState.initial(llm, BeamParams(K=_BEAM, prune_threshold=0.05))
        beam = await beam.prefill(text[:_BEFORE])
        bits, start = 0.0, time.perf_counter()
        for byte in text[_BEFORE:]:
            bits -= float((await beam.logp_next())[byte]) / math.log(2)
            beam = await (beam.prune() << byte)
        taken = time.perf_counter() - start
        await beam.cleanup()
        return bits, taken

    async def every() -> list[tuple[float, float]]:
        return [await read(text) for text in texts]

    yield from asyncio.run(every())


def main(engine: str, model: str, *paths: str) -> None:
    """Print a line for all texts."""
    torch.set_num_threads(2)
    texts = [Path(path).read_bytes()[: _BEFORE + _COUNTED] for path in paths]
    found = list({"softmeet": softmeet, "genlm": genlm}[engine](model, texts))
    counted = sum(len(text) - _BEFORE for text in texts)
    bits, seconds = (sum(column) for column in zip(*found, strict=True))
    print(f"{engine}, {Path(model).name}: {bits / counted:.4f} bits/B, {counted / seconds:.1f} B/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
