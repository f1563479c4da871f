"""update against a loop over rows in float64 numpy."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import fastproto
from fastproto.ops.update import largest, two_rounders, update, update_parts
from fastproto.reference import update as reference


def oracle(x: Tensor, labels: Tensor, k: int, weights: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = np.zeros((k, x.shape[1])), np.zeros(k)
    for n, label in enumerate(labels.tolist()):
        if label >= 0:
            weight = 1.0 if weights is None else float(weights[n])
            sums[label] += weight * x[n].double().numpy()
            counts[label] += weight
    return sums, counts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (33, 507, 24), (300, 10, 130), (100, 1, 96), (0, 5, 3)])
def test_matches_the_formula(n: int, k: int, d: int, dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(n, d).to(dtype)
    labels = torch.randint(-1, k, (n,))
    weights = torch.rand(n) if weighted else None
    sums, counts = update(x, labels, k, weights)
    expected_sums, expected_counts = oracle(x, labels, k, weights)
    assert sums.dtype == counts.dtype == torch.float64
    # What is off is the oracle's own float64.
    np.testing.assert_allclose(sums.numpy(), expected_sums, rtol=0, atol=n * 5 * 2.0**-53 * n)
    np.testing.assert_allclose(counts.numpy(), expected_counts, rtol=0, atol=n * 2.0**-53 * n)


def test_ignored_rows_do_not_count_even_if_they_are_nan() -> None:
    x = torch.randn(33, 24)
    x[3] = torch.nan
    labels = torch.randint(5, (33,))
    labels[3] = -1
    kept = torch.arange(33) != 3
    for one, other in zip(update(x, labels, 5), update(x[kept], labels[kept], 5), strict=True):
        assert torch.equal(one, other)


def test_a_long_sum_of_half_precision_does_not_saturate() -> None:
    sums, counts = update(torch.ones(100_000, 1, dtype=torch.float16), torch.zeros(100_000, dtype=torch.int64), 1)
    assert sums.item() == counts.item() == 100_000


def test_same_bits_for_any_run_threads_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, weights = torch.randn(50_000, 17), torch.randint(7, (50_000,)), torch.rand(50_000)
    before = torch.get_num_threads()
    results = []
    for threads, chunk in ((1, 1 << 22), (1, 1 << 22), (3, 1 << 22), (2, 17 * 999)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
        results.append(update(x, labels, 7, weights))
    torch.set_num_threads(before)
    for sums, counts in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(counts, results[0][1])


def test_any_strides_and_int32_labels() -> None:
    x, labels = torch.randn(24, 66), torch.randint(5, (66,))
    expected = update(x.T[::2].contiguous(), labels[::2].contiguous(), 5)
    for one, other in zip(expected, update(x.T[::2], labels[::2].int(), 5), strict=True):
        assert torch.equal(one, other)
    sums, _ = update(torch.ones(1, 24).expand(33, -1), torch.zeros(33, dtype=torch.int64), 1)
    assert sums.eq(33).all()


def test_no_gradient() -> None:
    sums, _ = update(torch.randn(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64), 1)
    assert not sums.requires_grad


def test_bad_input() -> None:
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, -1, 0])
    with pytest.raises(TypeError, match=r"update: x expected a float32 .* got int64 \(5, 3\) on cpu"):
        update(x.long(), labels, 3)
    with pytest.raises(TypeError, match=r"update: labels expected an int64 or int32 tensor \(5,\), got float32 \(5,\)"):
        update(x, labels.float(), 3)
    with pytest.raises(ValueError, match=r"update: labels expected \(5,\) on cpu, got int64 \(4,\) on cpu"):
        update(x, labels[:4], 3)
    with pytest.raises(ValueError, match=r"update: labels expected -1 or 0 to 1, got values from 0 to 2"):
        update(x, labels, 2)
    with pytest.raises(ValueError, match=r"update: labels expected -1 or 0 to 4, got values from -3 to 0"):
        update(x, labels - 2, 5)
    with pytest.raises(ValueError, match=r"update: weights expected \(5,\) on cpu, got float32 \(5, 1\) on cpu"):
        update(x, labels, 3, torch.ones(5, 1))
    with pytest.raises(ValueError, match="update: num_clusters expected at least 1, got int 0"):
        update(x, labels, 0)
    with pytest.raises(ValueError, match="update: x expected at least one dimension"):
        update(x[:, :0], labels, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiler_knows_what_comes(dtype: torch.dtype) -> None:
    x, labels = torch.randn(40, 24, dtype=dtype), torch.randint(-1, 5, (40,))
    rounders = two_rounders(torch.stack(largest(x, None)), len(x))
    for backend in ("reference", None):
        with fastproto.backend(backend) if backend else nullcontext():
            torch.library.opcheck(torch.ops.fastproto.update.default, (x, labels, 5, None, rounders))


def test_sums_of_parts_add_up_to_the_sum_of_the_whole_bit_by_bit() -> None:
    x, labels, weights = torch.randn(10_000, 9) * 1e3, torch.randint(7, (10_000,)), torch.rand(10_000)
    rounders = two_rounders(torch.stack(largest(x, weights)), len(x))
    whole = update_parts(x, labels, 7, weights, rounders)
    assert all(map(torch.equal, (parts.sum(0) for parts in whole), update(x, labels, 7, weights)))
    shuffled = torch.randperm(10_000)
    for parts in (shuffled.split(999), shuffled.split(3333), shuffled.sort().values.split(1)):
        sums, counts = (torch.zeros_like(total) for total in whole)
        for part in parts:
            part_sums, part_counts = update_parts(x[part], labels[part], 7, weights[part], rounders)
            sums += part_sums
            counts += part_counts
        assert torch.equal(sums, whole[0])
        assert torch.equal(counts, whole[1])


@pytest.mark.parametrize("huge", [1e9, 1e15])
def test_a_huge_row_or_weight_leaves_other_clusters_their_digits(huge: float) -> None:
    x, labels, weights = torch.randn(10_000, 5), torch.arange(10_000) % 7, torch.rand(10_000)
    x[0], labels[0] = huge, 7
    sums, _ = update(x, labels, 8)
    np.testing.assert_allclose(sums[:7].numpy(), oracle(x, labels, 8, None)[0][:7], rtol=0, atol=huge * 1e-21)
    x[0], weights[0] = 1, huge
    sums, counts = update(x, labels, 8, weights)
    expected_sums, expected_counts = oracle(x, labels, 8, weights)
    np.testing.assert_allclose(sums[:7].numpy(), expected_sums[:7], rtol=0, atol=huge * 1e-20)
    np.testing.assert_allclose(counts[:7].numpy(), expected_counts[:7], rtol=0, atol=huge * 1e-20)


@pytest.mark.parametrize("largest_value", [0.0, 1e-30, 1.0, 3.4e38])
def test_any_magnitude(largest_value: float) -> None:
    x = torch.linspace(-1, 1, 999)[:, None] * largest_value
    sums, _ = update(x, torch.zeros(999, dtype=torch.int64), 1)
    assert sums.isfinite().all()
    sums, _ = update(x.abs(), torch.zeros(999, dtype=torch.int64), 1)
    np.testing.assert_allclose(sums.item(), x.double().abs().sum().item(), rtol=1e-12)


@pytest.mark.gpu
def test_on_a_gpu_with_the_same_bits_each_run() -> None:
    x, labels, weights = torch.randn(50_000, 24), torch.randint(-1, 7, (50_000,)), torch.rand(50_000)
    expected = update(x, labels, 7, weights)
    first = update(x.cuda(), labels.cuda(), 7, weights.cuda())
    again = update(x.cuda(), labels.cuda(), 7, weights.cuda())
    for one, other, on_cpu in zip(first, again, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.cpu(), on_cpu)
