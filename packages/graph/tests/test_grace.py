import pytest
import torch
from torch.nn import functional

from cl_core.losses import NTXentLoss, SupConLoss
from cl_core.projectors import MLPProjector
from cl_graph.data import NodeBatch
from cl_graph.encoders import GCN
from cl_graph.graphs import Graph
from cl_graph.methods import GRACE
from cl_graph.views import UniformView


def grace(**options):
    torch.manual_seed(0)
    views = {"first_view": UniformView(0.2, 0.2), "second_view": UniformView(0.4, 0.1)}
    return GRACE(GCN(12, dim=8), NTXentLoss(0.4), **views | options)


def published_loss(h1, h2, temperature):
    """From the formula: the other nodes of both views are negatives, the mean of both directions."""
    h1, h2 = functional.normalize(h1), functional.normalize(h2)
    total = 0
    for anchors, others in ((h1, h2), (h2, h1)):
        between, within = (torch.exp(anchors @ z.T / temperature) for z in (others, anchors))
        total = total - (between.diag() / (between.sum(1) + within.sum(1) - within.diag())).log()
    return total.mean() / 2


def test_the_loss_is_the_published_one(graph):
    method = grace()
    torch.manual_seed(5)
    loss = method(graph)
    torch.manual_seed(5)
    h1, h2 = (
        method.projector(method.encoder(*view(graph))) for view in (method.first_view, method.second_view)
    )
    torch.testing.assert_close(loss, published_loss(h1, h2, 0.4))


def test_chosen_nodes_are_compared_and_all_are_encoded(graph):
    method, nodes = (
        grace(first_view=UniformView(0, 0), second_view=UniformView(0, 0)),
        torch.tensor([3, 1, 7]),
    )
    h = method.projector(method.embed(graph))[nodes]
    torch.testing.assert_close(method(NodeBatch(graph, nodes)), published_loss(h, h, 0.4))
    torch.testing.assert_close(method.embed(NodeBatch(graph, nodes)), method.embed(graph)[nodes])


def test_the_first_nodes_of_a_neighbour_loader_are_compared(graph):
    method = grace(first_view=UniformView(0, 0), second_view=UniformView(0, 0))
    whole = method(NodeBatch(graph, torch.arange(5)))
    graph.batch_size = 5
    torch.testing.assert_close(method(graph), whole)
    assert method.embed(graph).shape == (5, 8)


def test_a_bare_loop_trains_it(graph):
    method = grace()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = method(graph)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) - 2


def test_the_projector_is_published(graph):
    projector = grace().projector
    assert [type(layer).__name__ for layer in projector.network] == ["Linear", "ELU", "Linear"]
    assert projector.out_dim == 8


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GRACE(torch.nn.Linear(2, 2), NTXentLoss()), TypeError, "encoder must be a cl_graph Encoder"),
        (
            lambda: GRACE(GCN(3), SupConLoss()),
            TypeError,
            r"loss must be a TwoViewLoss, called with \(z1, z2\)",
        ),
        (
            lambda: GRACE(GCN(3, dim=4), NTXentLoss(), projector=MLPProjector(5)),
            ValueError,
            "must equal the encoder",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, ValueError, "must have features x and edges"),
        ({"x": torch.ones(24)}, ValueError, r"x must have shape \(n, F\)"),
        ({"x": torch.ones(24, 12, dtype=torch.int64)}, TypeError, "x must be floating"),
        ({"x": torch.full((24, 12), float("nan"))}, ValueError, "x must be finite"),
        ({"edge_index": torch.tensor([[0], [24]])}, ValueError, r"edge_index must lie in \[0, 24\)"),
        ({"edge_index": torch.zeros(2, 3)}, TypeError, "edge_index must be int64"),
    ],
)
def test_bad_graphs_are_refused_in_a_sentence(graph, change, error, message):
    fields = {"x": graph.x, "edge_index": graph.edge_index} | change
    with pytest.raises(error, match=message):
        grace()(Graph(**{name: value for name, value in fields.items() if value is not None}))


def test_other_batches_are_refused():
    with pytest.raises(TypeError, match="must be a NodeBatch or a torch_geometric Data, got Tensor"):
        grace()(torch.ones(3, 3))
