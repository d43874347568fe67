"""Feature transformation around the losses of the core, against definitions that know what was drawn."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_core import transforms
from cl_core.functional import (
    cacr_queue_loss,
    dcl_loss,
    debiased_nce_loss,
    info_nce_loss,
    nt_xent_loss,
    transformed_info_nce_loss,
)
from cl_core.losses import (
    AlignmentLoss,
    AMCLLoss,
    BarlowTwinsLoss,
    CACRLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedNCELoss,
    FeatureTransform,
    InfoNCELoss,
    NTXentLoss,
    SupConLoss,
)
from cl_core.memory import FeatureQueue
from cl_core.scores import ScoreRecorder
from cl_core.transforms import NegativeInterpolation, PositiveExtrapolation

T = 0.3
GRANULARITIES = ["scalar", "sample", "dim"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count=9, width=6, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64).to(dtype)


def given(count=9, size=13, width=6, dtype=torch.float64):
    """Queries, keys near them, and a queue, none of unit length."""
    query = rows(count, width).to(dtype)
    key = (rows(count, width) + 0.7 * rows(count, width, 1)).to(dtype)
    return query.requires_grad_(), key, rows(size, width, 2, dtype)


def both(granularity="dim", **options):
    return {
        "positive": PositiveExtrapolation(granularity=granularity, **options),
        "negative": NegativeInterpolation(granularity=granularity),
    }


class FixedPositive(PositiveExtrapolation):
    def __init__(self, lam, renormalize=False):
        super().__init__(renormalize=renormalize)
        self.lam = lam

    def draw(self, rows, *, generator=None):
        return self.lam


class FixedNegative(NegativeInterpolation):
    def __init__(self, lam):
        super().__init__()
        self.lam = lam

    def draw(self, rows, *, generator=None):
        return self.lam


def unit(z):
    return F.normalize(z, dim=1)


def moved(q, k, lam):
    return lam * q + (1 - lam) * k, lam * k + (1 - lam) * q


def drawn(module, z, count):
    """What a module draws for a queue from a fresh generator: weights, weights, partners."""
    generator = seeded(5)
    lam = module.positive.draw(unit(z), generator=generator) if module.positive else 1.0
    negative = module.negative
    if negative is None:
        return lam, 1.0, torch.arange(count)
    mu = negative.draw(torch.empty(count, z.shape[1], dtype=z.dtype), generator=generator)
    return lam, mu, torch.randperm(count, generator=generator)


# ---- with a queue ----------------------------------------------------------------------------------------------------


def queue_logits(q, k, z, lam, mu, partner, use):
    """Logits of positives (N,) and of negatives (N, K), by the definition."""
    q, k, z = unit(q), unit(k), unit(z)
    a, b = moved(q, k, lam)
    mixed = mu * z + (1 - mu) * z[partner]
    return (a * b).sum(1) / T, (a if use == "transformed" else q) @ mixed.T / T


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("use", ["transformed", "original"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("loss", [InfoNCELoss, DCLLoss, DCLWLoss])
def test_queue_is_its_definition(loss, granularity, use, impl):
    q, k, z = given()
    module = FeatureTransform(loss(T, impl=impl), negatives_use=use, **both(granularity))
    found = module(q, k, z, generator=seeded(5))
    positive, negative = queue_logits(q, k, z, *drawn(module, q, len(z)), use)
    log_negative = negative.logsumexp(1)
    if loss is InfoNCELoss:
        wanted = F.cross_entropy(
            torch.cat([positive[:, None], negative], 1), torch.zeros(9, dtype=torch.int64)
        )
    elif loss is DCLLoss:
        wanted = (log_negative - positive).mean()
    else:
        weight = 2 - len(q) * (positive * T / 0.5).softmax(0).detach()
        wanted = (log_negative - weight * positive).mean()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, q), torch.autograd.grad(wanted, q))


@pytest.mark.parametrize("part", ["positive", "negative"])
@pytest.mark.parametrize("use", ["transformed", "original"])
def test_either_part_alone(part, use):
    q, k, z = given()
    module = FeatureTransform(InfoNCELoss(T), negatives_use=use, **{part: both()[part]})
    positive, negative = queue_logits(q, k, z, *drawn(module, q, len(z)), use)
    wanted = F.softplus(negative.logsumexp(1) - positive).mean()
    torch.testing.assert_close(module(q, k, z, generator=seeded(5)), wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("use", ["transformed", "original"])
def test_module_is_its_function(use, reduction):
    q, k, z = given()
    module = FeatureTransform(
        InfoNCELoss(T, reduction=reduction), negatives_use=use, **both(renormalize=True)
    )
    lam, mu, partner = drawn(module, q, len(z))
    options = {"positive_lam": lam, "negative_lam": mu, "permutation": partner, "renormalize": True}
    function = transformed_info_nce_loss(
        q, k, z, negatives_use=use, temperature=T, reduction=reduction, **options
    )
    assert function.shape == ((9,) if reduction == "none" else ())
    torch.testing.assert_close(module(q, k, z, generator=seeded(5)), function)


@pytest.mark.parametrize("use", ["transformed", "original"])
def test_function_with_weights_of_one_is_info_nce(use):
    q, k, z = given(dtype=torch.float32)
    partner = torch.randperm(13, generator=seeded())
    for lam in (1.0, torch.ones(9, 1)):
        found = transformed_info_nce_loss(
            q, k, z, positive_lam=lam, negative_lam=1.0, permutation=partner, negatives_use=use
        )
        torch.testing.assert_close(found, info_nce_loss(q, k, z), rtol=1e-6, atol=1e-6)


def test_gradient_reaches_the_query_through_both_factors_and_the_negatives():
    q, k, z = (unit(t.detach()) for t in given())
    parts = []
    for through in itertools.product([False, True], repeat=3):
        leaf = q.clone().requires_grad_()
        a, b, c = (leaf if let else q for let in through)
        positive = (moved(a, k, 1.4)[0] * moved(b, k, 1.4)[1]).sum(1)
        loss = F.softplus((moved(c, k, 1.4)[0] @ z.T / T).logsumexp(1) - positive / T).mean()
        parts.append(torch.autograd.grad(loss, leaf)[0] if any(through) else torch.zeros_like(q))
    first, second, third = (parts[place].abs().max() for place in (4, 2, 1))
    assert min(first, second, third) > 1e-3
    leaf, key, queue = q.clone().requires_grad_(), k.clone(), z.clone()
    loss = transformed_info_nce_loss(leaf, key, queue, positive_lam=1.4, temperature=T, normalize=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], parts[-1])
    torch.testing.assert_close(parts[1] + parts[2] + parts[4], parts[-1])
    module = FeatureTransform(InfoNCELoss(T), **both())
    module(leaf, key, queue).backward()
    assert key.grad is None and queue.grad is None


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("use", ["transformed", "original"])
def test_function_gradient_is_the_derivative(use, impl):
    q, k, z = (t.detach().requires_grad_() for t in given(5, 7, 3))
    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    lam, mu = 1 + rows(5, 3, 3).abs(), rows(7, 3, 4).abs()
    options = {"positive_lam": lam, "negative_lam": mu, "permutation": torch.arange(7).roll(2)}
    options |= {"negatives_use": use, "impl": impl, "renormalize": True}

    def function(q, k, z, temperature):
        return transformed_info_nce_loss(q, k, z, temperature=temperature, **options)

    torch.autograd.gradcheck(function, (q, k, z, temperature))
    if impl == "dense":
        torch.autograd.gradgradcheck(function, (q, k, z, temperature))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 13), (5, 3), (7, 13)])
def test_any_number_of_rows(count, size):
    q, k, z = given(count, size)
    module = FeatureTransform(InfoNCELoss(T), **both())
    positive, negative = queue_logits(q, k, z, *drawn(module, q, size), "transformed")
    wanted = F.softplus(negative.logsumexp(1) - positive).mean()
    torch.testing.assert_close(module(q, k, z, generator=seeded(5)), wanted)


def test_queue_and_batch_together():
    """Keys of the batch are interpolated in pairs beside the queue."""
    q, k, z = given()
    module = FeatureTransform(InfoNCELoss(T, in_batch=True), **both("sample"))
    generator = seeded(5)
    lam = module.positive.draw(q, generator=generator)
    mu, partner = module.negative.draw(z, generator=generator), torch.randperm(13, generator=generator)
    weight = module.negative.draw(torch.cat([q, k]).detach(), generator=generator)[9:]
    pairs = transforms._partners(9, q.device, pairs=True, generator=generator)
    positive, negative = queue_logits(q, k, z, lam, mu, partner, "transformed")
    columns = weight * unit(k) + (1 - weight) * unit(k)[pairs]
    batch = (moved(unit(q), unit(k), lam)[0] @ columns.T / T).masked_fill(together(pairs), -torch.inf)
    wanted = F.softplus(torch.cat([negative, batch], 1).logsumexp(1) - positive).mean()
    torch.testing.assert_close(module(q, k, z, generator=seeded(5)), wanted)


# ---- without a queue -------------------------------------------------------------------------------------------------


def together(partner):
    """Which mixtures (columns) contain a part of which samples (rows)."""
    own = torch.arange(len(partner))
    return (own[:, None] == own) | (own[:, None] == partner)


def batch_definition(module, q, k, views, use):
    """Positive logits (N,) and those of negatives for each view's anchors, by masks."""
    generator, n = seeded(5), len(q)
    q, k = unit(q), unit(k)
    lam = module.positive.draw(q, generator=generator) if module.positive else 1.0
    mu, partner = 1.0, torch.arange(n)
    if module.negative is not None and n > 2:
        mu = module.negative.draw(torch.cat([q, k]), generator=generator)
        partner = transforms._partners(n, q.device, pairs=True, generator=generator)
    stacked = torch.cat([q, k])
    mixed = (mu * stacked + (1 - mu) * stacked[torch.cat([partner, partner + n])]).split(n)
    pair = moved(q, k, lam)
    anchors = pair if use == "transformed" else (q, k)
    logits = []
    for anchor, others in zip(anchors, views, strict=False):
        columns = [anchor @ mixed[view].T / T for view in others]
        logits.append(torch.cat([c.masked_fill(together(partner), -torch.inf) for c in columns], 1))
    return (pair[0] * pair[1]).sum(1) / T, logits


