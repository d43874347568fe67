import pytest
import torch

from cl_graph.centrality import (
    degree_centrality,
    drop_weights,
    edge_drop_probabilities,
    eigenvector_centrality,
    feature_mask_probabilities,
    pagerank_centrality,
)

NAMES = ["degree", "pagerank", "eigenvector"]


def dense_of(edges, n):
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.index_put_((edges[0], edges[1]), torch.ones(edges.shape[1]).double(), accumulate=True)


def both_ways(*pairs):
    edges = torch.tensor(pairs).T
    return torch.cat([edges, edges.flip(0)], dim=1)


def ring(n):
    return both_ways(*((i, (i + 1) % n) for i in range(n)))


def test_degree_counts_what_arrives():
    edges = torch.tensor([[0, 0, 2], [1, 2, 1]])
    assert degree_centrality(edges, 5).tolist() == [0, 2, 1, 0, 0]


def test_pagerank_is_the_recursion(graph):
    matrix, x = dense_of(graph.edge_index, 24), torch.ones(24).double()
    for _ in range(10):
        x = 0.15 * x + 0.85 * (matrix / matrix.sum(1, keepdim=True)).T @ x
    torch.testing.assert_close(pagerank_centrality(graph.edge_index, 24, steps=10), x)
    assert x.sum() == pytest.approx(24)  # no node is a dead end


def test_eigenvector_is_the_leading_one(graph):
    _, vectors = torch.linalg.eigh(dense_of(graph.edge_index, 24))
    expected = vectors[:, -1] * vectors[:, -1].sum().sign()
    found = eigenvector_centrality(graph.edge_index, 24)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_eigenvector_settles_on_a_bipartite_graph():
    star = both_ways((0, 1), (0, 2), (0, 3), (0, 4))
    expected = torch.tensor([0.5**0.5, *[0.125**0.5] * 4], dtype=torch.float64)
    torch.testing.assert_close(eigenvector_centrality(star, 5), expected)


@pytest.mark.parametrize("name", NAMES)
def test_edges_to_central_nodes_are_dropped_less(graph, name):
    edges = graph.edge_index
    probabilities = edge_drop_probabilities(edges, 24, 0.2, centrality=name)
    arriving = torch.bincount(edges[1], minlength=24)[edges[1]]
    least, most = arriving == arriving.min(), arriving == arriving.max()
    assert probabilities[least].mean() > probabilities[most].mean() + 0.1
    assert probabilities.min() >= 0 and probabilities.max() <= 0.7


def test_the_mean_is_the_rate_while_nothing_is_cut_off(graph):
    probabilities = edge_drop_probabilities(graph.edge_index, 24, 0.01)
    assert probabilities.mean().item() == pytest.approx(0.01)
    assert edge_drop_probabilities(graph.edge_index, 24, 0.6, threshold=0.65).max() == 0.65


@pytest.mark.parametrize("name", NAMES)
def test_where_all_are_equally_central_all_are_dropped_alike(name):
    probabilities = edge_drop_probabilities(ring(8), 8, 0.3, centrality=name)
    torch.testing.assert_close(probabilities, torch.full((16,), 0.3).double())
    same = feature_mask_probabilities(torch.ones(8, 3), ring(8), 0.3, centrality=name)
    torch.testing.assert_close(same, torch.full((3,), 0.3).double())
    assert edge_drop_probabilities(ring(8), 8, 0.9, centrality=name).max() == 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("magnitude", [False, True, None])
def test_features_of_nobody_and_trailing_nodes_have_numbers(graph, name, sparse, magnitude):
    x = torch.cat([graph.x, torch.rand(3, 12)])  # three more nodes, without edges
    x[:, 4] = 0
    x = x.to_sparse_coo() if sparse else x
    probabilities = feature_mask_probabilities(x, graph.edge_index, 0.2, centrality=name, magnitude=magnitude)
    assert probabilities.isfinite().all() and probabilities.min() >= 0 and probabilities.max() <= 0.7
    assert probabilities[4] == probabilities.max()
    edges = edge_drop_probabilities(graph.edge_index, 27, 0.2, centrality=name)
    assert edges.isfinite().all() and edges.min() >= 0 and edges.max() <= 0.7


def test_features_of_nobody_leave_the_others_alone(graph):
    wide = torch.cat([graph.x, torch.zeros(24, 5)], dim=1)
    for x, y in ((graph.x, wide), (graph.x.to_sparse_coo(), wide.to_sparse_coo())):
        alone, among = (feature_mask_probabilities(part, graph.edge_index, 0.2) for part in (x, y))
        torch.testing.assert_close(among[:12], alone)
    nothing = feature_mask_probabilities(torch.zeros(24, 5), graph.edge_index, 0.2)
    torch.testing.assert_close(nothing, torch.full((5,), 0.2).double())


def test_sources_that_fade_have_numbers():
    chain = torch.tensor(
        [[0, 1, 2, 3], [1, 2, 3, 1]]
    )  # nothing arrives at 0, which passes on what it has left
    probabilities = edge_drop_probabilities(chain, 600, 0.2, centrality="pagerank")
    assert probabilities.isfinite().all() and probabilities.max() <= 0.7


def test_dense_features_weigh_by_their_size(graph):
    x = torch.rand(24, 6) + 0.1
    auto = feature_mask_probabilities(x, graph.edge_index, 0.2)
    torch.testing.assert_close(auto, feature_mask_probabilities(x, graph.edge_index, 0.2, magnitude=True))
    score = (degree_centrality(graph.edge_index, 24) @ x.double()).log()
    torch.testing.assert_close(auto, (0.2 * drop_weights(score)).clamp(0, 0.7))
    rows = x.repeat(60, 1)  # more than are read at a time
    whole = feature_mask_probabilities(rows, graph.edge_index, 0.2)
    torch.testing.assert_close(whole, auto)  # the other nodes have no edges


def test_scaled_rows_of_sets_weigh_by_presence(graph):
    x = graph.x * (torch.rand(24, 12) < 0.5)
    made = [feature_mask_probabilities(x * scale, graph.edge_index, 0.2) for scale in (1, 0.25)]
    torch.testing.assert_close(*made)
    uneven = feature_mask_probabilities(x * torch.rand(24, 1), graph.edge_index, 0.2)
    torch.testing.assert_close(uneven, made[0])


def test_a_graph_without_edges():
    edges = torch.empty(2, 0, dtype=torch.int64)
    for name in NAMES:
        assert edge_drop_probabilities(edges, 4, 0.2, centrality=name).shape == (0,)
        assert feature_mask_probabilities(torch.eye(4), edges, 0.2, centrality=name).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 1.5}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ({"rate": -0.1}, ValueError, "rate must be at least 0"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\]"),
        ({"centrality": "katz"}, ValueError, "centrality must be one of 'degree', 'pagerank', 'eigenvector'"),
        ({"num_nodes": 3}, ValueError, r"edge_index must lie in \[0, 3\)"),
    ],
)
def test_refusals(graph, options, error, message):
    with pytest.raises(error, match=message):
        edge_drop_probabilities(**{"edge_index": graph.edge_index, "num_nodes": 24, "rate": 0.2} | options)


def test_other_refusals(graph):
    with pytest.raises(TypeError, match="magnitude must be True or False"):
        feature_mask_probabilities(graph.x, graph.edge_index, 0.2, magnitude=1)
    with pytest.raises(ValueError, match=r"damping must be in \[0, 1\], got 2"):
        pagerank_centrality(graph.edge_index, 24, damping=2)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        eigenvector_centrality(graph.edge_index, 24, steps=0)
