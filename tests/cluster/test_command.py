"""fastproto cluster: every format, the folder it writes, what it refuses, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import fastproto
from fastproto import cli
from fastproto.cluster import KMeans, command, concentration
from fastproto.cluster.files import read_matrix
from fastproto.cluster.picture import MAPPED_CLUSTERS, draw, plane

FILES = {"centers.npy", "labels.npy", "concentration.npy", "summary.json", "clusters.png"}
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


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the test the time to draw."""
    monkeypatch.setattr(command.picture, "draw", lambda file, *arguments: None)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.rstrip("\n").removeprefix("fastproto cluster: ")


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


@pytest.mark.usefixtures("no_picture")
def test_options_reach_kmeans(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", ROWS)
    np.save(tmp_path / "start.npy", ROWS[:9])
    for number, (options, settings) in enumerate(
        (
            (["--init", "k-means++", "--n-init", "3"], {"init": "k-means++", "n_init": 3}),
            (["--init", str(tmp_path / "start.npy")], {"init": ROWS[:9]}),
            (["--spherical"], {"spherical": True}),
            (["--max-points-per-cluster", "10"], {"max_points_per_cluster": 10}),
            (["--tol", "0.01"], {"tol": 0.01}),
            (["--engine", "faiss"], {"engine": "faiss"}),
        )
    ):
        out = tmp_path / str(number)
        assert cluster(path, out, *options) == 0
        expected = KMeans(9, **settings).fit(ROWS)
        np.testing.assert_array_equal(np.load(out / "centers.npy"), expected.cluster_centers_)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["objective"] == expected.history_
        assert summary["iterations"] == expected.n_iter_
        assert summary["training_rows"] == (90 if "max_points_per_cluster" in settings else 300)
        # The recorded options give the same again.
        again = KMeans(**summary["options"] | ({"init": ROWS[:9]} if number == 1 else {})).fit(ROWS)
        assert torch.equal(again.labels_, expected.labels_)


def test_the_summary_is_of_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Two far heaps and a start with a centre that gets no row: sizes differ widely, and one cluster stays empty.
    rows = np.concatenate([ROWS, ROWS[:20] + 100])
    out = tmp_path / "deep" / "out"
    assert cluster(save(tmp_path / "x.npy", rows), out, "--iterations", "4", k=14) == 0
    assert {path.name for path in out.iterdir()} == FILES
    centers, labels, phi = (np.load(out / f"{name}.npy") for name in ("centers", "labels", "concentration"))
    summary = json.loads((out / "summary.json").read_text())
    sizes = np.bincount(labels, minlength=14)
    assert (summary["rows"], summary["dim"], summary["clusters"], summary["iterations"]) == (320, 7, 14, 4)
    assert summary["fastproto"] == fastproto.__version__
    assert summary["file"] == str(tmp_path / "x.npy")
    distance = ((rows.astype(np.float64) - centers[labels]) ** 2).sum(1)
    assert summary["inertia"] == pytest.approx(distance.sum(), rel=1e-5)
    assert summary["inertia"] <= summary["objective"][-1] <= summary["objective"][0]
    assert len(summary["objective"]) == 4
    assert summary["sizes"] == {"min": sizes.min(), "median": np.median(sizes), "max": sizes.max()}
    assert summary["empty"] == (sizes == 0).sum()
    expected = concentration(*map(torch.from_numpy, (rows, labels, centers)))
    np.testing.assert_allclose(phi, expected, rtol=1e-5)
    for name, order in (("largest", np.argsort(-sizes, kind="stable")), ("smallest", np.argsort(sizes, kind="stable"))):
        assert [entry["cluster"] for entry in summary[name]] == order[:10].tolist()
        assert [entry["size"] for entry in summary[name]] == sizes[order[:10]].tolist()
        assert [entry["concentration"] for entry in summary[name]] == phi[order[:10]].tolist()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.isascii()
    first, objective, spread, written = printed.out.splitlines()
    assert first.startswith("rows        320 x 7, K = 14, ")
    assert objective.endswith(f" to {summary['objective'][-1]:.6g} in 4 iterations")
    empty = (sizes == 0).sum()
    assert spread == f"sizes       {sizes.min()} to {sizes.max()}, median {np.median(sizes):g}, {empty} empty"
    assert written.startswith(f"written     {out}")


def test_empty_clusters_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", np.repeat(ROWS[:2], 5, axis=0))
    assert cluster(path, tmp_path / "out", k=4) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    sizes = np.bincount(np.load(tmp_path / "out" / "labels.npy"), minlength=4)
    assert summary["empty"] == (sizes == 0).sum() > 0
    assert summary["smallest"][0]["size"] == 0


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
            "x.parquet: i expected a list of 1 numbers in every row, got a list of 0 in row 0",
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "0"], "argument --k: expected an integer of at least 1, got '0'"),
        (["--k", "2.5"], "argument --k: expected an integer of at least 1, got '2.5'"),
        (["--iterations", "none"], "argument --iterations: expected an integer of at least 1, got 'none'"),
        (["--tol", "nan"], "argument --tol: expected a number of at least 0, got 'nan'"),
        (["--tol", "inf"], "argument --tol: expected a number of at least 0, got 'inf'"),
        (["--seed", "-1"], "argument --seed: expected an integer of at least 0, got '-1'"),
        (["--init", "pca"], "--init expected random, k-means++ or a file of centres, got pca"),
        (["--init", "few.npy"], "KMeans: init expected (9, D), got float32 (3, 7) on cpu"),
        (["--device", "tpu"], "--device expected cpu or a GPU that is there, got tpu: "),
        (["--device", "meta"], "--device expected cpu or a GPU that is there, got meta"),
        (["--engine", "sklearn"], "argument --engine: invalid choice: 'sklearn'"),
        (["--key", "rows"], "x.npy: --key expected none for .npy, got 'rows'"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("x.npy"), ROWS)
    save(Path("few.npy"), ROWS[:3])
    assert cluster(Path("x.npy"), Path("out"), *options) == 2
    assert message in one_line(capsys)
    assert not Path("out").exists()


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster"]) == 2
    assert one_line(capsys) == "the following arguments are required: embeddings, --k, --out"


