"""SimSiam (Chen and He, arXiv 2011.10566): predict the other view; a stopped gradient is all that prevents collapse."""

from __future__ import annotations

from torch import Tensor

from fastproto.losses import NegativeCosineSimilarity
from fastproto.train.config import Config
from fastproto.train.encoders import Encoder
from fastproto.train.methods._base import Method, Prototypes, mlp, projection_head


class SimSiam(Method):
    """Negative cosine similarity of predictions and stopped projections, the mean of both directions.

    The predictor's learning rate does not fall: it has to keep up with the projections (section 4.2 and its code).
    """

    constant_lr = ("predictor",)

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        dim = config.head.dim
        self.projector = projection_head(config.head, encoder, last_norm=True)
        # A bottleneck, as in the paper: a quarter of the embedding.
        self.predictor = mlp(dim, max(1, dim // 4), dim)
        self.similarity = NegativeCosineSimilarity()

    def outputs(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        projections = [self.projector(self.encoder(view)) for view in views]
        predictions = [self.predictor(projection) for projection in projections]
        return (*predictions, *(projection.detach() for projection in projections))

    def terms(self, outputs: tuple[Tensor, ...], prototypes: Prototypes | None) -> dict[str, Tensor]:
        prediction0, prediction1, target0, target1 = outputs
        both = self.similarity(prediction0, target1) + self.similarity(prediction1, target0)
        return {"contrast": both / 2}
