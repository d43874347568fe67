import pytest
import torch
from torch.distributions import Beta
from torch.nn import functional

from cl_core.losses import NTXentLoss
from cl_core.losses.nt_xent import nt_xent_loss
from cl_graph import mixture as module
from cl_graph.mixture import BetaMixture, MixtureNCELoss, fit_beta_mixture, mixture_nce_loss

FIRST = BetaMixture(*torch.tensor([[1.2, 3.0], [2.5, 1.1], [0.8, 0.2]], dtype=torch.float64))
SECOND = BetaMixture(*torch.tensor([[1.5, 2.0], [2.0, 1.4], [0.7, 0.3]], dtype=torch.float64))


def views(n=40, d=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def true_share(mixture, x):
    """From the formula, by torch's own density."""
    density = [w * Beta(a, b).log_prob(x).exp() for a, b, w in zip(*mixture, strict=True)]
    return density[0] / (density[0] + density[1])


def plain(z1, z2, mixtures, temperature, mode, mixed=None, order=None):
    """Both directions with whole matrices."""
    values = []
    u, v = functional.normalize(z1), functional.normalize(z2)
    n = len(u)
    others = ~torch.eye(n, dtype=torch.bool)
    for (own, other), mixture in zip(((u, v), (v, u)), mixtures, strict=True):
        between, within = own @ other.T, own @ own.T
        x = ((between.detach() + 1) / 2).clamp(1e-9, 1 - 1e-9)
        weights = true_share(mixture, x) * x * others
        positive = (between.diag() / temperature).exp()
        sums = (between / temperature).exp() + (within / temperature).exp()
        if mode == "weight":
            negative = (sums * weights).sum(1) / (weights.sum(1) / (n - 1))
        else:
            b, place = weights.sort(1, descending=True)
            b, c = b[:, :mixed], between.gather(1, place[:, :mixed])
            made = (c * b + c[:, order] * b[:, order]) / (b + b[:, order])
            negative = (sums * others).sum(1) + (made / temperature).exp().sum(1)
        values.append(-(positive / (positive + negative)).log())
    return torch.cat(values)


@pytest.mark.parametrize("mode", ["weight", "mix"])
@pytest.mark.parametrize("tiled", [False, True])
def test_losses_and_gradients_are_those_of_whole_matrices(mode, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr("cl_core.similarity._DENSE_ENTRIES", 0)
        monkeypatch.setattr("cl_core._tiles.default_tile", lambda device: (16, 12))
        monkeypatch.setattr(module, "_ENTRIES", {"cpu": 7 * 40})
    z1, z2 = views()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    options = {"mode": mode, "mixed": 9, "permutation": order, "reduction": "none"}
    found = mixture_nce_loss(z1, z2, (FIRST, SECOND), temperature=0.3, **options)
    expected = plain(z1, z2, (FIRST, SECOND), 0.3, mode, 9, order)
    torch.testing.assert_close(found, expected)
    factor = torch.linspace(-1, 2, 80).double()
    gradients = [torch.autograd.grad(values @ factor, (z1, z2)) for values in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_equal_weights_give_nt_xent():
    z1, z2 = views()
    # Without false negatives, and all similarities alike, nothing is left to weigh by.
    with torch.no_grad():
        z1 = torch.eye(40, dtype=torch.float64)
        z2 = z1.roll(20, 0)
    alone = BetaMixture(*torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64))
    weighted = mixture_nce_loss(z1[:20], z2[:20], (alone, alone), temperature=0.3)
    torch.testing.assert_close(weighted, nt_xent_loss(z1[:20], z2[:20], temperature=0.3))


def test_the_fit_finds_what_was_drawn():
    torch.manual_seed(0)
    false = torch.rand(20000) < 0.3
    x = torch.where(false, Beta(12.0, 3.0).sample((20000,)), Beta(3.0, 8.0).sample((20000,)))
    mixture = fit_beta_mixture(x, false_share=0.3, steps=200)
    assert mixture.alphas.tolist() == pytest.approx([3, 12], rel=0.1)
    assert mixture.betas.tolist() == pytest.approx([8, 3], rel=0.1)
    assert mixture.weights.tolist() == pytest.approx([0.7, 0.3], rel=0.05)
    likely_true = mixture.log_odds()(x.double()) < 0
    assert (likely_true != false).double().mean() > 0.97


@pytest.mark.parametrize(
    "x", [torch.full((9,), 0.3), torch.zeros(9), torch.ones(9), torch.tensor([0.0, 1.0])]
)
def test_a_fit_to_degenerate_numbers_stays_finite(x):
    mixture = fit_beta_mixture(x)
    assert all(part.isfinite().all() for part in mixture)
    weights = mixture.log_odds().log_weights(torch.tensor([-1.0, 0.0, 0.999, 1.0, 1.0000002]))
    assert weights.isfinite().all()


def test_false_negatives_weigh_less_and_single_precision_is_enough():
    cosines, odds = torch.linspace(-1, 1, 101).double(), FIRST.log_odds()
    weights = odds.log_weights(cosines).exp()
    x = (cosines[1:-1] + 1) / 2
    torch.testing.assert_close(weights[1:-1], 2 * true_share(FIRST, x) * x)
    assert weights[-1] < weights[60] and weights[0] < 1e-9
    torch.testing.assert_close(odds.log_weights(cosines.float()).exp(), weights.float(), rtol=2e-5, atol=1e-6)


def test_the_module_is_nt_xent_until_it_is_fitted():
    z1, z2 = views(dtype=torch.float32)
    loss = MixtureNCELoss(0.4)
    assert not loss.fitted and torch.equal(loss(z1, z2), NTXentLoss(0.4)(z1, z2))
    torch.manual_seed(0)
    loss.fit(z1, z2)
    assert loss.fitted
    expected = mixture_nce_loss(z1, z2, loss.mixtures, temperature=0.4)
    assert torch.equal(loss(z1, z2), expected) and not torch.equal(expected, NTXentLoss(0.4)(z1, z2))
    other = MixtureNCELoss(0.4)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(z1, z2), expected)


def test_each_direction_is_fitted_to_similarities_with_others_only():
    z1, z2 = views(n=30, dtype=torch.float32)  # fewer than are drawn of many: all take part
    loss = MixtureNCELoss(0.4)
    loss.fit(z1, z2)
    between = functional.normalize(z1) @ functional.normalize(z2).T
    x = (1 + between[~torch.eye(30, dtype=torch.bool)].detach()) / 2
    for found in loss.mixtures:
        torch.testing.assert_close(tuple(found), tuple(part.float() for part in fit_beta_mixture(x)))


def test_each_direction_has_a_mixture_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLED", 4)
    z1, z2 = views(n=30, dtype=torch.float32)
    loss = MixtureNCELoss(0.4)
    loss.fit(z1, z2)
    first, second = loss.mixtures
    assert not torch.allclose(first.alphas, second.alphas)
    swapped = mixture_nce_loss(z2, z1, (second, first), temperature=0.4)
    torch.testing.assert_close(swapped, loss(z1, z2))


def test_a_node_alone_has_nothing_to_compare():
    z1, z2 = views(n=1)
    loss = mixture_nce_loss(z1, z2, (FIRST, SECOND))
    assert loss == 0
    with pytest.raises(ValueError, match="z1 must have at least 2 rows, got 1"):
        MixtureNCELoss().fit(z1, z2)


def test_two_nodes_and_more_to_mix_than_there_are():
    z1, z2 = views(n=2)
    for mode in ("weight", "mix"):
        assert mixture_nce_loss(z1, z2, (FIRST, SECOND), mode=mode).isfinite()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MixtureNCELoss(mode="both"), ValueError, "mode must be one of 'weight', 'mix'"),
        (lambda: MixtureNCELoss(mixed=0), ValueError, "mixed must be at least 1"),
        (lambda: MixtureNCELoss(false_share=1.0), ValueError, r"false_share must be in \(0, 1\), got 1.0"),
        (lambda: MixtureNCELoss(0.0), ValueError, "temperature must be finite and > 0"),
        (
            lambda: fit_beta_mixture(torch.ones(1)),
            ValueError,
            r"x must have shape \(N,\), N >= 2, got \(1,\)",
        ),
        (lambda: fit_beta_mixture(torch.tensor([0.5, 1.5])), ValueError, r"x must lie in \[0, 1\]"),
        (
            lambda: mixture_nce_loss(torch.ones(3, 2), torch.ones(4, 2), (FIRST, SECOND)),
            ValueError,
            "z1 and z2 must have the same shape",
        ),
        (
            lambda: mixture_nce_loss(
                torch.ones(3, 2), torch.ones(3, 2), (FIRST, SECOND), mode="mix", permutation=torch.arange(3)
            ),
            ValueError,
            r"permutation must have shape \(2,\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