BOTH, CROSS, KEYS = ((0, 1), (0, 1)), ((1,), (0,)), ((1,),)
HOSTED = [
    (NTXentLoss, {}, BOTH),
    (DCLLoss, {}, BOTH),
    (DCLWLoss, {}, BOTH),
    (DCLWLoss, {"detach_weight": False, "negatives": "cross"}, CROSS),
    (DCLLoss, {"negatives": "cross"}, CROSS),
    (InfoNCELoss, {}, KEYS),
    (InfoNCELoss, {"symmetric": True}, CROSS),
]


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("use", ["transformed", "original"])
@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.parametrize(("loss", "options", "views"), HOSTED, ids=str)
def test_batch_is_its_definition(loss, options, views, count, use, impl):
    q, k, _ = given(count)
    k = k.detach().requires_grad_()
    module = FeatureTransform(loss(T, impl=impl, **options), negatives_use=use, **both())
    found = module(q, k, generator=seeded(5))
    positive, logits = batch_definition(module, q, k, views, use)
    weight = 1
    if loss is DCLWLoss:
        weight = 2 - count * (positive * T / 0.5).softmax(0)
        weight = weight if options else weight.detach()
    values = torch.stack([side.logsumexp(1) - weight * positive for side in logits])
    values = F.softplus(values) if loss in (NTXentLoss, InfoNCELoss) else values
    torch.testing.assert_close(found, values.mean())
    torch.testing.assert_close(torch.autograd.grad(found, (q, k)), torch.autograd.grad(values.mean(), (q, k)))
    each = FeatureTransform(loss(T, reduction="none", impl=impl, **options), negatives_use=use, **both())
    torch.testing.assert_close(each(q, k, generator=seeded(5)), values.flatten())


