"""Sinkhorn's codes, SwAV and ProtoNCE against their definitions; queues, ranks, rows without a prototype, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl_core.functional import prototype_nce_loss, sinkhorn, swav_loss
from cl_core.losses import PrototypeNCELoss, SwAVLoss, _codes
from cl_core.memory import PrototypeBank
from cl_core.testing import check_group

SEEDS = pytest.mark.parametrize("seed", range(3))
IMPLS = pytest.mark.parametrize("impl", ["dense", "tiled"])
SIZES = (4, 0, 3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(rows, prototypes, seed=0):
    """Scores as a network gives them, in [-1, 1]."""
    z, c = random(rows, 5, seed=seed), random(prototypes, 5, seed=99)
    return F.normalize(z, dim=1) @ F.normalize(c, dim=1).t()


def naive_sinkhorn(scores, epsilon, iterations):
    """The published iteration, outside the logarithm."""
    q = torch.exp(scores / epsilon)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * len(q)


def naive_swav(scores, codes, crops, temperature):
    total = 0
    for q, own in zip(codes, crops, strict=True):
        for v, predictions in enumerate(scores):
            if v != own:
                total = total - (q * (predictions / temperature).log_softmax(1)).sum(1) / (len(scores) - 1)
    return total / len(crops)


# ---- codes -----------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 1), (0.5, 10)])
def test_codes_are_those_of_the_published_iteration(seed, epsilon, iterations):
    for rows, prototypes in ((12, 5), (3, 9), (1, 4), (6, 1)):
        scores = cosines(rows, prototypes, seed)
        found = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
        torch.testing.assert_close(found, naive_sinkhorn(scores, epsilon, iterations))
        torch.testing.assert_close(found.sum(1), torch.ones(rows, dtype=torch.float64))


def test_many_iterations_balance_the_prototypes():
    codes = sinkhorn(cosines(40, 8), iterations=200)
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 5.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_which_constants_codes_do_not_see():
    scores = cosines(10, 4)
    codes = sinkhorn(scores)
    torch.testing.assert_close(sinkhorn(scores + 3), codes)
    torch.testing.assert_close(sinkhorn(scores + random(4, seed=1)), codes)
    of_samples = scores + random(10, 1, seed=2)  # prototypes are divided out first, so samples still matter
    assert (sinkhorn(of_samples) - codes).abs().max() > 0.01
    torch.testing.assert_close(sinkhorn(of_samples, iterations=2000), sinkhorn(scores, iterations=2000))


def test_equal_scores_give_uniform_codes():
    torch.testing.assert_close(sinkhorn(torch.zeros(6, 5)), torch.full((6, 5), 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.2, 1e4])
def test_scores_of_any_type_and_size_have_codes_in_float32(dtype, scale):
    """Autocast or not, by factors or by logarithms."""
    scores = (scale * cosines(9, 4)).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            codes = sinkhorn(scores, epsilon=0.01)
        assert codes.dtype == torch.float32
        torch.testing.assert_close(
            codes,
            sinkhorn(scores.double(), epsilon=0.01).float(),
            rtol=1e-2 if scale > 1 else 1e-5,
            atol=1e-6,
        )
        torch.testing.assert_close(codes.sum(1), torch.ones(9))


@pytest.mark.parametrize("epsilon", [1e-30, 0.05, 100.0])
def test_scores_up_to_the_limit_stay_finite_and_beyond_it_are_refused(epsilon):
    limit = torch.finfo(torch.float32).max / 8 * min(epsilon, 8)
    scores = limit * cosines(9, 4).float().sign() * torch.linspace(0, 1, 36).view(9, 4)
    scores[0] = torch.tensor([-limit, -limit, limit, -limit])
    codes = sinkhorn(scores, epsilon=epsilon, iterations=10)
    torch.testing.assert_close(codes.sum(1), torch.ones(9))
    torch.testing.assert_close(codes[0], torch.eye(4)[2])
    loss = swav_loss(scores, scores.flip(1), epsilon=epsilon, temperature=torch.tensor(max(epsilon, 0.1)))
    assert loss.isfinite()
    beyond = scores * 1.001
    if epsilon < 8:
        message = (
            r"^scores must be at most 4e\+37 in absolute value once divided by epsilon, got a larger one\.$"
        )
        with pytest.raises(ValueError, match=message):
            sinkhorn(beyond, epsilon=epsilon)
        with pytest.raises(ValueError, match=r"^queue\[1\] must be .* divided by epsilon"):
            swav_loss(scores, scores, queue=[scores, beyond], epsilon=epsilon)
    for temperature in (epsilon / 2, torch.tensor(epsilon / 2)):
        if epsilon < 8:
            with pytest.raises(ValueError, match=r"^scores\[0\] must be .* divided by temperature"):
                swav_loss(scores, scores, epsilon=epsilon, temperature=temperature)
    assert sinkhorn(1.001 * scores.double(), epsilon=epsilon).isfinite().all()


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1.2e-38), (torch.float64, 2.3e-308)])
def test_divisors_without_an_inverse_are_refused(dtype, least):
    equal = torch.zeros(3, 4, dtype=dtype)
    torch.testing.assert_close(sinkhorn(equal, epsilon=least), torch.full_like(equal, 0.25))
    assert swav_loss(equal, equal, temperature=least).item() == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match=r"epsilon must be at least \d\.\d+e-\d+, got 1e-310"):
        sinkhorn(equal, epsilon=1e-310)
    with pytest.raises(ValueError, match=r"temperature must be at least \d\.\d+e-\d+, got 1e-310"):
        swav_loss(equal, equal, temperature=1e-310)


def test_a_queue_of_a_longer_type_is_checked_as_what_it_becomes():
    scores, queue = torch.zeros(3, 4), torch.full((5, 4), 1e39, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"queue\[1\] must be at most 4e\+37 .* divided by epsilon"):
        swav_loss(scores, scores, queue=[queue / 1e39, queue])


def test_codes_are_constants_and_scores_stay():
    scores = cosines(6, 3).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores, before)


def rank_codes(group, scores, sizes):
    return sinkhorn(scores.split(list(sizes))[torch.distributed.get_rank(group)], group=group)


def test_codes_over_ranks_are_those_of_one_process(ranks):
    scores = 20 * cosines(sum(SIZES), 4)
    found = ranks.run(rank_codes, scores, SIZES, world_size=3)
    assert [len(codes) for codes in found] == list(SIZES)
    torch.testing.assert_close(torch.cat(found), sinkhorn(scores))


@SEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_codes_of_a_narrow_range_are_those_by_logarithms(seed, dtype, iterations, monkeypatch):
    """Up to the widest range that is taken without them."""
    narrow = _codes._NARROW[dtype]
    for rows, prototypes in ((300, 40), (5, 900)):
        scores = cosines(rows, prototypes, seed).to(dtype)
        scores = (scores - scores.min()) / (scores.max() - scores.min()) * (0.999 * narrow * 0.05)
        found = sinkhorn(scores, iterations=iterations)
        with monkeypatch.context() as patched:
            patched.setattr(_codes, "_NARROW", dict.fromkeys(_codes._NARROW, -1.0))
            expected = sinkhorn(scores, iterations=iterations)
        torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-7)
        torch.testing.assert_close(found.sum(1), torch.ones(rows, dtype=dtype))


# ---- SwAV ------------------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize(("count", "crops"), [(2, (0, 1)), (4, (0, 1)), (4, (2,)), (3, (2, 0, 1))])
def test_swav_is_its_definition_with_constant_codes(seed, count, crops):
    scores = [cosines(7, 4, seed + 10 * v).requires_grad_() for v in range(count)]
    codes = [naive_sinkhorn(scores[crop].detach(), 0.05, 3) for crop in crops]
    expected = naive_swav(scores, codes, crops, 0.2)
    found = swav_loss(*scores, assignment_crops=crops, temperature=0.2, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.mean(), scores, allow_unused=True),
        torch.autograd.grad(expected.mean(), scores, allow_unused=True),
    )
    torch.testing.assert_close(SwAVLoss(0.2, assignment_crops=crops)(*scores), expected.mean())


@SEEDS
def test_hard_codes_name_one_prototype_each(seed):
    scores = [cosines(7, 4, seed + 10 * v).requires_grad_() for v in range(3)]
    codes = [naive_sinkhorn(scores[crop].detach(), 0.05, 3) for crop in (0, 1)]
    hard = [(q == q.max(1, keepdim=True).values).to(q.dtype) for q in codes]
    assert all((q.sum(1) == 1).all() for q in hard)
    expected = naive_swav(scores, hard, (0, 1), 0.1)
    torch.testing.assert_close(swav_loss(*scores, hard_codes=True, reduction="none"), expected)
    torch.testing.assert_close(SwAVLoss(hard_codes=True)(*scores), expected.mean())
    assert (expected - naive_swav(scores, codes, (0, 1), 0.1)).abs().max() > 1e-3
    with pytest.raises(TypeError, match="hard_codes must be"):
        SwAVLoss(hard_codes=1)


@pytest.mark.parametrize(("crops", "queue"), [(2, None), (4, None), (2, 5)])
def test_one_matrix_a_crop_is_kept_for_the_backward(crops, queue):
    """Beside the scores: what the codes were made with, and they themselves, is not."""
    scores = [cosines(7, 4, v).requires_grad_() for v in range(crops)]
    queue = None if queue is None else [cosines(queue, 4, v) for v in (8, 9)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        swav_loss(*scores, queue=queue)
    sizes = [t.untyped_storage().nbytes() // t.element_size() for t in kept.values()]
    assert [size for size in sizes if size > 7] == [7 * 4] * 2 * crops


def test_small_crops_predict_and_give_no_codes():
    large, small = [cosines(6, 4, v) for v in range(2)], cosines(6, 4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(swav_loss(*large, small), small)
    targets = (sinkhorn(large[0]) + sinkhorn(large[1])) / (2 * 2 * 6 * 0.1)
    softmax = (small / 0.1).softmax(1)
    torch.testing.assert_close(gradient, softmax * targets.sum(1, keepdim=True) - targets)


def test_collapsed_scores_cost_the_logarithm_of_the_number_of_prototypes():
    equal = torch.zeros(5, 8)
    assert swav_loss(equal, equal).item() == pytest.approx(math.log(8))


@SEEDS
def test_a_queue_takes_part_in_the_balance_alone(seed):
    scores = [cosines(4, 6, seed + 10 * v).requires_grad_() for v in range(3)]
    queue = [cosines(9, 6, seed + 100 * (v + 1)).requires_grad_() for v in range(2)]
    codes = [
        naive_sinkhorn(torch.cat(pair).detach(), 0.05, 3)[9:] for pair in zip(queue, scores, strict=False)
    ]
    found = swav_loss(*scores, queue=queue)
    torch.testing.assert_close(found, naive_swav(scores, codes, (0, 1), 0.1).mean())
    torch.testing.assert_close(SwAVLoss()(*scores, queue=queue), found)
    assert torch.autograd.grad(found, queue, allow_unused=True) == (None, None)
    assert (found - swav_loss(*scores)).abs() > 1e-3
    torch.testing.assert_close(swav_loss(*scores, queue=[q[:0] for q in queue]), swav_loss(*scores))


def rank_swav(group, scores, queue, sizes):
    own = [crop.split(list(sizes))[torch.distributed.get_rank(group)].requires_grad_() for crop in scores]
    loss = swav_loss(*own, queue=queue, group=group)
    return loss.detach(), torch.autograd.grad(loss, own)


def test_a_queue_that_all_ranks_hold_counts_once(ranks):
    scores = [cosines(sum(SIZES), 5, v) for v in range(3)]
    queue = [cosines(8, 5, 20 + v) for v in range(2)]
    found = ranks.run(rank_swav, scores, queue, SIZES, world_size=3)
    leaves = [crop.clone().requires_grad_() for crop in scores]
    single = swav_loss(*leaves, queue=queue)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), single.detach())
    for v, gradient in enumerate(torch.autograd.grad(single, leaves)):
        torch.testing.assert_close(torch.cat([of_rank[v] for _, of_rank in found]) / 3, gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"assignment_crops": ()}, "assignment_crops must name"),
        ({"assignment_crops": (0, 0)}, "assignment_crops must name"),
        ({"assignment_crops": ([0],)}, "assignment_crops must be an integer, got list"),
        ({"assignment_crops": torch.arange(2)}, "assignment_crops must be a sequence of numbers, got Tensor"),
        ({"queue": 3}, "queue must be a tensor or a sequence of tensors, got int"),
        ({"queue": torch.tensor(3.0)}, "queue must be a tensor or a sequence of tensors, got Tensor"),
        ({"assignment_crops": (0, 2)}, "scores must be at least 3 tensors"),
        ({"assignment_crops": (-1,)}, "assignment_crops must be at least 0"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"queue": [torch.zeros(3, 4)]}, "queue must hold one tensor for each of the 2"),
        ({"queue": [torch.zeros(3, 5)] * 2}, "must have the same number of columns"),
        ({"queue": [torch.full((3, 4), torch.nan)] * 2}, r"queue\[0\] must be finite"),
    ],
)
def test_swav_refuses_in_one_sentence(change, message):
    scores = [cosines(5, 4, v).float() for v in range(2)]
    with pytest.raises((ValueError, TypeError), match=rf"^(?=.*{message}).*\.$"):
        swav_loss(*scores, **change)
    if "queue" not in change and "at least 3" not in message:
        with pytest.raises((ValueError, TypeError), match=message):
            SwAVLoss(**change)
    with pytest.raises(ValueError, match=r"scores must be at least 2 tensors, one a crop .*, got 1"):
        swav_loss(scores)


# ---- ProtoNCE --------------------------------------------------------------------------------------------------------


def clustered(seed, rows=9, prototypes=5, width=4):
    z, centres = random(rows, width, seed=seed), random(prototypes, width, seed=seed + 50)
    index = torch.randint(0, prototypes, (rows,), generator=torch.Generator().manual_seed(seed))
    phi = 0.1 + random(prototypes, seed=seed + 70).abs()
    return z.requires_grad_(), centres.requires_grad_(), index, phi.requires_grad_()


def naive_nce(z, centres, index, phi):
    logits = F.normalize(z, dim=1) @ F.normalize(centres, dim=1).t() / phi
    return F.cross_entropy(logits, index, reduction="none", ignore_index=-100)


@SEEDS
@IMPLS
def test_prototype_nce_is_a_cross_entropy_over_prototypes(seed, impl):
    z, centres, index, phi = clustered(seed)
    for concentration, of_each in ((None, 0.3), (phi, phi)):
        expected = naive_nce(z, centres, index, of_each)
        found = prototype_nce_loss(
            z, centres, index, concentration=concentration, temperature=0.3, reduction="none", impl=impl
        )
        torch.testing.assert_close(found, expected)
        leaves = (z, centres) if concentration is None else (z, centres, phi)
        torch.testing.assert_close(
            torch.autograd.grad(found.mean(), leaves), torch.autograd.grad(expected.mean(), leaves)
        )
        module = PrototypeNCELoss(0.3, impl=impl)
        torch.testing.assert_close(module(z, centres, index, concentration), expected.mean())


@IMPLS
def test_a_row_close_to_its_prototype_keeps_its_precision(impl):
    rows = torch.eye(3)
    loss = prototype_nce_loss(rows, rows, torch.arange(3), temperature=0.04, impl=impl)
    assert loss.item() == pytest.approx(2 * math.exp(-25), rel=1e-4)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_the_smallest_concentrations_are_right(impl):
    z, centres, index, _ = (t.detach() for t in clustered(0))
    least = torch.finfo(torch.float32).tiny
    phi = least * torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0])
    given = [t.float().requires_grad_() for t in (z, centres)]
    each = prototype_nce_loss(*given, index, concentration=phi, reduction="none", impl=impl)
    assert each.count_nonzero() > 0
    torch.testing.assert_close(
        each.double(), naive_nce(z, centres, index, phi.double()), rtol=1e-5, atol=least**-1 * 1e-6
    )
    if impl == "dense":
        each.mean().backward()
        assert all(t.grad.isfinite().all() for t in given)
        assert all(t.grad.count_nonzero() for t in given)
    for small in (
        {"concentration": phi / 2},
        {"temperature": least / 2},
        {"temperature": torch.tensor(least / 2)},
    ):
        with pytest.raises(ValueError, match=r"must be at least 1\.1[78][^ ]*e-38, got"):
            prototype_nce_loss(*given, index, **small)


def test_rows_without_a_prototype_do_not_count():
    z, centres, index, _ = clustered(0)
    index[[1, 4]] = torch.tensor([-1, -100])
    rest = index >= 0
    each = prototype_nce_loss(z, centres, index, reduction="none")
    assert (each[~rest] == 0).all()
    mean = prototype_nce_loss(z, centres, index)
    torch.testing.assert_close(mean, naive_nce(z[rest], centres, index[rest], 0.1).mean())
    (gradient,) = torch.autograd.grad(mean, z)
    assert (gradient[~rest] == 0).all()
    none = prototype_nce_loss(z, centres, torch.full_like(index, -1))
    none.backward()
    assert none.item() == 0
    assert (z.grad == 0).all()


def test_several_clusterings_are_averaged_row_by_row():
    z, coarse, of_coarse, phi_coarse = clustered(1, prototypes=2)
    _, fine, of_fine, phi_fine = clustered(2, prototypes=7)
    of_coarse[0], of_fine[0], of_fine[1] = -1, -1, -1
    several = ([coarse, fine], [of_coarse, of_fine])
    options = {"concentration": [phi_coarse, phi_fine], "reduction": "none"}
    each = prototype_nce_loss(z, *several, **options)
    one = prototype_nce_loss(z, coarse, of_coarse, concentration=phi_coarse, reduction="none")
    other = prototype_nce_loss(z, fine, of_fine, concentration=phi_fine, reduction="none")
    torch.testing.assert_close(each[2:], (one[2:] + other[2:]) / 2)
    torch.testing.assert_close(each[1], one[1])
    assert each[0] == 0
    options["reduction"] = "mean"
    torch.testing.assert_close(prototype_nce_loss(z, *several, **options), each[1:].mean())
    as_matrix = prototype_nce_loss(z, several[0], torch.stack(several[1]), **options)
    torch.testing.assert_close(as_matrix, each[1:].mean())


def test_takes_what_a_prototype_bank_holds():
    z = random(60, 4).float()
    bank = PrototypeBank(60, (3, 6), 4)
    bank.refresh(z, generator=torch.Generator().manual_seed(0))
    batch = torch.arange(0, 60, 7)
    loss = prototype_nce_loss(
        z[batch], bank.prototypes, bank.assignments[:, batch], concentration=bank.concentrations
    )
    expected = [
        naive_nce(z[batch], *level)
        for level in zip(bank.prototypes, bank.assignments[:, batch], bank.concentrations, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def rank_nce(group, z, centres, index, phi, sizes):
    rank = torch.distributed.get_rank(group)
    own, centres, phi = (x.requires_grad_() for x in (z.split(list(sizes))[rank], centres, phi))
    loss = prototype_nce_loss(own, centres, index.split(list(sizes))[rank], concentration=phi, group=group)
    return loss.detach(), torch.autograd.grad(loss, (own, centres, phi))


def test_ranks_share_the_mean_over_rows_that_count(ranks):
    z, centres, index, phi = clustered(3, rows=sum(SIZES))
    index[:3] = -1
    arrays = [x.detach() for x in (z, centres, index, phi)]
    found = ranks.run(rank_nce, *arrays, SIZES, world_size=3)
    single = prototype_nce_loss(z, centres, index, concentration=phi)
    of_rows, of_centres, of_phi = torch.autograd.grad(single, (z, centres, phi))
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), single.detach())
    torch.testing.assert_close(torch.cat([g[0] for _, g in found]) / 3, of_rows)
    torch.testing.assert_close(torch.stack([g[1] for _, g in found]).mean(0), of_centres)
    torch.testing.assert_close(torch.stack([g[2] for _, g in found]).mean(0), of_phi)


def test_group_contracts_of_other_settings(ranks):
    check_group(SwAVLoss, ranks, 3, assignment_crops=(1,), reduction="sum")
    check_group(PrototypeNCELoss, ranks, 3, reduction="sum", normalize=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"assignments": torch.full((9,), 5)}, "assignments must be below the number of prototypes, 5"),
        ({"assignments": torch.zeros(8, dtype=torch.int64)}, "assignments must have shape"),
        ({"prototypes": torch.ones(5, 3, dtype=torch.float64)}, "must have the same number of columns"),
        ({"prototypes": [torch.ones(5, 4)] * 2}, "must be given for the same clusterings"),
        ({"prototypes": None}, "prototypes must be a tensor or a sequence of tensors, got NoneType"),
        ({"assignments": None}, "assignments must be a tensor or a sequence of tensors, got NoneType"),
        ({"concentration": 0.1}, "concentration must be a tensor or a sequence of tensors, got float"),
        ({"concentration": torch.ones(4)}, r"concentration must be a tensor of shape \(5,\), got \(4,\)"),
        ({"concentration": torch.zeros(5)}, "concentration must be finite and > 0"),
        (
            {"concentration": torch.full((5,), 1e-310, dtype=torch.float64)},
            "concentration must be at least 2.23e-308, got a smaller",
        ),
        ({"temperature": 1e-310}, "temperature must be at least 2.2250738585072014e-308, got 1e-310"),
        ({"temperature": torch.tensor(1e-310).double()}, "temperature must be"),
        ({"concentration": [0.1]}, r"concentration must be a tensor of shape \(5,\), got float"),
    ],
)
def test_prototype_nce_refuses_in_one_sentence(change, message):
    z, centres, index, _ = clustered(0)
    given = {
        "prototypes": centres,
        "assignments": [index] if isinstance(change.get("prototypes"), list) else index,
    }
    with pytest.raises((ValueError, TypeError), match=rf"^(?=.*{message}).*\.$"):
        prototype_nce_loss(z, **(given | change))


def test_measures_of_healthy_uniform_and_collapsed_scores():
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(64, 16, generator=generator), dim=1)
    prototypes = F.normalize(torch.randn(8, 16, generator=generator), dim=1)
    healthy, loss = (rows @ prototypes.T).requires_grad_(), SwAVLoss()
    found = loss.measures(healthy, healthy, queue=[healthy[:9].detach()] * 2)
    assert all(0 <= value <= 1 and not value.requires_grad for value in found.values())
    assert found["code_entropy"] < 0.7 < 0.95 < found["code_usage"]
    assert loss.advice(found) is None
    uniform = loss.measures(*[torch.zeros(64, 8)] * 2)
    torch.testing.assert_close(uniform["code_entropy"], torch.tensor(1.0))
    torch.testing.assert_close(uniform["prediction_entropy"], torch.tensor(1.0))
    assert "codes are uniform" in loss.advice(uniform)
    one = 0.2 * healthy.detach()
    one[:, 3] += 5
    collapsed = loss.measures(one, one)
    assert collapsed["largest_prototype_share"] == 1
    assert "one prototype is the best of 100% of SwAV's samples" in loss.advice(collapsed)


def test_codes_may_be_made_of_other_scores_than_predict():
    codes_of = [random(5, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    predicting = [random(5, 4, seed=seed).requires_grad_() for seed in (3, 4)]
    found = swav_loss(*codes_of, predictions=predicting)
    q = [sinkhorn(scores.detach()) for scores in codes_of]
    log_p = [(scores / 0.1).log_softmax(1) for scores in predicting]
    torch.testing.assert_close(found, -(q[0] * log_p[1] + q[1] * log_p[0]).sum(1).mean() / 2)
    torch.testing.assert_close(swav_loss(*codes_of, predictions=codes_of), swav_loss(*codes_of))
    assert all(g is None for g in torch.autograd.grad(found, codes_of, allow_unused=True))
    with pytest.raises(TypeError, match=r"predictions must be a tensor or a sequence of tensors, got int\."):
        swav_loss(*codes_of, predictions=3)
    with pytest.raises(ValueError, match="predictions must hold one tensor for each of the 2 crops, got 1"):
        swav_loss(*codes_of, predictions=predicting[:1])
