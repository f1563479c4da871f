"""MoCo v2 (He et al., arXiv 1911.05722; Chen et al., 2003.04297): keys of a slow copy, and a queue of keys to repel."""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import InfoNCELoss
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Prototypes, QueueMethod


class MoCo(QueueMethod):
    """InfoNCE of each view against its key, the other view, and the queue."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.contrast = InfoNCELoss(self.temperature(0.2))

    def one_way(self, query: Tensor, key: Tensor, prototypes: Prototypes | None) -> dict[str, Tensor]:
        return {"contrast": self.contrast(query, key, self.queue)}
