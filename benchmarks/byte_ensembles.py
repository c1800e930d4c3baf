"""What averages over bytes gain: python benchmarks/byte_ensembles.py -m A -m B -m C --text 'texts/prose/*.txt'

Every member reads every document once, and every pair and all together are averaged: uniformly, and with weights fitted
on four fifths of the documents and judged on the rest, in turn. Differences are against the best member by itself, in
bits a byte, with 95 % intervals paired by document. The time that each member takes to read a byte is measured beside
them: the ensemble costs the sum, and the control is the best single member that costs no more.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from report import show
from softmeet import Ensemble
from softmeet.evaluation.documents import read_documents
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import Clusters, paired
from softmeet.evaluation.objective import Layout, Objective, Values, minimise, pooled
from softmeet.evaluation.positions import Positions, observe_text
from softmeet.hf import EnsembleConfig
from softmeet.members.byte_member import ByteMember
from softmeet.members.covers import SYMBOLS
from softmeet.members.member import short
from softmeet.rules.settings import POOLS, Pool
from softmeet.scaling.local import LocalEngine

FOLDS = 5


def nats(pool: Pool, log_probs: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of an average, at each byte."""
    scores = pooled(pool, log_probs, weights, None).log_softmax(-1)
    return -scores.gather(-1, targets[:, None]).squeeze(-1)


def fitted(ensemble: Ensemble, positions: Positions, pool: Any) -> Tensor:
    """The weights of least loss."""
    n = len(ensemble.names)
    with LocalEngine() as engine:
        objective = Objective(ensemble.model, positions, Layout(n, tempered=False), pool)
        values, _, _ = minimise(objective, Values((1 / n,) * n), 40, engine)
    return torch.tensor(values.weights, dtype=torch.float64)


def cross_fitted(ensemble: Ensemble, positions: Positions, log_probs: Tensor, pool: Any) -> tuple[Tensor, list[float]]:
    """-log p(target) at each byte by weights fitted on other documents; the weights' mean."""
    out, every = torch.zeros(len(positions), dtype=torch.float64), []
    for fold in range(FOLDS):
        here = positions.document % FOLDS == fold
        weights = fitted(ensemble, positions.take((~here).nonzero().squeeze(-1)), pool)
        out[here] = nats(pool, log_probs[:, here], weights, positions.targets[here])
        every.append(weights)
    return out, torch.stack(every).mean(0).tolist()


@torch.inference_mode()
def own_bits(reader: ByteMember, text: bytes) -> float:
    """What the token model itself needs for the tokens that its tokenizer makes of a text."""
    tokens = reader.spelling.encode(text)
    logits = reader.model(torch.tensor([[*reader.prefix, *tokens]]), use_cache=False).logits[
        0, len(reader.prefix) - 1 : -1
    ]
    log_p = logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
    return float(-log_p.sum()) / math.log(2)


def compared(reader: ByteMember, texts: list[bytes]) -> dict[str, float]:
    """What a byte of known texts costs, in bits and in milliseconds, by bytes and by the model's own tokens."""
    found = {"bits/B": 0.0, "own bits/B": 0.0, "ms/B": 0.0, "own ms/B": 0.0}
    for text in texts:
        start = time.perf_counter()
        _, log_probs, _ = reader.score(text)
        middle = time.perf_counter()
        found["own bits/B"] += own_bits(reader, text)
        found["own ms/B"] += 1000 * (time.perf_counter() - middle)
        found["ms/B"] += 1000 * (middle - start)
        found["bits/B"] -= float(log_probs[range(len(text)), list(text)].sum()) / math.log(2)
    return {name: total / sum(map(len, texts)) for name, total in found.items()}