@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_no_negative_contains_its_anchor(count):
    """One-hot samples: whatever an anchor meets among its negatives is no part of itself, hence a score of 0."""
    eye = torch.eye(count)
    recorder = ScoreRecorder(rows=None)
    module = FeatureTransform(NTXentLoss(T), negative=NegativeInterpolation())
    module.recorder = recorder
    for seed in range(20):
        module(eye, eye, generator=seeded(seed))
    found = recorder.flush()
    assert found["negative_histogram"][0, 32] == found["negative_histogram"].sum() > 0
    assert found["negative_variance"].nan_to_num().max() == 0


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_partners(count):
    """Drawn in pairs each is the partner of its partner; else any permutation."""
    own = torch.arange(count)
    seen = set()
    for seed in range(200):
        pairs = transforms._partners(count, own.device, pairs=True, generator=seeded(seed))
        assert torch.equal(pairs[pairs], own)
        assert (pairs == own).sum() == count % 2
        assert torch.equal(transforms._partners(count, own.device, generator=seeded(seed)).sort()[0], own)
        seen.add(tuple(pairs.tolist()))
    if count == 8:
        assert len(seen) > 80  # of 105
    if count == 7:
        assert {partner for pairs in seen for partner in pairs[:1]} == set(range(7))


def test_without_interpolation_a_batch_is_compared_as_it_was():
    q, k, _ = given()
    for loss in (NTXentLoss(T), DCLLoss(T), InfoNCELoss(T), InfoNCELoss(T, symmetric=True), DCLWLoss(T)):
        module = FeatureTransform(loss, positive=FixedPositive(torch.tensor(1.0)))
        torch.testing.assert_close(module(q, k), loss(q, k), rtol=1e-12, atol=1e-12)


