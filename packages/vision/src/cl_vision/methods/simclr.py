"""SimCLR: agree between two augmented views of an image, disagree with all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cl_core.losses import TwoViewLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector, built
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_parts, views_for

if TYPE_CHECKING:
    from cl_vision.data import Views


class SimCLR(Method):
    """SimCLR: two augmented views, an encoder, a projector, any two-view loss.

        cl-vision fit --config dcl/digits

    The projector serves the loss only; :meth:`embed` returns the encoder's features, which transfer better.

    Args:
        encoder: what is trained and kept.
        loss: compares the projections of the views, for example ``NTXentLoss`` or ``DCLLoss``.
        projector: head between encoder and loss; None for SimCLR's, two layers to 128 columns. A head without
            ``in_dim`` is built here for the encoder's ``dim``.

    Reference: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, arXiv 2002.05709.
    """

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, projector: Projector | None = None) -> None:
        super().__init__()
        check_parts(encoder, loss, TwoViewLoss, called_with="(z1, z2)")
        self.encoder, self.criterion = encoder, loss
        self.projector = built("projector", projector or MLPProjector(), encoder.dim, "the encoder's dim")

    def loss(self, batch: Views) -> Tensor:
        """Loss of two views, or of more where the criterion takes a list of them; a scalar."""
        projections = [self.project(view) for view in views_for(self, batch)]
        return self.criterion(*projections) if len(projections) == 2 else self.criterion(projections)

    def project(self, images: Tensor) -> Tensor:
        """What the loss sees of images (N, C, H, W), shape (N, projector.out_dim)."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)
