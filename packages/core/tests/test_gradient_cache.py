from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_core.gradient_cache import gradient_cache, method_gradient_cache
from cl_core.losses import NTXentLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Method


class LearnableLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.3))
        self.calls = 0

    def forward(self, z1, z2):
        self.calls += 1
        z1, z2 = nn.functional.normalize(z1, dim=1), nn.functional.normalize(z2, dim=1)
        return nn.functional.cross_entropy(self.logit_scale.exp() * z1 @ z2.T, torch.arange(len(z1)))


def encoder(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4)
    ).double()


class Tiny(Method):
    def __init__(self, encoder, criterion):
        super().__init__()
        self.encoder, self.criterion = encoder, criterion

    def loss(self, batch):
        return {"loss": self.criterion(*(self.encoder(view) for view in batch["views"]))}


def gradients(*modules):
    found = [p.grad for module in modules for p in module.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_plain_gradient_of_two_towers(chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    towers, loss = [encoder(seed), encoder(seed + 7)], LearnableLoss().double()
    plain = loss(*(tower(x) for tower, x in zip(towers, inputs, strict=True)))
    plain.backward()
    expected = gradients(*towers, loss)
    for module in (*towers, loss):
        module.zero_grad()
    loss.calls = 0
    value, portions = gradient_cache(loss, list(zip(towers, inputs, strict=True)), chunk_size=chunk_size)
    count = 0
    for portion in portions:
        portion.backward()
        count += 1
    assert loss.calls == 1
    assert count == 2 * -(-10 // chunk_size)
    torch.testing.assert_close(value, plain.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(*towers, loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [2, 5, 8])
def test_dropout_is_replayed(chunk_size):
    net, x = encoder(0, dropout=0.5), torch.randn(8, 6, dtype=torch.float64)
    torch.manual_seed(3)
    z = torch.cat([net(part) for part in x.split(chunk_size)])
    z.pow(3).mean().backward()
    after = torch.rand(1)
    expected = gradients(net)
    net.zero_grad()
    torch.manual_seed(3)
    value, portions = gradient_cache(lambda z: z.pow(3).mean(), [(net, x)], chunk_size=chunk_size)
    for portion in portions:
        portion.backward()
    assert torch.equal(torch.rand(1), after)  # the random state goes on as if nothing was replayed
    torch.testing.assert_close(value, z.pow(3).mean().detach())
    for ours, theirs in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_autocast_is_replayed():
    net, x = encoder(0).float(), torch.randn(9, 6)

    def loss(z):
        assert z.dtype == torch.bfloat16
        return z.float().pow(3).mean()

    with torch.autocast("cpu", torch.bfloat16):
        plain = loss(net(x))
    plain.backward()
    expected = gradients(net)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value, portions = gradient_cache(loss, [(net, x)], chunk_size=9)
    for portion in portions:  # outside of autocast
        portion.backward()
    torch.testing.assert_close(value, plain.detach(), rtol=0, atol=0)
    for ours, theirs in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_portions_say_how_many_are_to_come():
    net, x = encoder(0), torch.randn(10, 6, dtype=torch.float64)
    _, portions = gradient_cache(lambda a, b: (a * b).mean(), [(net, x), (net, x)], chunk_size=4)
    assert [len(portions) for _ in portions] == [5, 4, 3, 2, 1, 0]
    assert len(portions) == 0


@pytest.mark.parametrize("criterion", [LearnableLoss, NTXentLoss])
def test_a_method_needs_no_change(criterion):
    method = Tiny(encoder(1), criterion()).double()
    batch = {"views": [torch.randn(9, 6, dtype=torch.float64) for _ in range(2)], "labels": torch.arange(9)}
    plain = method(batch)["loss"]
    plain.backward()
    expected = gradients(method)
    method.zero_grad()
    kept = method.criterion
    value, portions = method_gradient_cache(method, batch, chunk_size=4)
    for portion in portions:
        portion.backward()
    assert method.criterion is kept
    torch.testing.assert_close(value, plain.detach())
    for ours, theirs in zip(gradients(method), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_memory_is_that_of_a_chunk():
    alive, peak = set(), []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.key = object()
            if x.requires_grad:
                alive.add(ctx.key)
                peak.append(len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.discard(ctx.key)
            return gradient

    net, weight = nn.Linear(6, 4), torch.randn(12, 6)
    _, portions = gradient_cache(
        lambda z: z.square().sum(), [(lambda x: Saves.apply(net(x)), weight)], chunk_size=3
    )
    for portion in portions:
        portion.backward()
    assert len(peak) == 4
    assert max(peak) == 1


def test_bad_input_is_refused():
    net, x = encoder(0), torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        gradient_cache(torch.sum, [(net, x)], chunk_size=0)
    with pytest.raises(ValueError, match="at least one pair"):
        gradient_cache(torch.sum, [], chunk_size=2)
    with pytest.raises(ValueError, match=r"one number of rows >= 1, got \[3, 4\]"):
        gradient_cache(torch.sum, [(net, (x, x[:3]))], chunk_size=2)
    normalised = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="got BatchNorm1d '1' in training mode"):
        gradient_cache(torch.sum, [(normalised, x)], chunk_size=2)
    normalised.eval()
    gradient_cache(torch.sum, [(normalised, x.float())], chunk_size=2)

    class Adds(Tiny):
        def loss(self, batch):
            return super().loss(batch)["loss"] + 1

    with pytest.raises(ValueError, match="Adds cannot be trained with a gradient cache"):
        method_gradient_cache(Adds(net, LearnableLoss()), {"views": [x, x]}, chunk_size=2)

    class Remembers(Tiny):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.queue = FeatureQueue(8, 4)

    with pytest.raises(ValueError, match="must not be remembered on the way, got FeatureQueue 'queue'"):
        method_gradient_cache(Remembers(net, LearnableLoss()), {"views": [x, x]}, chunk_size=2)

    class TellsMore(Tiny):
        def loss(self, batch):
            return self.criterion(self.encoder(batch["views"][0]), queue=batch["views"])

    with pytest.raises(ValueError, match=r"a criterion of embeddings .* only, got something else"):
        method_gradient_cache(TellsMore(net, LearnableLoss()), {"views": [x, x]}, chunk_size=2)