def test_few_rows():
    q, k, _ = given(2)
    fixed = FixedPositive(torch.tensor(1.0, dtype=torch.float64)), NegativeInterpolation()
    module = FeatureTransform(NTXentLoss(T), positive=fixed[0], negative=fixed[1])
    torch.testing.assert_close(module(q, k), nt_xent_loss(q, k, temperature=T))
    assert module(q[:1], k[:1]) == 0
    with pytest.raises(ValueError, match="dcl_loss needs at least 2 rows"):
        FeatureTransform(DCLLoss(T), **both())(q[:1], k[:1])


# ---- other losses ----------------------------------------------------------------------------------------------------


def test_any_other_loss_gets_transformed_rows():
    q, k, z = given()
    module = FeatureTransform(CACRLoss(t_neg=0.5, in_batch=False), **both())
    lam, mu, partner = drawn(module, q, len(z))
    pair, memory = moved(unit(q), unit(k), lam), unit(z)
    mixed = mu * memory + (1 - mu) * memory[partner]
    wanted = cacr_queue_loss(*pair, mixed, t_neg=0.5, in_batch=False, normalize=False)
    torch.testing.assert_close(module(q, k, z, generator=seeded(5)), wanted)
    module = FeatureTransform(DebiasedNCELoss(T), positive=PositiveExtrapolation())
    wanted = debiased_nce_loss(*pair, temperature=T, normalize=False)
    torch.testing.assert_close(module(q, k, generator=seeded(5)), wanted)
    assert module.loss.normalize is True


def test_options_of_a_loss_are_put_back_after_an_error():
    module = FeatureTransform(CACRLoss(tau_plus=0.1), positive=PositiveExtrapolation())
    with pytest.raises(ValueError, match="tau_plus must be 0 with a queue"):
        module(*given())
    assert module.loss.normalize is True


def test_a_subclass_is_not_taken_for_its_base():
    class Doubled(InfoNCELoss):
        def forward(self, query, key, negatives=None):
            return 2 * super().forward(query, key, negatives)

    one, two = (FeatureTransform(loss(T), **both()) for loss in (InfoNCELoss, Doubled))
    torch.testing.assert_close(
        2 * one(*given(), generator=seeded()), two(*given(), generator=seeded()), rtol=1e-12, atol=0
    )


def test_rows_as_they_are_where_the_loss_takes_them_so():
    q, k, z = given()
    module = FeatureTransform(InfoNCELoss(T, normalize=False), positive=FixedPositive(torch.tensor(1.4)))
    a, b = moved(q, k, 1.4)
    wanted = F.softplus((a @ z.T / T).logsumexp(1) - (a * b).sum(1) / T).mean()
    torch.testing.assert_close(module(q, k, z), wanted, rtol=1e-6, atol=1e-6)


