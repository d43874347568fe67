"""Margin losses against the definitions written as loops; tiles, queues, listed pairs, edge cases, errors."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import pytest
import torch

from cl_core import _comparison
from cl_core.losses import _terms
from cl_core.losses.margin import (
    CircleLoss,
    ContrastiveMarginLoss,
    MultiSimilarityLoss,
    TripletMarginLoss,
    circle_loss,
    contrastive_margin_loss,
    multi_similarity_loss,
    triplet_margin_loss,
)
from cl_core.miners import (
    BatchHardMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    Pairs,
    Triplets,
    mine_multi_similarity,
    mine_pair_margin,
    mine_triplets,
)


def batch(seed, rows=12, classes=4, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, width, generator=generator, dtype=dtype)
    return z.requires_grad_(), torch.randint(0, classes, (rows,), generator=generator)


# ---- definitions: one list of hinge or logit values an anchor --------------------------------------------------------


class Lists:
    """Positives and negatives of every anchor, with distances and similarities, by loops."""

    def __init__(self, z, labels, ref=None, ref_labels=None, normalize=True):
        unit = torch.nn.functional.normalize if normalize else (lambda x: x)
        x = unit(z)
        y, y_labels = (x, labels) if ref is None else (unit(ref), ref_labels)
        self.similarity = x @ y.T
        # nudged off zero distance on the unused diagonal, where the norm has no gradient
        self.distance = (x[:, None] - y + (torch.eye(len(x))[..., None] if ref is None else 0)).norm(dim=2)
        rows, columns = range(len(x)), range(len(y))
        self.positives = [
            [j for j in columns if labels[a] == y_labels[j] and (ref is not None or a != j)] for a in rows
        ]
        self.negatives = [
            [j for j in columns if labels[a] != y_labels[j]] if self.positives[a] else [] for a in rows
        ]


def naive_triplet(lists, margin=0.05):
    d = lists.distance
    terms = [
        [(d[a, p] - d[a, n] + margin).relu() for p in positives for n in negatives]
        for a, (positives, negatives) in enumerate(zip(lists.positives, lists.negatives, strict=True))
    ]
    return reduced([terms], d)


def naive_contrastive(lists, positive_margin=0.0, negative_margin=1.0):
    d = lists.distance
    far = [[(d[a, p] - positive_margin).relu() for p in row] for a, row in enumerate(lists.positives)]
    near = [[(negative_margin - d[a, n]).relu() for n in row] for a, row in enumerate(lists.negatives)]
    return reduced([far, near], d)


def naive_multi_similarity(lists, alpha=2.0, beta=50.0, base=0.5):
    s = lists.similarity
    values = []
    for a, (positives, negatives) in enumerate(zip(lists.positives, lists.negatives, strict=True)):
        if positives:
            pull = torch.log(1 + torch.exp(-alpha * (s[a, positives] - base)).sum()) / alpha
            push = torch.log(1 + torch.exp(beta * (s[a, negatives] - base)).sum()) / beta
            values.append([pull + push])
        else:
            values.append([])
    return reduced([values], s)


def naive_circle(lists, margin=0.4, gamma=80.0):
    s = lists.similarity
    values = []
    for a, (positives, negatives) in enumerate(zip(lists.positives, lists.negatives, strict=True)):
        if positives and negatives:
            sp, sn = s[a, positives], s[a, negatives]
            pull = -gamma * (1 + margin - sp.detach()).relu() * (sp - (1 - margin))
            push = gamma * (sn.detach() + margin).relu() * (sn - margin)
            values.append([torch.log(1 + push.exp().sum() * pull.exp().sum())])
        else:
            values.append([])
    return reduced([values], s)


def reduced(sorts, like):
    """Mean over the non-zero terms sort by sort, the sum, and each anchor's sum."""
    zero = like.sum() * 0
    flat = [[term for row in sort for term in row] for sort in sorts]
    mean = sum(sum(sort, zero) / max(1, sum(bool(t > 0) for t in sort)) for sort in flat)
    anchors = [sum((term for sort in sorts for term in sort[a]), zero) for a in range(len(sorts[0]))]
    return {"mean": mean, "sum": sum(anchors), "none": torch.stack(anchors)}


