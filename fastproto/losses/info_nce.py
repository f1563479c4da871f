"""InfoNCE (MoCo): every query against its own key and a queue of others, or the other keys of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproto._check import FLOATS, expect_tensor
from fastproto.losses._common import (
    ContrastStats,
    expect_reduction,
    expect_temperature,
    expect_views,
    inverse_temperature,
    join_rows,
    shown_temperature,
    unit,
)
from fastproto.ops._dispatch import once_differentiable
from fastproto.ops.contrast import contrast_unchecked


def info_nce(
    query: Tensor,  # (N, D) float
    key: Tensor,  # (N, D) float
    queue: Tensor | None = None,  # (M, D) float
    *,
    temperature: float | Tensor = 0.2,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | Any:  # Any: a pair with return_stats; a union would have every caller narrow it
    """Contrasts every query with its own key against a queue of other keys.

        L_i = log Σ_{y ∈ {k_i, queue}} exp(<q_i, y> / τ) - <q_i, k_i> / τ,  all rows scaled to length 1

    Without a queue the other keys of the batch are the negatives. Keys and queue are constants: they get no gradient.

    Args:
        query, key: embeddings of the two views (N, D), float16, bfloat16, float32 or float64, not normalised.
        queue: earlier keys (M, D), not normalised; M may be 0.
        temperature: τ, a number, of which torch.compile compiles each value anew, or a tensor () or (1,), with a
            gradient where it asks for one: learnt, it costs twice as much.
        reduction: "mean", "sum", or "none" for the rows (N,).
        return_stats: also return ContrastStats(lse, entropy, top1, positive_logit), each (N,). ``top1`` counts the
            batch's keys first, then the queue: query i has found its key where it is i.

    Returns:
        The loss, at least float32; 0 for an empty batch. With ``return_stats`` the pair (loss, stats).

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: shapes or devices do not fit, τ < 1e-8 (a tensor's is read on the CPU, on CUDA with
            ``fastproto.set_debug(True)``), or an unknown reduction.

    Distributed: nothing has to be gathered; with one queue and N on every rank DDP's mean equals one process.

    Memory: grows with N · D. With (N + M) · D where own keys and queue are joined, on a GPU, if their dtypes differ or
    τ is a tensor, and where the rows of the queue are not contiguous. The (N, M) logits exist in the reference backend
    only.

    Example:
        >>> query, queue = torch.eye(2), torch.tensor([[0.0, -1.0]])
        >>> info_nce(query, query, queue, temperature=1.0, reduction="none")
        tensor([0.3133, 0.1269])

    Source: MoCo, arXiv 1911.05722, Eq. 1.
    """
    expect_views(query, key, "info_nce", ("query", "key"))
    expect_temperature(temperature, "info_nce", device=query.device)
    expect_reduction(reduction, "info_nce")
    n = query.shape[0]
    divisor = max(n, 1) if reduction == "mean" else None
    if queue is None:
        rows = torch.arange(n, device=query.device)
        scale = inverse_temperature(temperature, n, query, key)
        options: dict[str, Any] = {"normalize": True, "divisor": divisor, "stats": return_stats}
        loss, *stats = contrast_unchecked(query, key.detach(), rows, scale, **options)
    else:
        expect_tensor(queue, "info_nce", "queue", ("M", query.shape[1]), FLOATS, query.device)
        loss, *stats = against_queue(query, key.detach(), queue.detach(), temperature, divisor, return_stats)
    loss = loss.sum() if reduction == "sum" else loss
    return (loss, ContrastStats(*stats)) if return_stats else loss


def against_queue(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    divisor: int | None = None,
    stats: bool = False,
) -> tuple[Tensor, ...]:
    """Row losses (N,) of queries that see their own key and the queue (M, D), but not each other's keys.

    With a divisor, their sum by it; then the keys are constants. With ``stats`` those of the op follow.
    """
    n, device = query.shape[0], query.device
    scale = inverse_temperature(temperature, n + queue.shape[0], query, key, queue)
    apart = key.dtype == queue.dtype and not isinstance(scale, Tensor)
    keys, more = (key.detach(), queue) if apart else (join_rows(key.detach(), queue), None)
    in_queue = (torch.arange(n + queue.shape[0], device=device) >= n).long()
    rows = torch.arange(n, device=device)
    loss, *rest = contrast_unchecked(
        query, keys, rows, scale, groups=torch.zeros_like(rows), key_groups=in_queue, normalize=True,
        divisor=divisor, more_keys=more, stats=stats,
    )  # fmt: skip
    if key.requires_grad:
        constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
        loss = _OwnKeys.apply(loss, (unit(query.detach()) * unit(key)).sum(1) / constant)
    return loss, *rest


class _OwnKeys(torch.autograd.Function):
    """The row losses L_i, to which of all keys only the N own ones give a gradient: of a logit, p_ii - 1."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logit: Tensor) -> Tensor:
        ctx.save_for_backward(loss, logit)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
        loss, logit = kept
        return grad, (grad * torch.expm1(-loss)).to(logit.dtype)


class InfoNCELoss(nn.Module):
    """Contrasts every query with its own key against a queue of other keys, or the other keys of the batch.

        L_i = log Σ_{y ∈ {k_i, queue}} exp(<q_i, y> / τ) - <q_i, k_i> / τ,  mean over i

    Keys and queue get no gradient.

    Args:
        temperature: τ, a number, or a parameter () or (1,) that is learnt.

    Shape:
        query, key: (N, D), queue: (M, D), float16, bfloat16, float32 or float64, none of them normalised. Output:
        scalar of at least float32.

    Raises:
        ValueError: τ < 1e-8 (a parameter's is read on the CPU, on CUDA with ``fastproto.set_debug(True)``), or shapes
            or devices that do not fit.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> loss_fn = InfoNCELoss(temperature=0.1)
        >>> loss_fn(torch.eye(4), torch.eye(4), queue=torch.ones(1, 4))
        tensor(0.0067)

    Distributed: nothing has to be gathered. With the same queue and N on every rank DDP's mean of the gradients equals
    one process on the whole batch; without a queue the negatives are the keys of a rank's own batch.

    Memory: as that of :func:`fastproto.losses.functional.info_nce`.

    Source: MoCo, arXiv 1911.05722, Eq. 1; MoCo v2, arXiv 2003.04297 (τ 0.2).
    """

    def __init__(self, temperature: float | nn.Parameter = 0.2) -> None:
        super().__init__()
        expect_temperature(temperature, "InfoNCELoss")
        self.temperature = temperature

    def forward(self, query: Tensor, key: Tensor, queue: Tensor | None = None) -> Tensor:
        return info_nce(query, key, queue, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={shown_temperature(self.temperature)}"
