"""assign's Triton kernels against a float64 table of all distances.

With a GPU the tests marked gpu run on it; without one a second pytest runs this file under Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from host_waits import no_host_waits
from interpreter import DEVICE, INTERPRETED, assert_captured, gpu_alone, on_gpu, run_interpreted
from torch import Tensor

import fastproto
from fastproto.ops.assign import assign
from fastproto.reference import assign as reference

METRICS = ["l2", "ip"]
KINDS = [
    "plain", "offset", "near-duplicates", "unit", "heavy tails", "far outlier", "clusters", "on centres", "tiny",
    "huge", "rows beside one centre", "rows far away", "one centre many times", "on a line",
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests of this file run here themselves")
def test_all_of_this_file_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: tiles that make small problems long, and fewer programs than there are tiles.

    Where the interpreter takes as long for a large block as for a small one, two or three blocks that end in the
    middle of the last.
    """
    if not INTERPRETED:
        return
    from fastproto.kernels import _tiles, assign, assign_screen

    monkeypatch.setattr(assign_screen, "tile_for", lambda *_: _tiles.Tile(64, 64, 64, 0, 4, 1))
    monkeypatch.setattr(assign_screen, "PACK_ROWS", 64)
    monkeypatch.setattr(assign, "SETTLE_ROWS", 32)
    monkeypatch.setattr(assign, "SETTLE_COLUMNS", 32)
    monkeypatch.setattr(assign, "RESOLVE_COLUMNS", 32)
    monkeypatch.setattr(assign, "RESOLVE_PROGRAMS", 2)


def of_kind(kind: str, n: int = 40, k: int = 150, d: int = 48) -> tuple[Tensor, Tensor]:
    """Rows and centres that are hard to tell apart, to scale, or to keep in float16."""
    x, centers = torch.randn(n, d, device=DEVICE), torch.randn(k, d, device=DEVICE)
    some = torch.randint(k, (n,), device=DEVICE)
    if kind == "offset":
        return x + 1e4, centers + 1e4
    if kind == "near-duplicates":
        centers = centers[torch.arange(k, device=DEVICE) % 7] + 1e-5 * torch.randn_like(centers)
        return centers[some] + 1e-5 * x, centers
    if kind == "unit":
        return F.normalize(x), F.normalize(centers)
    if kind == "heavy tails":
        return x / torch.rand(n, 1, device=DEVICE) ** 3, centers / torch.rand(k, 1, device=DEVICE) ** 3
    if kind == "far outlier":
        centers[3] = 1e7
    if kind == "clusters":
        return 100 * centers[some] + 0.1 * x, 100 * centers
    if kind == "on centres":
        return centers[some], centers
    if kind in ("tiny", "huge"):
        scale = 1e-18 if kind == "tiny" else 1e18
        return x * scale, centers * scale
    if kind == "rows beside one centre":
        return centers[:1] + 1e-6 * x, centers
    if kind == "rows far away":
        return 1e4 * x, centers
    if kind == "on a line":
        # All errors of rounding point the same way, which is as large as they can make the error of a product.
        return torch.rand(n, 1, device=DEVICE).repeat(1, d), torch.rand(k, 1, device=DEVICE).repeat(1, d)
    if kind == "one centre many times":
        return x, centers[:1].repeat(k, 1)
    return x, centers


