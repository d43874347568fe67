import copy
import pickle

import pytest
import torch

from cl_graph import views
from cl_graph.centrality import edge_drop_probabilities, feature_mask_probabilities
from cl_graph.views import AdaptiveView, GraphView, UniformView


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


def test_an_adaptive_view_drops_as_probably_as_it_says(graph):
    torch.manual_seed(0)
    view, kept, masked = AdaptiveView(0.4, 0.3, "pagerank", 0.6), torch.zeros(24, 24), torch.zeros(12)
    for _ in range(400):
        x, edges = view(graph)
        kept[tuple(edges)] += 1
        masked += x.sum(0) == 0
    dropped = 1 - kept[tuple(graph.edge_index)].double() / 400
    options = {"centrality": "pagerank", "threshold": 0.6}
    expected = edge_drop_probabilities(graph.edge_index, 24, 0.4, **options)
    torch.testing.assert_close(dropped, expected, atol=0.11, rtol=0)
    assert dropped.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
    expected = feature_mask_probabilities(graph.x, graph.edge_index, 0.3, **options)
    torch.testing.assert_close(masked.double() / 400, expected, atol=0.11, rtol=0)


def test_probabilities_are_worked_out_once_for_a_graph(graph, monkeypatch):
    calls = []
    for name in ("edge_drop_probabilities", "feature_mask_probabilities"):
        made = getattr(views, name)
        monkeypatch.setattr(
            views, name, lambda *given, made=made, **options: calls.append(1) or made(*given, **options)
        )
    view = AdaptiveView()
    for _ in range(3):
        view(graph)
    assert len(calls) == 2
    other = graph.clone()
    other.edge_index = graph.edge_index[:, :-2].clone()
    before = view.edge_drop_probabilities(graph)
    assert len(view.edge_drop_probabilities(other)) == len(before) - 2
    assert len(calls) == 3
    other.edge_index[1, 0] = other.edge_index[0, 0]  # written to: no longer what it was
    view.edge_drop_probabilities(other)
    assert len(calls) == 4


def test_a_copied_view_remembers_nothing_but_its_arguments(graph):
    view = AdaptiveView(0.2, 0.1, "eigenvector", 0.5)
    probabilities = view.edge_drop_probabilities(graph)
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert (other.edge_drop, other.feature_mask) == (0.2, 0.1)
        assert torch.equal(other.edge_drop_probabilities(graph), probabilities)


def test_an_adaptive_view_of_rate_zero_loses_nothing(graph):
    view = AdaptiveView(0, 0)
    x, edge_index = view(graph)
    assert torch.equal(x, graph.x) and torch.equal(edge_index, graph.edge_index)
    assert view.edge_drop_probabilities(graph) == view.feature_mask_probabilities(graph) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edge_drop": 1.0}, r"edge_drop must be in \[0, 1\)"),
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\)"),
        ({"centrality": "katz"}, "centrality must be one of"),
    ],
)
def test_adaptive_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveView(**options)
