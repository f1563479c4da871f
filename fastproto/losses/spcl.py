"""SPCL: contrast of views, a metric on pairs of prototypes, and a classifier of prototypes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastproto._check import FLOATS, INTEGERS, expect_flags, expect_index, expect_positive_ints, expect_tensor
from fastproto.losses._common import expect_temperature, expect_views, expect_weights
from fastproto.losses._gather import from_first_rank, gather_rows
from fastproto.losses.nt_xent import NTXentLoss
from fastproto.losses.proto_nce import proto_nce
from fastproto.losses.siamese import SiameseMetricLoss


class SPCLTerms(NamedTuple):
    """The unweighted terms of :class:`SPCLLoss`, each a scalar."""

    contrast: Tensor
    metric: Tensor
    prototype: Tensor


class SPCLLoss(nn.Module):
    """Siamese prototypical contrastive learning.

        L = λ_c · NT-Xent(z0, z1) + λ_m · L_metric(h0, h1, y) + λ_p · (CE(c(h0), y) + CE(c(h1), y))

    z are embeddings, h raw backbone features, y the prototypes that k-means gave the images, c a linear classifier of
    the K prototypes, and L_metric the all-pairs form of :class:`SiameseMetricLoss`. The paper draws pairs of images;
    here the batch is a plain one and all its pairs are taken. Its loss of a pair is twice this one, but for the metric
    of different images, which weighs four times as much.

    Args:
        feature_dim: C.
        num_prototypes: K.
        temperature: τ of NT-Xent, a number, or a parameter () that is learnt.
        contrast_weight, metric_weight, prototype_weight: λ_c, λ_m, λ_p.
        gather_distributed: all three terms are over the images of all ranks, see below.

    Attributes:
        metric: the SiameseMetricLoss.
        classifier: the linear layer C → K.

    Shape:
        out0, out1: embeddings (N, D). features0, features1: (N, C). All float16, bfloat16, float32 or float64.
        assignments: (N,) int64 or int32, -1 for images without a prototype, which are contrasted and pair their own
        two views, no more. Output: scalar of at least float32.

    Raises:
        ValueError: |τ| < 1e-8, sizes that are not integers of at least 1, weights that are not finite, shapes or
            devices that do not fit, or an assignment out of range (read on the CPU, on CUDA with
            ``fastproto.set_debug(True)``).
        TypeError: an argument is not a tensor, or of another dtype.

    Example:
        >>> loss_fn = SPCLLoss(feature_dim=4, num_prototypes=2)
        >>> z0, z1, h0, h1 = torch.randn(4, 3, 4).unbind()
        >>> loss_fn(z0, z1, h0, h1, torch.tensor([0, 1, -1])).backward()
        >>> terms = loss_fn.forward_components(z0, z1, h0, h1, torch.tensor([0, 1, -1]))
        >>> terms._fields
        ('contrast', 'metric', 'prototype')

    Distributed: with ``gather_distributed`` DDP's mean of the gradients equals one process on the whole batch. NT-Xent
    sets local rows against the views of all ranks, the cross-entropy is a mean over all ranks' rows, and every rank
    computes the metric of all pairs of the whole batch: on W ranks W² times the pairs of one rank's batch. Every rank
    has the same N. Without it all terms are of a rank's own batch. FSDP2 is to shard the loss as a whole: classifier
    and metric are read, not called, so that neither their own sharding nor hooks on them run.

    Memory: grows with N · D and N · C; the (2N, 2N) and (N, K) logits exist in the reference backend only,
    which float64 takes everywhere, and nothing of size (N, N, C) is kept.

    Source: SPCL, arXiv 2208.08819.
    """

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        temperature: float | nn.Parameter = 0.5,
        contrast_weight: float = 1.0,
        metric_weight: float = 1.0,
        prototype_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        expect_temperature(temperature, "SPCLLoss", signed=True)
        expect_flags("SPCLLoss", gather_distributed=gather_distributed)
        expect_positive_ints("SPCLLoss", feature_dim=feature_dim, num_prototypes=num_prototypes)
        expect_weights(
            "SPCLLoss",
            contrast_weight=contrast_weight,
            metric_weight=metric_weight,
            prototype_weight=prototype_weight,
        )
        self.contrast_weight = contrast_weight
        self.metric_weight = metric_weight
        self.prototype_weight = prototype_weight
        self.gather_distributed = gather_distributed
        self.contrast = NTXentLoss(temperature, gather_distributed=gather_distributed)
        self.metric = SiameseMetricLoss(feature_dim)
        self.classifier = nn.Linear(feature_dim, num_prototypes)
        self._draw_classifier()

    def forward(self, out0: Tensor, out1: Tensor, features0: Tensor, features1: Tensor, assignments: Tensor) -> Tensor:
        terms = self.forward_components(out0, out1, features0, features1, assignments)
        return (
            self.contrast_weight * terms.contrast
            + self.metric_weight * terms.metric
            + self.prototype_weight * terms.prototype
        )

    def forward_components(
        self, out0: Tensor, out1: Tensor, features0: Tensor, features1: Tensor, assignments: Tensor
    ) -> SPCLTerms:
        """The unweighted terms, for logging or for weights of one's own."""
        self._expect(out0, out1, features0, features1, assignments)
        paired = features0, features1, assignments
        if self.gather_distributed:
            paired = gather_rows(features0), gather_rows(features1), gather_rows(assignments)
        return SPCLTerms(
            contrast=self.contrast(out0, out1),
            metric=self.metric(*paired),
            prototype=self._classify(features0, assignments) + self._classify(features1, assignments),
        )

    def reset_prototypes(self) -> None:
        """A new classifier, for after each clustering: the old ids mean nothing any more.

        Weights of deviation 0.01 and no bias, as in the authors' code: it begins by telling nothing apart. The
        parameters stay the same tensors, so an optimiser keeps them; its momentum of them is not touched. With
        ``gather_distributed`` all ranks call it, and get the first rank's. Without it each draws its own: under DDP,
        which keeps parameters alike but does not make them so, from one seed.
        """
        self._draw_classifier()
        if self.gather_distributed:
            for parameter in self.classifier.parameters():
                from_first_rank(parameter.detach())

    def extra_repr(self) -> str:
        return (
            f"contrast_weight={self.contrast_weight}, metric_weight={self.metric_weight}, "
            f"prototype_weight={self.prototype_weight}, gather_distributed={self.gather_distributed}"
        )

    def _draw_classifier(self) -> None:
        nn.init.normal_(self.classifier.weight, std=0.01)
        if self.classifier.bias is not None:  # in a layer put in place of ours
            nn.init.zeros_(self.classifier.bias)

    def _expect(self, out0: Tensor, out1: Tensor, features0: Tensor, features1: Tensor, assignments: Tensor) -> None:
        """Refuses bad input in this class's name, and before any rank waits for another."""
        weight = self.classifier.weight
        expect_tensor(features0, "SPCLLoss", "features0", ("N", weight.shape[1]), FLOATS, weight.device)
        expect_views(features0, features1, "SPCLLoss", ("features0", "features1"))
        n, device = features0.shape[0], features0.device
        expect_tensor(out0, "SPCLLoss", "out0", (n, "D"), FLOATS, device)
        expect_views(out0, out1, "SPCLLoss", ("out0", "out1"))
        expect_tensor(assignments, "SPCLLoss", "assignments", (n,), INTEGERS, device)
        expect_index(assignments, "SPCLLoss", "assignments", weight.shape[0], -1)

    def _classify(self, features: Tensor, assignments: Tensor) -> Tensor:
        # Classifier cross-entropy is ProtoNCE with the weight rows as prototypes, as they are, and φ = 1.
        weight, bias = self.classifier.weight, self.classifier.bias
        return proto_nce(
            features,
            weight,
            assignments,
            1.0,
            bias=bias,
            normalize=False,
            gather_distributed=self.gather_distributed,
        )
