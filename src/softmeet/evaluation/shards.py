"""Write and read shards of a trace: Parquet files that appear under their names only when they are complete.

Columns are ``document``, ``target`` and ``bytes`` (int32), and ``hidden_i`` for member i, a list of floats: a hidden
state and, of members whose reading has costs, these behind it. Pages have checksums. The file's metadata has the key of
its shard and a hash of all columns, since Parquet has no checksum of the footer, which says where the columns are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softmeet.errors import TraceError
from softmeet.evaluation.files import write_atomically
from softmeet.evaluation.positions import Positions
from softmeet.extras import install_line

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError(f"traces are kept in Parquet files, by pyarrow: {install_line('eval')}") from error

_KEY, _HASH = b"softmeet", b"softmeet-sha256"
_TYPES = {torch.float32: pa.float32(), torch.float16: pa.float16()}


def write_shard(path: Path, positions: Positions, dtype: torch.dtype, key: str) -> None:
    """Write positions as one shard of a trace, a Parquet file.

    Args:
        path: the file, which is replaced if it exists.
        positions: the positions, with hidden states, in whatever dtype and on whatever device.
        dtype: of the hidden states on disk, fp32 or fp16.
        key: what proves which shard it is, :meth:`Trace.shard_key`.

    Raises:
        TraceError: if the disk is full.
    """
    of_text = (positions.document, positions.targets, positions.sizes)
    columns = [pa.array(x.to(torch.int32).cpu().numpy()) for x in of_text]
    parts = zip(*filter(None, (positions.hidden, positions.costs)), strict=True)
    members = [torch.cat([part.to(dtype).cpu() for part in own], 1) for own in parts]
    columns += [pa.FixedSizeListArray.from_arrays(pa.array(own.flatten().numpy()), own.shape[1]) for own in members]
    table = pa.table(columns, schema=_schema([own.shape[1] for own in members], dtype))
    table = table.replace_schema_metadata({_KEY: key.encode(), _HASH: _hash(table)})
    # Floats of a hidden state neither repeat nor compress: plain pages are read fastest.
    how = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "row_group_size": 1 << 14}
    write_atomically(path, lambda file: pq.write_table(table, file, **how))


def read_shard(
    path: Path, key: str, names: list[str], count: int, widths: Sequence[int], dtype: torch.dtype, costs: int
) -> Positions:
    """Read and check a shard that :func:`write_shard` wrote; the hidden states are returned in fp32.

    Args:
        path: the file.
        key: the proof that the shard has to have, :meth:`Trace.shard_key`.
        names: the documents' names, which become ``names`` of the positions.
        count: the number of positions that the shard has to have.
        widths: the number of columns of each member.
        dtype: of the hidden states on disk, fp32 or fp16.
        costs: how many of each member's last columns are costs.

    Raises:
        TraceError: if the file is missing or damaged, or belongs to another trace.
    """
    if not path.exists():
        raise TraceError(f"{path} is missing")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata, table = file.schema_arrow.metadata or {}, file.read()
    except Exception as error:  # a damaged footer may raise any exception in pyarrow
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TraceError(f"{path} is damaged ({reason})") from error
    if metadata.get(_KEY) != key.encode():
        raise TraceError(f"{path} is of another trace, or another shard of this one")
    if table.schema != _schema(widths, dtype) or len(table) != count:
        raise TraceError(f"{path} is damaged (its columns are not those of its trace)")
    if metadata.get(_HASH) != _hash(table):
        raise TraceError(f"{path} is damaged (its columns do not have their hash)")
    document, targets, sizes, *hidden = (torch.tensor(column) for column in _columns(table))
    members = [flat.view(count, -1).float() for flat in hidden]
    told = [own[:, own.shape[1] - costs :].double() for own in members] if costs else []
    members = [own[:, : own.shape[1] - costs] for own in members]
    return Positions(members, targets.long(), document.long(), sizes.long(), names, told)


def _schema(widths: Sequence[int], dtype: torch.dtype) -> Any:
    """Return the Arrow schema of a shard."""
    of_text = [(name, pa.int32()) for name in ("document", "target", "bytes")]
    return pa.schema(of_text + [(f"hidden_{i}", pa.list_(_TYPES[dtype], d)) for i, d in enumerate(widths)])


def _columns(table: Any) -> list[Any]:
    """Return the columns as flat NumPy arrays."""
    columns = [column.combine_chunks() for column in table.columns]
    flat = [column.flatten() if pa.types.is_fixed_size_list(column.type) else column for column in columns]
    return [column.to_numpy(zero_copy_only=False) for column in flat]


def _hash(table: Any) -> bytes:
    """Compute the SHA-256 of all columns' numbers, in hexadecimal."""
    digest = hashlib.sha256()
    for column in _columns(table):
        digest.update(column)
    return digest.hexdigest().encode()