LOSSES = {
    "triplet": (triplet_margin_loss, naive_triplet, [{}, {"margin": 0.3}, {"margin": 0.0}]),
    "contrastive": (
        contrastive_margin_loss,
        naive_contrastive,
        [{}, {"positive_margin": 0.3, "negative_margin": 1.4}],
    ),
    "multi-similarity": (
        multi_similarity_loss,
        naive_multi_similarity,
        [{}, {"alpha": 5.0, "beta": 20.0, "base": 0.1}],
    ),
    "circle": (circle_loss, naive_circle, [{}, {"margin": 0.25, "gamma": 30.0}]),
}
each_loss = pytest.mark.parametrize(("loss", "naive", "settings"), LOSSES.values(), ids=LOSSES.keys())
each_function = pytest.mark.parametrize("loss", [loss for loss, _, _ in LOSSES.values()], ids=LOSSES.keys())


@pytest.fixture(params=["one tile", "small tiles"])
def tile_size(request, monkeypatch):
    """Tiles as they are, which hold these small batches whole, or of two anchors and three listed pairs."""
    if request.param == "small tiles":
        monkeypatch.setattr(_comparison, "_ENTRIES", 1)
        monkeypatch.setattr(_comparison, "_FEWEST_ANCHORS", 2)
        monkeypatch.setattr(_terms, "_LISTED_ENTRIES", 15)
    return request.param


any_tiles = pytest.mark.usefixtures("tile_size")


def assert_same(given, expected, *leaves):
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)
    weight = torch.linspace(1, 2, given.numel(), dtype=given.dtype).view_as(given)
    for one, other in zip(
        torch.autograd.grad((given * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@each_loss
@any_tiles
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(loss, naive, settings, reduction, seed):
    z, labels = batch(seed)
    labels[4] = 77  # without a positive: does not count, but is a negative of the others
    for setting in settings:
        expected = naive(Lists(z, labels), **setting)[reduction]
        assert_same(loss(z, labels, reduction=reduction, **setting), expected, z)


@each_loss
@any_tiles
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_other_rows(loss, naive, settings, reduction):
    z, labels = batch(0)
    ref, ref_labels = batch(9, rows=7, classes=5)
    expected = naive(Lists(z, labels, ref, ref_labels))[reduction]
    assert_same(loss(z, labels, ref=ref, ref_labels=ref_labels, reduction=reduction), expected, z, ref)
    queue = ref.detach()  # wants no gradient
    expected = naive(Lists(z, labels, queue, ref_labels))[reduction]
    assert_same(loss(z, labels, ref=queue, ref_labels=ref_labels, reduction=reduction), expected, z)


@each_loss
@any_tiles
def test_without_normalisation(loss, naive, settings):
    z, labels = batch(1)
    z = (z.detach() / 3).requires_grad_()
    assert_same(loss(z, labels, normalize=False), naive(Lists(z, labels, normalize=False))["mean"], z)
    rescaled = loss(z.detach() * torch.rand(12, 1, dtype=z.dtype), labels)
    torch.testing.assert_close(rescaled, loss(z, labels).detach())


@any_tiles
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_all_listed_triplets_or_pairs_give_the_same_as_none_listed(reduction, seed):
    z, labels = batch(seed)
    labels[4] = 77
    triplets = mine_triplets(z, labels, margin=math.inf)
    given = triplet_margin_loss(z, labels, margin=0.3, triplets=triplets, reduction=reduction)
    assert_same(given, triplet_margin_loss(z, labels, margin=0.3, reduction=reduction), z)
    pairs = mine_pair_margin(z, labels, positive_margin=-1, negative_margin=math.inf)
    for loss in (contrastive_margin_loss, multi_similarity_loss, circle_loss):
        given = loss(z, labels, pairs=pairs, reduction=reduction)
        assert_same(given, loss(z, labels, reduction=reduction), z)


@any_tiles
def test_listed_pairs_against_other_rows():
    z, labels = batch(0)
    ref, ref_labels = batch(9, rows=7, classes=5)
    against = {"ref": ref, "ref_labels": ref_labels}
    triplets = mine_triplets(z, labels, margin=math.inf, **against)
    given = triplet_margin_loss(z, labels, margin=0.3, triplets=triplets, **against)
    assert_same(given, triplet_margin_loss(z, labels, margin=0.3, **against), z, ref)
    pairs = mine_pair_margin(z, labels, positive_margin=-1, negative_margin=math.inf, **against)
    for loss in (contrastive_margin_loss, multi_similarity_loss, circle_loss):
        assert_same(loss(z, labels, pairs=pairs, **against), loss(z, labels, **against), z, ref)


def test_some_listed_pairs():
    z, labels = batch(0)
    d = torch.cdist(torch.nn.functional.normalize(z), torch.nn.functional.normalize(z))
    i = torch.tensor([0, 1, 1, 5])
    triplets = Triplets(i, torch.tensor([1, 2, 3, 4]), torch.tensor([6, 7, 8, 9]))
    hinges = (d[i, triplets.positive] - d[i, triplets.negative] + 0.4).relu()
    assert (hinges > 0).any()
    expected = hinges.sum() / (hinges > 0).sum()
    assert_same(triplet_margin_loss(z, labels, margin=0.4, triplets=triplets), expected, z)
    none = triplet_margin_loss(z, labels, margin=0.4, triplets=triplets, reduction="none")
    torch.testing.assert_close(none, torch.zeros(12, dtype=z.dtype).index_add(0, i, hinges.detach()))
    # the multi-similarity mean is over anchors with a positive, whether their pairs are listed or not
    pairs = mine_multi_similarity(z, labels, epsilon=-0.0)
    values = multi_similarity_loss(z, labels, pairs=pairs, reduction="none")
    counts = (labels[:, None] == labels).sum(1) > 1
    torch.testing.assert_close(multi_similarity_loss(z, labels, pairs=pairs), values.sum() / counts.sum())


# Not the circle loss: its weights are held constant. Its gradient is compared with the definition above.
@pytest.mark.parametrize("loss", [triplet_margin_loss, contrastive_margin_loss, multi_similarity_loss])
@any_tiles
def test_gradient_is_the_derivative(loss):
    z, labels = batch(3, rows=7, classes=2)
    ref, ref_labels = batch(8, rows=5, classes=2)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), (z,))
    assert torch.autograd.gradcheck(
        lambda z, ref: loss(z, labels, ref=ref, ref_labels=ref_labels, reduction="none"), (z, ref)
    )
    mined = (
        {"triplets": mine_triplets(z, labels)}
        if loss is triplet_margin_loss
        else {"pairs": mine_pair_margin(z, labels)}
    )
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, **mined), (z,))


