"""All losses as functions: embeddings first, everything else by keyword."""

from cl_core.losses.clip import clip_loss, siglip_loss
from cl_core.losses.decoupled import dcl_loss, dclw_loss
from cl_core.losses.hard_negative import debiased_nce_loss, hard_negative_nce_loss
from cl_core.losses.info_nce import info_nce_loss
from cl_core.losses.nt_xent import nt_xent_loss
from cl_core.losses.relational import ressl_loss
from cl_core.losses.supervised import sup_con_loss

__all__ = [
    "clip_loss",
    "dcl_loss",
    "dclw_loss",
    "debiased_nce_loss",
    "hard_negative_nce_loss",
    "info_nce_loss",
    "nt_xent_loss",
    "ressl_loss",
    "siglip_loss",
    "sup_con_loss",
]