def by_itself(name: str, pattern: str, column: str) -> dict[str, Any]:
    """What the texts take a model in its own tokens; the time, of all of them, in a column."""
    (reader,) = Ensemble.from_pretrained([name], vocabulary="bytes").model.readers
    texts = [document.text.encode() for document in read_documents([pattern])]
    start, size = time.perf_counter(), sum(map(len, texts))
    bits = sum(own_bits(reader, own) for own in texts) / size
    taken = 1000 * (time.perf_counter() - start) / size
    return {"text": pattern, "members": f"{short(name)}, its own tokens", "bits/B": bits, column: taken}


def main(
    members: Annotated[list[str], typer.Option("--member", "-m", help="Hub ids, folders or GGUF files.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="Files or patterns; each is judged by itself.")],
    prune: Annotated[float, typer.Option(help="As for every ensemble over bytes.")] = 0.01,
    timed: Annotated[int, typer.Option(help="Documents on which the members' own tokens are compared.")] = 6,
    kept: Annotated[Path | None, typer.Option(help="A folder for what members made of the texts.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="A model read by its own tokens alone, to be set beside the averages.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON of all figures.")] = None,
) -> None:
    """Print a table for each text."""
    ensemble = Ensemble.from_pretrained(members, vocabulary="bytes", prune=prune)
    names, rows = [short(name) for name in ensemble.names], list[dict[str, Any]]()
    for pattern in text:
        documents = read_documents([pattern])
        key = hashlib.sha256(repr((pattern, members, prune)).encode()).hexdigest()[:12]
        folder = kept and kept / key
        positions = observe_text(ensemble, documents, cache=PieceCache(folder, {"texts": [d.name for d in documents]}))
        within = Clusters(positions.document, "documents")
        log_probs = torch.stack([h[:, :SYMBOLS].double() for h in positions.hidden])
        single = [-own.gather(-1, positions.targets[:, None]).squeeze(-1) for own in log_probs]
        costs = [compared(reader, [d.text.encode() for d in documents[:timed]]) for reader in ensemble.model.readers]
        work = [h[:, SYMBOLS:].mean(0).tolist() for h in positions.hidden]
        for i, name in enumerate(names):
            rows.append(
                {
                    "text": pattern, "members": name, "average": "", "bits/B": single[i].mean().item() / math.log(2),
                    "against the best": "", "calls/B": work[i][1], "run/B": work[i][2], "dropped": work[i][0],
                    **{f"{name} of {timed}": x for name, x in costs[i].items()}, "weights": "",
                }
            )  # fmt: skip
        for size in range(2, len(names) + 1):
            for chosen in itertools.combinations(range(len(names)), size):
                some = list(chosen)
                part = ensemble.model.part(some, EnsembleConfig([ensemble.names[i] for i in some], "logit-mean"))
                own = Ensemble(part, ensemble.tokenizer)
                at = replace(positions, hidden=[positions.hidden[i] for i in some])
                best = min(some, key=lambda i: single[i].mean().item())
                for pool in POOLS:
                    even = torch.full((size,), 1 / size, dtype=torch.float64)
                    tried = {"uniform": (nats(pool, log_probs[some], even, positions.targets), even.tolist())}
                    tried["fitted"] = cross_fitted(own, at, log_probs[some], pool)
                    for kind, (found, weights) in tried.items():
                        difference = paired(found / math.log(2), single[best] / math.log(2), within)
                        rows.append(
                            {
                                "text": pattern, "members": " + ".join(names[i] for i in some),
                                "average": f"{kind} {pool}", "bits/B": found.mean().item() / math.log(2),
                                "against the best": str(difference), "calls/B": None, "run/B": None, "dropped": None,
                                **{f"{name} of {timed}": None for name in costs[0]},
                                f"ms/B of {timed}": sum(costs[i]["ms/B"] for i in some),
                                "weights": " ".join(f"{w:.2f}" for w in weights),
                            }
                        )  # fmt: skip
    rows += [
        dict.fromkeys(rows[0]) | by_itself(name, pattern, f"own ms/B of {timed}")
        for name in control or ()
        for pattern in text
    ]
    show(f"Averages over bytes, prune {prune:g}", rows, out)


if __name__ == "__main__":
    typer.run(main)
