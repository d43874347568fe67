"""Loss modules; their functional forms are in :mod:`cl_core.functional`."""

from cl_core.losses._base import ContrastiveLoss, LabelledLoss, QueryKeyLoss, TwoViewLoss
from cl_core.losses.decoupled import DCLLoss, DCLWLoss
from cl_core.losses.info_nce import InfoNCELoss
from cl_core.losses.nt_xent import NTXentLoss
from cl_core.losses.supervised import SupConLoss

__all__ = [
    "ContrastiveLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "LabelledLoss",
    "NTXentLoss",
    "QueryKeyLoss",
    "SupConLoss",
    "TwoViewLoss",
]
