"""All losses as functions: embeddings first, everything else by keyword."""

from cl_core.losses.alignment_uniformity import alignment_loss, uniformity_loss
from cl_core.losses.attraction_repulsion import cacr_loss, cacr_momentum_loss, cacr_queue_loss
from cl_core.losses.clip import clip_loss, siglip_loss
from cl_core.losses.clustering import prototype_nce_loss, sinkhorn, swav_loss
from cl_core.losses.decoupled import dcl_loss, dclw_loss
from cl_core.losses.feature_transform import transformed_info_nce_loss
from cl_core.losses.gated_pairs import gated_pair_loss, gated_similarity
from cl_core.losses.hard_negative import debiased_nce_loss, hard_negative_nce_loss
from cl_core.losses.info_nce import info_nce_loss
from cl_core.losses.margin import (
    circle_loss,
    contrastive_margin_loss,
    multi_similarity_loss,
    triplet_margin_loss,
)
from cl_core.losses.multi_head import amcl_barlow_loss, amcl_loss, amcl_simsiam_loss
from cl_core.losses.nt_xent import nt_xent_loss
from cl_core.losses.predictive import byol_loss, negative_cosine_similarity
from cl_core.losses.redundancy import barlow_twins_loss, vicreg_loss
from cl_core.losses.relational import ressl_loss
from cl_core.losses.supervised import sup_con_loss

__all__ = [
    "alignment_loss",
    "amcl_barlow_loss",
    "amcl_loss",
    "amcl_simsiam_loss",
    "barlow_twins_loss",
    "byol_loss",
    "cacr_loss",
    "cacr_momentum_loss",
    "cacr_queue_loss",
    "circle_loss",
    "clip_loss",
    "contrastive_margin_loss",
    "dcl_loss",
    "dclw_loss",
    "debiased_nce_loss",
    "gated_pair_loss",
    "gated_similarity",
    "hard_negative_nce_loss",
    "info_nce_loss",
    "multi_similarity_loss",
    "negative_cosine_similarity",
    "nt_xent_loss",
    "prototype_nce_loss",
    "ressl_loss",
    "siglip_loss",
    "sinkhorn",
    "sup_con_loss",
    "swav_loss",
    "transformed_info_nce_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "vicreg_loss",
]
