"""Barlow Twins and VICReg against their definitions; statistics, sizes, errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_core.functional import barlow_twins_loss, vicreg_loss
from cl_core.losses import BarlowTwinsLoss, VICRegLoss

LOSSES = pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss])
SHAPES = [(2, 1), (2, 5), (9, 1), (9, 4), (5, 30)]


def views(seed, rows, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z1 = 3 + torch.randn(rows, width, generator=generator, dtype=dtype)
    return z1, z1 + 0.5 * torch.randn(rows, width, generator=generator, dtype=dtype)


def uncorrelated(rows, width):
    """Features of mean 0 and mean square 1, orthogonal to each other."""
    constant = torch.ones(rows, 1, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([constant, views(0, rows, width)[0]], 1))
    return basis[:, 1:] * rows**0.5


def naive_barlow(z1, z2, lambd):
    a, b = (torch.nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    total = 0
    for k in range(z1.shape[1]):
        for m in range(z1.shape[1]):
            correlation = (a[:, k] * b[:, m]).mean()
            total = total + ((1 - correlation) ** 2 if k == m else lambd * correlation**2)
    return total


def naive_vicreg(z1, z2, sim_weight, var_weight, cov_weight, eps=1e-4):
    width = z1.shape[1]
    loss = sim_weight * torch.nn.functional.mse_loss(z1, z2)
    for z in (z1, z2):
        loss = loss + var_weight / 2 * torch.relu(1 - (z.var(0) + eps).sqrt()).mean()
        covariance = torch.cov(z.T).view(width, width)
        off = covariance[~torch.eye(width, dtype=torch.bool)]
        loss = loss + cov_weight * off.square().sum() / width
    return loss


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_barlow_twins_is_its_definition(shape):
    for seed in range(3):
        z1, z2 = views(seed, *shape)
        for lambd in (0.0, 0.005, 2.0):
            torch.testing.assert_close(barlow_twins_loss(z1, z2, lambd=lambd), naive_barlow(z1, z2, lambd))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_vicreg_is_its_definition(shape, weights):
    names = ("sim_weight", "var_weight", "cov_weight")
    for seed in range(3):
        z1, z2 = views(seed, *shape)
        for scale, eps in ((0.3, 1e-4), (1.0, 0.1)):  # all features below a deviation of 1, and some
            expected = naive_vicreg(scale * z1, scale * z2, *weights, eps=eps)
            found = vicreg_loss(scale * z1, scale * z2, **dict(zip(names, weights, strict=True)), eps=eps)
            torch.testing.assert_close(found, expected)


def test_barlow_twins_is_small_for_equal_views_of_uncorrelated_features():
    z = uncorrelated(32, 6)
    assert barlow_twins_loss(z, z, lambd=1.0) < 1e-8
    assert barlow_twins_loss(z, z.roll(1, 1), lambd=0.0) == pytest.approx(6)


def test_vicreg_is_zero_for_equal_views_of_uncorrelated_features_that_vary():
    z = uncorrelated(32, 6)
    assert vicreg_loss(z, z).item() == pytest.approx(0, abs=1e-20)


@LOSSES
def test_a_common_offset_of_the_rows_does_not_matter(loss):
    z1, z2 = views(1, 20, 5, torch.float32)
    shifted = loss(z1 + 1000, z2 + 1000)  # float32 keeps four digits of the rows, a one-pass variance none
    torch.testing.assert_close(shifted, loss(z1, z2), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("exponent", [14, 17, 24, 33, 36])
def test_barlow_twins_of_large_views_has_the_gradient_of_its_definition(dtype, exponent):
    scale = torch.tensor([1.0, 10.0**exponent, 10.0 ** (exponent / 2), 1e-3])  # features of their own size
    given = [(z * scale).to(dtype).requires_grad_() for z in views(1, 12, 4)]
    barlow_twins_loss(*given).backward()
    exact = [z.detach().double().requires_grad_() for z in given]
    expected = naive_barlow(*exact, 0.005)
    expected.backward()
    torch.testing.assert_close(barlow_twins_loss(*given).double(), expected, rtol=1e-5, atol=0)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for z, reference in zip(given, exact, strict=True):
        # In units in which all features weigh the same.
        found, wanted = z.grad.double() * scale, reference.grad * scale
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def test_views_too_large_for_vicreg_are_refused():
    z1, z2 = views(0, 9, 4, torch.float32)
    assert vicreg_loss(1e8 * z1, 1e8 * z2).isfinite()
    for scale in (1e10, 1e15, 1e25):
        with pytest.raises(
            ValueError, match=r"^z1 and z2 must be small enough .* in torch\.float32, got larger"
        ):
            vicreg_loss(scale * z1, scale * z2)
        assert vicreg_loss(scale * z1.double(), scale * z2.double()).isfinite()


@LOSSES
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_feature_keeps_the_gradient_finite(loss, value):
    z1, z2 = (z.clone() for z in views(2, 6, 4, torch.float32))
    z1[:, 1] = z2[:, 1] = value
    z1.requires_grad_()
    loss(z1, z2).backward()
    assert z1.grad.isfinite().all()


@LOSSES
def test_differentiable_twice(loss):
    given = [z.requires_grad_() for z in views(4, 5, 3)]
    assert torch.autograd.gradgradcheck(loss, given)


class Largest(TorchDispatchMode):
    """Number of entries of the largest tensor any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@LOSSES
@pytest.mark.parametrize(("rows", "width"), [(3000, 4), (4, 300)])
def test_nothing_is_larger_than_the_views_or_features_squared(loss, rows, width):
    z1, z2 = (z.requires_grad_() for z in views(3, rows, width, torch.float32))
    with Largest() as largest:
        loss(z1, z2).backward()
    assert largest.entries <= 2 * max(rows * width, width**2)


@pytest.mark.parametrize(
    ("name", "loss"), [("barlow_twins_loss", barlow_twins_loss), ("vicreg_loss", vicreg_loss)]
)
def test_one_row_is_refused(name, loss):
    z = torch.randn(1, 4)
    with pytest.raises(ValueError, match=rf"^{name} needs at least 2 rows .*, got 1\.$"):
        loss(z, z)


@pytest.mark.parametrize(
    ("function", "module", "bad"),
    [
        (barlow_twins_loss, BarlowTwinsLoss, {"lambd": -0.1}),
        (vicreg_loss, VICRegLoss, {"sim_weight": -1.0}),
        (vicreg_loss, VICRegLoss, {"var_weight": float("nan")}),
        (vicreg_loss, VICRegLoss, {"cov_weight": "one"}),
        (vicreg_loss, VICRegLoss, {"eps": 0.0}),
    ],
)
def test_bad_weights_are_refused_by_name(function, module, bad):
    (name,) = bad
    for call in (lambda: function(*views(0, 4, 3), **bad), lambda: module(**bad)):
        with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*\.$"):
            call()