def scores(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """½||x - c||² or -<x, c> in float64: (N, K)."""
    x, centers = x.double(), centers.double()
    if metric == "ip":
        return -(x[:, None] * centers).sum(2)
    return (x[:, None] - centers).square().sum(2) / 2


def check(x: Tensor, centers: Tensor, metric: str) -> None:
    """The first of the least scores, unless two differ by less than float32 resolves, and the distance to it."""
    with fastproto.backend("triton"):
        labels, distance = assign(x, centers, metric)
    assert (labels.dtype, distance.dtype) == (torch.int64, torch.float32)
    score = scores(x, centers, metric)
    expected = score.argmin(1)
    picked, best = (score.gather(1, label[:, None])[:, 0] for label in (labels, expected))
    assert (labels[picked == best] == expected[picked == best]).all()
    assert (picked - best <= 1e-7 * best.abs()).all()
    torch.testing.assert_close(distance, (-picked if metric == "ip" else 2 * picked).float(), rtol=1e-6, atol=0)


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (100, 1, 96), (33, 10, 130), (130, 65, 17)])
def test_matches_the_formula(n: int, k: int, d: int, dtype: torch.dtype, metric: str) -> None:
    check(torch.randn(n, d, device=DEVICE).to(dtype), torch.randn(k, d, device=DEVICE).to(dtype), metric)


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_data(kind: str, metric: str) -> None:
    check(*of_kind(kind), metric)


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_score_is_below_its_bound(kind: str, metric: str) -> None:
    """V_nk, from the screen's own numbers, does not exceed what a row grants to a centre that near, for any pair."""
    from fastproto.kernels.assign_screen import screen

    x, centers = of_kind(kind)
    (n, d), k = x.shape, len(centers)
    found = screen(x, centers, metric == "ip", None)
    product = found.rows[:n].float() @ found.centers[:k].float().T
    bound = found.coef[:n, None] * found.vector[None, :k] + product
    slack = 1.0 if metric == "ip" else 1 + d * 2.0**-50
    granted = found.base[:n, None] + found.unit[:n, None] * scores(x, centers, metric) * slack
    assert (bound <= granted).all()
    if kind in ("plain", "offset", "unit", "clusters", "tiny", "huge"):
        lengths = found.rows[:n].double().norm(dim=1)[:, None] * found.centers[:k].double().norm(dim=1)
        assert ((granted - bound) / lengths).median() < 2.0**-10


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
def test_both_passes_have_work(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rows are settled by the screen but for a few; rows between near-duplicates never are."""
    counts: list[int] = []
    cumsum = Tensor.cumsum

    def counted(*args: int) -> Tensor:
        total = cumsum(*args)
        counts.append(int(total[-1]))
        return total

    monkeypatch.setattr(Tensor, "cumsum", counted)
    for kind in ("plain", "near-duplicates"):
        check(*of_kind(kind), metric)
    assert counts[0] <= 2
    assert counts[1] >= 30


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(metric: str) -> None:
    centers = torch.randn(33, 130, device=DEVICE).repeat(6, 1)
    x = torch.cat([centers[:7], torch.randn(9, 130, device=DEVICE)])
    with fastproto.backend("triton"):
        labels, _ = assign(x, centers, metric)
        assert int(labels.max()) < 33
        labels, _ = assign(x, centers[:1].expand(90, -1), metric)
    assert labels.eq(0).all()


@on_gpu
def test_on_a_grid_full_of_ties_labels_are_the_first_best() -> None:
    x = torch.randint(-4, 5, (60, 2), device=DEVICE).float()
    for k in (9, 70):
        centers = torch.randint(-4, 5, (k, 2), device=DEVICE).float()
        for metric in METRICS:
            with fastproto.backend("triton"):
                labels, _ = assign(x, centers, metric)
            score = scores(x, centers, metric)
            first = (score == score.min(1, keepdim=True).values).int().argmax(1)
            assert torch.equal(labels, first)


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a NaN under the interpreter
@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_nan_harm_no_others(metric: str) -> None:
    x, centers = of_kind("plain", 70, 100, 24)
    with fastproto.backend("triton"):
        expected, _ = assign(x, centers, metric)
        x[5], x[7, 3], x[60, 2] = torch.nan, torch.nan, torch.inf
        labels, distance = assign(x, centers, metric)
    others = torch.ones(70, dtype=torch.bool, device=DEVICE)
    others[[5, 7, 60]] = False
    assert distance[[5, 7]].isnan().all()
    assert not distance[60].isfinite()
    assert ((labels >= 0) & (labels < 100)).all()
    assert torch.equal(labels[others], expected[others])
    assert distance[others].isfinite().all()


@on_gpu
def test_any_strides_and_mix_of_dtypes() -> None:
    x, centers = torch.randn(24, 66, device=DEVICE), torch.randn(60, 24, device=DEVICE)
    wide = torch.zeros(33, 50, device=DEVICE)
    wide[:, 1:49:2] = x.T[::2]
    with fastproto.backend("triton"):
        expected = assign(x.T[::2].contiguous(), centers[::3].contiguous())
        for rows in (x.T[::2], wide[:, 1:49:2]):
            assert all(map(torch.equal, assign(rows, centers[::3]), expected))
        labels, _ = assign(torch.randn(1, 24, device=DEVICE).expand(33, -1), centers)
    assert labels.unique().numel() == 1
    check(x.T.half(), centers.bfloat16(), "l2")


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
def test_the_same_bits_every_time(metric: str) -> None:
    for kind in ("plain", "near-duplicates"):
        x, centers = of_kind(kind, 20, 70)
        with fastproto.backend("triton"):
            first, again = assign(x, centers, metric), assign(x, centers, metric)
        assert all(map(torch.equal, first, again))


@on_gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["plain", "clusters", "near-duplicates"])
def test_an_approximation_is_within_its_error(kind: str, metric: str) -> None:
    """The score of the label exceeds the least by 2^-9 ||x|| ||c|| at most, and the distance is the label's."""
    x, centers = of_kind(kind)
    with fastproto.backend("triton"):
        labels, distance = assign(x, centers, metric, exact=False)
    score = scores(x, centers, metric)
    picked, best = score.gather(1, labels[:, None])[:, 0], score.min(1).values
    origin = centers.median(0).values
    rows = x if metric == "ip" else x - origin
    assert (picked - best <= 2.0**-9 * rows.norm(dim=1) * (centers - origin).norm(dim=1).max()).all()
    torch.testing.assert_close(distance, (-picked if metric == "ip" else 2 * picked).float(), rtol=1e-6, atol=0)


@on_gpu
def test_no_rows() -> None:
    with fastproto.backend("triton"):
        labels, distance = assign(torch.randn(0, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE))
    assert labels.shape == distance.shape == (0,)


@on_gpu
def test_float64_is_for_the_reference() -> None:
    x, centers = (value.double() for value in of_kind("near-duplicates"))
    with fastproto.backend("triton"):
        ours = assign(x, centers)
    assert all(map(torch.equal, ours, reference.assign(x, centers, "l2", True)))


@on_gpu
@gpu_alone
@pytest.mark.parametrize("d", [16, 64, 128, 200, 256, 384, 1024])
def test_every_tile_of_the_table(d: int) -> None:
    for metric in METRICS:
        check(*of_kind("plain", 1000, 700, d), metric)


@on_gpu
@gpu_alone
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_many_rows(ties: bool, metric: str) -> None:
    """With ties, which whole numbers make exact, more open rows than programs resolve at a time."""
    x, centers = of_kind("plain", 60_000, 500, 8)
    if ties:
        x, centers = x.round(), centers.round()
    with fastproto.backend("triton"):
        labels, distance = assign(x, centers, metric)
    expected, expected_distance = reference.assign(x, centers, metric, True)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(distance, expected_distance, rtol=1e-6, atol=0)


@on_gpu
@gpu_alone
@pytest.mark.parametrize("kind", ["plain", "near-duplicates"])
def test_waits_for_nothing_and_is_captured_into_a_cuda_graph(kind: str) -> None:
    x, centers = of_kind(kind, 1000, 700, 128)

    def step() -> list[Tensor]:
        return [*assign(x, centers), *assign(x, centers, "ip"), *assign(x, centers, exact=False)]

    step()
    with no_host_waits():
        step()
    assert_captured(step, x, centers)


@on_gpu
@gpu_alone
@pytest.mark.filterwarnings("ignore")  # what the compiler has to say of a GPU
def test_compiles_as_one_graph() -> None:
    x, centers = of_kind("plain", 1000, 700, 128)
    compiled = torch.compile(assign, fullgraph=True)
    assert all(map(torch.equal, compiled(x, centers), assign(x, centers)))


@on_gpu
@gpu_alone
def test_addresses_beyond_two_to_the_31() -> None:
    """Rows of 4.3 GB, of which the last ones differ."""
    n, d = (1 << 31) // 64 + 1000, 64
    x = torch.zeros(n, d, dtype=torch.bfloat16, device=DEVICE)
    x[-1], x[-2] = 1.0, 2.0
    centers = torch.arange(3.0, device=DEVICE)[:, None].expand(3, d)
    labels, distance = assign(x, centers)
    assert labels[-3:].tolist() == [0, 2, 1]
    assert not labels[:-2].any()
    assert math.isclose(float(distance.max()), 0.0)
