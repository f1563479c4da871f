"""Softmax cross-entropy of rows against keys, forward and backward, in plain PyTorch.

    s_ij = <x_i, y_j> · a_j + b_j
    L_i  = log Σ_{j ∈ A(i)} exp(s_ij) - s_{i,t(i)}

A(i) holds the target t(i) and every key whose group is not the row's. N rows, K keys, D embedding.
The (N, K) logits are materialised. Normalised, x_i and y_j stand for x_i / |x_i| and y_j / |y_j|, and gradients are
those of the rows as they came.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rows shorter than this are divided by it, as by torch.nn.functional.normalize: their length has no gradient.
SHORTEST = 1e-12


def contrast_fwd(
    features: Tensor,  # (N, D) float
    keys: Tensor,  # (K, D) float
    targets: Tensor,  # (N,) int64, -1 for an ignored row
    scale: Tensor | None,  # (K,) float; None: scale_all for every key
    scale_all: float,
    bias: Tensor | None,  # (K,) float
    groups: Tensor | None,  # (N,) int64
    key_groups: Tensor | None,  # (K,) int64
    normalize: bool,
    divisor: float | None,
    symmetric: bool,
    more_keys: Tensor | None,  # (M, D) float, which follow the keys
    need_dx: bool,
    need_stats: bool,
) -> list[Tensor]:
    """Loss (N,), what is saved (3, N), and where needed dx (N, D), entropy (N,), top1 (N,) and positive logit (N,).

    Saved are lse, p_t - 1 and, for kernels that find p from the rounded lse, p / exp(s - lse), which is 1 here.

    With a divisor the loss is the rows' sum by it, and dx is of that. ``symmetric`` promises what it does to
    ``contrast_bwd_keys``, and saves a kernel work, not this.
    """
    a_k = scale_all if scale is None else scale
    keys = keys if more_keys is None else torch.cat([keys, more_keys])
    x_nd, y_kd, length_n1, _, logits_nk = _logits(features, keys, targets, a_k, bias, groups, key_groups, normalize)
    counted_n, target_n1 = targets >= 0, targets.clamp(min=0)[:, None]
    # log_softmax and not lse - s: the difference of two large numbers would lose the digits of a small loss.
    log_p_nk = logits_nk.log_softmax(1)
    p_nk = log_p_nk.exp()
    loss_n = torch.where(counted_n, -log_p_nk.gather(1, target_n1).squeeze(1), 0)
    lse_n = torch.where(counted_n, logits_nk.logsumexp(1), 0)

    saved = torch.stack([lse_n, torch.expm1(-loss_n), torch.ones_like(lse_n)])
    out = [loss_n if divisor is None else loss_n.sum() / divisor, saved]
    if need_dx:
        q_nk = p_nk - torch.zeros_like(p_nk).scatter_(1, target_n1, 1.0)
        dx_nd = (q_nk * a_k).to(x_nd.dtype) @ y_kd
        dx_nd = through_length(dx_nd, x_nd, length_n1) if normalize else dx_nd
        dx_nd = torch.where(counted_n[:, None], dx_nd, 0)
        out.append(dx_nd if divisor is None else dx_nd / divisor)
    if need_stats:
        entropy_n = torch.where(counted_n, torch.special.entr(p_nk).sum(1), 0)
        # argmax refuses a (0, 0) matrix.
        top1_n = torch.where(counted_n, logits_nk.argmax(1), -1) if logits_nk.numel() else targets.clone()
        positive_n = torch.where(counted_n, logits_nk.gather(1, target_n1).squeeze(1), 0)
        out += [entropy_n, top1_n, positive_n]
    return out


def contrast_bwd_keys(
    features: Tensor,  # (N, D) float
    keys: Tensor,  # (K, D) float
    targets: Tensor,  # (N,) int64
    scale: Tensor | None,  # (K,) float; None: scale_all for every key
    scale_all: float,
    bias: Tensor | None,  # (K,) float
    groups: Tensor | None,  # (N,) int64
    key_groups: Tensor | None,  # (K,) int64
    normalize: bool,
    divisor: float | None,
    symmetric: bool,
    saved: Tensor,  # (3, N), of the forward
    grad: Tensor,  # () or (N,), of the forward's loss
) -> list[Tensor]:
    """dL/dy (K, D), and dL/da (K,) and dL/db (K,) where scale and bias are tensors; q_ij = g_i (p_ij - 1[j = t(i)]).

    Symmetric, keys and groups are those of the rows, the scale is one number, there is no bias and no ignored row, and
    the first result is the gradient of the rows in both roles, from q_ij + q_ji.
    """
    a_k = scale_all if scale is None else scale
    x_nd, y_kd, _, length_k1, logits_nk = _logits(features, keys, targets, a_k, bias, groups, key_groups, normalize)
    counted_n1, target_n1 = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    _, less_one_n1, _ = saved[..., None]
    p_nk = logits_nk.softmax(1)
    grad_n1 = grad.expand(len(features))[:, None] / (1 if divisor is None else divisor)
    # Not exp(s_t - lse) - 1, which has the rounding of two large numbers.
    q_nk = grad_n1 * p_nk.scatter(1, target_n1, less_one_n1)
    q_nk = torch.where(counted_n1, q_nk, 0)
    sum_kd = (q_nk.T + q_nk if symmetric else q_nk.T) @ x_nd
    dy_kd = sum_kd * (scale_all if scale is None else scale.to(x_nd.dtype)[:, None])
    out = [through_length(dy_kd, y_kd, length_k1) if normalize else dy_kd]
    if scale is not None:
        out.append((sum_kd * y_kd).sum(1))
    if bias is not None:
        out.append(q_nk.sum(0))
    return out


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i / |x_i| (N, D) and the lengths (N, 1), in at least float32; a zero row stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=SHORTEST)
    return x / length, length


def through_length(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """The gradient of the rows that ``unit`` was made from: (g - <g, u> u) / |x|; of rows too short, g / 1e-12."""
    along = torch.where(length > SHORTEST, (grad * unit).sum(-1, keepdim=True), 0)
    return (grad - along * unit) / length


def _logits(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    scale: Tensor | float,
    bias: Tensor | None,
    groups: Tensor | None,
    key_groups: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, keys, the lengths they had, and logits (N, K), in at least float32; -inf where a row may not see a key."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, keys.dtype), torch.float32)
    # An ignored row is emptied before the product, so that not even a NaN in it reaches the keys' gradient.
    x_nd = torch.where((targets >= 0)[:, None], features, 0).to(dtype)
    y_kd = keys.to(dtype)
    length_n1 = length_k1 = x_nd.new_ones(1)
    if normalize:
        (x_nd, length_n1), (y_kd, length_k1) = unit_rows(x_nd), unit_rows(y_kd)
    logits_nk = (x_nd @ y_kd.T) * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
    if bias is not None:
        logits_nk = logits_nk + bias.to(dtype)
    if groups is not None and key_groups is not None:
        hidden_nk = (groups[:, None] == key_groups).scatter(1, targets.clamp(min=0)[:, None], False)
        logits_nk = logits_nk.masked_fill(hidden_nk, -math.inf)
    return x_nd, y_kd, length_n1, length_k1, logits_nk
