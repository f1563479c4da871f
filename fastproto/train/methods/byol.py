"""BYOL (Grill et al., arXiv 2006.07733): predict what a slow copy says of the other view; nothing repels.

The target starts as a copy; in the authors' code it starts from weights of its own.
"""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import NegativeCosineSimilarity
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import MomentumMethod, Prototypes, mlp


class BYOL(MomentumMethod):
    """Negative cosine similarity of predictions and targets, the mean of both directions."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.predictor = mlp(config.head.dim, config.head.hidden, config.head.dim)
        self.similarity = NegativeCosineSimilarity()

    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        predictions = (self.predictor(self.projector(self.encoder(view))) for view in views)
        targets = (self.target(view) for view in views)
        return (*predictions, *targets)

    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        prediction0, prediction1, target0, target1 = outputs
        both = self.similarity(prediction0, target1) + self.similarity(prediction1, target0)
        return {"contrast": both / 2}
