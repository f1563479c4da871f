"""The siamese metric loss over all pairs, forward and backward, against eager PyTorch and torch.compile.

Operations that must be done, per unordered pair and channel: 3 forward, 7 backward. Hardly any is a fused multiply-add,
so half of a matrix product's rate is out of reach from the start.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Suite, Work, compiled
from torch import Tensor

from fastproto.losses.functional import siamese_metric_all_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # what the compiler has to say


def eager(x0: Tensor, x1: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All pairs at once: |x_i - x_j| (N, N, C) is in memory. Every image has a prototype."""
    features, rows = torch.cat([x0, x1]), torch.arange(2 * len(x0))
    images, prototypes = rows % len(x0), labels.repeat(2)
    logits = (features[:, None] - features).abs() @ weight + bias
    image = images[:, None] == images
    prototype = prototypes[:, None] == prototypes
    loss = F.binary_cross_entropy_with_logits(logits, (image | prototype).to(logits.dtype), reduction="none")
    kinds = (image & (rows[:, None] != rows), ~image & prototype, ~image & ~prototype)
    means = [torch.where(kind, loss, 0).sum() / kind.sum().clamp(min=1) for kind in kinds]
    return means[0] + (means[1] + means[2]) / 2


@pytest.mark.parametrize(("n", "c"), [(128, 512), (512, 2048)])
def test_all_pairs(suite: Suite, benchmark, n: int, c: int) -> None:
    x0, x1 = (torch.randn(n, c, requires_grad=True) for _ in range(2))
    weight = torch.randn(c).div(c).requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    labels, leaves = torch.randint(8, (n,)), (x0, x1, weight, bias)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(siamese_metric_all_pairs(x0, x1, labels, weight, bias), leaves)

    theirs = compiled(eager)
    methods = {
        "fastproto": ours,
        "torch.compile": lambda: torch.autograd.grad(theirs(x0, x1, labels, weight, bias), leaves),
    }
    if n == 128:  # the larger one takes 8 GB and more
        methods["eager"] = lambda: torch.autograd.grad(eager(x0, x1, labels, weight, bias), leaves)
    flop = 10 * (2 * n) ** 2 / 2 * c
    work = Work(f"SPCL all pairs 2 x {n}", f"2 x {n} x {c}", "float32", "cpu", bytes=4 * 4 * n * c, flop=flop)
    suite.compare(work, methods, seconds=6)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
