"""Random views of a graph: edges dropped, features masked."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from cl_core import _checks
from cl_graph._geometric import Graph
from cl_graph.centrality import Centrality, edge_drop_probabilities, feature_mask_probabilities


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


class AdaptiveView(GraphView):
    """Edges to nodes of little importance, and features of such nodes, are dropped more often (GCA).

    How often is worked out once for a graph, as long as the next one has the same ``edge_index`` and ``x``; see
    :func:`~cl_graph.centrality.edge_drop_probabilities` and
    :func:`~cl_graph.centrality.feature_mask_probabilities`. The two directions of an undirected edge are two edges, of
    probabilities of their own.

    Args:
        edge_drop: average probability of an edge while none is cut off, in [0, 1).
        feature_mask: average probability of a feature, of all nodes at once, in [0, 1).
        centrality: importance of a node: ``"degree"``, ``"pagerank"`` or ``"eigenvector"``.
        threshold: largest probability of an edge or a feature, in [0, 1).

    Reference: Zhu et al., "Graph Contrastive Learning with Adaptive Augmentation", WWW 2021, arXiv 2010.14945.
    """

    def __init__(
        self,
        edge_drop: float = 0.3,
        feature_mask: float = 0.3,
        centrality: Centrality = "degree",
        threshold: float = 0.7,
    ) -> None:
        check_rates(edge_drop=edge_drop, feature_mask=feature_mask, threshold=threshold)
        _checks.choice("centrality", centrality, get_args(Centrality))
        self.edge_drop, self.feature_mask = edge_drop, feature_mask
        self.centrality, self.threshold = centrality, threshold
        self._of_edges, self._of_features = _Remembered(), _Remembered()

    def edge_drop_probabilities(self, graph: Graph) -> float | Tensor:
        """One for each edge, shape (m,); 0 for none."""
        if self.edge_drop == 0:
            return 0.0
        edges, n, options = graph.edge_index, int(graph.num_nodes), self._options()
        return self._of_edges(lambda: edge_drop_probabilities(edges, n, self.edge_drop, **options), edges)

    def feature_mask_probabilities(self, graph: Graph) -> float | Tensor:
        """One for each feature, shape (F,); 0 for none."""
        if self.feature_mask == 0:
            return 0.0
        x, edges, options = graph.x, graph.edge_index, self._options()
        return self._of_features(
            lambda: feature_mask_probabilities(x, edges, self.feature_mask, **options), x, edges
        )

    def _options(self) -> dict[str, Any]:
        return {"centrality": self.centrality, "threshold": self.threshold}


class _Remembered:
    """What was worked out last, for as long as the tensors it is of live and are as they were."""

    def __init__(self) -> None:
        self._of: tuple[tuple[weakref.ref[Tensor], int | None], ...] = ()
        self._value: Tensor | None = None

    def __call__(self, work_out: Callable[[], Tensor], *of: Tensor) -> Tensor:
        """The value for some tensors, worked out unless it is the one at hand."""
        same = len(of) == len(self._of) and all(
            known() is tensor and version == _version(tensor)
            for tensor, (known, version) in zip(of, self._of, strict=True)
        )
        if not same or self._value is None:
            self._value = work_out()
            self._of = tuple((weakref.ref(tensor), _version(tensor)) for tensor in of)
        return self._value

    def __reduce__(self) -> tuple[type[_Remembered], tuple[()]]:
        """A copy remembers nothing: its tensors are others."""
        return _Remembered, ()


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to, which inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version


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
