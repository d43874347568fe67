"""How central each node is, and how probably an edge or a feature is dropped for it.

Important edges and features stay, unimportant ones go. Everything here is constant during training: work it out once.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cl_core import _checks
from cl_graph.adjacency import Adjacency
from cl_graph.graphs import check_edges, check_features

Centrality = Literal["degree", "pagerank", "eigenvector"]

# Steps of PageRank for edges and for features, as published.
_EDGE_STEPS, _FEATURE_STEPS = 200, 10
# Centralities that differ on average by less than this share are equal but for their rounding.
_EQUAL = 1e-6
# Rows of dense features that are widened at a time.
_ROWS = 1024
# What an eigenvector is lifted by before its logarithm is taken, as published.
_LIFT = 1e-8


def degree_centrality(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Number of edges that arrive at each node.

    Args:
        edge_index: edges, shape (2, m).
        num_nodes: n.

    Returns:
        float64, shape (n,).
    """
    check_edges(edge_index, num_nodes)
    return torch.bincount(edge_index[1], minlength=num_nodes).double()


def pagerank_centrality(
    edge_index: Tensor, num_nodes: int, *, steps: int = _EDGE_STEPS, damping: float = 0.85
) -> Tensor:
    """PageRank in the form that GCA uses: what a node does not pass on, it keeps.

        x <- (1 - damping) x + damping sum over edges (u, v) of x_u / outdegree_u

    from ones, for a number of steps. The textbook's teleports go to all nodes alike; here a node that no edge arrives
    at fades.

    Args:
        edge_index: edges, shape (2, m).
        num_nodes: n.
        steps: how many.
        damping: share that is passed on, in [0, 1].

    Returns:
        float64, shape (n,).

    Cost: O(steps m) time, O(m + n) memory.
    """
    check_edges(edge_index, num_nodes)
    _checks.count("steps", steps)
    _checks.number("damping", damping, at_least=0)
    if damping > 1:
        raise ValueError(f"damping must be in [0, 1], got {damping}.")
    source = edge_index[0]
    leaving = torch.bincount(source, minlength=num_nodes).double()
    passed = Adjacency(edge_index, damping / leaving[source], num_nodes).incoming
    x = torch.ones(num_nodes, dtype=torch.float64, device=edge_index.device)
    for _ in range(steps):
        x = (1 - damping) * x + passed @ x
    return x


def eigenvector_centrality(
    edge_index: Tensor, num_nodes: int, *, steps: int = 2000, tolerance: float = 1e-10
) -> Tensor:
    """Eigenvector of the largest eigenvalue of the adjacency, of length one and without negative entries.

    Found by power iteration from equal entries. With a self loop on every node, which moves no eigenvector, it settles
    on bipartite graphs too. Where two eigenvalues are so close that it has not settled, what it has got to is returned.

    Args:
        edge_index: edges, shape (2, m).
        num_nodes: n.
        steps: at most so many.
        tolerance: stop when no entry moves by more.

    Returns:
        float64, shape (n,).

    Cost: O(steps m) time, O(m + n) memory.
    """
    check_edges(edge_index, num_nodes)
    _checks.count("steps", steps)
    _checks.positive("tolerance", tolerance)
    ones = torch.ones(edge_index.shape[1], dtype=torch.float64, device=edge_index.device)
    arriving = Adjacency(edge_index, ones, num_nodes).incoming
    x = torch.full((num_nodes,), num_nodes**-0.5, dtype=torch.float64, device=edge_index.device)
    for step in range(steps):
        before, x = x, x + arriving @ x
        x = x / x.norm()
        # Looked at now and then, so that an accelerator need not wait each time.
        if step % 10 == 9 and bool((x - before).abs().max() < tolerance):
            break
    return x


