"""update's Triton kernel, bit by bit the reference.

With a GPU the tests marked gpu run on it; without one a second pytest runs this file under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from host_waits import no_host_waits
from interpreter import DEVICE, INTERPRETED, assert_captured, gpu_alone, on_gpu, run_interpreted
from torch import Tensor

import fastproto
from fastproto.ops.update import largest, two_rounders, update, update_parts


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests of this file run here themselves")
def test_all_of_this_file_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: small problems take several programs along both axes."""
    if not INTERPRETED:
        return
    from fastproto.kernels import update

    monkeypatch.setattr(update, "RUN", 16)
    monkeypatch.setattr(update, "COLUMNS", 64)


def problem(n: int, k: int, d: int, weighted: bool = True) -> tuple[Tensor, Tensor, int, Tensor | None]:
    x, labels = torch.randn(n, d, device=DEVICE), torch.randint(-1, k, (n,), device=DEVICE)
    return x, labels, k, torch.rand(n, device=DEVICE) if weighted else None


def triton(*args: object) -> tuple[Tensor, Tensor]:
    """Parts where rounders are given."""
    with fastproto.backend("triton"):
        return (update_parts if len(args) == 5 else update)(*args)


def assert_reference(*args: object) -> None:
    with fastproto.backend("reference"):
        expected = update(*args)
    for ours, theirs in zip(triton(*args), expected, strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, theirs)


@on_gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (70, 5, 130), (70, 1, 33), (0, 5, 3)])
def test_equals_the_reference(n: int, k: int, d: int, dtype: torch.dtype, weighted: bool) -> None:
    x, labels, _, weights = problem(n, k, d, weighted)
    assert_reference(x.to(dtype), labels, k, weights)


@on_gpu
def test_products_are_rounded_before_they_are_added() -> None:
    """In float64 w x is not exact; a multiply-add with the rounder would give other parts for half of these."""
    x, labels, k, weights = problem(200, 7, 24)
    x, weights = x.double() * torch.rand(200, 24, device=DEVICE), weights.double() / 3
    # The coarser the grid, the more often w x lies so near the middle of two of its points that one rounding decides.
    x[0] = x[0].sign() * 2.0**40
    arguments = x, labels, k, weights, two_rounders(torch.stack(largest(x, weights)), len(x))
    with fastproto.backend("reference"):
        expected = update_parts(*arguments)
    assert all(map(torch.equal, triton(*arguments), expected))


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a NaN under the interpreter
def test_ignored_rows_are_not_read() -> None:
    x, labels, k, weights = problem(70, 5, 40)
    labels[::7], x[::7] = -1, torch.nan
    weights[::7] = torch.nan
    kept = labels >= 0
    rounders = two_rounders(torch.stack(largest(x[kept], weights[kept])), 70)
    expected = triton(x[kept], labels[kept], k, weights[kept], rounders)
    assert all(map(torch.equal, triton(x, labels, k, weights, rounders), expected))
    sums, counts = triton(x, torch.full_like(labels, -1), k, weights, rounders)
    assert sums.eq(0).all()
    assert counts.eq(0).all()


@on_gpu
def test_labels_beyond_the_clusters_add_to_nothing() -> None:
    """Where nothing has refused them, as outside of debug mode on a GPU."""
    from fastproto.kernels.update import update

    x, labels = torch.ones(6, 3, device=DEVICE), torch.tensor([0, 2, 1, 1 << 32, 2, -1], device=DEVICE)
    rounders = torch.full((2, 2), 64.0, dtype=torch.float64, device=DEVICE)
    sums, counts = update(x, labels, 2, None, rounders)
    assert torch.equal(sums[0], torch.ones_like(sums[0]))
    assert torch.equal(counts[0], torch.ones_like(counts[0]))
    assert not sums[1].any()
    assert not counts[1].any()


@on_gpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_stays_in_its_cluster() -> None:
    x, labels, k, weights = problem(70, 5, 40)
    rounders = two_rounders(torch.stack(largest(x, weights)), 70)
    labels[3], x[3, 7] = 2, torch.nan
    sums, counts = triton(x, labels, k, weights, rounders)
    assert sums.sum(0).isnan().nonzero().tolist() == [[2, 7]]
    assert counts.isfinite().all()


@on_gpu
def test_any_order_of_the_rows_gives_the_same_bits() -> None:
    x, labels, k, weights = problem(150, 7, 40)
    first = triton(x, labels, k, weights)
    assert all(map(torch.equal, triton(x, labels, k, weights), first))
    order = torch.randperm(150, device=DEVICE)
    assert all(map(torch.equal, triton(x[order], labels[order], k, weights[order]), first))


@on_gpu
def test_sums_of_parts_add_up_to_the_sum_of_the_whole_bit_by_bit() -> None:
    x, labels, k, weights = problem(150, 7, 40)
    rounders = two_rounders(torch.stack(largest(x, weights)), 150)
    whole = triton(x, labels, k, weights, rounders)
    parts = [triton(x[i], labels[i], k, weights[i], rounders) for i in torch.arange(150, device=DEVICE).split(37)]
    for sums, total in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.stack(sums).sum(0), total)


@on_gpu
def test_any_strides_and_integers() -> None:
    x, labels, k, weights = problem(66, 5, 48)
    assert_reference(x.T.contiguous().T[::2], labels[::2].int(), k, weights[::2])
    assert_reference(x[:, 1::3], labels, k, weights.half())
    assert_reference(x[:1].expand(66, -1), labels, k, weights[:1].expand(66))


@on_gpu
@pytest.mark.parametrize("largest_value", [0.0, 1e-30, 3.4e38])
def test_any_magnitude(largest_value: float) -> None:
    x = torch.linspace(-1, 1, 99, device=DEVICE)[:, None] * largest_value
    assert_reference(x, torch.zeros(99, dtype=torch.int64, device=DEVICE), 1)


@on_gpu
@gpu_alone
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows(weighted: bool) -> None:
    for d in (1, 128, 1000):
        assert_reference(*problem(100_000, 300, d, weighted))


@on_gpu
@gpu_alone
def test_waits_for_nothing_and_is_captured_into_a_cuda_graph() -> None:
    x, labels, k, weights = problem(10_000, 300, 128)

    def step() -> list[Tensor]:
        return [*update(x, labels, k, weights), *update(x, labels, k)]

    step()
    with no_host_waits():
        step()
    assert_captured(step, x, labels, weights)


@on_gpu
@gpu_alone
@pytest.mark.filterwarnings("ignore")  # what the compiler has to say of a GPU
def test_compiles_as_one_graph() -> None:
    arguments = problem(10_000, 300, 128)
    compiled = torch.compile(update, fullgraph=True)
    assert all(map(torch.equal, compiled(*arguments), update(*arguments)))


@on_gpu
@gpu_alone
def test_addresses_beyond_two_to_the_31() -> None:
    """Rows of 4.3 GB, of which the last one has a cluster of its own."""
    n, d = (1 << 31) // 64 + 1000, 64
    x = torch.ones(n, d, dtype=torch.float16, device=DEVICE)
    x[-1] = 3.0
    labels = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    labels[-1] = 1
    sums, counts = update(x, labels, 2)
    assert counts.tolist() == [n - 1, 1]
    assert sums[:, [0, 63]].tolist() == [[n - 1, n - 1], [3, 3]]
