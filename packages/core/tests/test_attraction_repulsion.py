"""CACR against its definition, and what must hold of it for any data."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cl_core import similarity
from cl_core.functional import cacr_loss, cacr_momentum_loss, cacr_queue_loss, info_nce_loss
from cl_core.losses import CACRLoss, CACRMomentumLoss


def views(count=3, rows=7, width=5, seed=0, unit=True):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, rows, width, generator=generator, dtype=torch.float64)
    found = shared + 0.7 * noise
    return list((F.normalize(found, dim=2) if unit else found).requires_grad_().unbind())


def squared(x, y):
    return (x[:, None] - y[None]).square().sum(2)


def negatives_of(distances):
    """Off-diagonal entries, one row an anchor."""
    n = len(distances)
    return distances[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def definition(rows, t_pos, t_neg, cost="euclidean", rbf_t=2.0, detach=False, symmetric=False):
    """Attraction and repulsion by broadcasting, as the sums are written."""
    constant = (lambda w: w.detach()) if detach else (lambda w: w)
    attraction = 0
    for x, query in enumerate(rows):
        c = torch.stack([(query - other).square().sum(1) for y, other in enumerate(rows) if y != x], 1)
        attraction = attraction + (constant((t_pos * c).softmax(1)) * c).sum(1).mean() / len(rows)
    pairs = list((itertools.permutations if symmetric else itertools.combinations)(rows, 2))
    repulsion = 0
    for query, other in pairs:
        c = negatives_of(squared(query, other))
        weights = constant((-t_neg * c).softmax(1))
        if cost == "rbf":
            repulsion = repulsion + (weights * (-rbf_t * c).exp()).sum(1).mean().log() / len(pairs)
        else:
            repulsion = repulsion - (weights * c).sum(1).mean() / len(pairs)
    return attraction, repulsion


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"t_pos": 0.0, "t_neg": 0.0},
        {"t_pos": 3.0, "t_neg": 2.5, "symmetric": True},
        {"cost": "rbf", "t_neg": 0.9},
        {"cost": "rbf", "t_neg": 0.0, "rbf_t": 0.5},
        {"detach": True},
        {"detach": True, "cost": "rbf", "rbf_t": 3.0},
    ],
    ids=str,
)
def test_is_its_definition(options, count, unit, impl):
    rows = views(count, unit=unit)
    sharpness = {"t_pos": options.get("t_pos", 1.0), "t_neg": options.get("t_neg", 1.0)}
    attraction, repulsion = definition(rows, **(options | sharpness))
    rest = {("detach_weights" if k == "detach" else k): v for k, v in options.items()} | sharpness
    found = cacr_loss(rows, alpha=0.7, beta=1.3, normalize=False, impl=impl, **rest)
    wanted = 0.7 * attraction + 1.3 * repulsion
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, rows), torch.autograd.grad(wanted, rows))


def test_one_positive_has_weight_one():
    rows = views(2)
    distance = (rows[0] - rows[1]).square().sum(1).mean()
    for t_pos in (0.0, 1.0, 50.0):
        torch.testing.assert_close(cacr_loss(rows, t_pos=t_pos, beta=0.0), distance)


def test_sharp_weights_keep_the_farthest_positive_and_the_nearest_negative():
    rows = views(4)
    farthest = sum(
        torch.stack([(q - o).square().sum(1) for o in rows if o is not q]).amax(0).mean() for q in rows
    )
    torch.testing.assert_close(cacr_loss(rows, t_pos=1e4, beta=0.0), farthest / 4, rtol=1e-3, atol=0)
    pairs = list(itertools.combinations(rows, 2))
    nearest = sum(negatives_of(squared(x, y)).amin(1).mean() for x, y in pairs) / len(pairs)
    torch.testing.assert_close(cacr_loss(rows, t_neg=1e4, alpha=0.0), -nearest, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_weights_raise_both_terms(seed):
    """Far positives weigh more and near negatives weigh more, whatever the data."""
    rows = views(4, seed=seed)
    assert cacr_loss(rows, t_pos=1.0, beta=0.0) > cacr_loss(rows, t_pos=0.0, beta=0.0)
    assert cacr_loss(rows, t_neg=1.0, alpha=0.0) > cacr_loss(rows, t_neg=0.0, alpha=0.0)


def test_order_of_views_counts_one_way_only():
    rows = views(2)
    assert not torch.isclose(cacr_loss(rows), cacr_loss(rows[::-1]))
    torch.testing.assert_close(cacr_loss(rows, symmetric=True), cacr_loss(rows[::-1], symmetric=True))


def test_constant_weights_change_gradients_only():
    rows = views(3)
    attached, constant = cacr_loss(rows), cacr_loss(rows, detach_weights=True)
    torch.testing.assert_close(attached, constant)
    gradients = [torch.autograd.grad(loss, rows[0])[0] for loss in (attached, constant)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_constant_weights_have_the_gradient_of_a_log_sum_exp():
    x, y = views(2)
    t = 1.7
    loss = cacr_loss(x, y, t_neg=t, alpha=0.0, detach_weights=True)
    rows, columns = (F.normalize(z, dim=1) for z in (x, y))
    log_sum = similarity.cross_log_sum_exp(2 * t * rows, columns, over="different").mean() / t
    torch.testing.assert_close(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(log_sum, (x, y)))


def test_debiased_sign():
    """The share of negatives that are positives is taken out; the published code adds to it."""
    x, y = views(2)
    own = (x - y).square().sum(1).mean()
    plain = cacr_loss(x, y, alpha=0.0, beta=2.0)
    torch.testing.assert_close(
        cacr_loss(x, y, alpha=0.0, beta=2.0, tau_plus=0.1), (plain + 0.1 * 2 * own) / 0.9
    )
    torch.testing.assert_close(
        cacr_loss(x, y, alpha=0.0, beta=2.0, tau_plus=0.1, paper_code_sign=True), (plain - 0.1 * own) / 0.9
    )


def queue_definition(queries, keys, queue, t_pos, t_neg, in_batch, detach, cost, unit_count):
    losses = []
    for x, query in enumerate(queries):
        others = [key for y, key in enumerate(keys) if unit_count == 1 or y != x]
        c = torch.stack([(query - key).square().sum(1) for key in others], 1)
        weights = (t_pos * c).softmax(1)
        attraction = ((weights.detach() if detach else weights) * c).sum(1).mean()
        c = squared(query, queue)
        if in_batch:
            c = torch.cat([c, negatives_of(squared(query, query))], 1)
        weights = (-t_neg * c).softmax(1)
        weights = weights.detach() if detach is True else weights
        kernel = cost == "rbf"
        repulsion = (weights * (-2 * c).exp()).sum(1).mean().log() if kernel else -(weights * c).sum(1).mean()
        losses.append(attraction + repulsion)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("cost", ["euclidean", "rbf"])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("count", "t_neg"), [(1, 2.0), (3, 0.9), (3, 0.0)])
def test_queue_is_its_definition(count, t_neg, detach, in_batch, cost, impl):
    queries, keys = views(count, unit=False), views(count, seed=1, unit=False)
    queue = torch.randn(11, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = queue_definition(queries, keys, queue, 1.2, t_neg, in_batch, detach, cost, count)
    options = {"in_batch": in_batch, "detach_weights": detach, "cost": cost, "impl": impl}
    found = cacr_queue_loss(queries, keys, queue, t_pos=1.2, t_neg=t_neg, normalize=False, **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, queries), torch.autograd.grad(wanted, queries))


def test_one_query_is_info_nce():
    query, key = views(2)
    for temperature in (0.2, 1.0):
        torch.testing.assert_close(
            cacr_momentum_loss(query, key, temperature=temperature),
            info_nce_loss(query, key.detach(), temperature=temperature),
        )


def momentum_definition(queries, key, temperature, cost):
    weights = torch.stack([(q - key).square().sum(1) for q in queries]).div(temperature).softmax(0).detach()
    total = 0
    for query, weight in zip(queries, weights, strict=True):
        logits = query @ key.T / temperature
        if cost == "rbf":
            values = logits.logsumexp(1) - logits.diagonal()
        else:
            others = negatives_of(logits)
            expected = (others.softmax(1).detach() * others).sum(1)
            values = temperature * (expected - logits.diagonal())
        total = total + (weight * values).mean()
    return total


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("cost", ["euclidean", "rbf"])
def test_momentum_form_is_its_definition(cost, unit, impl):
    """Rows as they are have lengths of their own, which count in the weights of the queries."""
    *queries, key = views(4, unit=False)
    queries = [query * (1 + i) for i, query in enumerate(queries)]
    rows = [F.normalize(z, dim=1) if unit else z for z in (*queries, key.detach())]
    wanted = momentum_definition(rows[:-1], rows[-1], 0.7, cost)
    found = cacr_momentum_loss(queries, key, temperature=0.7, cost=cost, normalize=unit, impl=impl)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, queries), torch.autograd.grad(wanted, queries))


def test_keys_are_constants():
    query, key = views(2)
    loss = cacr_momentum_loss(query, key)
    assert torch.autograd.grad(loss, key, allow_unused=True)[0] is None


@pytest.mark.parametrize("cost", ["euclidean", "rbf"])
def test_order_of_queries_does_not_matter(cost):
    *queries, key = views(4)
    torch.testing.assert_close(
        cacr_momentum_loss(queries, key, cost=cost), cacr_momentum_loss(queries[::-1], key, cost=cost)
    )


def test_equal_rows_have_finite_gradients():
    """Where the published norm-then-square has none."""
    row = torch.ones(4, 6, requires_grad=True)
    for cost in ("euclidean", "rbf"):
        (gradient,) = torch.autograd.grad(cacr_loss([row, row, row], cost=cost), row)
        assert gradient.isfinite().all()


def test_weights_as_sharp_as_wanted_stay_finite():
    rows = [z.float() for z in views(3)]
    sharpest = [{"t_pos": 1e12}, {"t_neg": 1e12}, {"cost": "rbf", "rbf_t": 1e12, "t_neg": 1e12}]
    for options in (*sharpest, {"t_neg": 1e6}, {"t_neg": 1e-30}, {"cost": "rbf", "rbf_t": 1e4}):
        for impl in ("dense", "tiled"):
            loss = cacr_loss(rows, impl=impl, **options)
            assert loss.isfinite()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, rows))


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("t_neg", [1e4, 1e9, 1e12])
def test_sharp_weights_have_the_gradient_of_the_nearest_negative(t_neg, impl):
    x, y = (z.detach().float().requires_grad_() for z in views(2))
    loss = cacr_loss(x, y, t_neg=t_neg, alpha=0.0, impl=impl)
    nearest = -negatives_of(squared(F.normalize(x, dim=1), F.normalize(y, dim=1))).amin(1).mean()
    for found, wanted in zip(
        torch.autograd.grad(loss, (x, y)), torch.autograd.grad(nearest, (x, y)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cacr_loss([torch.ones(3, 2)]), "at least 2"),
        (lambda: cacr_loss(torch.ones(1, 2), torch.ones(1, 2)), "at least 2 rows"),
        (lambda: cacr_loss(*views(2), t_pos=-1.0), "t_pos must be at least 0"),
        (lambda: cacr_loss(*views(2), t_neg=float("nan")), "t_neg must be a finite"),
        (lambda: cacr_loss(*views(2), t_pos=1e38), r"t_pos must be at most 1000000000000"),
        (lambda: cacr_loss(*views(2), cost="rbf", rbf_t=1e38), r"rbf_t must be at most 1000000000000"),
        (lambda: cacr_loss(views(1)[0], views(1)[0][:5]), "z1 and z2 must have the same shape"),
        (lambda: cacr_loss([*views(2), views(1)[0] / 0]), "z3 must be finite"),
        (lambda: cacr_queue_loss(["rows"], views(1), torch.ones(4, 5)), "query must be a tensor"),
        (
            lambda: cacr_queue_loss(views(2), [*views(1), None], torch.ones(4, 5)),
            r"key\[1\] must be a tensor",
        ),
        (lambda: cacr_momentum_loss(views(2), views(1)[0] / 0), "key must be finite"),
        (lambda: cacr_loss(*views(2), tau_plus=1.0), "tau_plus must be in"),
        (lambda: cacr_loss(*views(2), tau_plus=0.1, cost="rbf"), "tau_plus needs cost='euclidean'"),
        (lambda: cacr_loss(*views(2), cost="cosine"), "cost must be one of"),
        (lambda: cacr_queue_loss(views(2), views(3), torch.ones(4, 5)), "as many views, got 2 and 3"),
        (lambda: cacr_queue_loss([], [], torch.ones(4, 5)), "query must be a tensor"),
        (lambda: cacr_queue_loss(*views(2), torch.ones(4, 6)), "number of columns"),
        (
            lambda: cacr_queue_loss(*views(2), torch.ones(4, 5), detach_weights="queue", cost="rbf"),
            "'queue' needs cost='euclidean'",
        ),
        (lambda: cacr_momentum_loss(views(1)[0][:1], views(1)[0][:1]), "at least 2 rows"),
        (lambda: CACRLoss(tau_plus=0.1)(*views(2), torch.ones(4, 5)), "tau_plus must be 0 with a queue"),
        (lambda: CACRLoss()(views(2), None, torch.ones(4, 5)), "key must be given"),
        (lambda: CACRLoss(detach_weights="batch"), "detach_weights must be one of"),
        (lambda: CACRMomentumLoss(cost="cosine"), "cost must be one of"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert str(error.value).endswith(".")


MEMORY = """
from pathlib import Path
import torch
from cl_core.functional import cacr_loss
torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

