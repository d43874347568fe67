"""NNCLR: the nearest earlier image stands in for a view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_core.losses import QueryKeyLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_parts, two_views, with_predictor

if TYPE_CHECKING:
    from cl_vision.data import Views


class NNCLR(Method):
    """NNCLR: a view's prediction must match the nearest neighbour of the other view among earlier images.

        cl-vision fit --config nnclr/digits

    With z = head(encoder(view)), p = predictor(z) and nn(z) the nearest of the support set's rows, the loss is the mean
    of loss(nn(z1), p2) and loss(nn(z2), p1), the other predictions of the batch being the negatives. The support set
    then takes in z1, of all processes where the loss has a ``group``: they train as one with the whole batch, but where
    two rows are equally near, rounding may choose another neighbour.

    Args:
        encoder: what is trained and kept.
        loss: called with the neighbours (N, D), constants, and the predictions (N, D). ``InfoNCELoss`` is NNCLR's own;
            ``DCLLoss(negatives="keys")`` its decoupled form.
        projector: head between encoder and loss; None for three layers of 2048 to 256 columns.
        predictor: from projections to predictions; None for two layers of 4096.
        support_size: rows of the support set. They start at random, as in the known implementations.

    Reference: Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
    Representations", ICCV 2021, arXiv 2104.14548.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: QueryKeyLoss,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        support_size: int = 16384,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, QueryKeyLoss, called_with="(query, key, negatives)")
        self.encoder, self.criterion, self.support_size = encoder, loss, support_size
        projector = projector or MLPProjector(hidden_dim=2048, out_dim=256, layers=3)
        self.projector, self.predictor = with_predictor(encoder, projector, predictor)
        self.support = FeatureQueue(support_size, self.projector.out_dim)
        self.support.enqueue(torch.randn(support_size, self.projector.out_dim))

    def loss(self, batch: Views) -> Tensor:
        """Loss of two views, a scalar; takes the projections of the first into the support set."""
        z1, z2 = (self.project(view) for view in two_views(self, batch))
        loss = self.criterion(self.neighbours(z1), self.predictor(z2))
        loss = (loss + self.criterion(self.neighbours(z2), self.predictor(z1))) / 2
        if self.training:
            self.support.enqueue(z1, group=getattr(self.criterion, "group", None))
        return loss

    @torch.no_grad()
    def neighbours(self, z: Tensor) -> Tensor:
        """The row of the support set with the largest cosine similarity to each row of z (N, D), shape (N, D)."""
        support = self.support.embeddings
        return support[(z.to(support.dtype) @ support.t()).argmax(1)].to(z.dtype)

    def project(self, images: Tensor) -> Tensor:
        """Projections of images (N, C, H, W), shape (N, projector.out_dim)."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)
