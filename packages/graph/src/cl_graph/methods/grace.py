"""GRACE: a node agrees with itself in two random views of its graph, and with no other node of either."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cl_core.losses import TwoViewLoss
from cl_core.projectors import Projector
from cl_graph.encoders import Encoder
from cl_graph.hosts import EncodedView, NodeContrast, Regulariser
from cl_graph.views import GraphView


class GRACE(NodeContrast):
    """GRACE: two random views of a graph, an encoder of nodes, a projector, any two-view loss.

        cl-graph fit --config grace/cora

    With ``NTXentLoss`` the loss is the published one: node i in view 1 against itself in view 2, the other nodes of
    both views as negatives, averaged over both directions. The projector serves the loss only.

    Args:
        encoder: what is trained and kept.
        loss: compares the projections of the views, for example ``NTXentLoss(temperature=0.4)``.
        first_view: makes one of the views; None for ``UniformView()``.
        second_view: makes the other one.
        projector: head between encoder and loss; None for two layers with ELU between them, as wide as the embedding.
        regulariser: adds to the loss, for example ``POT(kappa=0.4)``; None for nothing.

    Cost: that of the encoder twice, and of the loss: with ``NTXentLoss`` O(n^2 D) time and O(n D) memory for n compared
    nodes.

    Reference: Zhu et al., "Deep Graph Contrastive Representation Learning", ICML workshop 2020, arXiv 2006.04131.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: TwoViewLoss,
        first_view: GraphView | None = None,
        second_view: GraphView | None = None,
        projector: Projector | None = None,
        regulariser: Regulariser | None = None,
    ) -> None:
        super().__init__(encoder, loss, first_view, second_view, projector, regulariser)
        if not isinstance(loss, TwoViewLoss):
            raise TypeError(f"loss must be a TwoViewLoss, called with (z1, z2), got {type(loss).__name__}.")

    def contrast(self, views: Sequence[EncodedView]) -> Tensor:
        """Loss of the projections, a scalar."""
        return self.criterion(*(self.projector(view.compared) for view in views))