# ---- when it transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NTXentLoss, DCLLoss, InfoNCELoss, CACRLoss])
def test_evaluation_is_the_loss_itself(loss):
    q, k, z = given()
    inputs = (q, k) if loss is NTXentLoss else (q, k, z)
    module = FeatureTransform(loss(), **both(), start_step=1).eval()
    state = torch.get_rng_state()
    assert torch.equal(module(*inputs), loss()(*inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert module.calls == 0


@pytest.mark.parametrize("use", ["transformed", "original"])
@pytest.mark.parametrize(
    ("loss", "queue"),
    [(NTXentLoss, False), *itertools.product((DCLLoss, InfoNCELoss, DCLWLoss), (True, False))],
)
def test_before_its_start_it_is_the_loss_itself(loss, queue, use):
    q, k, z = given()
    inputs = (q, k, z) if queue else (q, k)
    module = FeatureTransform(loss(T), negatives_use=use, start_step=3, **both())
    plain = loss(T)(*inputs)
    for _ in range(3):
        torch.testing.assert_close(module(*inputs), plain, rtol=1e-12, atol=1e-12)
    assert module.calls == 3
    found = [module(*inputs) for _ in range(3)]
    assert min((value - plain).abs() for value in found) > 1e-4


def test_resumes_exactly():
    q, k, z = given()

    def run(module, steps):
        return [module(q, k, z).item() for _ in range(steps)]

    torch.manual_seed(0)
    straight = run(FeatureTransform(InfoNCELoss(T), start_step=3, **both()), 6)
    torch.manual_seed(0)
    module = FeatureTransform(InfoNCELoss(T), start_step=3, **both())
    begun = run(module, 2)
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    other = FeatureTransform(InfoNCELoss(T), start_step=3, **both())
    torch.manual_seed(99)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    assert begun + run(other, 4) == straight
    assert len(set(straight)) == 4  # three equal ones, then drawn anew each


# ---- hosts -----------------------------------------------------------------------------------------------------------


class Host(nn.Module):
    """MoCo in few lines, with some other loss."""

    def __init__(self, criterion):
        super().__init__()
        self.encoder, self.criterion = nn.Linear(6, 5), criterion
        self.queue = FeatureQueue(10, 5)
        self.queue.enqueue(rows(10, 5, 3, torch.float32))

    def forward(self, view, other):
        with torch.no_grad():
            keys = self.encoder(other)
        loss = self.criterion(self.encoder(view), keys, self.queue.embeddings)
        self.queue.enqueue(keys)
        return loss


def test_host_enqueues_clean_keys():
    torch.manual_seed(0)
    host = Host(FeatureTransform(InfoNCELoss(T), **both()))
    view, other = rows(4, 6, 0, torch.float32), rows(4, 6, 1, torch.float32)
    for step in range(1, 5):  # past the end of the queue
        before, keys = host.queue.embeddings.clone(), unit(host.encoder(other).detach())
        host(view, other).backward()
        places = (4 * (step - 1) + torch.arange(4)) % 10
        before[places] = keys
        torch.testing.assert_close(host.queue.embeddings, before)
        assert host.queue.pointer == 4 * step % 10
    assert host.encoder.weight.grad.abs().max() > 0


def test_positives_get_harder_and_negatives_less_varied():
    """What the recorder is there to show."""
    host = Host(FeatureTransform(InfoNCELoss(T), **both()))
    plain, transformed = ScoreRecorder(), ScoreRecorder(limits=(-9, 1))
    host.criterion.recorder = transformed
    host.criterion.register_forward_pre_hook(lambda _, inputs: plain.update(*inputs))
    for seed in range(20):
        host(rows(8, 6, seed, torch.float32), rows(8, 6, seed + 100, torch.float32))
    before, after = plain.flush(), transformed.flush()
    assert (after["positive_mean"] < before["positive_mean"]).all()
    host.criterion.positive = None
    host.criterion.eval()(*given(8, 10, 5, torch.float32))
    for seed in range(20):
        host.criterion.train()
        host(rows(8, 6, seed, torch.float32), rows(8, 6, seed + 100, torch.float32))
    before, after = plain.flush(), transformed.flush()
    assert len(after["step"]) == 20  # evaluation is not recorded
    assert after["negative_variance"].mean() < 0.8 * before["negative_variance"].mean()


@pytest.mark.parametrize("use", ["transformed", "original"])
def test_recorder_sees_what_the_loss_sees(use):
    q, k, z = given()
    module = FeatureTransform(InfoNCELoss(T), negatives_use=use, **both())
    module.recorder = ScoreRecorder()
    module(q, k, z, generator=seeded(5))
    positive, negative = queue_logits(q, k, z, *drawn(module, q, len(z)), use)
    found = module.recorder.flush()
    torch.testing.assert_close(found["positive_mean"][0], positive.mean() * T)
    torch.testing.assert_close(found["negative_mean"][0], negative.mean() * T)
    torch.testing.assert_close(found["negative_variance"][0], (negative * T).var(1).mean())
    torch.testing.assert_close(found["positive_log_mean_exp"][0], positive.exp().mean().log())
    torch.testing.assert_close(found["negative_log_mean_exp"][0], negative.exp().mean().log())
    module = FeatureTransform(CACRLoss(), **both())
    module.recorder = ScoreRecorder()
    module(q, k, z, generator=seeded(5))
    if use == "transformed":
        torch.testing.assert_close(module.recorder.flush()["negative_mean"], found["negative_mean"])


def test_tells_hosts_what_they_ask():
    module = FeatureTransform(InfoNCELoss(0.2, group="world"), **both())
    assert (module.group, module.temperature) == ("world", 0.2)
    module = FeatureTransform(AlignmentLoss(), positive=PositiveExtrapolation())
    assert module.group is None and not hasattr(module, "temperature")


@pytest.mark.parametrize("queue", [True, False])
def test_measures_what_the_loss_measures(queue):
    q, k, z = given()
    loss = CACRLoss()
    module = FeatureTransform(loss, positive=PositiveExtrapolation())
    options = {"negatives": z} if queue else {}
    found = module.measures(q, k, generator=seeded(), **options)
    assert found == loss.measures(q, k, **options)
    loss.advice = lambda measures: f"{len(measures)} numbers."
    assert module.advice(found) == f"{len(found)} numbers."


def test_temperature_may_be_learnt():
    q, k, z = given()
    module = FeatureTransform(InfoNCELoss(T), **both())

    def function(temperature, *inputs):
        module.loss.temperature = temperature
        return module(q.detach(), k, *inputs, generator=seeded())

    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: function(t, z), (temperature,))
    torch.autograd.gradcheck(function, (temperature,))


# ---- precision, compilation, copies ----------------------------------------------------------------------------------


def value_and_gradient(module, query, *others, seed=0):
    leaf = query.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    value = module(leaf, *others)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("queue", [True, False])
def test_autocast_and_half_precision(queue):
    q, k, z = given(dtype=torch.float32)
    module = FeatureTransform(InfoNCELoss(T), **both())
    inputs = (q, k, z) if queue else (q, k)
    plain = value_and_gradient(module, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, value_and_gradient(module, *inputs), plain))
    for dtype in (torch.bfloat16, torch.float16):
        half = [t.detach().to(dtype) for t in inputs]
        wide = value_and_gradient(module, *(t.float() for t in half))
        value, gradient = value_and_gradient(module, *half)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value, wide[0], rtol=2e-6, atol=3e-6)
        torch.testing.assert_close(gradient.float(), wide[1], rtol=1e-2, atol=1e-3)
    single = value_and_gradient(module, q.bfloat16(), k.bfloat16(), z)[0]  # a queue may have another type
    torch.testing.assert_close(single, value_and_gradient(module, q.float(), k, z)[0], rtol=0.02, atol=0)


