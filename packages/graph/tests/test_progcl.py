import pytest
import torch

from cl_core.losses import NTXentLoss
from cl_core.method import Progress
from cl_graph.data import NodeBatch
from cl_graph.encoders import GCN
from cl_graph.methods import GRACE, ProGCL
from cl_graph.mixture import MixtureNCELoss
from cl_graph.pot import POT
from cl_graph.views import AdaptiveView


def progcl(mode="weight", **options):
    torch.manual_seed(0)
    views = {"first_view": AdaptiveView(0.3, 0), "second_view": AdaptiveView(0.2, 0)}
    return ProGCL(GCN(12, dim=8), MixtureNCELoss(0.4, mode=mode), **views | options)


def train(method, batches, steps, start=0):
    """A loop that tells the method its steps."""
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = method(batches[step % len(batches)])
        loss = loss if isinstance(loss, torch.Tensor) else loss["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(Progress(step + 1, 1000, 0, 1))
        losses.append(loss.item())
    return losses


def test_at_first_it_is_grace(graph):
    method = progcl(mixture_from=400)
    torch.manual_seed(0)
    grace = GRACE(GCN(12, dim=8), NTXentLoss(0.4), AdaptiveView(0.3, 0), AdaptiveView(0.2, 0))
    torch.manual_seed(3)
    ours = train(method, [graph], 3)
    torch.manual_seed(3)
    theirs = []
    optimizer = torch.optim.Adam(grace.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = grace(graph)
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert ours == theirs


def test_the_default_views_go_by_eigenvectors():
    views = progcl(first_view=None).first_view
    assert isinstance(views, AdaptiveView) and views.centrality == "eigenvector"


@pytest.mark.parametrize("mode", ["weight", "mix"])
def test_the_mixtures_are_fitted_in_their_step_and_frozen(graph, mode):
    method = progcl(mode, mixture_from=3)
    train(method, [graph], 3)
    assert not method.criterion.fitted and method.steps == 3
    method.eval()(graph)
    assert not method.criterion.fitted  # looking is not training
    train(method.train(), [graph], 1, start=3)
    frozen = {name: value.clone() for name, value in method.criterion.named_buffers()}
    assert method.criterion.fitted
    losses = train(method, [graph], 60, start=4)
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    for name, value in method.criterion.named_buffers():
        assert torch.equal(value, frozen[name])


def test_the_mixtures_serve_any_nodes(graph):
    method = progcl(mixture_from=0)
    batches = [NodeBatch(graph, torch.randperm(24)[:9]) for _ in range(3)]
    losses = train(method, [*batches, NodeBatch(graph, torch.tensor([4])), NodeBatch(graph)], 10)
    assert all(torch.tensor(losses).isfinite()) and method.criterion.fitted
    alone = progcl(mixture_from=0)
    train(alone, [NodeBatch(graph, torch.tensor([4]))], 1)
    assert not alone.criterion.fitted  # one node has no others; the next step does it


def test_a_regulariser_adds_to_it(graph):
    method = progcl(mixture_from=1, regulariser=POT(kappa=0.3))
    assert train(method, [graph], 40)[-1] < train(progcl(regulariser=POT(kappa=0.3)), [graph], 1)[0]


def test_refusals():
    with pytest.raises(TypeError, match="loss must be a MixtureNCELoss, got NTXentLoss"):
        ProGCL(GCN(12, dim=8), NTXentLoss(0.4))
    with pytest.raises(ValueError, match="mixture_from must be at least 0"):
        progcl(mixture_from=-1)
