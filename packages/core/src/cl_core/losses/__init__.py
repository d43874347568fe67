"""Loss modules; their functional forms are in :mod:`cl_core.functional`."""

from cl_core.losses._base import (
    ClassPairLoss,
    ContrastiveLoss,
    EmbeddingLoss,
    LabelledLoss,
    PredictionLoss,
    PrototypeLoss,
    QueryKeyLoss,
    QueueLoss,
    ScoresLoss,
    TwoViewLoss,
)
from cl_core.losses.alignment_uniformity import AlignmentLoss, UniformityLoss
from cl_core.losses.attraction_repulsion import CACRLoss, CACRMomentumLoss
from cl_core.losses.clip import CLIPLoss, SigLIPLoss
from cl_core.losses.clustering import PrototypeNCELoss, SwAVLoss
from cl_core.losses.decoupled import DCLLoss, DCLWLoss
from cl_core.losses.feature_transform import FeatureTransform
from cl_core.losses.gated_pairs import GatedPairLoss
from cl_core.losses.hard_negative import DebiasedNCELoss, HardNegativeNCELoss
from cl_core.losses.info_nce import InfoNCELoss
from cl_core.losses.margin import CircleLoss, ContrastiveMarginLoss, MultiSimilarityLoss, TripletMarginLoss
from cl_core.losses.multi_head import AMCLBarlowLoss, AMCLLoss, AMCLSimSiamLoss
from cl_core.losses.nt_xent import NTXentLoss
from cl_core.losses.predictive import BYOLLoss, NegativeCosineSimilarityLoss
from cl_core.losses.redundancy import BarlowTwinsLoss, VICRegLoss
from cl_core.losses.relational import ReSSLLoss
from cl_core.losses.supervised import SupConLoss

__all__ = [
    "AMCLBarlowLoss",
    "AMCLLoss",
    "AMCLSimSiamLoss",
    "AlignmentLoss",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CACRLoss",
    "CACRMomentumLoss",
    "CLIPLoss",
    "CircleLoss",
    "ClassPairLoss",
    "ContrastiveLoss",
    "ContrastiveMarginLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedNCELoss",
    "EmbeddingLoss",
    "FeatureTransform",
    "GatedPairLoss",
    "HardNegativeNCELoss",
    "InfoNCELoss",
    "LabelledLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NegativeCosineSimilarityLoss",
    "PredictionLoss",
    "PrototypeLoss",
    "PrototypeNCELoss",
    "QueryKeyLoss",
    "QueueLoss",
    "ReSSLLoss",
    "ScoresLoss",
    "SigLIPLoss",
    "SupConLoss",
    "SwAVLoss",
    "TripletMarginLoss",
    "TwoViewLoss",
    "UniformityLoss",
    "VICRegLoss",
]