def test_long_queries_at_a_cold_temperature_stay_finite():
    """Antipodal pairs at lam = 2: queries of length 3, logits of up to 9 / T."""
    z = unit(rows(8, 8, dtype=torch.float16).float()).half()
    for dtype, impl in itertools.product((torch.float16, torch.float32), ("dense", "tiled")):
        loss = InfoNCELoss(0.01, impl=impl)
        module = FeatureTransform(
            loss, positive=FixedPositive(torch.tensor(2.0)), negative=NegativeInterpolation()
        )
        value, gradient = value_and_gradient(module, z.to(dtype), -z.to(dtype), z.to(dtype))
        assert value.isfinite() and gradient.isfinite().all() and value > 500


@pytest.mark.parametrize(
    ("loss", "queue", "start_step"),
    [(InfoNCELoss, True, 1), (InfoNCELoss, False, 0), (DCLLoss, False, 1), (CACRLoss, True, 0)],
)
def test_compiles_to_one_graph(loss, queue, start_step):
    module = FeatureTransform(loss(), start_step=start_step, **both())
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager", dynamic=True)
    for count in (7, 12, 9):
        q, k, z = given(count)
        inputs = (q, k, z) if queue else (q, k)
        torch.testing.assert_close(value_and_gradient(compiled, *inputs), value_and_gradient(module, *inputs))


def test_copies_pickles_and_shows_itself():
    module = FeatureTransform(InfoNCELoss(T), start_step=2, negatives_use="original", **both())
    wanted = value_and_gradient(module, *given())[0]
    module.calls.zero_()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(value_and_gradient(other, *given())[0], wanted)
    shown = repr(module)
    for part in ("negatives_use='original', start_step=2", "temperature=0.3", "alpha=2.0", "alpha=1.6"):
        assert part in shown


