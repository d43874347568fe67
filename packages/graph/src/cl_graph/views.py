"""Random views of a graph: edges dropped, features masked."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_core import _checks
from cl_graph._geometric import Graph


class GraphView:
    """Base of every random view. What is drawn comes from torch's global generator of the graph's device."""

    def __call__(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Features (n, F) and edges (2, m') of a view."""
        x, edge_index = graph.x, graph.edge_index
        kept = torch.rand(edge_index.shape[1], device=edge_index.device) >= self.edge_drop_probabilities(
            graph
        )
        columns = torch.rand(x.shape[1], device=x.device) >= self.feature_mask_probabilities(graph)
        return mask_features(x, columns), edge_index[:, kept]

    def edge_drop_probabilities(self, graph: Graph) -> float | Tensor:
        """Probability that an edge is dropped: a number, or one for each edge, shape (m,)."""
        raise NotImplementedError(f"{type(self).__name__} must define edge_drop_probabilities(graph).")

    def feature_mask_probabilities(self, graph: Graph) -> float | Tensor:
        """Probability that a feature is set to zero, of all nodes at once: a number, or one for each, shape (F,)."""
        raise NotImplementedError(f"{type(self).__name__} must define feature_mask_probabilities(graph).")


class UniformView(GraphView):
    """Every edge is dropped and every feature masked with the same probability (GRACE).

    The two directions of an undirected edge are two edges, dropped independently.

    Args:
        edge_drop: probability of an edge, in [0, 1).
        feature_mask: probability of a feature, of all nodes at once, in [0, 1).

    Reference: Zhu et al., "Deep Graph Contrastive Representation Learning", arXiv 2006.04131.
    """

    def __init__(self, edge_drop: float = 0.3, feature_mask: float = 0.3) -> None:
        check_rates(edge_drop=edge_drop, feature_mask=feature_mask)
        self.edge_drop, self.feature_mask = edge_drop, feature_mask

    def edge_drop_probabilities(self, graph: Graph) -> float:
        """The same for all."""
        return self.edge_drop

    def feature_mask_probabilities(self, graph: Graph) -> float:
        """The same for all."""
        return self.feature_mask


def check_rates(**rates: float) -> None:
    """Refuse anything but probabilities in [0, 1)."""
    for name, rate in rates.items():
        _checks.number(name, rate, at_least=0)
        if rate >= 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}.")


def mask_features(x: Tensor, kept: Tensor) -> Tensor:
    """Features (n, F), dense or sparse COO, with the columns that are not kept (F,) set to zero."""
    if not x.is_sparse:
        return x * kept.to(x.dtype)
    x = x.coalesce()
    values = x.values() * kept.to(x.dtype)[x.indices()[1]]
    return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True)
