"""The contrast losses on a GPU in bfloat16, forward and backward, against eager PyTorch and fused kernels.

Operations that must be done: 2 products of 2·N·K·D with frozen keys, 4 with learnt ones, 3 of rows with themselves.
Frozen, the loss is attention with keys = values, so scaled_dot_product_attention's forward is the strongest stand-in
for forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench_contrast import backward, eager_proto_nce, eager_queue
from harness import Suite, Work, compiled, peer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastproto.losses import InfoNCELoss, NTXentLoss
from fastproto.losses.functional import proto_nce

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # what peers and the compiler have to say
PHI = 0.1


def unit(*shape: int, learnt: bool = False) -> Tensor:
    x = F.normalize(torch.randn(*shape, device="cuda"), dim=-1).bfloat16()
    return x.requires_grad_(learnt)


def fused_peers(x: Tensor, y: Tensor, t: Tensor) -> dict[str, Callable[[], object]]:
    """Fused linear cross-entropies of language models; the temperature goes into the rows."""
    methods: dict[str, Callable[[], object]] = {}
    if cut := peer("cut_cross_entropy", "linear_cross_entropy"):
        methods["cut-cross-entropy"] = lambda: backward(cut(x / PHI, y, t), x, y)
    if liger := peer("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"):
        methods["liger-kernel"] = lambda: backward(liger()(y, x / PHI, t), x, y)
    return methods


@pytest.mark.parametrize("learnt", [False, True], ids=["frozen", "learnt"])
@pytest.mark.parametrize(("n", "d", "k"), [(4096, 128, 65536), (4096, 256, 300000)])
def test_proto_nce(suite: Suite, benchmark, n: int, d: int, k: int, learnt: bool) -> None:
    x, y = unit(n, d, learnt=True), unit(k, d, learnt=learnt)
    t = torch.randint(k, (n,), device="cuda")
    theirs = compiled(eager_proto_nce)

    def ours() -> tuple[Tensor, ...]:
        return backward(proto_nce(x, y, t, PHI), x, y)

    methods: dict[str, Callable[[], object]] = {
        "fastproto": ours,
        "fastproto, unit rows given": lambda: backward(proto_nce(x, y, t, PHI, normalize=False), x, y),
        "eager": lambda: backward(eager_proto_nce(x, y, t), x, y),
        "torch.compile": lambda: backward(theirs(x, y, t), x, y),
        **fused_peers(x, y, t),
    }
    if not learnt:
        q, scaled = x.detach()[None, None], (y.detach() / PHI)[None, None]

        def attention() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, scaled, scaled, scale=1.0)

        methods["attention, forward alone"] = attention
    name = f"ProtoNCE {'learnt' if learnt else 'frozen'} {k}"
    flop = (4 if learnt else 2) * 2 * n * k * d
    suite.compare(Work(name, f"{n} x {d} x {k}", "bfloat16", "cuda", flop=flop), methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def test_three_sets_of_prototypes(suite: Suite, benchmark) -> None:
    """PCL's batch: bound by launches rather than by work."""
    n, d, counts = 256, 128, (25_000, 50_000, 100_000)
    x, sets = unit(n, d, learnt=True), [unit(k, d) for k in counts]
    ids = [torch.randint(k, (n,), device="cuda") for k in counts]
    phis = [torch.full((k,), PHI, device="cuda") for k in counts]

    def eager() -> tuple[Tensor, ...]:
        return backward(sum(eager_proto_nce(x, y, t) for y, t in zip(sets, ids, strict=True)) / 3, x)

    def ours() -> tuple[Tensor, ...]:
        return backward(proto_nce(x, sets, ids, phis), x)

    flop = 4 * n * sum(counts) * d
    shape = f"{n} x {d} x {' + '.join(map(str, counts))}"
    suite.compare(
        Work("ProtoNCE three sets", shape, "bfloat16", "cuda", flop=flop), {"fastproto": ours, "eager": eager}
    )
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def test_nt_xent(suite: Suite, benchmark) -> None:
    n, d = 8192, 128
    x0, x1 = unit(n, d, learnt=True), unit(n, d, learnt=True)
    mine, lightly = NTXentLoss(), peer("lightly.loss", "NTXentLoss")
    inf_cl = peer("inf_cl", "cal_flash_loss")
    others = torch.arange(2 * n, device="cuda").roll(n)

    def ours() -> tuple[Tensor, ...]:
        return backward(mine(x0, x1), x0, x1)

    def eager() -> tuple[Tensor, ...]:
        x = F.normalize(torch.cat([x0, x1]), dim=1)
        logits = (x @ x.T / 0.5).fill_diagonal_(float("-inf"))
        return backward(F.cross_entropy(logits, others), x0, x1)

    methods: dict[str, Callable[[], object]] = {"fastproto": ours, "eager": eager}
    if lightly:
        theirs = lightly()
        methods["lightly"] = lambda: backward(theirs(x0, x1), x0, x1)
    if inf_cl:

        def infs() -> tuple[Tensor, ...]:
            """Of two kinds of rows, so that it does not leave a row itself out: as much work."""
            x = F.normalize(torch.cat([x0, x1]), dim=1)
            return backward(inf_cl(x, x, others, 1 / 0.5, d).mean(), x0, x1)

        methods["inf-cl"] = infs
    work = Work("NT-Xent", f"2 x {n} x {d}", "bfloat16", "cuda", flop=3 * 2 * (2 * n) ** 2 * d)
    suite.compare(work, methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def test_queue(suite: Suite, benchmark) -> None:
    n, m, d = 256, 65536, 128
    query, key, queue = unit(n, d, learnt=True), unit(n, d), unit(m, d)
    loss = InfoNCELoss()

    def ours() -> tuple[Tensor, ...]:
        return backward(loss(query, key, queue), query)

    methods = {"fastproto": ours, "eager": lambda: backward(eager_queue(query, key, queue), query)}
    suite.compare(Work("InfoNCE with a queue", f"{n} x {d} x {m}", "bfloat16", "cuda", flop=4 * n * m * d), methods)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
