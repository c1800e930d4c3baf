"""One shard of a trace: a Parquet file that appears under its name when it is whole, and not before.

Columns are ``document``, ``target`` and ``bytes`` (int32), and for member i ``hidden_i``, a list of d_i floats. Pages
carry checksums, and the file's metadata the identity of its trace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmeet.errors import TraceError
from softmeet.evaluation.files import write_atomically
from softmeet.evaluation.positions import Positions

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError("traces are kept in Parquet files: pip install 'softmeet[eval]'") from error

_KEY = b"softmeet"


def write_shard(path: Path, positions: Positions, dtype: torch.dtype, key: str) -> None:
    """Write one shard, its hidden states in ``dtype``.

    Args:
        path: where to.
        positions: what to write.
        dtype: fp32 or fp16.
        key: the identity of the trace.

    Raises:
        TraceError: the disk is full.
    """
    columns: dict[str, Any] = {
        name: pa.array(x.to(torch.int32).cpu().numpy())
        for name, x in (("document", positions.document), ("target", positions.targets), ("bytes", positions.sizes))
    }
    for i, hidden in enumerate(positions.hidden):
        flat = pa.array(hidden.to(dtype).cpu().contiguous().flatten().numpy())
        columns[f"hidden_{i}"] = pa.FixedSizeListArray.from_arrays(flat, hidden.shape[1])
    table = pa.table(columns).replace_schema_metadata({_KEY: key.encode()})
    # Floats of a hidden state neither repeat nor compress: plain pages are read fastest.
    write_atomically(
        path,
        lambda file: pq.write_table(
            table, file, compression="none", use_dictionary=False, write_page_checksum=True, row_group_size=1 << 14
        ),
    )


def read_shard(path: Path, key: str, names: list[str]) -> Positions:
    """What :func:`write_shard` wrote, hidden states in fp32.

    Raises:
        TraceError: the file is missing, damaged or of another trace.
    """
    if not path.exists():
        raise TraceError(f"{path} is missing")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(_KEY) != key.encode():
                raise TraceError(f"{path} is of another trace")
            table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
    hidden: list[Tensor] = []
    while f"hidden_{len(hidden)}" in table.column_names:
        column = table.column(f"hidden_{len(hidden)}").combine_chunks()
        flat = torch.tensor(column.flatten().to_numpy(zero_copy_only=False))
        hidden.append(flat.view(table.num_rows, -1).float())
    targets, document, sizes = (_integers(table, name) for name in ("target", "document", "bytes"))
    return Positions(hidden, targets, document, sizes, names)


def _integers(table: Any, name: str) -> Tensor:
    return torch.tensor(table.column(name).to_numpy()).long()
