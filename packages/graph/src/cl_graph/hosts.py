"""What the hosts of node contrast share: two random views, an encoder, a projector, and what is added to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cl_core.losses import ContrastiveLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector, built
from cl_graph._geometric import Graph
from cl_graph.encoders import Encoder
from cl_graph.graphs import NodeBatch, unpacked
from cl_graph.views import GraphView, UniformView


@dataclass(frozen=True)
class EncodedView:
    """A view of a graph and what an encoder made of it.

    Attributes:
        edge_index: edges that were kept, shape (2, m').
        embeddings: of all nodes, shape (n, D).
        edge_drop: probability with which an edge of the graph was dropped, or of each, shape (m,).
        feature_mask: probability with which a feature was masked, or of each, shape (F,).
        nodes: that are compared, shape (B,); None for all.
    """

    edge_index: Tensor
    embeddings: Tensor
    edge_drop: float | Tensor
    feature_mask: float | Tensor
    nodes: Tensor | None

    @property
    def compared(self) -> Tensor:
        """Embeddings of the nodes that are compared, shape (B, D)."""
        return self.embeddings if self.nodes is None else self.embeddings[self.nodes]


class Regulariser(nn.Module):
    """Base of what can be added to the loss of any host."""

    def forward(
        self, host: Tensor, encoder: nn.Module, graph: Graph, views: Sequence[EncodedView]
    ) -> dict[str, Tensor]:
        """The host's loss with this one's: ``loss``, and what is worth logging.

        Args:
            host: the host's loss, a scalar.
            encoder: that embedded the views.
            graph: clean, of which they are views.
            views: both.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(host, encoder, graph, views).")


class NodeContrast(Method):
    """Base of the hosts: a subclass says in :meth:`contrast` how the views are compared.

    Args:
        encoder: what is trained and kept.
        loss: stored as ``criterion``.
        first_view: makes one of the views; None for ``default_view()``.
        second_view: makes the other one.
        projector: head between encoder and loss; None for two layers with ELU between them, as wide as the embedding.
        regulariser: adds to the loss, for example ``POT(kappa=0.4)``; None for nothing.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ContrastiveLoss,
        first_view: GraphView | None,
        second_view: GraphView | None,
        projector: Projector | None,
        regulariser: Regulariser | None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise TypeError(f"encoder must be a cl_graph Encoder, got {type(encoder).__name__}.")
        if regulariser is not None and not isinstance(regulariser, Regulariser):
            raise TypeError(f"regulariser must be a Regulariser or None, got {type(regulariser).__name__}.")
        self.encoder, self.criterion, self.regulariser = encoder, loss, regulariser
        self.first_view = self.default_view() if first_view is None else first_view
        self.second_view = self.default_view() if second_view is None else second_view
        head = projector or MLPProjector(out_dim=encoder.dim, norm="none", activation="elu")
        self.projector = built("projector", head, encoder.dim, "the encoder's dim")

    def build(self, data: Any) -> None:
        """Give an encoder without ``in_dim`` as many inputs as the data have features."""
        if self.encoder.in_dim is None:
            self.encoder.build(data.num_features)

    def default_view(self) -> GraphView:
        """What makes a view where none is given."""
        return UniformView()

    def contrast(self, views: Sequence[EncodedView]) -> Tensor:
        """The host's loss of both views, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define contrast(views).")

    def loss(self, batch: NodeBatch | Graph) -> Tensor | dict[str, Tensor]:
        """Loss of two views of a graph over the nodes of the batch: a scalar, with a regulariser also its parts."""
        graph, nodes = unpacked(batch)
        views = self.views(graph, nodes)
        value = self.contrast(views)
        return value if self.regulariser is None else self.regulariser(value, self.encoder, graph, views)

    def views(self, graph: Graph, nodes: Tensor | None) -> list[EncodedView]:
        """Draw both views and embed them."""
        return [self.encoded(view, graph, nodes) for view in (self.first_view, self.second_view)]

    def encoded(self, view: GraphView, graph: Graph, nodes: Tensor | None) -> EncodedView:
        """Draw a view and embed it."""
        x, edge_index = view(graph)
        drop, mask = view.edge_drop_probabilities(graph), view.feature_mask_probabilities(graph)
        return EncodedView(edge_index, self.encoder(x, edge_index), drop, mask, nodes)

    def embed(self, inputs: NodeBatch | Graph) -> Tensor:
        """Embeddings of the nodes in the graph as it is, shape (B, encoder.dim)."""
        graph, nodes = unpacked(inputs)
        z = self.encoder(graph.x, graph.edge_index)
        return z if nodes is None else z[nodes]
