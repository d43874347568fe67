"""What methods on nodes are trained on: a graph, and the nodes of it that take part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_core import _checks
from cl_graph._geometric import Graph

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NodeBatch:
    """A graph to encode, and the nodes of it whose embeddings are compared or asked for.

    Attributes:
        graph: features ``x`` (n, F), dense or sparse COO, and edges ``edge_index`` (2, m).
        nodes: row numbers of the nodes, shape (B,); None for all.
        moved: the graph by device, shared by the batches of one graph so that it is copied once.
    """

    graph: Graph
    nodes: Tensor | None = None
    moved: dict[torch.device, Graph] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        """Nodes that take part."""
        return int(self.graph.num_nodes) if self.nodes is None else len(self.nodes)

    def to(self, device: Any, non_blocking: bool = False) -> NodeBatch:
        """The batch on a device; the graph is copied there once."""
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        if device not in self.moved:
            self.moved[device] = self.graph.to(device, non_blocking=non_blocking)
        nodes = None if self.nodes is None else self.nodes.to(device, non_blocking=non_blocking)
        return NodeBatch(self.moved[device], nodes, self.moved)


def unpacked(batch: NodeBatch | Graph) -> tuple[Graph, Tensor | None]:
    """Graph and nodes of a batch: of ours, of a whole graph, or of a ``NeighborLoader`` of torch_geometric.

    The last puts the nodes that it was asked for first and says in ``batch_size`` how many they are.

    Raises:
        TypeError: if it is none of them.
        ValueError: in one sentence, if features and edges do not fit each other.
    """
    if isinstance(batch, NodeBatch):
        graph, nodes = batch.graph, batch.nodes
    elif isinstance(batch, Graph):
        asked = batch.get("batch_size")
        graph, nodes = (
            batch,
            None if asked is None else torch.arange(int(asked), device=batch.edge_index.device),
        )
    else:
        raise TypeError(
            f"the batch must be a NodeBatch or a torch_geometric Data, got {type(batch).__name__}."
        )
    if graph.x is None or graph.edge_index is None:
        raise ValueError(f"the graph must have features x and edges edge_index, got {graph}.")
    check_features(graph.x)
    check_edges(graph.edge_index, len(graph.x))
    return graph, nodes


def check_features(x: Tensor) -> None:
    """Refuse anything but a finite floating matrix (n, F), dense or sparse COO."""
    if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must have shape (n, F), one row of features for each node, got {got}.")
    if x.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(f"x must be dense or sparse COO, got {x.layout}.")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be floating, got {x.dtype}.")
    _checks.finite("x", x.values() if x.is_sparse and x.is_coalesced() else x)


def check_edges(edge_index: Tensor, num_nodes: int) -> None:
    """Refuse anything but integers (2, m) in [0, num_nodes)."""
    if not isinstance(edge_index, Tensor) or edge_index.ndim != 2 or len(edge_index) != 2:
        got = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise ValueError(f"edge_index must have shape (2, m), from row 0 to row 1, got {got}.")
    if edge_index.dtype != torch.int64:
        raise TypeError(f"edge_index must be int64, got {edge_index.dtype}.")
    if edge_index.numel():
        low, high = edge_index.aminmax()
        _checks.require(
            (low >= 0) & (high < num_nodes), f"edge_index must lie in [0, {num_nodes}), got other numbers."
        )
