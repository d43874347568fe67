"""The moving average against its formula, entry by entry."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from cl_core.momentum import ExponentialMovingAverage, cosine_momentum


class Encoder(nn.Module):
    def __init__(self, seed, width=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
            self.tied = self.layers[0]
            self.precise = nn.Parameter(torch.randn(2, dtype=torch.float64))
            self.register_buffer("scratch", torch.randn(2), persistent=False)
            self.register_buffer("mask", torch.tensor([seed % 2 == 0]))

    def forward(self, x):
        return self.layers(x)


def state(module):
    return dict([*module.named_parameters(), *module.named_buffers()])


def trained(encoder, steps=3):
    """Change every entry of the state, as steps of training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in state(encoder).values():
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape, generator=generator).to(tensor)
    for _ in range(steps):
        encoder.train()(torch.randn(8, 3, generator=generator))
    return encoder


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_update_is_the_formula(momentum):
    model = Encoder(0)
    average = ExponentialMovingAverage(model)
    before = {name: tensor.clone() for name, tensor in state(average.module).items()}
    trained(model)
    model.mask.logical_not_()
    average.update(model, momentum)
    for name, tensor in state(average.module).items():
        source = state(model)[name].detach()
        if momentum in (0, 1):
            assert torch.equal(tensor, source if momentum == 0 else before[name]), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, momentum * before[name] + (1 - momentum) * source)
            assert tensor.dtype == source.dtype
        else:
            assert torch.equal(tensor, source), name


def test_momentum_zero_copies_over_anything():
    average = ExponentialMovingAverage(Encoder(0))
    with torch.no_grad():
        average.module.precise.fill_(math.nan)
    average.update(Encoder(0), 0.0)
    assert torch.equal(average.module.precise, Encoder(0).precise)


def test_the_copy_is_separate_and_takes_no_gradients():
    model = Encoder(0)
    average = ExponentialMovingAverage(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    pointers = {tensor.data_ptr() for tensor in state(model).values()}
    assert not pointers & {tensor.data_ptr() for tensor in state(average).values()}
    x = torch.randn(5, 3, requires_grad=True)
    assert not average(x).requires_grad
    before = copy.deepcopy(model.state_dict())
    trained(average.module)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_parameters_stay_tied():
    average = ExponentialMovingAverage(Encoder(0))
    assert average.module.tied.weight is average.module.layers[0].weight
    model = trained(Encoder(0))
    average.update(model, 0.5)
    expected = torch.lerp(model.tied.weight, Encoder(0).tied.weight, 0.5)
    torch.testing.assert_close(average.module.tied.weight, expected)


def test_modes_follow_the_holder():
    source = Encoder(0).eval()
    holder = nn.ModuleDict({"target": ExponentialMovingAverage(source)})
    assert not holder["target"].module.training
    holder.train()
    assert holder["target"].module.layers[1].training
    holder["target"].update(source, 0.5)
    assert holder["target"].module.layers[1].training
    assert not source.training


def test_state_goes_through_a_file_exactly():
    model = Encoder(0)
    average = ExponentialMovingAverage(model)
    average.update(trained(model), 0.9)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    other = ExponentialMovingAverage(Encoder(5))
    other.load_state_dict(torch.load(file, weights_only=True))
    other.module.scratch.copy_(average.module.scratch)  # not persistent, by the model's own wish
    for step in range(3):
        trained(model)
        average.update(model, 0.9 + step / 100)
        other.update(model, 0.9 + step / 100)
    assert all(torch.equal(tensor, state(other)[name]) for name, tensor in state(average).items())


def test_a_half_precision_model_is_followed_in_float32():
    model = nn.Linear(3, 3).bfloat16()
    average = ExponentialMovingAverage(model).float()
    with torch.no_grad():
        model.weight.copy_(average.module.weight + 0.01)
    start = average.module.weight.clone()
    for _ in range(100):
        average.update(model, 0.999)
    moved = (average.module.weight - start) / (model.weight.float() - start)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**100), rtol=1e-2, atol=0)


def test_cosine_momentum():
    assert cosine_momentum(0.996, 0) == pytest.approx(0.996)
    assert cosine_momentum(0.996, 0.5) == pytest.approx(0.998)
    assert cosine_momentum(0.996, 1) == 1
    values = [cosine_momentum(0.9, step / 50) for step in range(51)]
    assert values == sorted(values)
    assert cosine_momentum(0.0, 1 / 3) == pytest.approx(1 - (1 + math.cos(math.pi / 3)) / 2)


def test_refusals():
    average = ExponentialMovingAverage(Encoder(0))
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1\.5\."):
        average.update(Encoder(0), 1.5)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got nan\."):
        average.update(Encoder(0), math.nan)
    with pytest.raises(ValueError, match=r"its 'layers\.0\.weight' has shape \(6, 3\) instead of \(4, 3\)\."):
        average.update(Encoder(0, width=6), 0.5)
    bigger = Encoder(0)
    bigger.head = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"but it has an additional 'head\.bias'\."):
        average.update(bigger, 0.5)
    del bigger.precise
    with pytest.raises(ValueError, match=r"it lacks 'precise' and has an additional 'head\.bias'\."):
        average.update(bigger, 0.5)
    for arguments in ((-0.1, 0.5), (0.9, 1.1)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            cosine_momentum(*arguments)
