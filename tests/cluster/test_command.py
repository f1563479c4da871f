"""fastproto cluster: its options, the folder it writes, what it refuses, Ctrl-C and SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clustered_files import ROWS, cluster, one_line, save

import fastproto
from fastproto import cli
from fastproto.cluster import KMeans, command, concentration

FILES = {"centers.npy", "labels.npy", "concentration.npy", "summary.json", "clusters.png"}


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
        (["--init", "few.npy"], "few.npy: --init expected (9, 7), got float32 (3, 7) on cpu"),
        (["--init", "narrow.npy"], "narrow.npy: --init expected (9, 7), got float32 (9, 6) on cpu"),
        (["--init", "nan.npy"], "nan.npy: --init expected finite centres, got NaN or infinity"),
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
    save(Path("narrow.npy"), ROWS[:9, :6])
    save(Path("nan.npy"), np.full_like(ROWS[:9], np.nan))
    assert cluster(Path("x.npy"), Path("out"), *options) == 2
    assert one_line(capsys).startswith(message)
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
        one_line(capsys) == f"--out expected a new or empty folder, got {out}, which holds a clustering: "
        "replace it with --overwrite"
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cluster(path, out, "--overwrite", k=5) == 0
    assert np.load(out / "centers.npy").shape == (5, 7)
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.npy"]

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
        assert one_line(capsys).startswith("--out expected a ")


def test_what_is_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = save(tmp_path / "x.npy", ROWS), tmp_path / "out"
    assert cluster(path, out, k=5) == 0
    (tmp_path / "link").symlink_to(out)
    linked = tmp_path / "link" / ".." / "link" / "centers.npy"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    capsys.readouterr()
    for argument, rows, options in (
        ("embeddings", out / "centers.npy", []),
        ("embeddings", linked, []),
        ("--init", path, ["--init", str(out / "centers.npy")]),
        ("--init", path, ["--init", str(linked)]),
    ):
        assert cluster(rows, out, "--overwrite", *options, k=5) == 2
        named = rows if argument == "embeddings" else options[1]
        assert one_line(capsys) == f"{argument} expected another file than those replaced in {out}, got {named}"
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert cluster(path, tmp_path / "other", "--init", str(linked), k=5) == 0


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

    def short(*arguments: object) -> None:
        raise OSError("20 requested and 7 written")

    monkeypatch.setattr(command.np, "save", short)
    assert cluster(path, tmp_path / "a") == 1
    said = one_line(capsys)
    assert said.startswith("cannot write ") and said.endswith("centers.npy: 20 requested and 7 written")
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


def test_sigterm_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", ROWS)
    (tmp_path / "out").mkdir()
    code = """
import signal, sys
from fastproto import cli
from fastproto.cluster import command
command.picture.draw = lambda *arguments: signal.raise_signal(signal.SIGTERM)
sys.exit(cli.main(sys.argv[1:]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, "cluster", path, "--k", "9", "--out", tmp_path / "out", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "fastproto cluster: interrupted\n")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("no_picture")
def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", ROWS)
    # In containers the next run often has the same number.
    for number in (os.getpid(), os.getpid() + 1):
        part = tmp_path / "out" / f".fastproto-cluster-{number}.part"
        part.mkdir(parents=True)
        (part / "centers.npy").write_text("half")
    assert cluster(path, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {part.name}
    assert np.load(tmp_path / "out" / "centers.npy").shape == (9, 7)


@pytest.mark.parametrize(
    ("package", "extension", "source"),
    [
        ("pyarrow", ".parquet", '".[cluster]" in the folder of fastproto\'s source'),
        ("safetensors", ".safetensors", '".[cluster]" in the folder of fastproto\'s source'),
        ("matplotlib", ".npy", '".[cluster]" in the folder of fastproto\'s source'),
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
