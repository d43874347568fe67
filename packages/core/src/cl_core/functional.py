"""All losses as functions: embeddings first, everything else by keyword."""

from cl_core.losses.decoupled import dcl_loss, dclw_loss
from cl_core.losses.info_nce import info_nce_loss
from cl_core.losses.nt_xent import nt_xent_loss
from cl_core.losses.supervised import sup_con_loss

__all__ = ["dcl_loss", "dclw_loss", "info_nce_loss", "nt_xent_loss", "sup_con_loss"]
