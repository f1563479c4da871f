"""The contrast losses, forward and backward, against eager PyTorch, torch.compile and lightly.

Operations that must be done: 2 products of 2·N·K·D with frozen keys, 4 with learnt ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Suite, Work
from torch import Tensor

from fastproto.losses import InfoNCELoss, NTXentLoss
from fastproto.losses.functional import proto_nce

PHI = 0.1


def eager_proto_nce(features: Tensor, prototypes: Tensor, assignments: Tensor) -> Tensor:
    logits = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T / PHI
    return F.cross_entropy(logits, assignments)


def eager_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def backward(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


@pytest.mark.parametrize(("name", "learnt"), [("ProtoNCE frozen", False), ("ProtoNCE learnt", True)])
def test_proto_nce(suite: Suite, benchmark, name: str, learnt: bool) -> None:
    n, k, d = 1024, 16384, 128
    x = torch.randn(n, d, requires_grad=True)
    y = torch.randn(k, d, requires_grad=learnt)
    t = torch.randint(k, (n,))
    compiled = torch.compile(eager_proto_nce)

    def ours() -> tuple[Tensor, ...]:
        return backward(proto_nce(x, y, t, PHI), x, y)

    methods = {
        "fastproto": ours,
        "eager": lambda: backward(eager_proto_nce(x, y, t), x, y),
        "torch.compile": lambda: backward(compiled(x, y, t), x, y),
    }
    flop = (4 if learnt else 2) * 2 * n * k * d
    suite.compare(Work(name, f"{n} x {d} x {k}", "float32", "cpu", flop=flop), methods, seconds=8)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)


def test_nt_xent(suite: Suite, benchmark) -> None:
    n, d = 1024, 128
    x0, x1 = torch.randn(2, n, d).unbind()
    x0.requires_grad_(), x1.requires_grad_()
    mine, theirs = NTXentLoss(), pytest.importorskip("lightly.loss").NTXentLoss()

    def ours() -> tuple[Tensor, ...]:
        return backward(mine(x0, x1), x0, x1)

    methods = {"fastproto": ours, "lightly": lambda: backward(theirs(x0, x1), x0, x1)}
    suite.compare(Work("NT-Xent", f"2 x {n} x {d}", "float32", "cpu", flop=4 * 2 * (2 * n) ** 2 * d), methods)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)


def test_queue(suite: Suite, benchmark) -> None:
    n, m, d = 256, 65536, 128
    query, key, queue = torch.randn(n, d, requires_grad=True), torch.randn(n, d), F.normalize(torch.randn(m, d), dim=1)
    loss = InfoNCELoss()

    def ours() -> tuple[Tensor, ...]:
        return backward(loss(query, key, queue), query)

    methods = {"fastproto": ours, "eager": lambda: backward(eager_queue(query, key, queue), query)}
    suite.compare(Work("InfoNCE with a queue", f"{n} x {d} x {m}", "float32", "cpu", flop=4 * n * m * d), methods)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
