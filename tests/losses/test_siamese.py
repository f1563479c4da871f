"""The siamese metric loss: its composition from the terms that tests/ops/test_siamese.py checks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastproto.losses import SiameseMetricLoss
from fastproto.losses.functional import siamese_metric, siamese_metric_all_pairs


def metric(a: Tensor, b: Tensor, same: float, weight: Tensor, bias: Tensor) -> float:
    logit = float((weight * (a - b).abs()).sum() + bias)
    return same * math.log1p(math.exp(-logit)) + (1 - same) * math.log1p(math.exp(logit))


def problem(n: int, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    h0, h1 = torch.randn(2, n, c, dtype=torch.float64).unbind()
    weight, bias = torch.randn(c, dtype=torch.float64) / c, torch.tensor(0.3, dtype=torch.float64)
    return h0, h1, torch.randint(-1, 3, (n,)), weight, bias


def module_with(weight: Tensor, bias: Tensor, pairs: str) -> SiameseMetricLoss:
    loss_fn = SiameseMetricLoss(len(weight), pairs).double()
    loss_fn.metric.weight.data[0], loss_fn.metric.bias.data[0] = weight, bias
    return loss_fn


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


@pytest.mark.parametrize(("n", "c"), [(1, 24), (9, 1), (12, 130)])
def test_all_pairs_is_its_formula(n: int, c: int) -> None:
    h0, h1, labels, weight, bias = problem(n, c)
    own = [metric(h0[i], h1[i], 1, weight, bias) for i in range(n)]
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(n):
        for j in range(i):
            if labels[i] >= 0 and labels[j] >= 0:
                same = bool(labels[i] == labels[j])
                kinds[same] += [metric(a[i], b[j], same, weight, bias) for a in (h0, h1) for b in (h0, h1)]
    expected = torch.tensor(mean(own) + mean(kinds[True]) / 2 + mean(kinds[False]) / 2, dtype=torch.float64)
    torch.testing.assert_close(siamese_metric_all_pairs(h0, h1, labels, weight, bias), expected)
    torch.testing.assert_close(module_with(weight, bias, "all")(h0, h1, labels), expected)


@pytest.mark.parametrize(("n", "c"), [(2, 24), (12, 130)])
def test_sampled_is_its_formula(n: int, c: int) -> None:
    h0, h1, labels, weight, bias = problem(n, c)
    own = [[metric(h0[i], h1[i], 1, weight, bias) for i in range(start, n, 2)] for start in (0, 1)]
    cross = []
    for i in range(0, n, 2):
        if labels[i] >= 0 and labels[i + 1] >= 0:
            same = float(labels[i] == labels[i + 1])
            views = [(a[i], b[i + 1]) for a in (h0, h1) for b in (h0, h1)]
            cross.append(sum(metric(a, b, same, weight, bias) for a, b in views))
    expected = torch.tensor(mean(own[0]) + mean(own[1]) + mean(cross), dtype=torch.float64)
    torch.testing.assert_close(module_with(weight, bias, "sampled")(h0, h1, labels), expected)


def test_reductions() -> None:
    a, b, _, weight, bias = problem(5, 3)
    same = torch.tensor([1, 0, -1, 1, 0])
    rows = torch.tensor(
        [0.0 if t < 0 else metric(x, y, float(t), weight, bias) for x, y, t in zip(a, b, same, strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(siamese_metric(a, b, same, weight, bias, reduction="none"), rows)
    torch.testing.assert_close(siamese_metric(a, b, same, weight, bias, reduction="sum"), rows.sum())
    torch.testing.assert_close(siamese_metric(a, b, same, weight, bias), rows.sum() / 4)
    torch.testing.assert_close(module_with(weight, bias, "all").pairwise(a, b, same), rows.sum() / 4)
    kept = same >= 0
    torch.testing.assert_close(
        siamese_metric(a[kept], b[kept], same[kept] == 1, weight, bias), rows.sum() / 4, msg="bool labels"
    )
    relabelled = siamese_metric(a, b, same.where(kept, 9), weight, bias, ignore_index=9)
    torch.testing.assert_close(relabelled, rows.sum() / 4)


@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_gradient(pairs: str) -> None:
    h0, h1, _, weight, bias = problem(4, 3)
    loss_fn = module_with(weight, bias, pairs)
    labels = torch.tensor([0, 0, 1, -1])
    assert torch.autograd.gradcheck(lambda a, b: loss_fn(a, b, labels), (h0.requires_grad_(), h1.requires_grad_()))
    loss_fn(h0, h1, labels).backward()
    assert (loss_fn.metric.weight.grad != 0).all()
    assert (loss_fn.metric.bias.grad != 0).all()


@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_empty_batch_is_zero_with_zero_gradient(pairs: str) -> None:
    loss_fn, features = SiameseMetricLoss(3, pairs), torch.zeros(0, 3, requires_grad=True)
    loss = loss_fn(features, features, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(loss_fn.metric.weight.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_half_autocast_and_compile(pairs: str) -> None:
    loss_fn, labels = SiameseMetricLoss(24, pairs), torch.tensor([0, 0, 1, -1])
    h0, h1 = torch.randn(2, 4, 24).bfloat16().unbind()
    expected = loss_fn(h0.float(), h1.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss_fn(h0, h1, labels), expected)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(h0.float(), h1.float(), labels), expected)


def test_bad_input_is_refused_by_name() -> None:
    features, labels = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    weight, bias = torch.ones(4), torch.tensor(0.0)
    with pytest.raises(ValueError, match="""pairs expected "all" or "sampled", got 'some'"""):
        SiameseMetricLoss(4, pairs="some")
    with pytest.raises(ValueError, match=r"SiameseMetricLoss: features0 expected an even number of rows"):
        SiameseMetricLoss(4, pairs="sampled")(features, features, labels)
    with pytest.raises(ValueError, match=r"SiameseMetricLoss: a expected \(N, 5\) on cpu, got float32 \(3, 4\)"):
        SiameseMetricLoss(5).pairwise(features, features, labels)
    with pytest.raises(ValueError, match=r"SiameseMetricLoss: features0 expected \(N, 5\) on cpu, got"):
        SiameseMetricLoss(5)(features, features, labels)
    with pytest.raises(ValueError, match="SiameseMetricLoss: assignments expected -1 or at least 0"):
        SiameseMetricLoss(4, pairs="sampled")(features[:2], features[:2], labels[:2] - 2)
    with pytest.raises(ValueError, match=r"siamese_metric_all_pairs: features1 expected \(3, 4\) on cpu"):
        siamese_metric_all_pairs(features, features[:2], labels, weight, bias)
    with pytest.raises(ValueError, match=r"siamese_metric_all_pairs: assignments expected \(3,\) on cpu"):
        siamese_metric_all_pairs(features, features, labels[:2], weight, bias)
    with pytest.raises(ValueError, match="siamese_metric_all_pairs: assignments expected -1 or at least 0"):
        siamese_metric_all_pairs(features, features, labels - 2, weight, bias)
    with pytest.raises(ValueError, match="siamese_metric: reduction expected"):
        siamese_metric(features, features, labels, weight, bias, reduction="all")
    with pytest.raises(ValueError, match=r"^siamese_metric: same expected -1 or 0 to 1, got"):
        siamese_metric(features, features, labels + 2, weight, bias)


def test_views_of_two_dtypes() -> None:
    features0, features1, assignments = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 3
    loss_fn = SiameseMetricLoss(4)
    mixed = loss_fn(features0.double(), features1, assignments)
    expected = loss_fn(features0.double(), features1.double(), assignments)
    torch.testing.assert_close(mixed, expected)
