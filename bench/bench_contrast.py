"""The contrast losses, forward and backward, against eager PyTorch, torch.compile, lightly and PML.

Operations that must be done: 2 products of 2·N·K·D with frozen keys, 4 with learnt ones, 2 of rows with themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Suite, Work, compiled
from torch import Tensor

from fastproto.losses import InfoNCELoss, NTXentLoss
from fastproto.losses.functional import proto_nce

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler have to say
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


def compare_proto_nce(suite: Suite, benchmark, name: str, n: int, k: int, **options) -> None:
    """``autocast``: features and prototypes in bfloat16, as a network under autocast gives them."""
    learnt, autocast, peers = (options.get(key) for key in ("learnt", "autocast", "peers"))
    d = 128
    x, y = (torch.randn(size, d, dtype=torch.bfloat16 if autocast else torch.float32) for size in (n, k))
    x.requires_grad_(), y.requires_grad_(bool(learnt))
    t = torch.randint(k, (n,))

    def run(loss_fn: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
                loss = loss_fn(x, y, t)
            return backward(loss, x, y)

        return step

    ours = run(lambda x, y, t: proto_nce(x, y, t, PHI))
    all_peers = {"eager": run(eager_proto_nce), "torch.compile": run(compiled(eager_proto_nce))}
    methods = {"fastproto": ours, **{peer: all_peers[peer] for peer in peers or all_peers}}
    flop = (4 if learnt else 2) * 2 * n * k * d
    dtype = "bfloat16 autocast" if autocast else "float32"
    suite.compare(Work(name, f"{n} x {d} x {k}", dtype, "cpu", flop=flop), methods, options.get("seconds", 16))
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)


def test_frozen(suite: Suite, benchmark) -> None:
    compare_proto_nce(suite, benchmark, "ProtoNCE frozen", 1024, 16384)


def test_learnt(suite: Suite, benchmark) -> None:
    compare_proto_nce(suite, benchmark, "ProtoNCE learnt", 1024, 16384, learnt=True)


@pytest.mark.parametrize("learnt", [False, True])
def test_bfloat16(suite: Suite, benchmark, learnt: bool) -> None:
    """Without bfloat16 instructions the peers take seconds a step."""
    name = "ProtoNCE learnt" if learnt else "ProtoNCE frozen"
    compare_proto_nce(suite, benchmark, name, 1024, 16384, learnt=learnt, autocast=True, peers=["torch.compile"])


def test_small(suite: Suite, benchmark) -> None:
    """Little arithmetic: what a call costs."""
    compare_proto_nce(suite, benchmark, "ProtoNCE small", 64, 1000, seconds=2)


def test_large(suite: Suite, benchmark) -> None:
    """Logits of 1 GB."""
    compare_proto_nce(suite, benchmark, "ProtoNCE large", 2048, 131072, peers=["eager"])


@pytest.mark.parametrize("n", [1024, 128])
def test_nt_xent(suite: Suite, benchmark, n: int) -> None:
    d = 128
    x0, x1 = torch.randn(2, n, d).unbind()
    x0.requires_grad_(), x1.requires_grad_()
    losses = {"fastproto": NTXentLoss(), "lightly": pytest.importorskip("lightly.loss").NTXentLoss()}
    if n == 128:  # memory grows with N³: 34 GB at 1024
        metric_learning = pytest.importorskip("pytorch_metric_learning.losses")
        losses["pytorch-metric-learning"] = metric_learning.SelfSupervisedLoss(metric_learning.NTXentLoss(0.5))

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: backward(loss(x0, x1), x0, x1)

    methods = {name: run(loss) for name, loss in losses.items()}
    work = Work(f"NT-Xent 2 x {n}", f"2 x {n} x {d}", "float32", "cpu", flop=2 * 2 * (2 * n) ** 2 * d)
    suite.compare(work, methods)
    benchmark.pedantic(methods["fastproto"], rounds=3, warmup_rounds=1)


def test_queue(suite: Suite, benchmark) -> None:
    n, m, d = 256, 65536, 128
    query, key, queue = torch.randn(n, d, requires_grad=True), torch.randn(n, d), F.normalize(torch.randn(m, d), dim=1)
    loss = InfoNCELoss()

    def ours() -> tuple[Tensor, ...]:
        return backward(loss(query, key, queue), query)

    methods = {"fastproto": ours, "eager": lambda: backward(eager_queue(query, key, queue), query)}
    suite.compare(Work("InfoNCE with a queue", f"{n} x {d} x {m}", "float32", "cpu", flop=4 * n * m * d), methods)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
