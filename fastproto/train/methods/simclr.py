"""SimCLR (Chen et al., arXiv 2002.05709): two views of an image attract, all other views in the batch repel."""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import NTXentLoss
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Method, Prototypes, projection_head


class SimCLR(Method):
    """NT-Xent on the projections of both views."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.projector = projection_head(config.head, encoder)
        self.contrast = NTXentLoss(self.temperature(0.5), gather_distributed=True)

    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.projector(self.encoder(view)) for view in views)

    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        out0, out1 = outputs
        return {"contrast": self.contrast(out0, out1)}
