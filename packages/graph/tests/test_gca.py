import torch

from cl_core.losses import NTXentLoss
from cl_graph.centrality import edge_drop_probabilities
from cl_graph.encoders import GCN
from cl_graph.methods import GCA, GRACE
from cl_graph.pot import POT, EdgeDropBounds
from cl_graph.views import AdaptiveView, UniformView


def gca(**options):
    torch.manual_seed(0)
    return GCA(GCN(12, dim=8), NTXentLoss(0.4), **options)


def test_it_is_grace_with_adaptive_views(graph):
    method = gca()
    assert isinstance(method.first_view, AdaptiveView) and isinstance(method.second_view, AdaptiveView)
    torch.manual_seed(0)
    grace = GRACE(GCN(12, dim=8), NTXentLoss(0.4), AdaptiveView(), AdaptiveView())
    losses = []
    for one in (method, grace):
        torch.manual_seed(1)
        losses.append(one(graph))
    assert torch.equal(*losses)


def test_other_views_may_be_given():
    view = UniformView(0.1, 0.2)
    assert gca(second_view=view).second_view is view


def test_pot_bounds_each_edge_at_its_own_probability(graph):
    method = gca(first_view=AdaptiveView(0.4, 0), second_view=AdaptiveView(0.3, 0), regulariser=POT(0.3))
    view = method.encoded(method.first_view, graph, None)
    probabilities = edge_drop_probabilities(graph.edge_index, 24, 0.4)
    assert torch.equal(view.edge_drop, probabilities)
    expected = torch.zeros(24).double().index_add(0, graph.edge_index[1], probabilities).round()
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, view.edge_drop)
    assert torch.equal((bounds.degree - bounds.kept).double(), expected.minimum(bounds.degree - 2))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    before = method(graph)
    for _ in range(30):
        optimizer.zero_grad()
        losses = method(graph)
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss"] < before["loss"] and losses["pot"] < before["pot"]
