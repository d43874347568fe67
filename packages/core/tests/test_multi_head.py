"""AMCL against its definition, and what must hold of it for any data."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cl_core.functional import (
    amcl_barlow_loss,
    amcl_loss,
    amcl_simsiam_loss,
    dcl_loss,
    info_nce_loss,
    negative_cosine_similarity,
    nt_xent_loss,
)
from cl_core.losses import (
    AMCLBarlowLoss,
    AMCLLoss,
    AMCLSimSiamLoss,
    NTXentLoss,
    _heads,
)
from cl_core.temperatures import PairTemperature

HEADS, WIDTH = 3, 4


def views(rows=7, *, seed=0, heads=HEADS, noise=0.7, count=2):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, heads * WIDTH, generator=generator, dtype=torch.float64)
    found = [
        shared + noise * torch.randn(shared.shape, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return [z.requires_grad_() for z in found]


def queue(rows=11, *, heads=HEADS):
    return torch.randn(rows, heads * WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def network(heads=HEADS, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PairTemperature(WIDTH, heads=heads, hidden_dim=5, **options).double()


def omega(tau):
    return WIDTH / 2 * tau.log() + 1 / tau


def by_pairs(tau, head, u, v):
    """Temperature of one pair of rows in one head, from a network on its own stacks or a constant."""
    if not callable(tau):
        return torch.as_tensor(tau, dtype=u.dtype)
    stacks = [torch.zeros(tau.heads, 1, WIDTH, dtype=u.dtype) for _ in range(2)]
    for stack, row in zip(stacks, (u, v), strict=True):
        stack[head, 0] = row
    return tau(*stacks)[head, 0]


def definition(z1, z2, memory, tau, *, beta, pooling="max", include_positive=False, raw=False, heads=HEADS):
    """Equations 2.1 and 2.4 pair by pair; one value an anchor, view 1 first."""
    rows = [*z1, *z2]
    total = []
    anchors = range(len(z1) if memory is not None else len(rows))
    for i in anchors:
        partner = z2[i] if i < len(z1) else z1[i - len(z1)]
        others = memory if memory is not None else [r for j, r in enumerate(rows) if (j - i) % len(z1)]
        anchor_total = 0
        for head in range(heads):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            anchor = rows[i][part]

            def term(other, anchor=anchor, head=head, part=part):
                u, v = F.normalize(anchor, dim=0), F.normalize(other[part], dim=0)
                temperature = by_pairs(tau, head, *((anchor, other[part]) if raw else (u, v)))
                return u @ v, u @ v / temperature - beta * omega(temperature)

            positive = term(partner)
            candidates = [term(other) for other in others] + [positive] * include_positive
            if pooling == "max":
                negative = max(candidates, key=lambda pair: pair[0].item())[1]
            else:
                negative = torch.stack([value for _, value in candidates]).logsumexp(0)
            anchor_total = anchor_total + negative - positive[1]
        total.append(anchor_total)
    return torch.stack(total)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("pooling", ["max", "lse"])
@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize(
    ("beta", "raw", "network_options"),
    [(0.1, False, {}), (1.0, True, {}), (0.1, True, {"shared": True}), (0.0, False, None)],
)
def test_is_its_definition(beta, raw, network_options, include_positive, pooling, memory):
    z1, z2 = views()
    held = queue().requires_grad_() if memory else None
    tau = 0.3 if network_options is None else network(**network_options)
    options = {"beta": beta, "pooling": pooling, "include_positive": include_positive}
    found = amcl_loss(z1, z2, held, heads=HEADS, temperature=tau, raw_input=raw, reduction="none", **options)
    wanted = definition(z1, z2, held, tau, raw=raw, **options)
    torch.testing.assert_close(found, wanted)
    leaves = [z1, z2, *([held] if memory else []), *([] if network_options is None else tau.parameters())]
    weight = torch.linspace(1, 2, len(found), dtype=torch.float64)
    gradients = [torch.autograd.grad((weight * loss).sum(), leaves) for loss in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("memory", [False, True])
def test_a_constant_temperature_and_all_negatives_are_the_losses_it_starts_from(memory):
    z1, z2 = views(heads=1)
    held = queue(heads=1) if memory else None
    options = {"heads": 1, "temperature": 0.2, "beta": 0.0, "pooling": "lse", "reduction": "none"}
    given = {"temperature": 0.2, "reduction": "none"}
    decoupled = dcl_loss(z1, z2, **given | ({"negatives": held} if memory else {}))
    torch.testing.assert_close(amcl_loss(z1, z2, held, **options), decoupled)
    coupled = info_nce_loss(z1, z2, held, **given) if memory else nt_xent_loss(z1, z2, **given)
    torch.testing.assert_close(amcl_loss(z1, z2, held, include_positive=True, **options), coupled)


def test_temperature_one_is_hardest_less_positive():
    z1, z2 = views(heads=1)
    rows = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity, own = rows @ rows.T, torch.arange(7).repeat(2)
    hardest = similarity.masked_fill(own[:, None] == own, -2).amax(1)
    positive = similarity.diagonal(7).repeat(2)
    found = amcl_loss(z1, z2, heads=1, temperature=1.0, beta=0.0)
    torch.testing.assert_close(found, (hardest - positive).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("include_positive", [False, True])
def test_the_hardest_is_no_more_than_all(include_positive, seed):
    z1, z2 = views(seed=seed, noise=2.0)
    options = {"heads": HEADS, "include_positive": include_positive, "reduction": "none"}
    for tau in (network(), 0.3):
        hardest, pooled = (amcl_loss(z1, z2, temperature=tau, pooling=p, **options) for p in ("max", "lse"))
        assert (hardest < pooled).all()
    dominated = [amcl_loss(z1, z2, temperature=1e-5, pooling=p, **options) for p in ("max", "lse")]
    torch.testing.assert_close(*dominated, rtol=1e-6, atol=1e-6)


def test_the_positive_among_candidates_gates_the_loss():
    """Where the positive is its own hardest candidate, an anchor has no loss and exactly no gradient in that head."""
    z1, z2 = views(heads=1, noise=0.01)
    options = {"heads": 1, "temperature": network(1), "include_positive": True}
    loss = amcl_loss(z1, z2, **options)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (z1, z2)))
    z1, z2 = views(heads=1)
    alone = amcl_loss(z1, z2, reduction="none", **options | {"include_positive": False})
    gated = amcl_loss(z1, z2, reduction="none", **options)
    assert 0 < (gated != 0).sum() < len(gated)
    torch.testing.assert_close(gated, torch.where(gated != 0, alone, 0))


def of_similarity(s):
    """A prediction and a target of one head whose cosine is s."""
    row = torch.tensor([[s, math.sqrt(1 - s * s), 0, 0]], dtype=torch.float64)
    return row, torch.eye(1, WIDTH, dtype=torch.float64)


def predicted(s, tau, beta):
    """What 2.1 has for one positive: the loss of predictions weighs the regulariser twice."""
    return amcl_simsiam_loss(*of_similarity(s), heads=1, temperature=tau, beta=beta / 2)


def derivative(function, at, order=1):
    tau = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = function(tau)
    for _ in range(order):
        (value,) = torch.autograd.grad(value, tau, create_graph=True)
    return value.item()


def test_the_regulariser_is_least_at_two_over_d_and_convex_up_to_four():
    regulariser = lambda tau: predicted(0.0, tau, 1.0)  # noqa: E731
    assert abs(derivative(regulariser, 2 / WIDTH)) < 1e-12
    assert derivative(regulariser, 1.9 / WIDTH) < 0 < derivative(regulariser, 2.1 / WIDTH)
    assert derivative(regulariser, 3.9 / WIDTH, 2) > 0 > derivative(regulariser, 4.1 / WIDTH, 2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("share", [-2.0, 0.0, 0.5])
def test_the_best_temperature_of_a_positive_below_beta(beta, share):
    s = max(share * beta, -0.9)
    best = 2 * (beta - s) / (beta * WIDTH)
    function = lambda tau: predicted(s, tau, beta)  # noqa: E731
    assert abs(derivative(function, best)) < 1e-9
    assert derivative(function, 0.9 * best) < 0 < derivative(function, 1.1 * best)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_floor_is_what_bounds_it(beta):
    """No beta makes both sides bounded as temperatures go to zero."""
    z1, z2 = views(heads=1, noise=0.1)
    values = [
        min(
            amcl_loss(z1, z2, heads=1, temperature=tau, beta=beta).item()
            for tau in (
                lambda u, v, low=low: torch.where((u * v).sum(2) > 0.9, low, 1.0),
                lambda u, v, low=low: torch.where((u * v).sum(2) < 0.9, low, 1.0),
            )
        )
        for low in (1e-2, 1e-3, 1e-4)
    ]
    assert values[0] > values[1] > values[2]
    assert values[2] < -100 * beta


def test_gradients_reach_everything_but_targets():
    z1, z2 = views()
    tau = network()
    loss = amcl_loss(z1, z2, heads=HEADS, temperature=tau)
    for gradient in torch.autograd.grad(loss, [z1, z2, *tau.parameters()]):
        assert gradient.abs().max() > 0
    loss = amcl_simsiam_loss(z1, z2, heads=HEADS, temperature=tau)
    target, *others = torch.autograd.grad(loss, [z2, z1, *tau.parameters()], allow_unused=True)
    assert target is None
    assert all(gradient.abs().max() > 0 for gradient in others)


def test_heads_are_independent():
    z1, z2 = views()
    tau = network()
    loss = amcl_loss(z1, z2, heads=HEADS, temperature=tau)
    of_all = torch.autograd.grad(loss, [z1, z2, tau.weight1])
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        alone = PairTemperature(WIDTH, heads=1, hidden_dim=5).double()
        alone.weight1.data = tau.weight1.data[head : head + 1]
        alone.bias1.data = tau.bias1.data.view(HEADS, -1)[head]
        alone.weight2.data = tau.weight2.data[head : head + 1]
        alone.bias2.data = tau.bias2.data[head : head + 1]
        given = [z.detach()[:, part].requires_grad_() for z in (z1, z2)]
        one = torch.autograd.grad(amcl_loss(*given, heads=1, temperature=alone), [*given, alone.weight1])
        for whole, single in zip(
            (of_all[0][:, part], of_all[1][:, part], of_all[2][head, None]), one, strict=True
        ):
            torch.testing.assert_close(whole, single)


def test_each_head_has_a_length_of_its_own():
    z1, z2 = views()
    lengths = torch.tensor([0.01, 1.0, 30.0]).double().repeat_interleave(WIDTH)
    options = {"heads": HEADS, "temperature": network()}
    torch.testing.assert_close(
        amcl_loss(z1 * lengths, z2, queue() * lengths, **options), amcl_loss(z1, z2, queue(), **options)
    )


@pytest.mark.parametrize("pooling", ["max", "lse"])
@pytest.mark.parametrize("bias", [-1e6, 1e6])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_finite_at_both_ends_of_the_temperatures(beta, bias, pooling):
    z1, z2 = (z.detach().float().requires_grad_() for z in views())
    tau = network(minimum=1e-5).float()
    torch.nn.init.constant_(tau.bias2, bias)
    loss = amcl_loss(z1, z2, heads=HEADS, temperature=tau, beta=beta, pooling=pooling)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [z1, z2, *tau.parameters()]))


def test_temperatures_are_computed_of_positives_and_hardest_only():
    calls = []

    def tau(u, v):
        assert u.shape == v.shape
        calls.append(u.shape)
        return torch.ones(u.shape[:2], dtype=u.dtype)

    z1, z2 = views(20)
    amcl_loss(z1, z2, heads=HEADS, temperature=tau)
    assert sum(c * n for c, n, _ in calls) == HEADS * 40 * 2
    calls.clear()
    amcl_loss(z1, z2, queue(100), heads=HEADS, temperature=tau)
    assert sum(c * n for c, n, _ in calls) == HEADS * 20 * 2


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return result


@pytest.mark.parametrize("pooling", ["max", "lse"])
def test_no_matrix_of_all_pairs(pooling, monkeypatch):
    monkeypatch.setattr(_heads, "_GRID_ENTRIES_CPU", 1 << 13)
    z1, z2 = (z.detach().float().requires_grad_() for z in views(600 if pooling == "max" else 100))
    with Largest() as largest:
        amcl_loss(z1, z2, heads=HEADS, temperature=network(), pooling=pooling).backward()
    pairs = (2 * len(z1)) ** 2
    assert 0 < largest.entries <= pairs / 2


def test_pooling_some_anchors_at_a_time_changes_nothing(monkeypatch):
    z1, z2 = views(noise=2.0)
    for tau in (network(), 0.3, lambda u, v: 1.5 + (u * v).sum(2)):
        results = []
        leaves = [z1, z2, *(tau.parameters() if isinstance(tau, PairTemperature) else [])]
        for entries in (1 << 20, 1):
            monkeypatch.setattr(_heads, "_GRID_ENTRIES_CPU", entries)
            loss = amcl_loss(z1, z2, heads=HEADS, temperature=tau, pooling="lse")
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results)


def test_a_function_that_draws_is_differentiated_as_it_drew(monkeypatch):
    """Also where the backward computes it again, one anchor at a time."""
    monkeypatch.setattr(_heads, "_GRID_ENTRIES_CPU", 1)
    z1, z2 = (z.detach() for z in views(4))

    def loss(weight):
        torch.manual_seed(0)
        options = {"temperature": lambda u, v: 0.5 + F.dropout((u * v * weight).square()).sum(2)}
        return amcl_loss(z1, z2, heads=HEADS, pooling="lse", **options)

    torch.autograd.gradcheck(loss, (torch.ones(WIDTH, dtype=torch.float64, requires_grad=True),))


def test_any_function_of_pairs_is_a_temperature():
    z1, z2 = views()
    net = network()
    for pooling in ("max", "lse"):
        options = {"heads": HEADS, "pooling": pooling}
        wrapped = amcl_loss(z1, z2, temperature=lambda u, v: net(u, v), **options)
        torch.testing.assert_close(wrapped, amcl_loss(z1, z2, temperature=net, **options))


def test_a_learnable_constant_gets_its_gradient():
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for pooling in ("max", "lse"):
        torch.autograd.gradcheck(
            lambda tau, pooling=pooling: amcl_loss(*views(), heads=HEADS, temperature=tau, pooling=pooling),
            (tau,),
        )


@pytest.mark.parametrize("options", [{}, {"pooling": "lse"}, {"include_positive": True}, {"raw_input": True}])
def test_gradient_is_the_derivative(options):
    z1, z2 = views(5, noise=2.0)
    tau = network()

    def loss(z1, z2, *_):
        return amcl_loss(z1, z2, heads=HEADS, temperature=tau, **options)

    torch.autograd.gradcheck(loss, (z1, z2, *tau.parameters()), fast_mode=True)
    torch.autograd.gradgradcheck(loss, (z1, z2), fast_mode=True)


# ---- temperatures ----------------------------------------------------------------------------------------------------


def test_temperature_is_a_perceptron_of_both_rows():
    tau = network(minimum=0.2, maximum=1.2)
    u, v = torch.randn(2, HEADS, 6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias1 = tau.bias1.view(HEADS, 1, -1)
    hidden = F.relu(torch.cat([u, v], 2) @ tau.weight1.mT + bias1)
    logits = (hidden @ tau.weight2.mT)[..., 0] + tau.bias2[:, None]
    torch.testing.assert_close(tau(u, v), 0.2 + logits.sigmoid())
    assert not torch.allclose(tau(u, v), tau(v, u))


def test_one_network_may_serve_all_heads():
    shared, own = network(shared=True), network()
    rows = torch.randn(1, 6, WIDTH, dtype=torch.float64).expand(HEADS, -1, -1)
    assert torch.equal(*shared(rows, rows.flip(1))[:2])
    assert not torch.allclose(*own(rows, rows.flip(1))[:2])
    counts = [sum(p.numel() for p in net.parameters()) for net in (shared, own)]
    assert counts[1] == HEADS * counts[0]


def test_temperatures_stay_inside_their_range():
    tau = network(minimum=0.1, maximum=1.0)
    for bias, end in ((-1e9, 0.1), (1e9, 1.0)):
        torch.nn.init.constant_(tau.bias2, bias)
        found = tau(*torch.randn(2, HEADS, 6, WIDTH, dtype=torch.float64))
        assert ((found > 0.1) & (found < 1.0)).all()
        torch.testing.assert_close(found, torch.full_like(found, end), rtol=0, atol=1e-4)


def test_a_detached_input_learns_nothing_for_the_temperature():
    z1, z2 = views()
    tau, free = network(detach_input=True), network()
    loss = amcl_loss(z1, z2, heads=HEADS, temperature=tau)
    torch.testing.assert_close(loss, amcl_loss(z1, z2, heads=HEADS, temperature=free))
    gradient, *of_network = torch.autograd.grad(loss, [z1, *tau.parameters()])
    # As if the temperatures were given.
    constant = amcl_loss(z1, z2, heads=HEADS, temperature=lambda u, v: free(u, v).detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(constant, z1)[0])
    assert all(g.abs().max() > 0 for g in of_network)


def test_biases_are_exempt_where_vectors_are():
    for name, parameter in PairTemperature().named_parameters():
        assert (parameter.ndim > 1) == name.startswith("weight")


def test_equal_ends_make_a_constant_temperature():
    z1, z2 = views()
    loss = AMCLLoss(WIDTH, min_temperature=0.3, max_temperature=0.3)
    assert not list(loss.parameters())
    torch.testing.assert_close(loss(z1, z2), amcl_loss(z1, z2, heads=HEADS, temperature=0.3))
    assert set(loss.measures(z1, z2)) == {"similarity_positive", "similarity_negative"}


# ---- hosts -----------------------------------------------------------------------------------------------------------


def test_simsiam_of_both_views_is_the_printed_equation():
    (z1, z2), (h1, h2) = views(), views(seed=1)
    tau, beta = network(), 0.1
    loss = AMCLSimSiamLoss(WIDTH).double()
    loss.pair_temperature = tau
    found = (loss(z1, h2) + loss(z2, h1)) / 2
    wanted = 0
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        for z, h in ((z1, h2), (z2, h1)):
            for row, target in zip(z[:, part], h.detach()[:, part], strict=True):
                row, target = F.normalize(row, dim=0), F.normalize(target, dim=0)
                temperature = by_pairs(tau, head, row, target)
                wanted = wanted + (-row @ target / (2 * temperature) + beta * omega(temperature)) / len(z)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(wanted, (z1, z2)))


def test_simsiam_of_temperature_one_is_the_sum_of_cosines():
    z1, z2 = views()
    cosines = [
        negative_cosine_similarity(a, b) for a, b in zip(z1.split(WIDTH, 1), z2.split(WIDTH, 1), strict=True)
    ]
    torch.testing.assert_close(
        amcl_simsiam_loss(z1, z2, heads=HEADS, temperature=1.0, beta=0.0), sum(cosines)
    )


def barlow_definition(z1, z2, tau, lambd, beta, eps):
    total = 0
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        a, b = ((z - z.mean(0)) / (z.var(0) + eps).sqrt() for z in (z1[:, part], z2[:, part]))
        for k in range(WIDTH):
            for m in range(WIDTH):
                value, t = (a[:, k] * b[:, m]).mean(), tau[head, k, m]
                if k == m:
                    total = total + (1 - value / t).square() + beta * omega(t)
                else:
                    total = total + lambd * value.square() / t - beta * omega(t)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_barlow_is_its_definition(beta):
    z1, z2 = views()
    tau = torch.rand(HEADS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tau = (tau + 0.1).requires_grad_()
    options = {"lambd": 0.02, "beta": beta, "eps": 1e-3}
    found = amcl_barlow_loss(z1, z2, heads=HEADS, temperature=tau, **options)
    wanted = barlow_definition(z1, z2, tau, **options)
    torch.testing.assert_close(found, wanted)
    leaves = (z1, z2, tau)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


def test_barlow_learns_its_temperatures():
    z1, z2 = views()
    loss = AMCLBarlowLoss(WIDTH, min_temperature=0.1, max_temperature=1.1).double()
    torch.testing.assert_close(loss.pair_temperature, torch.full_like(loss.temperature_logits, 0.6))
    torch.testing.assert_close(loss(z1, z2), amcl_barlow_loss(z1, z2, heads=HEADS, temperature=0.6))
    (gradient,) = torch.autograd.grad(loss(z1, z2), loss.temperature_logits)
    assert (gradient != 0).all()
    constant = AMCLBarlowLoss(WIDTH, min_temperature=0.6, max_temperature=0.6).double()
    torch.testing.assert_close(constant(z1, z2), loss(z1, z2))
    assert not any(p.requires_grad for p in constant.parameters())


# ---- measures --------------------------------------------------------------------------------------------------------


def test_measures_tell_of_the_pairs_compared():
    z1, z2 = views(30)
    loss = AMCLLoss(WIDTH, hidden_dim=5).double()
    tau = loss.pair_temperature = network()
    found = loss.measures(z1, z2)
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
    rows = [F.normalize(z.view(30, HEADS, WIDTH), dim=2).transpose(0, 1) for z in (z1, z2)]
    anchors, partners = torch.cat(rows, 1), torch.cat(rows[::-1], 1)
    similarity, own = anchors @ anchors.mT, torch.arange(30).repeat(2)
    nearest = similarity.masked_fill(own[:, None] == own, -2).max(2)
    hardest = torch.stack([rows[i] for rows, i in zip(anchors, nearest.indices, strict=True)])
    torch.testing.assert_close(found["similarity_positive"], (anchors * partners).sum(2).mean())
    torch.testing.assert_close(found["similarity_negative"], nearest.values.mean())
    for side, others in (("positive", partners), ("negative", hardest)):
        temperatures = tau(anchors, others)
        torch.testing.assert_close(found[f"tau_{side}_median"], temperatures.quantile(0.5))
        torch.testing.assert_close(found[f"tau_{side}_q90"], temperatures.quantile(0.9))
        assert found[f"tau_{side}_at_floor"] == 0
    assert loss.advice(found) is None
    assert AMCLLoss(WIDTH, group="world").measures(z1, z2).keys() == found.keys()  # without the other ranks
    with_queue = loss.measures(z1, z2, queue())
    assert with_queue["similarity_negative"] != found["similarity_negative"]


@pytest.mark.parametrize("kind", [AMCLLoss, AMCLSimSiamLoss])
def test_advice_when_temperatures_sit_at_the_floor(kind):
    z1, z2 = views()
    loss = kind(WIDTH).double()
    assert loss.advice(loss.measures(z1, z2)) is None
    torch.nn.init.constant_(loss.pair_temperature.bias2, -9.0)
    advice = loss.advice(loss.measures(z1, z2))
    assert advice.startswith("100 % of the temperatures of positive pairs are at min_temperature=0.05")


@pytest.mark.parametrize("pooling", ["max", "lse"])
def test_advice_when_all_rows_are_one(pooling):
    z1, z2 = (0.05 * view + torch.ones_like(view) for view in views())
    loss = AMCLLoss(WIDTH, pooling=pooling).double()
    advice = loss.advice(loss.measures(z1, z2))
    assert advice.endswith("milder views or a smaller learning rate.")
    assert ('pooling="lse"' in advice) == (pooling == "max")
    products = AMCLLoss(WIDTH, pooling=pooling, normalize=False).double()  # whose similarities are no cosines
    assert products.advice(products.measures(z1, z2)) is None


def test_advice_on_barlow_tells_the_sides_apart():
    loss = AMCLBarlowLoss(WIDTH)
    assert loss.advice(loss.measures(*views())) is None
    with torch.no_grad():
        loss.temperature_logits.fill_(-9.0).diagonal(dim1=1, dim2=2).zero_()
    assert loss.advice(loss.measures(*views())).startswith("100 % of the temperatures of negative pairs")


def test_one_dimension_has_no_temperatures_off_the_diagonal():
    found = AMCLBarlowLoss(1).measures(*views())
    assert set(found) == {f"tau_positive_{name}" for name in ("q10", "median", "q90", "at_floor")}


def test_a_loss_measures_nothing_unless_it_says_so():
    loss = NTXentLoss()
    assert loss.measures(*views()) == {}
    assert loss.advice({}) is None


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: amcl_loss(*views(1), heads=HEADS, temperature=1.0), "amcl_loss needs at least 2 rows"),
        (lambda: amcl_loss(*views(), heads=5, temperature=1.0), "that heads=5 divides, got 12"),
        (lambda: amcl_loss(*views(), heads=0, temperature=1.0), "heads must be at least 1"),
        (lambda: amcl_loss(*views(), heads=HEADS, temperature=0.0), "temperature must be finite and > 0"),
        (lambda: amcl_loss(*views(), heads=HEADS, temperature="warm"), "temperature must be a number"),
        (lambda: amcl_loss(*views(), heads=HEADS, temperature=1.0, beta=-1.0), "beta must be at least 0"),
        (lambda: amcl_loss(*views(), heads=HEADS, temperature=1.0, pooling="mean"), "pooling must be one of"),
        (lambda: amcl_loss(*views(), heads=HEADS, temperature=1.0, raw_input=1), "raw_input must be True or"),
        (
            lambda: amcl_loss(*views(), heads=2, temperature=network()),
            "heads must be those of the temperature",
        ),
        (
            lambda: amcl_loss(*views(heads=1), heads=HEADS, temperature=network()),
            r"z1 must have heads \* dim = 3 \* 4 = 12 columns, got 4",
        ),
        (
            lambda: amcl_loss(*views(), heads=HEADS, temperature=lambda u, v: (u * v).sum()),
            r"temperature must give shape \(3, 14\)",
        ),
        (
            lambda: amcl_loss(*views(), heads=HEADS, temperature=lambda u, v: (u * v).sum(2)),
            "temperature must give finite values > 0",
        ),
        (
            lambda: amcl_loss(*views(), heads=HEADS, temperature=lambda u, v: (u * v).sum(2) * 0 + torch.inf),
            "temperature must give finite values > 0",
        ),
        (
            lambda: amcl_barlow_loss(*views(), heads=HEADS, temperature=torch.full((3, 4, 4), 1e-40)),
            "temperature must be at least 1e-12",
        ),
        (lambda: network()([1.0], torch.ones(3, 2, 4)), r"u must have shape \(3, N, 4\), got list"),
        (lambda: amcl_loss(*views(), queue(heads=2), heads=HEADS, temperature=1.0), "number of columns"),
        (lambda: amcl_simsiam_loss(*views(heads=1), heads=HEADS, temperature=network()), "p must have heads"),
        (lambda: amcl_barlow_loss(*views(), heads=HEADS, temperature=torch.ones(2, 4, 4)), "0-d or of shape"),
        (lambda: amcl_barlow_loss(*views(), heads=HEADS, temperature=-torch.ones(3, 4, 4)), "finite and > 0"),
        (lambda: amcl_barlow_loss(*views(1), heads=HEADS, temperature=1.0), "needs at least 2 rows"),
        (lambda: amcl_barlow_loss(*views(), heads=HEADS, temperature=1.0, eps=0.0), "eps must be finite and"),
        (lambda: network()(torch.ones(3, 2, 4), torch.ones(2, 2, 4)), r"v must have shape \(3, N, 4\)"),
        (lambda: PairTemperature(minimum=0.0), "minimum must be finite and > 0"),
        (lambda: PairTemperature(minimum=1.0, maximum=1.0), "maximum must exceed minimum"),
        (lambda: AMCLLoss(min_temperature=0.0), "min_temperature must be finite and > 0"),
        (lambda: AMCLLoss(min_temperature=3.0), "min_temperature must not exceed max_temperature"),
        (lambda: AMCLLoss(dim=0), "dim must be at least 1"),
        (lambda: AMCLLoss(beta=-0.1), "beta must be at least 0"),
        (lambda: AMCLSimSiamLoss(shared=1), "shared must be True or False"),
        (lambda: AMCLBarlowLoss(heads=0), "heads must be at least 1"),
        (
            lambda: AMCLBarlowLoss(WIDTH + 1)(*views()),
            rf"z1 must have heads \* dim = 3 \* {WIDTH + 1} = {3 * WIDTH + 3} columns, got {3 * WIDTH}",
        ),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert str(error.value).endswith(".")
