"""Encoders: from a graph with features to one row a node."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_graph._geometric import GCNConv
from cl_graph.adjacency import Adjacency

Activation = Literal["relu", "prelu", "rrelu", "elu", "leaky_relu", "none"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "none": nn.Identity,
}


class Encoder(nn.Module):
    """Base of every encoder: maps features (n, ``in_dim``) and edges (2, m) to (n, ``dim``).

    ``in_dim`` may be left None at construction; :meth:`build` is then called with the number of features of the data.
    """

    in_dim: int | None
    dim: int

    def build(self, in_dim: int) -> None:
        """Create the layers for ``in_dim`` features and set ``self.in_dim``."""
        raise NotImplementedError(f"{type(self).__name__} must define build(in_dim).")

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Embeddings of all nodes, shape (n, dim)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, edge_index).")


class GCN(Encoder):
    """Graph convolutions, an activation after each, the last one too.

    h^(l+1) = act(A h^(l) W_l + b_l), A the normalised adjacency with self loops. The layers are torch_geometric's
    ``GCNConv`` (its weights, names and initialisation); the product with A is one of compressed matrices, and features
    may be sparse.

    Args:
        in_dim: features of a node; None takes those of the data.
        hidden_dim: columns of the hidden layers; None takes twice ``dim``, as GRACE does.
        dim: columns of the embeddings.
        layers: number of convolutions.
        activation: ``"relu"``, ``"prelu"``, ``"rrelu"``, ``"elu"``, ``"leaky_relu"`` or ``"none"``; layers share it.

    Cost: O(m (hidden_dim + dim) + n (in_dim hidden_dim + hidden_dim dim)) at two layers; of sparse features only their
    entries count.

    Reference: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017,
    arXiv 1609.02907.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        hidden_dim: int | None = None,
        dim: int = 128,
        layers: int = 2,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim)):
            if value is not None:
                _checks.count(name, value)
        _checks.count("dim", dim)
        _checks.count("layers", layers)
        _checks.choice("activation", activation, _ACTIVATIONS)
        self.in_dim: int | None = None
        self.hidden_dim, self.dim, self.layers, self.activation = hidden_dim, dim, layers, activation
        self.convs = nn.ModuleList()
        self.act = _ACTIVATIONS[activation]()
        if in_dim is not None:
            self.build(in_dim)

    def build(self, in_dim: int) -> None:
        """Create the layers for ``in_dim`` features."""
        if self.in_dim is not None:
            raise RuntimeError(f"this encoder is already built, for in_dim={self.in_dim}.")
        hidden = self.hidden_dim or 2 * self.dim
        widths = [in_dim, *[hidden] * (self.layers - 1), self.dim]
        self.convs.extend(GCNConv(width, out) for width, out in pairwise(widths))
        self.in_dim = in_dim

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Embeddings of all nodes, shape (n, dim)."""
        if self.in_dim is None:
            raise RuntimeError("this encoder has no in_dim yet: give one, or let a method build it.")
        if x.shape[1] != self.in_dim:
            raise ValueError(f"x must have {self.in_dim} features, got {x.shape[1]}.")
        adjacency = Adjacency.normalized(edge_index, len(x), x.dtype)
        for conv in self.convs:
            x = self.act(adjacency.gather(linear(x, conv.lin.weight)) + conv.bias)
        return x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T of dense or sparse COO features (n, F) and weights (D, F), shape (n, D)."""
    return x.to_sparse_csr() @ weight.t() if x.is_sparse else torch.nn.functional.linear(x, weight)
