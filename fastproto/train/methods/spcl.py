"""SPCL (Mo et al., arXiv 2208.08819): SimCLR, a classifier of prototypes, and a metric of which images share one.

Clusters, metric and classifier see backbone features, only the contrast sees projections. The classifier is drawn anew
at each clustering, whose ids mean nothing to the old one, and has until the next to learn: its learning rate does not
follow the others', and of LARS it takes plain steps of SGD without decay, as in the authors' code (train.py: at twice
the rate).
"""

from __future__ import annotations

from torch import Tensor, nn

from fastproto._check import expect
from fastproto.cluster import whiten
from fastproto.losses import SPCLLoss
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Method, Prototypes, projection_head


class SPCL(Method):
    """NT-Xent on projections; siamese metric and prototype cross-entropy on features."""

    clusters = True
    idle_parts = True  # metric and classifier, before the first clustering
    constant_lr = ("loss.classifier",)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        sets = config.prototypes.num
        expect(len(sets) == 1, "spcl", "prototypes.num", "one prototype set", str(sets))
        self.projector = projection_head(config.head, encoder)
        self.loss = SPCLLoss(encoder.num_features, sets[0], self.temperature(0.5), gather_distributed=True)
        self.cluster_dim = min(config.prototypes.whiten_dim, encoder.num_features)

    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        features = [self.encoder(view) for view in views]
        return (*(self.projector(feature) for feature in features), *features)

    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        if prototypes is None:
            return {"contrast": self.loss.contrast(*outputs[:2])}
        out0, out1, features0, features1 = outputs
        return self.loss.forward_components(out0, out1, features0, features1, prototypes.assignments[0])._asdict()

    def cluster_space(self, features: Tensor) -> Tensor:
        return whiten(features, self.cluster_dim)

    def after_clustering(self) -> list[nn.Parameter]:
        self.loss.reset_prototypes()
        return list(self.loss.classifier.parameters())
