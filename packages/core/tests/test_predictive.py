"""Negative cosine similarity and BYOL's loss against their definitions; who receives a gradient."""

import pytest
import torch

from cl_core.functional import byol_loss, negative_cosine_similarity
from cl_core.losses import BYOLLoss, NegativeCosineSimilarityLoss
from cl_core.testing import check_group

PAIRS = [
    (negative_cosine_similarity, NegativeCosineSimilarityLoss),
    (byol_loss, BYOLLoss),
]
BOTH = pytest.mark.parametrize(("function", "module"), PAIRS, ids=["cosine", "byol"])


def pair(seed, rows=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )


@pytest.mark.parametrize("seed", range(5))
def test_each_row_is_its_definition(seed):
    p, z = pair(seed)
    cosines = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(p, z, strict=True)])
    torch.testing.assert_close(negative_cosine_similarity(p, z, reduction="none"), -cosines)
    units = [torch.nn.functional.normalize(x, dim=1) for x in (p, z)]
    squared = (units[0] - units[1]).square().sum(1)
    torch.testing.assert_close(byol_loss(p, z, reduction="none"), squared)
    torch.testing.assert_close(byol_loss(p, z, reduction="sum"), squared.sum())
    torch.testing.assert_close(negative_cosine_similarity(p, z), squared.mean() / 2 - 1)


@BOTH
def test_targets_are_constants_unless_asked_otherwise(function, module):
    p, z = pair(0)
    for loss in (function, module()):
        (gradient,) = torch.autograd.grad(loss(p, z), z, allow_unused=True)
        assert gradient is None
    open_gradients = torch.autograd.grad(function(p, z, detach=False), (p, z))
    swapped = torch.autograd.grad(module(detach=False)(z, p), (p, z))
    for one, other in zip(open_gradients, swapped, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


@BOTH
def test_gradient_is_tangent_to_the_sphere(function, module):
    p, z = pair(1)
    (gradient,) = torch.autograd.grad(function(p, z), p)
    torch.testing.assert_close((gradient * p).sum(1), torch.zeros(len(p), dtype=torch.float64))


@BOTH
def test_unnormalised_rows_enter_as_they_are(function, module):
    p, z = pair(2)
    products = (p * z).sum(1)
    expected = -products if function is negative_cosine_similarity else 2 - 2 * products
    torch.testing.assert_close(module(normalize=False, reduction="none")(p, z), expected)


def test_ends_of_the_range():
    p, _ = pair(3)
    assert byol_loss(p, 4 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(p, -p).item() == pytest.approx(4)
    assert negative_cosine_similarity(p, p).item() == pytest.approx(-1)
    assert negative_cosine_similarity(torch.zeros_like(p), p).item() == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rounding_never_leaves_the_range(function, module, dtype):
    p = torch.randn(500, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, high = (-1, 1) if function is negative_cosine_similarity else (0, 4)
    for z in (p, -p, 3 * p, 1.001 * p):
        each = function(p, z, reduction="none")
        assert each.min() >= low and each.max() <= high
        assert low <= function(p, z) <= high


@BOTH
def test_a_value_at_the_end_of_the_range_keeps_its_gradient(function, module):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(400, 30, generator=generator)
    p = (z + 1e-4 * torch.randn(400, 30, generator=generator)).requires_grad_()
    at_the_end = function(p, z, reduction="none") == (-1 if function is negative_cosine_similarity else 0)
    assert 20 < at_the_end.sum() < 380  # values that float32 cannot tell from the end
    (gradient,) = torch.autograd.grad(function(p, z, reduction="sum"), p)
    exact = p.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(function(exact, z.double(), reduction="sum"), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-3 * expected.abs().max().item())


@BOTH
def test_group_contract_with_gradients_on_both_sides(function, module, ranks):
    check_group(module, ranks, 3, detach=False)
    check_group(module, ranks, 3, reduction="sum")
