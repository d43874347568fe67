import pytest
import torch
from torch import nn

from cl_core.losses import AMCLLoss, DCLLoss, TwoViewLoss
from cl_core.projectors import MLPProjector
from cl_vision.data import Views
from cl_vision.encoders import SmallConvNet
from cl_vision.methods.simclr import SimCLR


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 8, 8, generator=generator)
    views = tuple(images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(2))
    return Views(views, torch.arange(16) % 4, torch.arange(16))


@pytest.fixture
def method(two_view_loss):
    torch.manual_seed(0)
    return SimCLR(SmallConvNet(4, in_channels=1), two_view_loss)


def train(method, batch, steps):
    optimiser = torch.optim.SGD(method.parameter_groups(1e-4), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = method(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_two_steps_move_every_parameter(method, batch):
    before = {name: parameter.clone() for name, parameter in method.named_parameters()}
    train(method, batch, 2)
    assert all(not torch.equal(before[name], parameter) for name, parameter in method.named_parameters())


def test_loss_falls(method, batch):
    losses = train(method, batch, 30)
    assert losses[-1] < losses[0] - 0.5


def test_loss_is_the_criterion_of_the_projections(method, batch):
    method.eval()
    expected = method.criterion(*(method.projector(method.encoder(view)) for view in batch.views))
    torch.testing.assert_close(method.loss(batch), expected)
    torch.testing.assert_close(method(batch), expected)


def test_more_than_two_views(method, batch):
    three = batch._replace(views=(*batch.views, batch.views[0].flip(3)))
    loss = method(three)
    assert loss.ndim == 0
    assert not torch.allclose(loss, method(batch))


def test_embed_gives_features_not_projections(method, batch):
    method.eval()
    assert method.embed(batch.views[0]).shape == (16, 32)
    torch.testing.assert_close(method.embed(batch.views[0]), method.encoder(batch.views[0]))
    assert method.project(batch.views[0]).shape == (16, 128)


def test_state_dict_round_trip(method, batch, two_view_loss):
    train(method, batch, 2)
    other = SimCLR(SmallConvNet(4, in_channels=1), two_view_loss)
    other.load_state_dict(method.state_dict())
    method.eval(), other.eval()
    assert torch.equal(method.embed(batch.views[0]), other.embed(batch.views[0]))
    assert torch.equal(method(batch), other(batch))


def test_a_given_projector_is_used_and_built(two_view_loss):
    projector = MLPProjector(out_dim=16, layers=3)
    method = SimCLR(SmallConvNet(4, in_channels=1), two_view_loss, projector)
    assert method.projector is projector
    assert projector.in_dim == 32


def test_a_loss_of_several_heads_takes_a_wide_projector_and_is_trained(batch):
    torch.manual_seed(0)
    loss = AMCLLoss(dim=8, heads=3, hidden_dim=8)
    method = SimCLR(SmallConvNet(4, in_channels=1), loss, MLPProjector(out_dim=24))
    test_two_steps_move_every_parameter(method, batch)
    assert {id(p) for p in loss.parameters()} <= {
        id(p) for g in method.parameter_groups(0.1) for p in g["params"]
    }
    with pytest.raises(ValueError, match=r"z1 must have heads \* dim = 3 \* 8 = 24 columns, got 128"):
        SimCLR(SmallConvNet(4, in_channels=1), loss)(batch)


def test_bad_parts_get_one_sentence(two_view_loss):
    encoder = SmallConvNet(4)
    with pytest.raises(TypeError, match="encoder must be a cl_vision Encoder, got Linear"):
        SimCLR(nn.Linear(3, 3), two_view_loss)
    with pytest.raises(TypeError, match=r"loss must be a TwoViewLoss, .* got MSELoss"):
        SimCLR(encoder, nn.MSELoss())
    with pytest.raises(ValueError, match="must equal the encoder's dim, got 33 and 32"):
        SimCLR(encoder, two_view_loss, MLPProjector(33))
    assert issubclass(type(two_view_loss), TwoViewLoss)


def test_one_view_is_refused(method, batch):
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        method(batch._replace(views=batch.views[:1]))


def test_more_views_than_the_loss_compares_are_refused(batch):
    method = SimCLR(SmallConvNet(4, in_channels=1), DCLLoss())
    with pytest.raises(ValueError, match=r"DCLLoss compares 2 views, got 3: pass --data.num_views 2"):
        method(batch._replace(views=(*batch.views, batch.views[0])))


def test_one_image_is_refused(method, batch):
    one = batch._replace(views=tuple(view[:1] for view in batch.views))
    with pytest.raises(ValueError, match=r"at least 2 of them, got 1: pass --data.batch_size 2 or more"):
        method(one)
