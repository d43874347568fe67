"""Barlow Twins: the features of two views correlate with themselves and with nothing else."""

from __future__ import annotations

from cl_core.losses import TwoViewLoss
from cl_core.projectors import MLPProjector, Projector
from cl_vision.encoders import Encoder
from cl_vision.methods.simclr import SimCLR


class BarlowTwins(SimCLR):
    """Barlow Twins: SimCLR's two branches with a wide head, whose features the loss compares, not its rows.

        cl-vision fit --config barlow/digits

    Args:
        encoder: what is trained and kept.
        loss: compares the projections of two views; ``BarlowTwinsLoss`` is the method's own.
        projector: head between encoder and loss; None for three layers of 8192.

    Reference: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv
    2103.03230.
    """

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, projector: Projector | None = None) -> None:
        projector = projector or MLPProjector(hidden_dim=8192, out_dim=8192, layers=3)
        super().__init__(encoder, loss, projector)
