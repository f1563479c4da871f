"""PAUC (arXiv 2210.10194): PCL, and the batch's prototypes are aligned between views, spread out and decorrelated.

Only the paper's abstract is public to us; fastproto.losses.PAUCLoss says how we read it.
"""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import PAUCLoss
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Prototypes, QueueMethod


class PAUC(QueueMethod):
    """InfoNCE, ProtoNCE, and alignment, uniformity and correlation of batch prototypes."""

    clusters = True

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.loss = PAUCLoss(
            self.temperature(0.2),
            correlation=config.loss.correlation,
            gather_distributed=True,
            num_negatives=config.prototypes.negatives,
        )

    def one_way(self, query: Tensor, key: Tensor, prototypes: Prototypes | None) -> dict[str, Tensor]:
        if prototypes is None:
            return {"contrast": self.loss.info_nce(query, key, self.queue)}
        terms = self.loss.forward_components(query, key, *prototypes, self.queue)._asdict()
        return {"contrast": terms.pop("info_nce"), "prototype": terms.pop("proto_nce"), **terms}
