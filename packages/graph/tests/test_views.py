import pytest
import torch

from cl_graph.views import GraphView, UniformView


def test_shares_of_edges_and_whole_columns(graph):
    torch.manual_seed(0)
    view, kept, masked = UniformView(0.3, 0.4), 0, 0
    for _ in range(300):
        x, edge_index = view(graph)
        pairs = set(map(tuple, edge_index.T.tolist()))
        assert pairs <= set(map(tuple, graph.edge_index.T.tolist()))
        kept += edge_index.shape[1] / graph.edge_index.shape[1]
        gone = x.sum(0) == 0
        assert torch.equal(x[:, ~gone], graph.x[:, ~gone])
        masked += gone.double().mean().item()
    assert kept / 300 == pytest.approx(0.7, abs=0.02)
    assert masked / 300 == pytest.approx(0.4, abs=0.03)


def test_the_two_directions_of_an_edge_are_dropped_by_themselves(graph):
    torch.manual_seed(0)
    _, edge_index = UniformView(0.5, 0)(graph)
    pairs = set(map(tuple, edge_index.T.tolist()))
    assert any((target, source) not in pairs for source, target in pairs)


def test_sparse_features_are_masked_alike(graph):
    torch.manual_seed(3)
    dense, _ = UniformView(0.3, 0.5)(graph)
    torch.manual_seed(3)
    graph.x = graph.x.to_sparse_coo()
    sparse, _ = UniformView(0.3, 0.5)(graph)
    assert sparse.is_sparse and torch.equal(sparse.to_dense(), dense)


def test_nothing_is_lost_at_rate_zero(graph):
    x, edge_index = UniformView(0, 0)(graph)
    assert torch.equal(x, graph.x) and torch.equal(edge_index, graph.edge_index)


@pytest.mark.parametrize("rates", [(1.0, 0), (-0.1, 0), (0, 1.0), (0, float("nan"))])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(ValueError, match="must be"):
        UniformView(*rates)


def test_a_view_must_say_what_it_does(graph):
    with pytest.raises(NotImplementedError, match="GraphView must define edge_drop_probabilities"):
        GraphView()(graph)
