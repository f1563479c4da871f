"""uniformity: the logarithm of the mean Gaussian potential of rows and its gradient, from one pass of the contrast.

    -t ||x_i - x_j||² = s_ij - t |x_i|²,  s_ij = 2t <x_i, x_j> - t |x_j|²
    L = log Σ_i exp(e_i) - log(pairs),  e_i = lse_{j≠i} s_ij - t |x_i|²
    dL/dx_i = 4t w_i (Σ_j p_ij x_j - x_i),  w = softmax(e),  p_ij = exp(s_ij - lse_i)

A pair's share w_i p_ij is that of both of its rows, so no pass over the rows as keys follows: Σ_j p_ij x_j is in the
contrast's dx. Along x_i the gradient of a row of length 1 is not wanted, so it may lack the last term, and does where
the rest is shorter. No op of its own, but the contrast's forward with a gradient of its own. Never in memory: the
(N, N) potentials, but in the reference backend, which float64 takes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproto.ops._dispatch import once_differentiable
from fastproto.ops.contrast import contrast_fwd


class _Uniformity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_nd: Tensor, mask_n: Tensor, t: float) -> Tensor:
        need_dx, index_n = ctx.needs_input_grad[0], torch.arange(len(rows_nd), device=rows_nd.device)
        count = mask_n.sum()
        pairs = count * (count - 1)
        used_n = mask_n & (pairs > 0)
        # Distances do not change with the origin. Seen from their mean, points close together have small coordinates,
        # and their scores are not differences of large numbers.
        mean_d = rows_nd.sum(0) / count.clamp(min=1)
        x_nd = torch.where(mask_n[:, None], rows_nd - mean_d, 0)
        square_n = torch.linalg.vector_norm(x_nd, dim=1, dtype=torch.float64).square()
        bias_n = torch.where(mask_n, -t * square_n, -math.inf).to(x_nd.dtype)
        # The contrast wants a target, to which dx is relative: the row in the middle, of itself the next.
        off_n = torch.where(mask_n, square_n, math.inf)
        middle = off_n.argmin()
        target_n = torch.where(index_n == middle, torch.where(index_n == middle, math.inf, off_n).argmin(), middle)
        _, saved, *dx = contrast_fwd(
            x_nd, x_nd, torch.where(used_n, target_n, -1), None, 2.0 * t, bias_n, index_n, index_n, False, None, False,
            None, need_dx, False,
        )  # fmt: skip
        # In float64, as an error of e_i is one of all pairs of row i. saved[2] takes back the rounding of lse.
        e_n = torch.where(used_n, saved[0].double() - saved[2].double().log() - t * square_n, -math.inf)
        total = e_n.logsumexp(0)
        if need_dx:
            # dx_i = 2t (Σ_j p_ij x_j - x_target). Seen from x_i and, as it is the row less the mean, from the origin.
            others_nd = dx[0] / (2 * t) + x_nd[target_n]
            from_row_nd, from_origin_nd = others_nd - x_nd, others_nd + mean_d
            is_near_n1 = from_row_nd.square().sum(1, True) < from_origin_nd.square().sum(1, True)
            is_near_n1 |= rows_nd.square().sum(1, True) < 0.99  # too short to have been scaled to length 1
            weight_n1 = 4 * t * (e_n - total).exp()[:, None].to(x_nd.dtype)
            gradient_nd = weight_n1 * torch.where(is_near_n1, from_row_nd, from_origin_nd)
            ctx.save_for_backward(torch.where(used_n[:, None], gradient_nd, 0), rows_nd)
        return torch.where(pairs > 0, total - pairs.clamp(min=1).to(total.dtype).log(), 0).to(x_nd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * kept[0], None, None


def uniformity_unchecked(
    rows: Tensor,  # (N, D) float32 or float64
    mask: Tensor,  # (N,) bool
    t: float,
) -> Tensor:
    """log mean exp(-t ||x_i - x_j||²) over the pairs of different rows that count; 0 where there is none.

    For callers that have checked the arguments and scaled the rows to length 1, but for those near 0. Rows that do not
    count are 0. The gradient of a row is right but for a multiple of the row, which that scaling takes away.
    """
    return _Uniformity.apply(rows, mask, t) if len(rows) > 1 else 0 * rows.sum()