for rows in (64, 2048):
    views = [torch.randn(rows, 64, requires_grad=True) for _ in range(5)]
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    cacr_loss(views, t_neg=2.0).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory():
    """Five views of 2048 rows have ten blocks of distances, of 16 MB each; rows and gradients are 5 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


def test_modules_pass_everything_on():
    rows, keys = views(3), views(3, seed=1)
    queue = torch.randn(11, 5, dtype=torch.float64)
    torch.testing.assert_close(CACRLoss(0.5, 0.7)(rows), cacr_loss(rows, t_pos=0.5, t_neg=0.7))
    torch.testing.assert_close(
        CACRLoss(0.5, 0.7, in_batch=False)(rows, keys, queue),
        cacr_queue_loss(rows, keys, queue, t_pos=0.5, t_neg=0.7, in_batch=False),
    )
    torch.testing.assert_close(
        CACRMomentumLoss(0.5, cost="euclidean")(rows, keys[0]),
        cacr_momentum_loss(rows, keys[0], temperature=0.5, cost="euclidean"),
    )


@pytest.mark.parametrize("with_queue", [False, True])
def test_measures(with_queue):
    rows, keys = views(4), views(4, seed=1)
    queue = torch.randn(11, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = (rows, keys, queue) if with_queue else (rows,)
    module = CACRLoss(alpha=2.0, beta=3.0)
    found = module.measures(*given)
    assert set(found) == {"attraction", "repulsion", "positive_weight_entropy", "negative_weight_entropy"}
    torch.testing.assert_close(2 * found["attraction"] + 3 * found["repulsion"], module(*given).detach())
    assert not any(value.requires_grad for value in found.values())
    uniform = CACRLoss(0.0, 0.0).measures(*given)
    sharp = CACRLoss(1e5, 1e5).measures(*given)
    for name in ("positive_weight_entropy", "negative_weight_entropy"):
        assert 0.5 < found[name] < 1
        torch.testing.assert_close(uniform[name].item(), 1.0)
        assert sharp[name].abs() < 1e-3


def test_measures_of_two_views_and_of_one_query():
    x, y = views(2)
    assert torch.equal(CACRLoss().measures(x, y)["attraction"], CACRLoss().measures([x, y])["attraction"])
    found = CACRLoss(in_batch=False).measures(x, y, y.detach()[:3])
    torch.testing.assert_close(found["attraction"], (x - y).square().sum(1).mean().detach())
    assert "positive_weight_entropy" not in found
