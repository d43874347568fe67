"""GCA: GRACE whose views keep the important edges and features."""

from __future__ import annotations

from cl_graph.methods.grace import GRACE
from cl_graph.views import AdaptiveView


class GCA(GRACE):
    """GCA: GRACE with views that drop unimportant edges and features more often.

        cl-graph fit --config gca/cora

    All that differs is where no view is given: ``AdaptiveView()`` in place of ``UniformView()``.

    Args:
        encoder: what is trained and kept.
        loss: compares the projections of the views, for example ``NTXentLoss(temperature=0.4)``.
        first_view: makes one of the views; None for ``AdaptiveView()``.
        second_view: makes the other one.
        projector: head between encoder and loss; None for two layers with ELU between them, as wide as the embedding.
        regulariser: adds to the loss, for example ``POT(kappa=0.3)``; None for nothing.

    Cost: that of GRACE, and once for a graph that of its centralities.

    Reference: Zhu et al., "Graph Contrastive Learning with Adaptive Augmentation", WWW 2021, arXiv 2010.14945.
    """

    def default_view(self) -> AdaptiveView:
        """What makes a view where none is given."""
        return AdaptiveView()
