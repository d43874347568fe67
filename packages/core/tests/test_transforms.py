"""Transformations of embeddings against their definitions, and draws against their distribution."""

import pytest
import torch
import torch.nn.functional as F

from cl_core.functional import info_nce_loss
from cl_core.transforms import (
    NegativeInterpolation,
    PositiveExtrapolation,
    extrapolate_positives,
    interpolate_negatives,
    symmetric_beta,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(rows=9, width=6, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(rows, width, generator=seeded(seed), dtype=dtype), dim=1)


def near(z, seed=1):
    return F.normalize(z + 0.7 * torch.randn(z.shape, generator=seeded(seed), dtype=z.dtype), dim=1)


def weights(shape, seed=2):
    """One in all, one a row, one an entry."""
    drawn = [torch.rand(s, generator=seeded(seed), dtype=torch.float64) for s in ((), (shape[0], 1), shape)]
    return [0.3, *drawn]


@pytest.mark.parametrize("kind", range(4))
def test_both_are_their_definition(kind):
    q, k = unit_rows(), near(unit_rows())
    lam = 1 + weights(q.shape)[kind]
    found = extrapolate_positives(q, k, lam)
    torch.testing.assert_close(found, (lam * q + (1 - lam) * k, lam * k + (1 - lam) * q))
    renormalized = extrapolate_positives(q, k, lam, renormalize=True)
    torch.testing.assert_close(renormalized, tuple(F.normalize(z, dim=1) for z in found))
    z = unit_rows(11, seed=3)
    mu, partner = weights(z.shape)[kind], torch.randperm(11, generator=seeded())
    before = z.clone()
    torch.testing.assert_close(interpolate_negatives(z, mu, partner), mu * z + (1 - mu) * z[partner])
    assert torch.equal(z, before)


def test_weight_one_changes_no_bit():
    q, k, z = unit_rows(), near(unit_rows()), unit_rows(11, seed=3)
    for lam in (1, 1.0, torch.tensor(1.0), torch.ones(9, 1), torch.ones(9, 6)):
        assert all(map(torch.equal, extrapolate_positives(q, k, lam), (q, k)))
    for mu in (1.0, torch.ones(11, 1), torch.ones(11, 6)):
        assert torch.equal(interpolate_negatives(z, mu, torch.randperm(11, generator=seeded())), z)


@pytest.mark.parametrize("lam", [1.0, 1.3, 1.5, 2.0, 0.4])
def test_law_of_the_positive_score(lam):
    q, k = unit_rows(200), unit_rows(200, seed=1)
    score = (q * k).sum(1)
    moved, target = extrapolate_positives(q, k, lam)
    torch.testing.assert_close((moved * target).sum(1), 2 * lam * (1 - lam) * (1 - score) + score)
    if lam >= 1:
        assert ((moved * target).sum(1) <= score + 1e-15).all()
        assert (moved.norm(dim=1) >= 1 - 1e-15).all()
    else:
        assert ((moved * target).sum(1) > score).all()
    torch.testing.assert_close(moved.square().sum(1), 1 - 2 * lam * (1 - lam) * (1 - score))


@pytest.mark.parametrize("granularity", ["sample", "dim"])
@pytest.mark.parametrize("alpha", [0.3, 1.6, 2.0, 8.0])
def test_expected_positive_score(alpha, granularity):
    q = unit_rows(1, 8).expand(40000, 8).contiguous()
    k = near(unit_rows(1, 8)).expand(40000, 8).contiguous()
    moved, target = PositiveExtrapolation(alpha, granularity)(q, k, generator=seeded())
    score = (q[0] * k[0]).sum()
    expected = score - (1 + (alpha + 1) / (2 * alpha + 1)) * (1 - score)
    torch.testing.assert_close((moved * target).sum(1).mean(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("granularity", ["sample", "dim"])
@pytest.mark.parametrize("alpha", [0.3, 1.6, 2.0])
def test_interpolation_keeps_the_mean_and_shrinks_the_variance(alpha, granularity):
    query, z = unit_rows(1, 64), unit_rows(40000, 64, seed=3)
    z = z + 0.5 * query  # scores with a mean of 0.5
    mixed = NegativeInterpolation(alpha, granularity)(z, generator=seeded())
    before, after = query @ z.T, query @ mixed.T
    torch.testing.assert_close(after.mean(), before.mean(), rtol=0, atol=0.003)
    assert after.var() / before.var() == pytest.approx((alpha + 1) / (2 * alpha + 1), rel=0.03)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_scores_may_be_mixed_instead_of_rows(kind):
    """What holds for one weight a row, and what nothing here needs: it is slower."""
    q, z = unit_rows(), unit_rows(11, seed=3)
    mu, partner = weights(z.shape)[kind], torch.randperm(11, generator=seeded())
    scores = q @ z.T
    across = mu.T if kind == 2 else mu
    torch.testing.assert_close(
        q @ interpolate_negatives(z, mu, partner).T, across * scores + (1 - across) * scores[:, partner]
    )


@pytest.mark.parametrize("kind", range(4))
def test_gradients_are_the_derivatives(kind):
    q, k, z = unit_rows().requires_grad_(), near(unit_rows()).requires_grad_(), unit_rows(11).requires_grad_()
    lam, mu = 1 + weights(q.shape)[kind], weights(z.shape)[kind]
    partner = torch.randperm(11, generator=seeded())

    def function(q, k, z):
        return *extrapolate_positives(q, k, lam, renormalize=True), interpolate_negatives(z, mu, partner)

    torch.autograd.gradcheck(function, (q, k, z))
    torch.autograd.gradgradcheck(function, (q, k, z))


def test_weights_are_constants():
    q, k = unit_rows().requires_grad_(), near(unit_rows())
    lam = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    moved, _ = extrapolate_positives(q, k, lam)
    mixed = interpolate_negatives(q, lam, torch.arange(9))
    assert torch.autograd.grad((moved + mixed).sum(), lam, allow_unused=True)[0] is None


def test_usable_before_any_loss():
    q, k, z = unit_rows().float().requires_grad_(), near(unit_rows()).float(), unit_rows(11, seed=3).float()
    pair = PositiveExtrapolation()(q, k, generator=seeded())
    loss = info_nce_loss(*pair, NegativeInterpolation()(z, generator=seeded()), normalize=False)
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.5, 1.0, 1.6, 2.0, 7.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_of_the_beta_distribution(alpha, dtype):
    """Kolmogorov and Smirnov's distance, below its 0.1 % quantile."""
    special = pytest.importorskip("scipy.special")
    count = 300_000
    found = symmetric_beta(alpha, (count,), dtype=dtype, generator=seeded()).double().sort().values
    assert found.isfinite().all() and found[0] >= 0 and found[-1] <= 1
    exact = torch.from_numpy(special.betainc(alpha, alpha, found.numpy()))
    # A small alpha leaves many draws nearer to 0 or 1 than float32 can tell.
    inside = (found > 1e-5) & (found < 1 - 1e-5)
    exact, place = exact[inside], torch.arange(count)[inside]
    distance = torch.maximum((place + 1) / count - exact, exact - place / count).max()
    assert distance < 1.95 / count**0.5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_draws_are_of_known_distributions(alpha):
    """Arcsine, uniform, and the median of three uniforms."""
    x = symmetric_beta(alpha, (200_000,), dtype=torch.float64, generator=seeded()).sort().values
    exact = {0.5: 2 / torch.pi * x.sqrt().asin(), 1.0: x, 2.0: 3 * x**2 - 2 * x**3}[alpha]
    assert (exact - torch.arange(1, len(x) + 1) / len(x)).abs().max() < 1.95 / len(x) ** 0.5


@pytest.mark.parametrize(("alpha", "value"), [(1e-12, (0.0, 1.0)), (1e12, (0.5,)), (1e30, (0.5,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_at_the_ends(alpha, value, dtype):
    found = symmetric_beta(alpha, (1000,), dtype=dtype, generator=seeded())
    distance = (found[:, None] - torch.tensor(value, dtype=dtype)).abs()
    assert distance.amin(1).max() < 1e-5
    assert distance.amin(0).max() < 1e-5  # each of the values is met


def test_draws_are_independent():
    x, y = symmetric_beta(1.6, (2, 100_000), generator=seeded())
    for one, other in ((x, y), (x[1:], x[:-1]), ((x - 0.5).abs(), (y - 0.5).abs())):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.01


@pytest.mark.parametrize("granularity", ["scalar", "sample", "dim"])
def test_draws_repeat_with_their_generator(granularity):
    q, k, z = unit_rows(), near(unit_rows()), unit_rows(11, seed=3)
    positive, negative = PositiveExtrapolation(1.2, granularity), NegativeInterpolation(0.8, granularity)
    shape = {"scalar": (), "sample": (11, 1), "dim": (11, 6)}[granularity]
    assert negative.draw(z, generator=seeded()).shape == shape

    def run(generator):
        return *positive(q, k, generator=generator), negative(z, generator=generator)

    first, again, other = run(seeded()), run(seeded()), run(seeded(1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    # torch's own generator is touched if and only if none is given, and restoring it restores the draws.
    state = torch.get_rng_state()
    run(seeded())
    assert torch.equal(state, torch.get_rng_state())
    default = run(None)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    assert all(map(torch.equal, default, run(None)))


def test_weights_lie_where_they_should():
    q = unit_rows(400, 50)
    lam, mu = PositiveExtrapolation().draw(q, generator=seeded()), NegativeInterpolation().draw(q)
    assert lam.dtype == q.dtype and 1 <= lam.min() < 1.05 and 1.95 < lam.max() <= 2
    assert 0 <= mu.min() < 0.05 and 0.95 < mu.max() <= 1


def test_half_precision_is_widened():
    q, k = unit_rows().bfloat16(), near(unit_rows()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pair = extrapolate_positives(q, k, torch.tensor(1.5))
        mixed = interpolate_negatives(q, 0.5, torch.arange(9).flip(0))
        drawn = NegativeInterpolation()(q)
    assert {z.dtype for z in (*pair, mixed, drawn)} == {torch.float32}
    torch.testing.assert_close(pair, extrapolate_positives(q.float(), k.float(), 1.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_partners_of_any_integer_type(dtype):
    rows, partners = unit_rows(), torch.arange(9).flip(0)
    assert torch.equal(
        interpolate_negatives(rows, 0.3, partners.to(dtype)), interpolate_negatives(rows, 0.3, partners)
    )


def test_no_row_at_all():
    none = torch.zeros(0, 5)
    assert [z.shape for z in PositiveExtrapolation()(none, none)] == [(0, 5), (0, 5)]
    assert NegativeInterpolation()(none).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: extrapolate_positives(z, z[:2], 1.5), "query and key must have the same shape"),
        (lambda z: extrapolate_positives(z, z, torch.ones(3)), r"lam must be a number or a floating tensor"),
        (
            lambda z: extrapolate_positives(z, z, torch.ones(3, 2).long()),
            "lam must be a number or a floating",
        ),
        (lambda z: extrapolate_positives(z, z, float("nan")), "lam must be a finite number"),
        (lambda z: extrapolate_positives(z, z, torch.tensor(torch.inf)), "lam must be finite"),
        (lambda z: extrapolate_positives(z, z, "1.5"), "lam must be a number"),
        (lambda z: extrapolate_positives(z, z, 1.5, renormalize=1), "renormalize must be True or False"),
        (lambda z: interpolate_negatives(z, 0.5, torch.arange(2)), r"permutation must have shape \(3,\)"),
        (lambda z: interpolate_negatives(z, 0.5, torch.arange(3) + 1), "permutation must hold row numbers"),
        (lambda z: interpolate_negatives(z, 0.5, torch.ones(3)), "permutation must hold integers"),
        (lambda z: interpolate_negatives(z * torch.nan, 0.5, torch.arange(3)), "negatives must be finite"),
        (lambda z: PositiveExtrapolation(0.0), "alpha must be finite and > 0"),
        (lambda z: PositiveExtrapolation(torch.tensor(1.0)), "alpha must be a number > 0"),
        (lambda z: symmetric_beta(-1.0, (2,)), "alpha must be finite and > 0"),
        (lambda z: NegativeInterpolation(granularity="row"), "granularity must be one of"),
        (lambda z: PositiveExtrapolation(renormalize="no"), "renormalize must be True or False"),
        (lambda z: PositiveExtrapolation()(z[0], z), r"query must have shape \(N, D\)"),
        (lambda z: NegativeInterpolation()(z.long()), "negatives must be float16"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call(torch.ones(3, 2))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_show_themselves():
    assert repr(PositiveExtrapolation(2.0, "scalar")) == (
        "PositiveExtrapolation(alpha=2.0, granularity='scalar', renormalize=False)"
    )
    assert repr(NegativeInterpolation()) == "NegativeInterpolation(alpha=1.6, granularity='dim')"
