"""What the tests of ``fastproto cluster`` share: rows, files of them in every format, the command and its one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from fastproto import cli

ROWS = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)


def lists(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(list(rows), type=kind)


def save(path: Path, rows: np.ndarray) -> Path:
    """The rows as the extension of the path says; some hold more beside them."""
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".npz":
        np.savez(path, rows)
    elif path.suffix == ".safetensors":
        save_file({"rows": torch.from_numpy(rows), "ids": torch.arange(len(rows))}, path)
    else:
        kind = pa.from_numpy_dtype(rows.dtype)
        beside = {"id": np.arange(len(rows)), "tokens": [[1, 2]] * len(rows)}
        table = pa.table(beside | {"rows": lists(rows, pa.list_(kind, rows.shape[1]))})
        pq.write_table(table, path, row_group_size=70)
    return path


def cluster(path: Path, out: Path, *options: str, k: int = 9) -> int:
    return cli.main(["cluster", str(path), "--k", str(k), "--out", str(out), "--device", "cpu", *options])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n").removeprefix("fastproto cluster: ")
