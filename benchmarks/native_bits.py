"""What llama.cpp's arithmetic changes: python benchmarks/native_bits.py -m QWEN05 -m QWEN15 texts

GGUF files of one tokenizer, and their uniform logit mean, as llama.cpp runs them and as transformers does, dequantised
to single precision: bits a byte of documents, and how far their predictions are apart.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from report import show
from softmeet import Ensemble


def log_probs(ensemble: Ensemble, ids: Tensor) -> list[Float[Tensor, "t v"]]:
    """What each member predicts behind each token but the last, and what their logit mean does."""
    with torch.inference_mode():
        own = [member(ids).logits[0, :-1].float().log_softmax(-1) for member in ensemble.model.members]
    v = min(one.shape[1] for one in own)
    own = [one[:, :v] for one in own]
    return [*own, torch.stack(own).mean(0).log_softmax(-1)]


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="GGUF files of one tokenizer.")],
    texts: Annotated[Path, typer.Argument(help="What benchmarks/recent_texts.py has written.")],
    tokens: Annotated[int, typer.Option(help="Of each document, at most.")] = 256,
    documents: Annotated[int, typer.Option(help="How many, at most.")] = 24,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print a table."""
    native, floats = (
        Ensemble.from_pretrained([f"{name}+engine={one}" for name in members], "logit-mean", weights=[1] * len(members))
        for one in ("llama.cpp", "transformers")
    )
    paths = sorted(texts.glob("*/*.txt"))
    chosen = paths[:: max(1, len(paths) // documents)][:documents]
    who = [*(Path(name).stem for name in members), "logit-mean"]
    count, size = 0, 0
    nats, apart = torch.zeros(2, len(who), dtype=torch.float64), torch.zeros(len(who), dtype=torch.float64)
    for path in track(chosen, "reading"):
        ids = native.tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :tokens]
        found, drawn = [log_probs(own, ids) for own in (native, floats)], ids[0, 1:, None]
        for k, (ours, theirs) in enumerate(zip(*found, strict=True)):
            v = min(ours.shape[1], theirs.shape[1])
            apart[k] += (ours[:, :v].exp() - theirs[:, :v].exp()).abs().sum().item() / 2
            for way, own in enumerate((ours, theirs)):
                nats[way, k] -= own.gather(1, drawn).double().sum()
        count += len(drawn)
        size += len(native.tokenizer.decode(ids[0, 1:]).encode())
    bits = nats / math.log(2) / size
    rows: list[dict[str, Any]] = [
        {
            "what": name, "llama.cpp, bits a byte": bits[0, k].item(), "dequantised": bits[1, k].item(),
            "more, %": 100 * (bits[0, k] / bits[1, k] - 1).item(), "total variation": apart[k].item() / count,
        }
        for k, name in enumerate(who)
    ]  # fmt: skip
    show(f"{count:,} tokens of {len(chosen)} documents", rows, json)


if __name__ == "__main__":
    typer.run(main)
