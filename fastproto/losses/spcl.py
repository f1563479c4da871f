"""SPCL: contrast of views, a metric on pairs of prototypes, and a classifier of prototypes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastproto.losses.contrast import NTXentLoss
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
    here the batch is a plain one and all its pairs are taken.

    Args:
        feature_dim: C.
        num_prototypes: K.
        temperature: τ of NT-Xent.
        contrast_weight, metric_weight, prototype_weight: λ_c, λ_m, λ_p.

    Attributes:
        metric: the SiameseMetricLoss.
        classifier: the linear layer C → K.

    Shape:
        out0, out1: embeddings (N, D). features0, features1: (N, C). assignments: (N,), -1 for images without a
        prototype, which are contrasted and pair their own two views, no more. Output: scalar.

    Raises:
        ValueError: shapes do not fit, or an assignment is out of range.
        TypeError: something is no tensor, or of another dtype.

    Example:
        >>> loss_fn = SPCLLoss(feature_dim=4, num_prototypes=2)
        >>> z0, z1, h0, h1 = torch.randn(4, 3, 4).unbind()
        >>> loss_fn(z0, z1, h0, h1, torch.tensor([0, 1, -1])).backward()
        >>> terms = loss_fn.forward_components(z0, z1, h0, h1, torch.tensor([0, 1, -1]))
        >>> terms._fields
        ('contrast', 'metric', 'prototype')

    Source: SPCL, arXiv 2208.08819.
    """

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        temperature: float = 0.5,
        contrast_weight: float = 1.0,
        metric_weight: float = 1.0,
        prototype_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.contrast_weight = contrast_weight
        self.metric_weight = metric_weight
        self.prototype_weight = prototype_weight
        self.contrast = NTXentLoss(temperature)
        self.metric = SiameseMetricLoss(feature_dim)
        self.classifier = nn.Linear(feature_dim, num_prototypes)

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
        return SPCLTerms(
            contrast=self.contrast(out0, out1),
            metric=self.metric(features0, features1, assignments),
            prototype=self._classify(features0, assignments) + self._classify(features1, assignments),
        )

    def reset_prototypes(self) -> None:
        """A new classifier, for after each clustering: the old ids mean nothing any more.

        The parameters stay the same tensors, so an optimiser keeps them; its momentum of them is not touched.
        """
        self.classifier.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"contrast_weight={self.contrast_weight}, metric_weight={self.metric_weight}, "
            f"prototype_weight={self.prototype_weight}"
        )

    def _classify(self, features: Tensor, assignments: Tensor) -> Tensor:
        # Classifier cross-entropy is ProtoNCE with the weight rows as prototypes, as they are, and φ = 1.
        weight, bias = self.classifier.weight, self.classifier.bias
        return proto_nce(features, weight, assignments, 1.0, bias=bias, normalize=False)