def edge_drop_probabilities(
    edge_index: Tensor,
    num_nodes: int,
    rate: float,
    *,
    centrality: Centrality = "degree",
    threshold: float = 0.7,
) -> Tensor:
    """How probably each edge is dropped: the more so, the less central the node it arrives at.

        p_e = min(rate w_e, threshold),   w_e = (max s - s_e) / (max s - mean s),   s_e = log c(target of e)

    so that w has the mean 1. The eigenvector enters as log(c + 1e-8). Where all are equally central, every edge has the
    same probability, the lesser of ``rate`` and ``threshold``.

    Args:
        edge_index: edges, shape (2, m).
        num_nodes: n.
        rate: average probability while none is cut off, in [0, 1].
        centrality: ``"degree"``, ``"pagerank"`` (200 steps) or ``"eigenvector"``.
        threshold: largest probability, in [0, 1].

    Returns:
        float64 in [0, threshold], shape (m,).

    Raises:
        ValueError: for numbers out of range, or edges that do not fit.

    Cost: that of the centrality, and O(m).

    Reference: Zhu et al., "Graph Contrastive Learning with Adaptive Augmentation", WWW 2021, arXiv 2010.14945. The
    authors divide by 0 on regular graphs, and take for n what the edges name, so that trailing nodes without edges are
    lost.
    """
    central = _centrality(centrality, edge_index, num_nodes, _EDGE_STEPS)
    if centrality == "eigenvector":
        central = central + _LIFT
    return _probabilities(central[edge_index[1]].log(), rate, threshold)


def feature_mask_probabilities(
    x: Tensor,
    edge_index: Tensor,
    rate: float,
    *,
    centrality: Centrality = "degree",
    threshold: float = 0.7,
    magnitude: bool | None = None,
) -> Tensor:
    """How probably each feature is masked: the more so, the less central the nodes that have it.

    As :func:`edge_drop_probabilities`, with s_j = log sum_v a_vj c(v), where a is 1 for each feature that is not zero,
    or its absolute value. A feature that no node has tells nothing: it is masked as probably as the least central of
    the others, and does not enter the mean.

    Args:
        x: features, dense or sparse COO, shape (n, F).
        edge_index: edges, shape (2, m).
        rate: average probability while none is cut off, in [0, 1].
        centrality: ``"degree"``, ``"pagerank"`` (10 steps) or ``"eigenvector"``.
        threshold: largest probability, in [0, 1].
        magnitude: weigh by absolute values, as published for dense features; None where most entries are not zero.

    Returns:
        float64 in [0, threshold], shape (F,).

    Raises:
        ValueError: for numbers out of range, or shapes that do not fit.

    Cost: that of the centrality, and O(n F), of sparse features only their entries.

    Reference: Zhu et al., "Graph Contrastive Learning with Adaptive Augmentation", WWW 2021, arXiv 2010.14945. The
    authors' code has no number for a feature that no node has.
    """
    check_features(x)
    if magnitude is not None:
        _checks.flag("magnitude", magnitude)
    central = _centrality(centrality, edge_index, len(x), _FEATURE_STEPS)
    if x.is_sparse:
        x = x.coalesce()
    entries = x.values() if x.is_sparse else x
    if magnitude is None:
        magnitude = 2 * int(entries.count_nonzero()) > x.shape[0] * x.shape[1]

    def had(values: Tensor) -> Tensor:
        return values.double().abs() if magnitude else (values != 0).double()

    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    if x.is_sparse:
        nodes, columns = x.indices()
        total.index_add_(0, columns, had(entries) * central[nodes])
    else:
        for rows, of_rows in zip(x.split(_ROWS), central.split(_ROWS), strict=True):
            total += of_rows @ had(rows)
    return _probabilities(total.log(), rate, threshold)


def _centrality(name: Centrality, edge_index: Tensor, num_nodes: int, steps: int) -> Tensor:
    _checks.choice("centrality", name, get_args(Centrality))
    if name == "degree":
        return degree_centrality(edge_index, num_nodes)
    if name == "pagerank":
        return pagerank_centrality(edge_index, num_nodes, steps=steps)
    return eigenvector_centrality(edge_index, num_nodes)


def drop_weights(scores: Tensor) -> Tensor:
    """(max s - s) / (max s - mean s), of mean 1; of scores of -inf, which do not count, the largest of the others'.

    Args:
        scores: logarithms, shape (N,).

    Returns:
        Shape (N,); ones where all scores are equal, or none is finite.
    """
    counted = scores[scores.isfinite()]
    if not len(counted):
        return torch.ones_like(scores)
    top = counted.max()
    spread = top - counted.mean()
    if not bool(spread > _EQUAL):
        return torch.ones_like(scores)
    return (top - torch.where(scores.isfinite(), scores, counted.min())) / spread


def _probabilities(scores: Tensor, rate: float, threshold: float) -> Tensor:
    for name, value in (("rate", rate), ("threshold", threshold)):
        _checks.number(name, value, at_least=0)
        if value > 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")
    return (rate * drop_weights(scores)).clamp(0, threshold)
