"""BYOL: an online network predicts the projections of its own moving average."""

from __future__ import annotations

from typing import Literal

from cl_core.losses import PredictionLoss
from cl_core.projectors import MLPProjector, Projector
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_parts
from cl_vision.methods.moco import MoCoV3


class BYOL(MoCoV3):
    """BYOL: MoCo v3's networks with a loss that has no negatives, loss(p1, z2) + loss(p2, z1).

        cl-vision fit --config byol/digits

    Args:
        encoder: what is trained and kept.
        loss: called with predictions (N, D) and targets (N, D) of the moving average; ``BYOLLoss`` is BYOL's own.
        projector: head between encoder and predictor; None for two layers of 4096 to 256 columns.
        predictor: from projections to predictions; None for two layers of 4096.
        momentum: weight of the old target network in each step.
        schedule: "cosine" lets ``momentum`` rise to 1 over the training, "constant" keeps it.

    Reference: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: PredictionLoss,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        momentum: float = 0.996,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        check_parts(encoder, loss, PredictionLoss, called_with="(p, z)")
        projector = projector or MLPProjector(hidden_dim=4096, out_dim=256)
        super().__init__(encoder, loss, projector, predictor, momentum, schedule, scale=2.0)