@pytest.mark.parametrize("loss", [triplet_margin_loss, contrastive_margin_loss, circle_loss])
def test_second_derivative_exists_in_one_tile_and_is_refused_beyond(loss, monkeypatch):
    z, labels = batch(0)
    (gradient,) = torch.autograd.grad(loss(z, labels), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    assert second.isfinite().all()
    monkeypatch.setattr(_comparison, "_ENTRIES", 1)
    monkeypatch.setattr(_comparison, "_FEWEST_ANCHORS", 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(z, labels), z, create_graph=True)


@each_function
@any_tiles
def test_nothing_to_compare_gives_a_zero_with_a_graph(loss):
    z, _ = batch(0)
    empty = torch.empty(0, dtype=torch.int64)
    listed = (
        {"triplets": Triplets(*[empty] * 3)}
        if loss is triplet_margin_loss
        else {"pairs": Pairs(*[empty] * 4)}
    )
    for labels, given in (
        (torch.arange(12), {}),
        (torch.arange(12), listed),
        (torch.arange(12), {"ref": z.detach(), "ref_labels": torch.arange(12) + 20}),
    ):
        for reduction in ("mean", "sum", "none"):
            value = loss(z, labels, reduction=reduction, **given)
            assert (value == 0).all()
            assert value.shape == ((12,) if reduction == "none" else ())
            (gradient,) = torch.autograd.grad(value.sum(), z)
            assert (gradient == 0).all()
    one = loss(z[:1], torch.zeros(1, dtype=torch.long))
    assert one == 0
    assert one.requires_grad
    lonely = loss(z, torch.zeros(12, dtype=torch.long))  # one class: no negatives
    assert lonely.isfinite()
    assert (lonely == 0) == (loss in (triplet_margin_loss, circle_loss))


@each_function
@any_tiles
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_finite_for_duplicates_zero_rows_and_extreme_norms(loss, dtype):
    z, labels = batch(0, dtype=torch.float32)
    with torch.no_grad():
        z[1] = z[0]
        z[2] = z[0]
        # In float16 gradients of zero rows end at 2^14 times what comes in: gamma = 80 of the circle loss is too much.
        if dtype != torch.float16 or loss is not circle_loss:
            z[3:5] = 0
        if dtype != torch.float16:
            z[5] *= 1e20
            z[6] *= 1e-20
    labels[:5] = torch.tensor([0, 0, 1, 1, 2])
    z = z.detach().to(dtype).requires_grad_()
    value = loss(z, labels)
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.dtype == dtype
    assert gradient.float().isfinite().all()


def test_coinciding_rows_are_at_distance_zero():
    z, _ = batch(0, rows=4)
    z = z.detach()[[0, 0, 1, 1]].float().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    value = contrastive_margin_loss(z, labels, negative_margin=0.0)
    assert value == 0
    value = contrastive_margin_loss(z, labels, negative_margin=2.0)
    distance = (z[0] / z[0].norm() - z[2] / z[2].norm()).norm()
    torch.testing.assert_close(value, 2 - distance)


@any_tiles
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_does_not_part_coinciding_rows(dtype):
    z, _ = batch(0, rows=40, width=33, dtype=dtype)
    z = z.detach().repeat(3, 1)
    labels = torch.arange(40).repeat(3)
    assert contrastive_margin_loss(z, labels, negative_margin=0.0) == 0
    pairs = mine_pair_margin(z, labels, positive_margin=0.0, negative_margin=0.0)
    assert len(pairs.positive) == 0
    if dtype == torch.float64:  # in which distances are measured: equal but for their own rounding
        z[40:80] *= 3
    every = mine_pair_margin(z, labels, positive_margin=-1.0)
    assert contrastive_margin_loss(z, labels, negative_margin=0.0, pairs=every, reduction="sum") == 0


@any_tiles
@pytest.mark.parametrize("distance", [1e-6, 1e-8, 1e-12])
def test_listed_distances_keep_their_digits_however_small(distance):
    """Rows of exact differences: 2^-k beside 1, which a difference of squares loses from 1e-8 on."""
    step = 2.0 ** round(math.log2(distance))
    z = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64).repeat(6, 1)
    z[1::2] += step * torch.tensor([[1.0, 2.0, 2.0], [-4.0, 4.0, 7.0], [6.0, -3.0, 2.0]])
    z.requires_grad_()
    anchor, other, far = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), torch.tensor([3, 5, 1])
    labels, lengths = torch.arange(6) // 2, step * torch.tensor([3.0, 9.0, 7.0], dtype=torch.float64)
    options = {"normalize": False, "reduction": "none"}
    nothing = torch.empty(0, dtype=torch.int64)
    found = contrastive_margin_loss(z, labels, pairs=Pairs(anchor, other, nothing, nothing), **options)
    torch.testing.assert_close(found[anchor], lengths, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    direction = (z[other] - z[anchor]).detach() / lengths[:, None]
    torch.testing.assert_close(gradient[other], direction, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[anchor], -direction, rtol=1e-12, atol=0)
    margin = 10 * step
    found = triplet_margin_loss(z, labels, margin=margin, triplets=Triplets(anchor, other, far), **options)
    torch.testing.assert_close(found[anchor], lengths - lengths.roll(-1) + margin, rtol=1e-12, atol=0)


def test_multi_similarity_at_extreme_sharpness():
    z, labels = batch(0, dtype=torch.float32)
    for alpha, beta in ((2.0, 2000.0), (2000.0, 50.0)):
        value = multi_similarity_loss(z, labels, alpha=alpha, beta=beta)
        exact = multi_similarity_loss(z.detach().double(), labels, alpha=alpha, beta=beta)
        assert value.isfinite()
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.autograd.grad(value, z)[0].isfinite().all()


@each_function
@any_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_types_are_computed_at_length(loss, dtype):
    z, labels = batch(5, rows=20, dtype=torch.float32)
    z = z.detach().to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    expected = loss(exact, labels)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(z, labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=3e-7)
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.dtype == dtype
        error = (gradient.double() - expected_gradient).abs().max()
        step = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert error <= step * expected_gradient.abs().max()


@each_function
@any_tiles
def test_order_of_the_batch_does_not_matter(loss):
    z, labels = batch(2)
    kept, kept_labels = z.detach().clone(), labels.clone()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(z[order], labels[order]), loss(z, labels))
    none = loss(z, labels, reduction="none")
    torch.testing.assert_close(loss(z[order], labels[order], reduction="none"), none[order])
    torch.testing.assert_close(loss(z, labels.to(torch.uint8) * 50), loss(z, labels))
    assert torch.equal(z, kept)
    assert torch.equal(labels, kept_labels)


