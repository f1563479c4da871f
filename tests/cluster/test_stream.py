"""Rows that are streamed: every kind of source, what is read and how often, and how much memory that takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproto.cluster import KMeans
from fastproto.cluster._rows import Rows
from fastproto.cluster._stream import Stream


class Spy(np.ndarray):
    """An array that notes how many rows are read at a time."""

    def __getitem__(self, key):
        out = super().__getitem__(key)
        if isinstance(key, slice):
            self.read.append(len(out))
        return out

    def __array_finalize__(self, source: object) -> None:
        self.read = getattr(source, "read", None)


def spied(x: np.ndarray) -> Spy:
    spy = x.view(Spy)
    spy.read = []
    return spy


def kinds(x: np.ndarray) -> dict[str, np.ndarray | torch.Tensor]:
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "array": x,
        "read-only": frozen,
        "backwards": x[::-1].copy()[::-1],
        "big-endian": x.astype(x.dtype.newbyteorder(">")),
        "columns": np.repeat(x, 2, axis=1)[:, ::2],
        "tensor": torch.from_numpy(x),
        "gradient": torch.from_numpy(x).requires_grad_(),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rows", [0, 1, 33, 100])
def test_pieces_are_the_rows(rows: int, dtype: type, device: str) -> None:
    x = np.random.default_rng(0).normal(size=(rows, 5)).astype(dtype)
    slices = [slice(start, min(start + 33, rows)) for start in range(0, rows, 33)]
    for kind, source in kinds(x).items():
        stream = Stream(source, slices, torch.device(device))
        first = [piece.clone() for piece in stream]
        pieces = [piece.clone() for piece in stream]
        assert all(torch.equal(one, again) for one, again in zip(first, pieces, strict=True))
        assert all(piece.device.type == device and not piece.requires_grad for piece in pieces)
        assert [len(piece) for piece in pieces] == [here.stop - here.start for here in slices]
        if rows:
            assert np.array_equal(torch.cat(pieces).cpu().numpy(), x), kind


@pytest.mark.gpu
def test_pieces_stay_whole_while_the_gpu_lags_behind() -> None:
    x = torch.arange(1000.0)[:, None].repeat(1, 1 << 16)
    slices = [slice(start, start + 50) for start in range(0, 1000, 50)]
    sums = []
    for piece in Stream(x, slices, torch.device("cuda")):
        torch.cuda._sleep(20_000_000)
        sums.append(piece.double().mean())
    assert torch.stack(sums).cpu().equal(x[:, 0].double().view(20, 50).mean(1))


def test_a_fit_reads_no_more_than_a_chunk_at_a_time_and_each_once() -> None:
    x = spied(np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32))
    kmeans = KMeans(8, n_iter=3, chunk_rows=33).fit(x)
    assert max(x.read) == 33
    # Once to see that all rows are finite, once for each iteration, once to assign them to the final centres.
    assert sum(x.read) == 200 * (1 + 3 + 1)
    x.read.clear()
    kmeans.predict(x)
    assert sum(x.read) == 200
    kmeans.transform(x)
    assert sum(x.read) == 400
    x.read.clear()
    KMeans(8, n_iter=3, n_init=2, chunk_rows=33).fit(x)
    assert sum(x.read) == 200 * (1 + 2 * (3 + 1))
    x.read.clear()
    KMeans(8, n_iter=3, init="k-means++", chunk_rows=33).fit(x)
    assert sum(x.read) == 200 * (1 + 7 + 3 + 1)
    x.read.clear()
    KMeans(8, n_iter=3, chunk_rows=33, max_points_per_cluster=4).fit(x)
    assert sum(x.read) == 200 * (1 + 1)


def test_sums_over_rows_are_exact_in_any_order() -> None:
    values = torch.randn(5000).double().exp2().mul(1e3).float()
    weights = torch.rand(5000).double()
    total = Rows(torch.zeros(5000, 1), weights).weighted_sum(values)
    assert float(total) == pytest.approx(math.fsum((values.double() * weights).tolist()), rel=1e-11)
    for _ in range(5):
        order = torch.randperm(5000)
        assert torch.equal(Rows(torch.zeros(5000, 1), weights[order]).weighted_sum(values[order]), total)
    assert Rows(torch.zeros(0, 1)).weighted_sum(torch.zeros(0)) == 0


@pytest.mark.parametrize("kinds", [("u1", "f4"), ("i4", "f8"), ("u1,u1,u1", "f4"), ("u1", "f2")])
def test_rows_of_records_are_copied(kinds: tuple[str, str], tmp_path: Path) -> None:
    """NumPy calls one such row, or none, contiguous, and torch refuses it."""
    records = np.zeros(30, [("label", kinds[0]), ("row", kinds[1], (9,))])
    records["row"] = np.random.default_rng(0).normal(size=(30, 9))
    records.tofile(tmp_path / "records")
    mapped = np.memmap(tmp_path / "records", records.dtype, "r+")
    expected = KMeans(3).fit(records["row"].copy())
    for x in (records["row"], mapped["row"]):
        fitted = KMeans(3, chunk_rows=7).fit(x)
        assert torch.equal(fitted.labels_, expected.labels_)
        assert torch.equal(fitted.predict(x[:1]), expected.labels_[:1])


def test_rows_that_are_copied_come_in_pieces() -> None:
    x = np.zeros((5000, 4096), dtype=np.float32)
    assert Rows(x).chunk_rows == 4096
    assert Rows(x.astype(np.float64)).chunk_rows == 2048
    assert Rows(torch.from_numpy(x)).chunk_rows == 5000


# A file of 64 MiB, and no more than 48 MiB for all that is done with it.
LIMITED = """
import resource, sys
import numpy as np, torch
from fastproto.cluster import KMeans
torch.set_num_threads(1)
KMeans(2, n_iter=1).fit(torch.randn(100, 8))
x = np.load(sys.argv[1], mmap_mode="r")
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (48 << 20), -1))
kmeans = KMeans(10, n_iter=2, chunk_rows=4096).fit(x)
kmeans.predict(x)
print(int(kmeans.counts_.sum()))
try:
    np.array(x)
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on private memory is Linux's")
def test_a_file_is_clustered_in_less_memory_than_it_has(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1 << 18, 64)).astype(np.float32))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(1 << 18), "the limit holds"]
