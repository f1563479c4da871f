"""A matrix of embeddings out of a file: mapped where the format allows it, else read once into one array."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastproto._check import FLOATS, describe, expect

# Rows of a parquet column that are decoded at a time: 64 MB of float32 at D = 4096.
BATCH_ROWS = 4096
NAMES_SHOWN = 10


def _npy(path: Path, key: str | None) -> np.ndarray:
    expect(key is None, str(path), "--key", "none for .npy", repr(key))
    with _parsing(path):
        return np.lib.format.open_memmap(path, mode="r")


def _npz(path: Path, key: str | None) -> np.ndarray:
    expect(zipfile.is_zipfile(path), str(path), "content", "a zip archive of arrays", "something else")
    with _parsing(path):
        archive = np.load(path)
    with archive:
        name = _choose(path, "an array", archive.files, archive.files, key)
        with _parsing(path):
            return archive[name]


def _safetensors(path: Path, key: str | None) -> Tensor:
    from safetensors import safe_open

    with _parsing(path):
        file = safe_open(path, framework="pt")
    with file:
        names = list(file.keys())
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
        floats = [name for name, kind in kinds.items() if kind in ("F16", "BF16", "F32", "F64")]
        return file.get_tensor(_choose(path, "a float tensor", floats, names, key))


def _parquet(path: Path, key: str | None) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def is_list(kind: Any) -> bool:
        return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

    # Mapped: read, a row group's whole column would lie in memory beside the array.
    with _parsing(path):
        file = pq.ParquetFile(path, memory_map=True)
    with file:
        schema = file.schema_arrow
        lists = [field for field in schema if is_list(field.type)]
        floats = [field for field in lists if pa.types.is_floating(field.type.value_type)]
        name = _choose(path, "a column of lists", [field.name for field in floats or lists], schema.names, key)
        kind = schema.field(name).type
        fits = is_list(kind) and pa.types.is_floating(kind.value_type)
        expect(fits, str(path), name, "lists of float16, float32 or float64", str(kind))
        # pyarrow's own to_pandas_dtype wants pandas in some versions.
        dtype, rows = np.dtype(f"f{kind.value_type.bit_width // 8}"), file.metadata.num_rows
        x, row = np.empty((0, 1), dtype), 0
        for column in _batches(path, file, name):
            lengths = np.asarray(pc.fill_null(pc.list_value_length(column), -1))
            if row == 0:
                x = np.empty((rows, max(0, lengths[0])), dtype)
            others = np.flatnonzero((lengths != x.shape[1]) | (lengths < 1))
            if others.size:
                length = lengths[others[0]]
                got = f"{'no list' if length < 0 else f'a list of {length}'} in row {row + others[0]}"
                numbers = f"{x.shape[1]} numbers" if x.shape[1] else "numbers"
                expect(False, str(path), name, f"a list of {numbers} in every row", got)
            # A missing number becomes a NaN, which k-means refuses.
            x[row : row + len(lengths)] = np.reshape(column.flatten().to_numpy(zero_copy_only=False), (-1, x.shape[1]))
            row += len(lengths)
        return x


def _batches(path: Path, file: Any, name: str) -> Iterator[Any]:
    """The column as pyarrow arrays of some rows each."""
    batches = file.iter_batches(BATCH_ROWS, columns=[name])
    while True:
        with _parsing(path):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.num_rows:
            yield batch.column(0)


def _choose(path: Path, what: str, candidates: Sequence[str], names: Sequence[str], key: str | None) -> str:
    """The entry to read: the one named, which need be no candidate, or the only candidate."""
    if key is not None:
        expect(key in names, str(path), "--key", f"one of {_listed(names)}", repr(key))
        return key
    if not candidates:
        raise ValueError(f"{path}: expected {what}, got {_listed(names) if names else 'an empty file'}")
    expect(len(candidates) == 1, str(path), "--key", f"one of {_listed(candidates)}", "none")
    return candidates[0]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises at a damaged file (each has errors of its own) into a ValueError with its name."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {error or type(error).__name__}") from error


READERS: dict[str, Callable[[Path, str | None], np.ndarray | Tensor]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}


def read_matrix(path: Path, key: str | None = None) -> np.ndarray | Tensor:
    """The float matrix (N, D) in a file; no second copy of it is made.

    Args:
        path: .npy and .safetensors are memory maps; of an .npz one array is read, a column of lists of a .parquet is
            read batch by batch into one array.
        key: which array of an .npz, tensor of a .safetensors or column of a .parquet; needed where there are several.

    Raises:
        ValueError: no such file, another extension, a damaged file, no such key, or what lies there is no float matrix.
        ModuleNotFoundError: safetensors or pyarrow is needed and not installed.
    """
    suffix = path.suffix.lower()
    expect(suffix in READERS, str(path), "extension", f"one of {', '.join(READERS)}", path.suffix or "none")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got {'a folder' if path.is_dir() else 'nothing of that name'}")
    x = READERS[suffix](path, key)
    dtype = x.dtype if isinstance(x, Tensor) else x.dtype.newbyteorder("=")
    known = dtype in FLOATS if isinstance(x, Tensor) else dtype in (np.float16, np.float32, np.float64)
    got = describe(x) if isinstance(x, Tensor) else f"{dtype} {x.shape}"
    expect(known and len(x.shape) == 2, str(path), key or "array", "float16, float32 or float64 (N, D)", got)
    return x
