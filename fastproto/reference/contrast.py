"""Softmax cross-entropy of rows against keys, in plain PyTorch.

    s_ij = <x_i, y_j> · a_j + b_j
    L_i  = log Σ_{j ∈ A(i)} exp(s_ij) - s_{i,t(i)}

A(i) holds the target t(i) and every key whose group is not the row's. N rows, K keys, D embedding.
The (N, K) logits are materialised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contrast(
    features: Tensor,  # (N, D) float
    keys: Tensor,  # (K, D) float
    targets: Tensor,  # (N,) int
    scale: float | Tensor,  # (K,) float
    bias: Tensor | None,  # (K,) float
    groups: Tensor | None,  # (N,) int
    key_groups: Tensor | None,  # (K,) int
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, lse, entropy, top1 and positive logit, each (N,); only the loss carries a gradient."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, keys.dtype), torch.float32)
    counted_n = targets != ignore_index
    target_n1 = torch.where(counted_n, targets, 0).long()[:, None]
    # An ignored row is emptied before the product, so that not even a NaN in it reaches the keys' gradient.
    x_nd = torch.where(counted_n[:, None], features, 0).to(dtype)

    with torch.autocast(features.device.type, enabled=False):
        logits_nk = x_nd @ keys.to(dtype).T
    logits_nk = logits_nk * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
    if bias is not None:
        logits_nk = logits_nk + bias.to(dtype)
    if groups is not None and key_groups is not None:
        hidden_nk = (groups[:, None] == key_groups).scatter(1, target_n1, False)
        logits_nk = logits_nk.masked_fill(hidden_nk, -math.inf)

    # log_softmax and not lse - s: the difference of two large numbers would lose the digits of a small loss.
    log_p_nk = logits_nk.log_softmax(1)
    loss_n = torch.where(counted_n, -log_p_nk.gather(1, target_n1).squeeze(1), 0)

    logits_nk, log_p_nk = logits_nk.detach(), log_p_nk.detach()
    lse_n = logits_nk.logsumexp(1)
    entropy_n = torch.special.entr(log_p_nk.exp()).sum(1)
    top1_n = logits_nk.argmax(1) if logits_nk.numel() else targets.long()  # argmax refuses a (0, 0) matrix
    positive_n = logits_nk.gather(1, target_n1).squeeze(1)
    return (
        loss_n,
        torch.where(counted_n, lse_n, 0),
        torch.where(counted_n, entropy_n, 0),
        torch.where(counted_n, top1_n, ignore_index),
        torch.where(counted_n, positive_n, 0),
    )
