"""The losses of an evaluation as a Parquet file: a row for each document, or for each token or byte."""

from __future__ import annotations

from pathlib import Path

import torch

from softmeet.evaluation.files import write_atomically
from softmeet.evaluation.scores import Evaluation


def write_losses(path: Path, found: Evaluation, *, each: bool = False) -> None:
    """Write losses, in nats, with a column for every member and rule under its name.

    Args:
        path: the file.
        found: the evaluation.
        each: whether there is a row for each token, or byte over bytes, with ``document``, its ``place`` there from 0
            among those that are predicted, its ``id`` and the ``bytes`` of text that it adds; else a row for each
            document, with its name, how many ``tokens`` (or ``symbols`` over bytes) are predicted, their ``bytes``, and
            the sums of losses.

    Raises:
        TraceError: if the disk is full.
    """
    import pyarrow
    from pyarrow import parquet

    positions, rows = found.positions, {**found.members, **found.choices}
    ids, which = positions.document.unique(return_inverse=True)
    names = [positions.names[k] for k in ids.tolist()]
    if each:
        counts = torch.bincount(which)
        place = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        columns = {
            "document": pyarrow.array([names[k] for k in which.tolist()]), "place": place.numpy(),
            "id": positions.targets.numpy(), "bytes": positions.sizes.numpy(),
        }  # fmt: skip
        columns |= {name: scores.nats.numpy() for name, scores in rows.items()}
    else:

        def sums(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(ids), dtype=values.dtype).index_add_(0, which, values)

        unit = "tokens" if found.vocabulary == "tokens" else "symbols"
        columns = {
            "document": pyarrow.array(names), unit: torch.bincount(which).numpy(),
            "bytes": sums(positions.sizes).numpy(),
        }  # fmt: skip
        columns |= {name: sums(scores.nats).numpy() for name, scores in rows.items()}
    write_atomically(path, lambda file: parquet.write_table(pyarrow.table(columns), file))
