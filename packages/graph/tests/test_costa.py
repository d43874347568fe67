import math

import pytest
import torch
from torch.nn import functional

from cl_core.losses import InfoNCELoss, NTXentLoss, SupConLoss
from cl_core.training import export_method, load_export
from cl_graph.data import NodeBatch
from cl_graph.encoders import GCN
from cl_graph.methods import COSTA
from cl_graph.methods import costa as module
from cl_graph.methods.costa import sketch
from cl_graph.pot import POT
from cl_graph.views import UniformView


def costa(**options):
    torch.manual_seed(0)
    views = {"first_view": UniformView(0.2, 0), "second_view": UniformView(0.4, 0)}
    if options.get("single_view"):
        del views["second_view"]
    return COSTA(GCN(12, dim=8), InfoNCELoss(0.4, symmetric=True), **views | options)


def published_loss(h1, h2, temperature):
    """From the formula: negatives of the other view alone."""
    logits = functional.normalize(h1) @ functional.normalize(h2).T / temperature
    rows = torch.arange(len(h1))
    return (functional.cross_entropy(logits, rows) + functional.cross_entropy(logits.T, rows)) / 2


@pytest.mark.parametrize("nodes", [None, torch.arange(10)])
def test_both_views_share_a_projection(graph, nodes, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "sketch", lambda z, rows: drawn.append(rows) or mixing @ z)
    method, n = costa(), 24 if nodes is None else 10
    mixing = torch.randn(n // 2, n)
    torch.manual_seed(4)
    loss = method(NodeBatch(graph, nodes))
    torch.manual_seed(4)
    h1, h2 = (method.projector(mixing @ view.compared) for view in method.views(graph, nodes))
    assert drawn == [n // 2]
    torch.testing.assert_close(loss, published_loss(h1, h2, 0.4))


def test_one_view_is_projected_twice(graph):
    method = costa(single_view=True, ratio=1.0)
    assert method.second_view is None
    first, second = method.views(graph, None)
    assert first is second
    torch.manual_seed(4)
    loss = method.contrast([first, second])
    torch.manual_seed(4)
    h1, h2 = (method.projector(sketch(first.embeddings, 24)) for _ in range(2))
    assert not torch.allclose(h1, h2)
    torch.testing.assert_close(loss, published_loss(h1, h2, 0.4))


def test_a_sketch_keeps_the_covariance_on_average():
    torch.manual_seed(0)
    z = torch.randn(40, 3)
    mean = sum((s := sketch(z, 20)).T @ s for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, z.T @ z, atol=1.5, rtol=0)


def test_parts_of_a_projection_are_the_same_in_the_backward(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 3 * 20)
    z = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    whole = sketch(torch.eye(20, dtype=torch.float64), 10)  # the projection itself
    assert whole.shape == (10, 20) and not torch.equal(whole[:3], whole[3:6])
    torch.manual_seed(2)
    mixed = sketch(z, 10)
    torch.testing.assert_close(mixed, whole @ z)
    factor = torch.randn(10, 4).double()
    found = torch.autograd.grad((mixed * factor).sum(), z)[0]
    torch.testing.assert_close(found, whole.T @ factor)


@pytest.mark.parametrize("options", [{}, {"single_view": True}])
def test_pot_scores_nodes_and_not_sketches(graph, options, monkeypatch):
    scored = []
    from cl_graph import pot

    made = pot.node_compactness
    monkeypatch.setattr(
        pot,
        "node_compactness",
        lambda *given, **named: scored.append(named["nodes"]) or made(*given, **named),
    )
    method = costa(regulariser=POT(kappa=0.2, nodes=20), ratio=0.25, **options)
    losses = method(graph)
    assert set(losses) == {"loss", "host", "pot"}
    assert all(len(nodes) == 20 and nodes.max() >= 6 for nodes in scored)  # beyond the six sketches
    losses["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def trained(method, graph, steps):
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method(graph)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss(graph):
    losses = trained(costa(), graph, 80)
    assert sum(losses[-10:]) < sum(losses[:10]) - 2


def test_two_projections_of_one_view_have_nothing_to_agree_on(graph):
    method = costa(single_view=True)
    start = [method(graph).item() for _ in range(200)]
    assert sum(start) / 200 > math.log(12)  # of a pair drawn among twelve by chance
    assert sum(trained(method, graph, 150)[-20:]) / 20 == pytest.approx(math.log(12), abs=0.01)
    h = functional.normalize(method.projector(sketch(method.embed(graph), 12)))
    assert (h @ h.T).min() > 0.9


def test_few_nodes_still_make_two_sketches(graph):
    assert costa()(NodeBatch(graph, torch.tensor([1, 2, 3]))) > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio must be finite and > 0"),
        ({"ratio": 1.5}, ValueError, r"ratio must be in \(0, 1\], got 1.5"),
        ({"single_view": 1}, TypeError, "single_view must be True or False"),
        ({"loss": SupConLoss()}, TypeError, r"loss must be a TwoViewLoss, called with \(z1, z2\)"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        COSTA(**{"encoder": GCN(12, dim=8), "loss": NTXentLoss()} | options)


def test_a_second_view_of_one_is_refused():
    with pytest.raises(ValueError, match="second_view must be None with single_view=True, got UniformView"):
        COSTA(GCN(12, dim=8), NTXentLoss(), second_view=UniformView(), single_view=True)


def test_one_view_is_exported_as_one(graph, tmp_path):
    method = costa(single_view=True)
    loaded = load_export(export_method(method, tmp_path))
    assert loaded.second_view is None and loaded.single_view
    assert torch.equal(loaded.embed(graph), method.eval().embed(graph))
