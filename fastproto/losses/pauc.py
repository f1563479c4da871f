"""PAUC: alignment, uniformity and correlation of prototypes beside InfoNCE and ProtoNCE."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastproto._check import expect_flags
from fastproto.losses._common import expect_temperature, expect_views, expect_weights
from fastproto.losses._gather import gather_rows
from fastproto.losses.distribution import (
    AlignmentLoss,
    CorrelationLoss,
    UniformityLoss,
    batch_prototypes,
    expect_kind,
    expect_t,
)
from fastproto.losses.info_nce import InfoNCELoss
from fastproto.losses.proto_nce import Concentrations, ProtoNCELoss, Tensors


class PAUCTerms(NamedTuple):
    """The unweighted terms of :class:`PAUCLoss`, each a scalar."""

    info_nce: Tensor
    proto_nce: Tensor
    align: Tensor
    uniform: Tensor
    correlation: Tensor


class PAUCLoss(nn.Module):
    """Prototypical contrast with alignment, uniformity and correlation of the prototypes.

        L = InfoNCE + ProtoNCE + λ_a · align + λ_u · uniform + λ_c · correlation

    The last three are of the prototypes p, p' that the two views of the batch span (``functional.batch_prototypes`` of
    query and key), each prototype once:

        align   = mean_y ||p_y - p'_y||²
        uniform = ½ Σ_views log mean_{y≠y'} exp(-t · ||p_y - p_y'||²)
        correlation: CorrelationLoss of p and p'

    and 0 where fewer than two prototypes are in the batch. With several prototype sets they are means over the sets, as
    ProtoNCE is. InfoNCE sends no gradient into the keys; the batch prototypes do, unless the keys are detached.

    Only the abstract of the paper is public to us: the terms are our reading of it, the weights no tuned ones.

    Args:
        temperature: τ of InfoNCE, a number, or a parameter () that is learnt.
        align_weight, uniform_weight, correlation_weight: λ_a, λ_u, λ_c. "cross" is a sum over dimensions: at 1 it
            drowns the others, and an encoder learns less than nothing (bench/notes.md). "covariance" is a mean.
        uniform_t: t.
        correlation: "cross" or "covariance".
        gather_distributed: the prototypes are those of the batch of all ranks, and so is the mean of ProtoNCE.
        num_negatives: of ProtoNCE, see :class:`ProtoNCELoss`; None sums over all K.

    Shape:
        query, key: (N, D). prototypes: (K, D). assignments: (N,) int64 or int32, -1 for rows without a prototype.
        concentration: a number or (K,). queue: (M, D). Floats are float16, bfloat16, float32 or float64. Prototypes,
        assignments and concentration may be lists, one entry per set. Nothing needs to be normalised. Output: scalar
        of at least float32.

    Raises:
        ValueError: τ < 1e-8, t ≤ 0, an unknown correlation, weights that are not finite, shapes or numbers of sets that
            do not fit, an assignment out of range, or φ that is not positive.
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> loss_fn = PAUCLoss(temperature=0.2)
        >>> query, key, prototypes = torch.randn(8, 4), torch.randn(8, 4), torch.randn(3, 4)
        >>> assignments = torch.tensor([0, 1, 2, 0, 1, 2, 0, -1])
        >>> loss = loss_fn(query, key, prototypes, assignments, 0.2, queue=torch.randn(16, 4))
        >>> loss_fn.forward_components(query, key, prototypes, assignments, 0.2)._fields
        ('info_nce', 'proto_nce', 'align', 'uniform', 'correlation')

    Distributed: with ``gather_distributed`` the loss is that of the batch of all ranks, if they have one queue.
    Without, the prototypes that the batch spans are those of a rank's own batch.

    Memory: grows with (N + M + K) · D, D² for "cross" and "covariance", and N² for the batch's prototypes; the (N, M)
    and (N, K) logits exist in the reference backend only, which float64 takes everywhere.

    Source: PAUC, arXiv 2210.10194; its parts: MoCo, arXiv 1911.05722; PCL, arXiv 2005.04966; Wang and Isola,
    arXiv 2005.10242; Barlow Twins, arXiv 2103.03230; VICReg, arXiv 2105.04906.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.2,
        align_weight: float = 1.0,
        uniform_weight: float = 1.0,
        correlation_weight: float = 0.01,
        uniform_t: float = 2.0,
        correlation: str = "cross",
        gather_distributed: bool = False,
        num_negatives: int | None = None,
    ) -> None:
        super().__init__()
        expect_temperature(temperature, "PAUCLoss")
        expect_flags("PAUCLoss", gather_distributed=gather_distributed)
        expect_t(uniform_t, "PAUCLoss", "uniform_t")
        expect_kind(correlation, "PAUCLoss", "correlation")
        expect_weights(
            "PAUCLoss",
            align_weight=align_weight,
            uniform_weight=uniform_weight,
            correlation_weight=correlation_weight,
        )
        self.align_weight = align_weight
        self.uniform_weight = uniform_weight
        self.correlation_weight = correlation_weight
        self.gather_distributed = gather_distributed
        self.info_nce = InfoNCELoss(temperature)
        self.proto_nce = ProtoNCELoss(num_negatives, gather_distributed)
        self.align = AlignmentLoss()
        self.uniform = UniformityLoss(uniform_t)
        self.correlation = CorrelationLoss(correlation)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        prototypes: Tensors,
        assignments: Tensors,
        concentration: Concentrations,
        queue: Tensor | None = None,
    ) -> Tensor:
        terms = self.forward_components(query, key, prototypes, assignments, concentration, queue)
        return (
            terms.info_nce
            + terms.proto_nce
            + self.align_weight * terms.align
            + self.uniform_weight * terms.uniform
            + self.correlation_weight * terms.correlation
        )

    def forward_components(
        self,
        query: Tensor,
        key: Tensor,
        prototypes: Tensors,
        assignments: Tensors,
        concentration: Concentrations,
        queue: Tensor | None = None,
    ) -> PAUCTerms:
        """The unweighted terms, for logging or for weights of one's own."""
        expect_views(query, key, "PAUCLoss", ("query", "key"))
        info_nce = self.info_nce(query, key, queue)
        nce = self.proto_nce(query, prototypes, assignments, concentration)
        sets = [assignments] if isinstance(assignments, Tensor) else assignments
        if self.gather_distributed:
            query, key, sets = gather_rows(query), gather_rows(key), [gather_rows(labels) for labels in sets]
        of_prototypes = torch.stack([self._of_prototypes(query, key, labels) for labels in sets]).mean(0)
        terms = torch.unbind_copy(of_prototypes)  # type: ignore[func-returns-value]  # PyTorch's own is wrong
        return PAUCTerms(info_nce, nce, *terms)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return (
            f"align_weight={self.align_weight}, uniform_weight={self.uniform_weight}, "
            f"correlation_weight={self.correlation_weight}"
        )

    def _of_prototypes(self, query: Tensor, key: Tensor, assignments: Tensor) -> Tensor:
        """Alignment, uniformity and correlation (3,) of the prototypes that the batch spans."""
        p0, mask = batch_prototypes(query, assignments)
        p1, _ = batch_prototypes(key, assignments)
        uniform = (self.uniform(p0, mask) + self.uniform(p1, mask)) / 2
        terms = torch.stack([self.align(p0, p1, mask), uniform, self.correlation(p0, p1, mask)])
        return torch.where(mask.sum() > 1, terms, 0)
