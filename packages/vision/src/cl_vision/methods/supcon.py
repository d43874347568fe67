"""SupCon: all views of all images of a class are positives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_core.losses import LabelledLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector, built
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_labels, check_parts, check_views

if TYPE_CHECKING:
    from cl_vision.data import Views


class SupCon(Method):
    """Supervised contrastive learning: SimCLR's branches with a loss that knows the labels.

        cl-vision fit --config supcon/digits

    Args:
        encoder: what is trained and kept.
        loss: called with the projections of all views (V N, D) and their labels (V N,), as ``SupConLoss``.
        projector: head between encoder and loss; None for two layers to 128 columns.

    Reference: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.
    """

    def __init__(self, encoder: Encoder, loss: LabelledLoss, projector: Projector | None = None) -> None:
        super().__init__()
        check_parts(encoder, loss, LabelledLoss, called_with="(z, labels)")
        self.encoder, self.criterion = encoder, loss
        self.projector = built("projector", projector or MLPProjector(), encoder.dim, "the encoder's dim")

    def loss(self, batch: Views) -> Tensor:
        """Loss of two or more views with their labels, a scalar."""
        check_views(self, batch)
        check_labels(self, batch.labels)
        projections = torch.cat([self.project(view) for view in batch.views])
        return self.criterion(projections, batch.labels.repeat(len(batch.views)))

    def project(self, images: Tensor) -> Tensor:
        """What the loss sees of images (N, C, H, W), shape (N, projector.out_dim)."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)
