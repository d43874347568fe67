"""SimSiam: each view predicts the other's projection; no negatives, no momentum encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cl_core.losses import PredictionLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_parts, two_views, with_predictor

if TYPE_CHECKING:
    from cl_vision.data import Views


class SimSiam(Method):
    """SimSiam: with z = head(encoder(view)) and p = predictor(z), the mean of loss(p1, z2) and loss(p2, z1).

        cl-vision fit --config simsiam/digits

    That the targets z are constants is what keeps all embeddings from becoming equal; the losses see to it.

    Args:
        encoder: what is trained and kept.
        loss: called with predictions (N, D) and targets (N, D); ``NegativeCosineSimilarityLoss`` is SimSiam's own.
        projector: head between encoder and predictor; None for three layers of 2048, batch normalisation after each.
        predictor: from projections to predictions; None for two layers with 512 between them.

    Reference: Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: PredictionLoss,
        projector: Projector | None = None,
        predictor: Projector | None = None,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, PredictionLoss, called_with="(p, z)")
        self.encoder, self.criterion = encoder, loss
        projector = projector or MLPProjector(hidden_dim=2048, out_dim=2048, layers=3, final_norm="batch")
        predictor = predictor or MLPProjector(hidden_dim=512, out_dim=projector.out_dim)
        self.projector, self.predictor = with_predictor(encoder, projector, predictor)

    def loss(self, batch: Views) -> Tensor:
        """Loss of two views, a scalar."""
        z1, z2 = (self.project(view) for view in two_views(self, batch))
        return (self.criterion(self.predictor(z1), z2) + self.criterion(self.predictor(z2), z1)) / 2

    def project(self, images: Tensor) -> Tensor:
        """Targets of images (N, C, H, W), shape (N, projector.out_dim)."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)
