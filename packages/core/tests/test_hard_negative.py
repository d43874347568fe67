"""Hard-negative and debiased NCE against their formula, written out."""

import math

import pytest
import torch

from cl_core.functional import debiased_nce_loss, hard_negative_nce_loss, nt_xent_loss


def literal(z1, z2, *, beta, tau_plus, temperature):
    """The published estimator, anchor by anchor, with plain exponentials."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    values = []
    for i in range(2 * n):
        other = torch.tensor([j for j in range(2 * n) if j % n != i % n])
        negative = ((z[i] @ z[other].t()) / temperature).exp()
        positive = (z[i] @ z[(i + n) % (2 * n)] / temperature).exp()
        weight = negative**beta / (negative**beta).mean()
        estimate = ((weight * negative).sum() - tau_plus * len(other) * positive) / (1 - tau_plus)
        floor = len(other) * math.exp(-1 / temperature)
        values.append(-(positive / (positive + estimate.clamp_min(floor))).log())
    return torch.stack(values)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
def test_equals_the_formula(tau_plus, beta, impl):
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    z2 = (z1.detach() + 0.5 * torch.randn(9, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    options = {"beta": beta, "tau_plus": tau_plus, "temperature": 0.4}
    each = hard_negative_nce_loss(z1, z2, reduction="none", impl=impl, **options)
    expected = literal(z1, z2, **options)
    torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-12)
    given, wanted = (torch.autograd.grad(v.mean(), [z1, z2]) for v in (each, expected))
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)


def test_the_floor_is_reached_in_these_tests():
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(9, 5, generator=generator, dtype=torch.float64)
    each = hard_negative_nce_loss(z1, z2, beta=0.0, tau_plus=0.15, temperature=0.4, reduction="none")
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    positive = (z * z.roll(9, 0)).sum(1) / 0.4
    at_floor = torch.nn.functional.softplus(math.log(16) - 1 / 0.4 - positive)
    assert torch.isclose(each, at_floor).any()
    assert not torch.isclose(each, at_floor).all()


def test_special_cases():
    z1, z2 = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = nt_xent_loss(z1, z2, temperature=0.5)
    torch.testing.assert_close(hard_negative_nce_loss(z1, z2, beta=0.0, tau_plus=0.0), plain)
    debiased = debiased_nce_loss(z1, z2, tau_plus=0.2)
    torch.testing.assert_close(hard_negative_nce_loss(z1, z2, beta=0.0, tau_plus=0.2), debiased)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_plus": 1.0}, "tau_plus must be in"),
        ({"beta": -0.1}, "beta must be at least"),
        ({"beta": "1"}, "beta"),
    ],
)
def test_bad_numbers(options, message):
    z = torch.randn(4, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        hard_negative_nce_loss(z, z, **options)
