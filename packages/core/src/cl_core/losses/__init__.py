"""Loss modules; their functional forms are in :mod:`cl_core.functional`."""

from cl_core.losses._base import ContrastiveLoss, LabelledLoss, QueryKeyLoss, QueueLoss, TwoViewLoss
from cl_core.losses.clip import CLIPLoss, SigLIPLoss
from cl_core.losses.decoupled import DCLLoss, DCLWLoss
from cl_core.losses.hard_negative import DebiasedNCELoss, HardNegativeNCELoss
from cl_core.losses.info_nce import InfoNCELoss
from cl_core.losses.nt_xent import NTXentLoss
from cl_core.losses.relational import ReSSLLoss
from cl_core.losses.supervised import SupConLoss

__all__ = [
    "CLIPLoss",
    "ContrastiveLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedNCELoss",
    "HardNegativeNCELoss",
    "InfoNCELoss",
    "LabelledLoss",
    "NTXentLoss",
    "QueryKeyLoss",
    "QueueLoss",
    "ReSSLLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TwoViewLoss",
]
