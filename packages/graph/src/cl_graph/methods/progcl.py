"""ProGCL: GRACE that comes to weigh negatives by how likely they are of another class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.method import Progress
from cl_core.projectors import Projector
from cl_graph.encoders import Encoder
from cl_graph.hosts import EncodedView, Regulariser
from cl_graph.methods.grace import GRACE
from cl_graph.mixture import MixtureNCELoss
from cl_graph.views import AdaptiveView, GraphView


class ProGCL(GRACE):
    """ProGCL: GRACE at first; then similarities get a mixture fitted, and negatives are weighted or mixed by it.

        cl-graph fit --config progcl/cora

    The first step from ``mixture_from`` on fits the mixtures, which are kept from then on: see
    :class:`~cl_graph.mixture.MixtureNCELoss`, also for what differs from the authors' code. Steps are counted by
    :meth:`after_step`: call it after each step in a loop of your own.

    Args:
        encoder: what is trained and kept.
        loss: weighs or mixes negatives, for example ``MixtureNCELoss(temperature=0.6, mode="weight")``.
        first_view: makes one of the views; None for ``AdaptiveView(centrality="eigenvector")``.
        second_view: makes the other one.
        projector: head between encoder and loss; None for two layers with ELU between them, as wide as the embedding.
        regulariser: adds to the loss, for example ``POT(kappa=0.3)``; None for nothing.
        mixture_from: optimiser steps before the mixtures are fitted.

    Cost: before, that of GRACE; after, that of the loss, O(n^2 D) time and O(n D) memory, to mix O(n mixed).

    Reference: Xia et al., "ProGCL: Rethinking Hard Negative Mining in Graph Contrastive Learning", ICML 2022,
    arXiv 2110.02027. In the authors' code, an epoch is a step.
    """

    steps: Tensor

    def __init__(
        self,
        encoder: Encoder,
        loss: MixtureNCELoss,
        first_view: GraphView | None = None,
        second_view: GraphView | None = None,
        projector: Projector | None = None,
        regulariser: Regulariser | None = None,
        mixture_from: int = 400,
    ) -> None:
        super().__init__(encoder, loss, first_view, second_view, projector, regulariser)
        if not isinstance(loss, MixtureNCELoss):
            raise TypeError(f"loss must be a MixtureNCELoss, got {type(loss).__name__}.")
        _checks.count("mixture_from", mixture_from, at_least=0)
        self.mixture_from = mixture_from
        self.register_buffer("steps", torch.tensor(0))

    def default_view(self) -> AdaptiveView:
        """What makes a view where none is given."""
        return AdaptiveView(centrality="eigenvector")

    def contrast(self, views: Sequence[EncodedView]) -> Tensor:
        """Loss of the projections, a scalar; fits the mixtures when it is time."""
        h1, h2 = (self.projector(view.compared) for view in views)
        due = self.training and bool(self.steps >= self.mixture_from) and not self.criterion.fitted
        if due and len(h1) > 1:
            self.criterion.fit(h1, h2)
        return self.criterion(h1, h2)

    def after_step(self, progress: Progress) -> None:
        """Count the steps."""
        self.steps.fill_(progress.step)
