"""Behind which token a text is predicted best: python benchmarks/starts.py -m MODEL -t 'texts/*.txt'

Over bytes a text begins behind what its tokenizer puts there, or else a BOS or a line break (``spelling.py``). The loss
is that of the model's own tokens, the first left out, as behind no token at all there is no prediction of it.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from report import show
from softmeet.evaluation.documents import read_documents
from softmeet.members.spelling import spelling_of
from softmeet.members.zoo import locate


@torch.inference_mode()
def loss(model: torch.nn.Module, start: list[int], ids: list[int]) -> float:
    """The loss of a text's tokens behind some others, but for the first token, in nats."""
    read = torch.tensor([[*start, *ids]])
    log_p = model(read, attention_mask=torch.ones_like(read)).logits[0, len(start) : -1].double().log_softmax(-1)
    return -float(log_p.gather(-1, torch.tensor(ids[1:])[:, None]).sum())


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Hub ids, folders or bundled names.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns; each is judged by itself.")],
    each: Annotated[int, typer.Option(help="The most bytes of a document.")] = 600,
) -> None:
    """Print a table."""
    rows = list[dict[str, object]]()
    for name in members:
        place = locate(name) if name.partition("/")[0] in ("wide", "narrow", "mixed") else name
        tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
        model = model.float().eval()
        vocab, spelling = tokenizer.get_vocab(), spelling_of(name, tokenizer)
        starts = {"nothing": [], "a line break": tokenizer("\n", add_special_tokens=False)["input_ids"]}
        named = (vocab.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id)
        starts |= {tokenizer.convert_ids_to_tokens(k): [k] for k in named if k is not None}
        for pattern in text:
            cut = [own.text.encode()[:each].decode(errors="ignore") for own in read_documents([pattern])]
            ids = [tokenizer(own, add_special_tokens=False)["input_ids"] for own in cut]
            size = sum(len(own.encode()) for own in cut)
            rows += [
                {
                    "member": name, "text": pattern, "behind": kind,
                    "nats a byte": sum(loss(model, start, own) for own in ids) / size,
                    "used": tuple(start) == spelling.start,
                }
                for kind, start in starts.items()
            ]  # fmt: skip
    show("Loss behind what a text begins with", rows, None)


if __name__ == "__main__":
    typer.run(main)