def test_a_folder_is_overwritten_only_where_asked_and_only_a_clustering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = save(tmp_path / "x.npy", ROWS), tmp_path / "out"
    out.mkdir()
    assert cluster(path, out) == 0
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cluster(path, out, k=5) == 2
    assert (
        one_line(capsys) == f"cluster: --out expected a new or empty folder, got {out}, which holds a clustering: "
        "replace it with --overwrite"
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cluster(path, out, "--overwrite", k=5) == 0
    assert np.load(out / "centers.npy").shape == (5, 7)
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.npy"]

    # Its own centres can be clustered into the folder they lie in.
    assert cluster(out / "centers.npy", out, "--overwrite", k=2) == 0
    assert np.load(out / "labels.npy").shape == (5,)

    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    for name, content in (
        ("labels.npy", "mine"),
        ("summary.json", '{"mine": 1}'),
        ("summary.json", "[]"),
        ("summary.json", "7"),
    ):
        (other / name).write_text(content)
        assert cluster(path, other, "--overwrite") == 2
        assert one_line(capsys).endswith(f"{other}, which holds something else")
        assert (other / name).read_text() == content
    for file in (path, path / "below"):
        assert cluster(path, file, "--overwrite") == 2
        assert "cluster: --out expected a " in one_line(capsys)


def test_nothing_is_left_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    path = save(tmp_path / "x.npy", ROWS)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(command.picture, "draw", full)
    for out in (tmp_path / "a" / "b", tmp_path / "empty"):
        assert cluster(path, out) == 1
        assert one_line(capsys) == "No space left on device"
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["empty", "x.npy"]


def test_ctrl_c_leaves_nothing_behind_and_no_package_was_imported_in_vain(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20000, 32)))
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "fastproto", "cluster", path, "--k", "500",
         "--out", tmp_path / "out", "--iterations", "100000", "--device", "cpu"], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    # Python says what it has imported: the module that starts from there is the last before the clustering.
    imported = set()
    for line in process.stderr:
        imported.add(line.split()[-1])
        if "fastproto.cluster.command" in imported:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "fastproto cluster: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert "torch" in imported
    assert imported.isdisjoint({"pyarrow", "safetensors", "jsonargparse", "torchvision", "faiss"})


@pytest.mark.parametrize(
    ("package", "extension", "source"),
    [
        ("pyarrow", ".parquet", "'fastproto[cluster]'"),
        ("safetensors", ".safetensors", "'fastproto[cluster]'"),
        ("matplotlib", ".npy", "'fastproto[cluster]'"),
        ("faiss", ".npy", "faiss-cpu"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    extension: str,
    source: str,
) -> None:
    path = save(tmp_path / f"x{extension}", ROWS)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("command", "picture"):
        monkeypatch.delitem(sys.modules, f"fastproto.cluster.{name}")
    monkeypatch.setitem(sys.modules, package, None)
    assert cluster(path, tmp_path / "out", *(["--engine", "faiss"] if package == "faiss" else [])) == 1
    line = one_line(capsys)
    assert package in line
    assert line.endswith(f"it comes with pip install {source}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("k", "dim"), [(1, 5), (2, 1), (3, 40), (50, 6)])
def test_the_plane_keeps_the_distances_that_two_components_can(k: int, dim: int) -> None:
    centers = np.random.default_rng(k).normal(size=(k, dim))
    centred = centers - centers.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = np.zeros((k, 2))
    expected[:, : min(2, len(s))] = (u * s)[:, :2]
    np.testing.assert_allclose(np.abs(plane(centers)), np.abs(expected), atol=1e-6)
    assert (plane(centers).max(0) >= -plane(centers).min(0)).all()


@pytest.mark.parametrize("k", [1, 2, MAPPED_CLUSTERS + 200])
def test_the_picture_is_drawn_whatever_the_sizes(tmp_path: Path, k: int) -> None:
    from PIL import Image

    draws = np.random.default_rng(0)
    counts = np.minimum(draws.pareto(0.7, k) * 10, 1e6).astype(np.int64)
    counts[0] = 7
    with open(tmp_path / "x.png", "wb") as file:
        draw(file, draws.normal(size=(k, 3)), counts, draws.random(k), [1.0] if k == 1 else [3.0, 2.0, 1.5])
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert pixels.shape == (420, 1320, 3)
    # Bars, line and discs: ink in each third.
    assert all((part != 255).any(-1).mean() > 0.01 for part in np.array_split(pixels, 3, axis=1))