def test_is_written_down_and_built_again():
    artifacts = pytest.importorskip("cl_core.training.artifacts")
    module = FeatureTransform(DCLLoss(T), start_step=2, positive=PositiveExtrapolation(1.3, "scalar", True))
    again = artifacts.build(artifacts.describe(module), FeatureTransform)
    assert repr(again) == repr(module)
    assert again.state_dict().keys() == module.state_dict().keys() == {"calls"}


# ---- ranks -----------------------------------------------------------------------------------------------------------

SPLITS = {2: (5, 3), 3: (4, 0, 4)}
RANKED = {
    "queue": (InfoNCELoss, {}, True, "transformed"),
    "queue, original": (DCLLoss, {}, True, "original"),
    "queue, weighted": (DCLWLoss, {}, True, "transformed"),
    "queue and batch": (InfoNCELoss, {"in_batch": True}, True, "transformed"),
    "batch": (NTXentLoss, {}, False, "transformed"),
    "batch, original": (DCLLoss, {}, False, "original"),
    "batch, cross": (InfoNCELoss, {"symmetric": True}, False, "transformed"),
    "another loss": (CACRLoss, {}, True, "transformed"),
}


def on_rank(group, case, world_size):
    return fixed_loss(group, case, world_size, torch.distributed.get_rank(group))


def fixed_loss(group, case, world_size, rank=None):
    """Loss and gradient of a linear encoder for weights and partners that are the same however rows are spread."""
    loss, options, queue, use = RANKED[case]
    split = SPLITS[world_size]
    own = slice(0, 8) if rank is None else slice(sum(split[:rank]), sum(split[: rank + 1]))
    query, key, memory = (t.detach() for t in given(8, 11, 5))
    encoder = rows(5, 4, 7).requires_grad_()
    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    module = FeatureTransform(
        loss(group=group, **options),
        positive=FixedPositive(1 + rows(8, 4, 8).abs()[own]),
        negative=FixedNegative(None),
        negatives_use=use,
    )
    if hasattr(module, "temperature"):
        module.loss.temperature = temperature
    module.recorder = ScoreRecorder()
    # Partners within the rows of a rank; how the rows are spread is what one process must imitate.
    of_ranks, start = [], 0
    for count in split:
        swapped = torch.arange(count)
        swapped[: count - count % 2] = swapped[: count - count % 2].view(-1, 2).flip(1).flatten()
        of_ranks.append(swapped + start)
        start += count
    partner = torch.cat(of_ranks)[own] - own.start
    lam_of_queue, lam_of_rows = rows(11, 4, 9), torch.cat([rows(8, 4, 10)[own], rows(8, 4, 11)[own]])
    module.negative.draw = lambda z, generator=None: lam_of_queue if len(z) == 11 else lam_of_rows
    kept = transforms._partners
    transforms._partners = lambda count, device, pairs=False, generator=None: (
        partner if pairs else torch.arange(count).roll(3)
    )
    try:
        inputs = (query[own], key[own], memory) if queue else (query[own], key[own])
        value = module(*(t @ encoder for t in inputs))
        gradients = torch.autograd.grad(value, (encoder, temperature), allow_unused=True)
    finally:
        transforms._partners = kept
    return value.detach(), gradients[0], gradients[1] if gradients[1] is not None else torch.zeros(())


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", RANKED)
def test_ranks_together_are_one_process(case, world_size, ranks):
    wanted = fixed_loss(None, case, world_size)
    found = ranks.run(on_rank, case, world_size, world_size=world_size)
    for one, *others in zip(wanted, *found, strict=True):
        torch.testing.assert_close(torch.stack(others).mean(0), one, rtol=1e-6, atol=1e-9)