@each_function
def test_keeps_nothing_of_size_n_by_n(loss):
    rows = 2500
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 500, (rows,), generator=generator)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        value = loss(z, labels)
    assert sum(kept) < 40 * z.numel() < rows * rows
    value.backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


MEMORY = """
import sys
from pathlib import Path
import torch
from cl_core import functional, miners
torch.set_num_threads(1)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

for name in sys.argv[1:]:
    call = getattr(functional, name, None) or getattr(miners, name)
    for rows in (800, 4000):
        z, labels = torch.randn(rows, 64, requires_grad=True), torch.arange(rows) // 8
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = call(z, labels)
        if name.endswith("loss"):
            result.backward()
    print(name, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_that_of_tiles():
    """A matrix of 4000 x 4000 takes 128 MB in float64; holes between small results can cost as much."""
    names = ["triplet_margin_loss", "contrastive_margin_loss", "mine_batch_hard"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *names], capture_output=True, text=True, check=True)
    peaks = {name: float(peak) for name, peak in (line.split() for line in done.stdout.splitlines())}
    assert peaks.keys() == set(names)
    assert max(peaks.values()) < 64, peaks


MODULES = {
    "triplet": (TripletMarginLoss(margin=0.3), triplet_margin_loss, {"margin": 0.3}),
    "contrastive": (
        ContrastiveMarginLoss(0.1, 0.9, reduction="sum"),
        contrastive_margin_loss,
        {"positive_margin": 0.1, "negative_margin": 0.9, "reduction": "sum"},
    ),
    "multi-similarity": (
        MultiSimilarityLoss(alpha=3, beta=40, base=0.4, normalize=False),
        multi_similarity_loss,
        {"alpha": 3, "beta": 40, "base": 0.4, "normalize": False},
    ),
    "circle": (CircleLoss(margin=0.2, gamma=64), circle_loss, {"margin": 0.2, "gamma": 64}),
}


@pytest.mark.parametrize(("module", "loss", "setting"), MODULES.values(), ids=MODULES.keys())
def test_modules(module, loss, setting):
    z, labels = batch(0)
    ref, ref_labels = batch(9, rows=7)
    assert torch.equal(module(z, labels), loss(z, labels, **setting))
    given = module(z, labels, ref=ref, ref_labels=ref_labels)
    assert torch.equal(given, loss(z, labels, ref=ref, ref_labels=ref_labels, **setting))
    assert module.state_dict() == {}
    for name, value in setting.items():
        assert f"{name}={value!r}" in repr(module)
    assert torch.equal(pickle.loads(pickle.dumps(module))(z, labels), module(z, labels))


def test_modules_mine_or_take_what_is_listed():
    z, labels = batch(0)
    hard = BatchHardMiner()
    module = TripletMarginLoss(margin=0.3, miner=hard)
    expected = triplet_margin_loss(z, labels, margin=0.3, triplets=hard(z, labels))
    assert torch.equal(module(z, labels), expected)
    assert expected != triplet_margin_loss(z, labels, margin=0.3)
    listed = mine_triplets(z, labels, kind="semi-hard")
    assert torch.equal(module(z, labels, listed), triplet_margin_loss(z, labels, margin=0.3, triplets=listed))
    assert "miner=BatchHardMiner(positive='hard'" in repr(module)
    for module, loss in (
        (MultiSimilarityLoss(miner=MultiSimilarityMiner(epsilon=-0.3 + 0.4)), multi_similarity_loss),
        (ContrastiveMarginLoss(miner=PairMarginMiner()), contrastive_margin_loss),
        (CircleLoss(miner=PairMarginMiner()), circle_loss),
    ):
        pairs = module.miner(z, labels)
        assert torch.equal(module(z, labels), loss(z, labels, pairs=pairs))
        assert torch.equal(module(z, labels, pairs), loss(z, labels, pairs=pairs))


def vector(*rows):
    return torch.tensor(rows)


Z, Y = batch(0)
TRIPLETS = Triplets(vector(0), vector(1), vector(2))
PAIRS = Pairs(vector(0), vector(1), vector(0), vector(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triplet_margin_loss(Z, Y[1:]), r"labels must have shape \(12,\)"),
        (lambda: triplet_margin_loss(Z, Y, margin=-1), "margin must be at least 0, got -1"),
        (lambda: triplet_margin_loss(Z, Y, margin=math.inf), "margin must be a finite number, got inf"),
        (lambda: triplet_margin_loss(Z, Y, reduction="max"), "reduction must be one of"),
        (lambda: triplet_margin_loss(Z, Y, ref=Z), "ref and ref_labels must be given together"),
        (lambda: triplet_margin_loss(Z[:0], Y[:0]), "z must have at least 1 row, got 0"),
        (lambda: triplet_margin_loss(Z, Y, triplets=PAIRS), "triplets must be cl_core.miners.Triplets, got Pairs"),
        (lambda: triplet_margin_loss(Z, Y, triplets=vector(0)), "must be cl_core.miners.Triplets, got Tensor"),
        (lambda: triplet_margin_loss(Z, Y, triplets=TRIPLETS._replace(negative=vector(12))),
         "triplets.negative must hold row numbers of z, 0 to 11, got another"),
        (lambda: triplet_margin_loss(Z, Y, triplets=TRIPLETS._replace(negative=vector(-1))), "got another"),
        (lambda: triplet_margin_loss(Z, Y, ref=Z[:5], ref_labels=Y[:5], triplets=TRIPLETS._replace(positive=vector(5))),
         "triplets.positive must hold row numbers of ref, 0 to 4, got another"),
        (lambda: triplet_margin_loss(Z, Y, triplets=TRIPLETS._replace(negative=vector(1, 2))),
         "triplets.positive and triplets.negative must be equally long, got 1 and 2"),
        (lambda: triplet_margin_loss(Z, Y, triplets=TRIPLETS._replace(anchor=vector(1.0))),
         r"triplets.anchor must be a vector of int64, got torch.float32 of shape \(1,\)"),
        (lambda: contrastive_margin_loss(Z, Y, pairs=PAIRS._replace(negative=vector(1, 2))),
         "pairs.negative_anchor and pairs.negative must be equally long, got 1 and 2"),
        (lambda: contrastive_margin_loss(Z, Y, pairs=TRIPLETS), "pairs must be cl_core.miners.Pairs, got Triplets"),
        (lambda: contrastive_margin_loss(Z, Y, positive_margin=-0.5), "positive_margin must be at least 0"),
        (lambda: contrastive_margin_loss(Z, Y, negative_margin="1"), "negative_margin must be a number, got str"),
        (lambda: multi_similarity_loss(Z, Y, alpha=0), "alpha must be finite and > 0, got 0"),
        (lambda: multi_similarity_loss(Z, Y, beta=-1.0), "beta must be finite and > 0"),
        (lambda: multi_similarity_loss(Z, Y, base=math.nan), "base must be a finite number, got nan"),
        (lambda: circle_loss(Z, Y, gamma=0.0), "gamma must be finite and > 0, got 0.0"),
        (lambda: circle_loss(Z * math.inf, Y), "z must be finite"),
        (lambda: TripletMarginLoss(margin=-1), "margin must be at least 0"),
        (lambda: ContrastiveMarginLoss(negative_margin=-1), "negative_margin must be at least 0"),
        (lambda: MultiSimilarityLoss(beta=0), "beta must be finite and > 0"),
        (lambda: CircleLoss(gamma=0), "gamma must be finite and > 0"),
        (lambda: CircleLoss(reduction="max"), "reduction must be one of"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_pairs_of_unequal_sorts_may_differ_in_number():
    pairs = Pairs(vector(0, 1, 2), vector(1, 2, 3), vector(4), vector(5))
    assert contrastive_margin_loss(Z, Y, pairs=pairs) > 0
