"""The files that ``fastproto cluster`` reads: every format, and those that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clustered_files import ROWS, cluster, lists, one_line, save
from safetensors.torch import save_file

from fastproto.cluster import KMeans
from fastproto.cluster.files import read_matrix


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("extension", [".npy", ".npz", ".parquet", ".safetensors", ".NPY"])
def test_every_format_is_clustered_as_the_array_is(tmp_path: Path, extension: str, dtype: type) -> None:
    rows = ROWS.astype(dtype)
    path = save(tmp_path / f"x{extension.lower()}", rows).rename(tmp_path / f"x{extension}")
    assert cluster(path, tmp_path / "out", "--iterations", "5", "--seed", "3") == 0
    expected = KMeans(9, n_iter=5, seed=3).fit(rows)
    centers, labels, phi = (
        np.load(tmp_path / "out" / f"{name}.npy") for name in ("centers", "labels", "concentration")
    )
    np.testing.assert_array_equal(labels, expected.labels_)
    np.testing.assert_array_equal(centers, expected.cluster_centers_)
    np.testing.assert_array_equal(phi, expected.concentration_)
    assert centers.dtype == (np.float64 if dtype is np.float64 else np.float32)


def test_several_arrays_need_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ROWS[:, :3]
    np.savez(tmp_path / "x.npz", other=other, rows=ROWS, ids=np.arange(300))
    save_file({"other": torch.from_numpy(other.copy()), "rows": torch.from_numpy(ROWS)}, tmp_path / "x.safetensors")
    columns = {"other": lists(other, pa.list_(pa.float32())), "rows": lists(ROWS, pa.large_list(pa.float32()))}
    pq.write_table(pa.table(columns | {"ids": np.arange(300)}), tmp_path / "x.parquet")
    for extension, names in (
        (".npz", "other, rows, ids"),
        (".parquet", "other, rows"),
        (".safetensors", "other, rows"),
    ):
        path = tmp_path / f"x{extension}"
        assert cluster(path, tmp_path / "out") == 2
        assert one_line(capsys) == f"{path}: --key expected one of {names}, got none"
        assert cluster(path, tmp_path / "out", "--column", "row") == 2
        assert one_line(capsys).endswith(", got 'row'")
        np.testing.assert_array_equal(read_matrix(path, "rows"), ROWS)
    assert cluster(tmp_path / "x.npz", tmp_path / "out", "--key", "rows") == 0
    capsys.readouterr()
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "labels.npy"), KMeans(9).fit(ROWS).labels_)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["key"] == "rows"
    for path, key, message in (
        (tmp_path / "x.npz", "ids", "x.npz: ids expected float16, float32 or float64 (N, D), got int64 (300,)"),
        (tmp_path / "x.parquet", "ids", "x.parquet: ids expected lists of float16, float32 or float64, got int64"),
    ):
        assert cluster(path, tmp_path / "new", "--key", key) == 2
        assert one_line(capsys).endswith(message)


def test_files_are_mapped_and_bfloat16_is_read(tmp_path: Path) -> None:
    assert isinstance(read_matrix(save(tmp_path / "x.npy", ROWS)), np.memmap)
    half = torch.from_numpy(ROWS).bfloat16()
    save_file({"rows": half}, tmp_path / "x.safetensors")
    assert torch.equal(read_matrix(tmp_path / "x.safetensors"), half)
    assert cluster(tmp_path / "x.safetensors", tmp_path / "out") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "labels.npy"), KMeans(9).fit(half).labels_)


@pytest.mark.usefixtures("no_picture")
def test_arrays_of_any_order_and_endianness(tmp_path: Path) -> None:
    for number, rows in enumerate((np.asfortranarray(ROWS), ROWS.astype(">f4"))):
        assert cluster(save(tmp_path / f"{number}.npy", rows), tmp_path / f"out{number}") == 0
        np.testing.assert_array_equal(np.load(tmp_path / f"out{number}" / "labels.npy"), KMeans(9).fit(ROWS).labels_)


def with_nan() -> np.ndarray:
    rows = ROWS.copy()
    rows[[7, 50, 51], [0, 3, 6]] = (np.nan, np.inf, -np.inf)
    return rows


NOT_FLOATS = "array expected float16, float32 or float64 (N, D), got"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npy", None, "x.npy: expected a file, got nothing of that name"),
        ("x.npy", lambda path: path.mkdir(), "x.npy: expected a file, got a folder"),
        ("x.csv", lambda path: path.write_text("1,2\n"), "x.csv: extension expected one of .npy, .npz, .safetensors, "),
        ("x", None, "x: extension expected one of .npy, .npz, .safetensors, .parquet, got none"),
        ("x.npy", lambda path: np.save(path, ROWS[0]), f"x.npy: {NOT_FLOATS} float32 (7,)"),
        ("x.npy", lambda path: np.save(path, np.float32(1)), f"x.npy: {NOT_FLOATS} float32 ()"),
        ("x.npy", lambda path: np.save(path, ROWS[None]), f"x.npy: {NOT_FLOATS} float32 (1, 300, 7)"),
        ("x.npy", lambda path: np.save(path, ROWS.astype(np.int8)), f"x.npy: {NOT_FLOATS} int8 (300, 7)"),
        ("x.npy", lambda path: np.save(path, ROWS.astype(complex)), f"x.npy: {NOT_FLOATS} complex128 (300, 7)"),
        (
            "x.npy",
            lambda path: np.save(path, ROWS.astype(object)),
            "x.npy: cannot be read: Array can't be memory-mapped",
        ),
        ("x.npy", lambda path: np.save(path, ROWS[:8]), "n_clusters = 9 rows, got 8"),
        ("x.npy", lambda path: np.save(path, ROWS[:0]), "n_clusters = 9 rows, got 0"),
        ("x.npy", lambda path: np.save(path, ROWS[:, :0]), "at least one dimension, got shape (300, 0)"),
        ("x.npy", lambda path: np.save(path, with_nan()), "got 3 with NaN or infinity, the first at index 7"),
        ("x.npy", lambda path: path.write_bytes(b"no array"), "x.npy: cannot be read: "),
        ("x.npy", lambda path: path.write_bytes(b""), "x.npy: cannot be read: "),
        (
            "x.npz",
            lambda path: path.write_bytes(b"no archive"),
            "x.npz: content expected a zip archive of arrays, got ",
        ),
        ("x.npz", lambda path: np.savez(path), "x.npz: expected an array, got an empty file"),
        ("x.npz", lambda path: np.savez(path, x=ROWS.astype(object)), "x.npz: cannot be read: Object arrays cannot be"),
        ("x.npz", lambda path: np.savez(path, x=ROWS[0]), f"x.npz: {NOT_FLOATS} float32 (7,)"),
        ("x.safetensors", lambda path: path.write_bytes(b"none"), "x.safetensors: cannot be read: "),
        ("x.safetensors", lambda path: save_file({"i": torch.arange(3)}, path), "expected a float tensor, got i"),
        ("x.safetensors", lambda path: save_file({"i": torch.ones(3)}, path), f"{NOT_FLOATS} float32 (3,) on cpu"),
        ("x.parquet", lambda path: path.write_bytes(b"none"), "x.parquet: cannot be read: "),
        ("x.parquet", lambda path: pq.write_table(pa.table({"i": [1, 2]}), path), "expected a column of lists, got i"),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [[1, 2], [3, 4]]}), path),
            "x.parquet: i expected lists of float16, float32 or float64, got list<element: int64>",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [[1.0, 2.0]] * 5000 + [[1.0], [2.0]]}), path),
            "x.parquet: i expected a list of 2 numbers in every row, got a list of 1 in row 5000",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [[1.0, 2.0], None, [1.0, 2.0]]}), path),
            "x.parquet: i expected a list of 2 numbers in every row, got no list in row 1",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [[], [1.0]]}), path),
            "x.parquet: i expected a list of numbers in every row, got a list of 0 in row 0",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [None, [1.0, 2.0]]}), path),
            "x.parquet: i expected a list of numbers in every row, got no list in row 0",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": [[1.0, 2.0]] * 9 + [[1.0, None]]}), path),
            "got 1 with NaN or infinity, the first at index 9",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"i": pa.array([], type=pa.list_(pa.float32()))}), path),
            "n_clusters = 9 rows, got 0",
        ),
    ],
)
def test_bad_files_are_refused_with_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, write: object, message: str
) -> None:
    path = tmp_path / name
    if callable(write):
        write(path)
    before = sorted(tmp_path.iterdir())
    assert cluster(path, tmp_path / "out") == 2
    line = one_line(capsys)
    assert line.startswith(str(path))
    assert message in line
    assert sorted(tmp_path.iterdir()) == before
