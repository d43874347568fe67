"""The sparse matrix of a graph, multiplied from either side without a message an edge.

Gathering a row an edge and adding the rows up again moves m D numbers three times and keeps them for the backward; a
compressed matrix moves them once and keeps nothing.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cl_graph.graphs import check_edges


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """CSR matrix (size, size) of entries in any order."""
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(size + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=size), 0, out=starts[1:])
    return torch.sparse_csr_tensor(starts, columns[order], values[order], (size, size))


with (
    warnings.catch_warnings()
):  # torch says once that the layout may change; that is no concern of who trains
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
    )


class Adjacency:
    """Weighted edges of a graph as a matrix.

    Args:
        edge_index: edge e goes from ``edge_index[0, e]`` to ``edge_index[1, e]``, shape (2, m); an edge that stands
            there twice counts twice.
        weights: of the edges, shape (m,); the matrix is a constant to autograd.
        num_nodes: n.

    Cost: O(m log m) time to build one direction, O(m) memory; a product with n rows of D numbers O(m D) time.
    """

    def __init__(self, edge_index: Tensor, weights: Tensor, num_nodes: int) -> None:
        check_edges(edge_index, num_nodes)
        if weights.shape != edge_index.shape[1:]:
            raise ValueError(
                f"weights must have shape ({edge_index.shape[1]},), one for each edge, got {tuple(weights.shape)}."
            )
        self.edge_index, self.weights, self.num_nodes = edge_index, weights.detach(), num_nodes

    @classmethod
    def normalized(cls, edge_index: Tensor, num_nodes: int, dtype: torch.dtype = torch.float32) -> Adjacency:
        """The matrix of a graph convolution: w(j, i) = 1 / sqrt(d_j d_i), with a self loop on every node.

        d is the number of edges that arrive at a node, its self loop included. A node that has a self loop already gets
        no second one.

        Args:
            edge_index: edges, shape (2, m).
            num_nodes: n.
            dtype: of the weights.

        Reference: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017,
        arXiv 1609.02907.
        """
        check_edges(edge_index, num_nodes)
        edge_index = with_self_loops(edge_index, num_nodes)
        return cls(edge_index, normalized_weights(edge_index, num_nodes, dtype), num_nodes)

    def within(self, nodes: Tensor) -> Adjacency:
        """The part between some nodes (N,), each named once, in their order; weights stay what they are."""
        at = torch.full((self.num_nodes,), -1, device=nodes.device)
        at[nodes] = torch.arange(len(nodes), device=nodes.device)
        edges = at[self.edge_index]
        inside = (edges >= 0).all(0)
        return Adjacency(edges[:, inside], self.weights[inside], len(nodes))

    @cached_property
    def incoming(self) -> Tensor:
        """CSR matrix (n, n) with a row a target."""
        return _compressed(self.edge_index[1], self.edge_index[0], self.weights, self.num_nodes)

    @cached_property
    def outgoing(self) -> Tensor:
        """CSR matrix (n, n) with a row a source: the transposed one."""
        return _compressed(self.edge_index[0], self.edge_index[1], self.weights, self.num_nodes)

    def gather(self, x: Tensor) -> Tensor:
        """What arrives at each node: y_i = sum over edges (j, i) of w x_j; x and y of shape (n, D)."""
        return _Product.apply(x, self, False)

    def scatter(self, x: Tensor) -> Tensor:
        """What each node's targets hold: y_j = sum over edges (j, i) of w x_i; x and y of shape (n, D)."""
        return _Product.apply(x, self, True)


class _Product(torch.autograd.Function):
    """Product with the matrix or its transpose, whose backward is the product with the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Adjacency, transposed: bool) -> Tensor:
        ctx.adjacency, ctx.transposed, ctx.dtype = adjacency, transposed, x.dtype
        return _product(adjacency, x, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _product(ctx.adjacency, gradient, not ctx.transposed).to(ctx.dtype), None, None


def _product(adjacency: Adjacency, x: Tensor, transposed: bool) -> Tensor:
    matrix = adjacency.outgoing if transposed else adjacency.incoming
    with torch.autocast(x.device.type, enabled=False):
        return matrix @ x.to(matrix.dtype)


def with_self_loops(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Edges with one self loop on every node, those of the graph first."""
    source, target = edge_index
    loops = source == target
    nodes = torch.arange(num_nodes, device=edge_index.device)
    if bool(loops.any()):
        edge_index = edge_index[:, ~loops]
    return torch.cat([edge_index, nodes.expand(2, -1)], dim=1)


def normalized_weights(edge_index: Tensor, num_nodes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 / sqrt(d_j d_i) of each edge (j, i), shape (m,); d counts the edges that arrive, so each node needs one."""
    source, target = edge_index
    scale = torch.bincount(target, minlength=num_nodes).to(dtype).rsqrt()
    return scale[source] * scale[target]
