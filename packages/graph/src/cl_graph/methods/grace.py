"""GRACE: a node agrees with itself in two random views of its graph, and with no other node of either."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_core.losses import TwoViewLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector, built
from cl_graph._geometric import Graph
from cl_graph.encoders import Encoder
from cl_graph.graphs import NodeBatch, unpacked
from cl_graph.views import GraphView, UniformView


class GRACE(Method):
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
    ) -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise TypeError(f"encoder must be a cl_graph Encoder, got {type(encoder).__name__}.")
        if not isinstance(loss, TwoViewLoss):
            raise TypeError(f"loss must be a TwoViewLoss, called with (z1, z2), got {type(loss).__name__}.")
        self.encoder, self.criterion = encoder, loss
        self.first_view = UniformView() if first_view is None else first_view
        self.second_view = UniformView() if second_view is None else second_view
        head = projector or MLPProjector(out_dim=encoder.dim, norm="none", activation="elu")
        self.projector = built("projector", head, encoder.dim, "the encoder's dim")

    def build(self, data: Any) -> None:
        """Give an encoder without ``in_dim`` as many inputs as the data have features."""
        if self.encoder.in_dim is None:
            self.encoder.build(data.num_features)

    def loss(self, batch: NodeBatch | Graph) -> Tensor:
        """Loss of two views of a graph, over the nodes of the batch; a scalar."""
        graph, nodes = unpacked(batch)
        return self.criterion(
            *(self.project(*view(graph), nodes) for view in (self.first_view, self.second_view))
        )

    def project(self, x: Tensor, edge_index: Tensor, nodes: Tensor | None = None) -> Tensor:
        """What the loss sees of the nodes of a view, shape (B, projector.out_dim)."""
        z = self.encoder(x, edge_index)
        return self.projector(z if nodes is None else z[nodes])

    def embed(self, inputs: NodeBatch | Graph) -> Tensor:
        """Embeddings of the nodes in the graph as it is, shape (B, encoder.dim)."""
        graph, nodes = unpacked(inputs)
        z = self.encoder(graph.x, graph.edge_index)
        return z if nodes is None else z[nodes]
