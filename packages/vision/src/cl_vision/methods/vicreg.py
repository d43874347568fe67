"""VICReg: views agree, no feature dies, no two features say the same."""

from __future__ import annotations

from cl_core.losses import TwoViewLoss
from cl_core.projectors import MLPProjector, Projector
from cl_vision.encoders import Encoder
from cl_vision.methods.simclr import SimCLR


class VICReg(SimCLR):
    """VICReg: SimCLR's two branches with a wide head, whose features the loss compares, not its rows.

        cl-vision fit --config vicreg/digits

    Args:
        encoder: what is trained and kept.
        loss: compares the projections of two views; ``VICRegLoss`` is the method's own.
        projector: head between encoder and loss; None for three layers of 8192.

    Reference: Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR
    2022, arXiv 2105.04906.
    """

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, projector: Projector | None = None) -> None:
        projector = projector or MLPProjector(hidden_dim=8192, out_dim=8192, layers=3)
        super().__init__(encoder, loss, projector)
