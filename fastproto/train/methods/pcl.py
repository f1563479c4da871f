"""PCL (Li et al., arXiv 2005.04966): MoCo, and the query also finds the k-means prototype of its image."""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import InfoNCELoss, ProtoNCELoss
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Prototypes, QueueMethod


class PCL(QueueMethod):
    """InfoNCE, and ProtoNCE averaged over the prototype sets."""

    clusters = True

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.contrast = InfoNCELoss(self.temperature(0.2))
        self.prototype = ProtoNCELoss(config.prototypes.negatives)

    def one_way(self, query: Tensor, key: Tensor, prototypes: Prototypes | None) -> dict[str, Tensor]:
        terms = {"contrast": self.contrast(query, key, self.queue)}
        if prototypes is not None:
            terms["prototype"] = self.prototype(query, *prototypes)
        return terms