def drawing_rank(group, world_size):
    """Numbers that each rank draws for itself."""
    torch.manual_seed(torch.distributed.get_rank(group))
    count = SPLITS[world_size][torch.distributed.get_rank(group)]
    q, k, z = (t.detach() for t in given(8, 11, 5))
    module = FeatureTransform(InfoNCELoss(T, group=group), **both())
    q, k = q[:count].requires_grad_(), k[:count]
    value = module(q, k, z) + module(q, k)
    value.backward()
    return value.detach(), q.grad.isfinite().all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_draw_for_themselves(world_size, ranks):
    found = ranks.run(drawing_rank, world_size, world_size=world_size)
    assert all(value.isfinite() and finite for value, finite in found)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, z: FeatureTransform(SupConLoss(), **both()), "loss must be a loss of two views"),
        (lambda q, k, z: FeatureTransform(BarlowTwinsLoss(), **both()), "with an option normalize"),
        (lambda q, k, z: FeatureTransform(InfoNCELoss()), "positive or negative must be given"),
        (
            lambda q, k, z: FeatureTransform(InfoNCELoss(), positive=2.0),
            "positive must be a PositiveExtrapolation",
        ),
        (
            lambda q, k, z: FeatureTransform(InfoNCELoss(), negative=PositiveExtrapolation()),
            "negative must be a NegativeInterpolation or None",
        ),
        (
            lambda q, k, z: FeatureTransform(AlignmentLoss(), **both()),
            "negative needs a loss that takes a queue",
        ),
        (
            lambda q, k, z: FeatureTransform(CACRLoss(), negatives_use="original", **both()),
            "negatives_use='original' needs a loss of InfoNCELoss",
        ),
        (
            lambda q, k, z: FeatureTransform(DCLLoss(), negatives_use="mine", **both()),
            "negatives_use must be one of",
        ),
        (
            lambda q, k, z: FeatureTransform(DCLLoss(), start_step=-1, **both()),
            "start_step must be at least 0",
        ),
        (
            lambda q, k, z: FeatureTransform(NTXentLoss(), **both())(q, k, z),
            "negatives must be None for NTXentLoss",
        ),
        (
            lambda q, k, z: FeatureTransform(CACRLoss(), **both())(q, k),
            "negatives must be given with a negative",
        ),
        (
            lambda q, k, z: FeatureTransform(DCLLoss(), **both())(q, k[:2], z),
            "query and key must have the same shape",
        ),
        (lambda q, k, z: FeatureTransform(DCLLoss(), **both())(q, k, z[:, :2]), "same number of columns"),
        (
            lambda q, k, z: FeatureTransform(DCLLoss(), **both())(q, k, z * torch.nan),
            "negatives must be finite",
        ),
        (lambda q, k, z: FeatureTransform(DCLLoss(), **both())([q], k), "query must be a tensor"),
        (lambda q, k, z: FeatureTransform(DCLLoss(group="world"), **both())(q, k, z), "torch.distributed"),
        (
            lambda q, k, z: FeatureTransform(InfoNCELoss(symmetric=True), **both())(q, k, z),
            "symmetric=True needs negatives=None",
        ),
        (
            lambda q, k, z: FeatureTransform(InfoNCELoss(in_batch=False), **both())(q, k),
            "in_batch=False needs negatives",
        ),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, negative_lam=0.5),
            "negative_lam and permutation must be given together",
        ),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, positive_lam=torch.ones(5)),
            "positive_lam must be a number",
        ),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, negative_lam="a", permutation=z),
            "negative_lam must be a number",
        ),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, negative_lam=0.5, permutation=z),
            "permutation must hold integers",
        ),
        (lambda q, k, z: transformed_info_nce_loss(q, k, z, renormalize=1), "renormalize must be True or"),
        (
            lambda q, k, z: FeatureTransform(AMCLLoss(2, heads=2), positive=PositiveExtrapolation()),
            "loss must scale whole rows to unit length",
        ),
        (
            lambda q, k, z: FeatureTransform(
                AMCLLoss(2, heads=1, raw_input=True), positive=PositiveExtrapolation()
            ),
            "loss must scale whole rows to unit length",
        ),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, temperature=0.0),
            "temperature must be finite and > 0",
        ),
        (lambda q, k, z: transformed_info_nce_loss(q, k, z, reduction="max"), "reduction must be one of"),
        (lambda q, k, z: transformed_info_nce_loss(q, k, z, impl="fast"), "impl must be one of"),
        (
            lambda q, k, z: transformed_info_nce_loss(q, k, z, negatives_use="none"),
            "negatives_use must be one of",
        ),
        (lambda q, k, z: transformed_info_nce_loss(q, k, z[:0]), "negatives must have at least 1 row"),
        (lambda q, k, z: transformed_info_nce_loss(q, k, z, group="world"), "torch.distributed"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call(*given())
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_decoupled_weights_are_what_they_were():
    """The weights moved to a function of their own."""
    q, k, _ = given()
    weight = 2 - 9 * (F.cosine_similarity(q, k) / 0.5).softmax(0).detach()
    plain = dcl_loss(q, k, temperature=T, reduction="none")
    wanted = plain + (F.cosine_similarity(q, k) / T * (1 - weight)).repeat(2)
    torch.testing.assert_close(DCLWLoss(T, reduction="none")(q, k), wanted)
