"""Alignment and uniformity against loops over pairs, and against the diagnostics of the same name."""

import itertools
import math

import pytest
import torch

from cl_core import diagnostics
from cl_core.functional import alignment_loss, uniformity_loss
from cl_core.losses import AlignmentLoss, UniformityLoss
from cl_core.testing import check_group

SEEDS = pytest.mark.parametrize("seed", range(4))
IMPLS = pytest.mark.parametrize("impl", ["dense", "tiled"])


def embeddings(seed, rows=8, width=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()


def naive_uniformity(z, t):
    potentials = [torch.exp(-t * (a - b).square().sum()) for a, b in itertools.permutations(z, 2)]
    return torch.stack(potentials).mean().log()


@SEEDS
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_alignment_is_its_definition(seed, alpha):
    z1, z2 = embeddings(seed), embeddings(seed + 50)
    units = [torch.nn.functional.normalize(z, dim=1) for z in (z1, z2)]
    each = (units[0] - units[1]).norm(dim=1) ** alpha
    torch.testing.assert_close(alignment_loss(z1, z2, alpha=alpha, reduction="none"), each)
    mean = alignment_loss(z1, z2, alpha=alpha)
    torch.testing.assert_close(mean, diagnostics.alignment(z1, z2, alpha=alpha))
    for one, other in zip(
        torch.autograd.grad(mean, (z1, z2)), torch.autograd.grad(each.mean(), (z1, z2)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_equal_views_have_a_zero_gradient(alpha):
    z1 = embeddings(0)
    z2 = z1.detach().clone()
    z2[0] += 1
    each = AlignmentLoss(alpha, reduction="none")(z1, z2)
    assert each[0] > 0
    assert (each[1:] == 0).all()
    (gradient,) = torch.autograd.grad(each.sum(), z1)
    assert gradient[0].abs().max() > 0
    assert (gradient[1:] == 0).all()


@SEEDS
@IMPLS
@pytest.mark.parametrize("t", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_uniformity_is_its_definition(seed, impl, t, normalize):
    z = embeddings(seed)
    rows = torch.nn.functional.normalize(z, dim=1) if normalize else z
    expected = naive_uniformity(rows, t)
    found = uniformity_loss(z, t=t, normalize=normalize, impl=impl)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))
    if normalize:
        torch.testing.assert_close(found, diagnostics.uniformity(z, t=t))


@IMPLS
def test_uniformity_at_its_ends(impl):
    equal = torch.ones(5, 3, dtype=torch.float64)
    assert uniformity_loss(equal, impl=impl).item() == pytest.approx(0, abs=1e-12)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert uniformity_loss(poles, t=3.0, impl=impl).item() == pytest.approx(-12)
    # Far apart and sharp: every potential underflows, its logarithm does not.
    assert uniformity_loss(1000 * poles, normalize=False, impl=impl).item() == pytest.approx(-8e6)
    square = torch.cat([torch.eye(2), -torch.eye(2)])
    value = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity_loss(square, impl=impl).item() == pytest.approx(value, rel=1e-5)


def test_group_contracts_of_other_settings(ranks):
    check_group(AlignmentLoss, ranks, 3, alpha=1.0, reduction="sum")
    check_group(UniformityLoss, ranks, 3, t=0.5, normalize=False)


def test_one_row_is_refused():
    with pytest.raises(ValueError, match=r"^uniformity_loss needs at least 2 rows .*, got 1\.$"):
        uniformity_loss(torch.randn(1, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: alignment_loss(embeddings(0), embeddings(1), alpha=bad),
        lambda bad: AlignmentLoss(alpha=bad),
        lambda bad: uniformity_loss(embeddings(0), t=bad),
        lambda bad: UniformityLoss(t=bad),
    ],
)
@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), "two"])
def test_bad_exponents_are_refused(call, bad):
    with pytest.raises((ValueError, TypeError), match=r"^(alpha|t) must be .*\.$"):
        call(bad)
