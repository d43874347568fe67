"""Miners against naive loops; tiles, queues, draws, empty cases, errors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import partial
from itertools import chain

import pytest
import torch

from cl_core import _comparison, miners
from cl_core.miners import (
    BatchHardMiner,
    DistanceWeightedMiner,
    MultiSimilarityMiner,
    PairMarginMiner,
    TripletMarginMiner,
    mine_batch_hard,
    mine_distance_weighted,
    mine_multi_similarity,
    mine_nearest_negatives,
    mine_pair_margin,
    mine_triplets,
)
from cl_core.samplers import HardNegativeBatchSampler


def batch(seed, rows=14, classes=4, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, width, generator=generator, dtype=dtype)
    return z, torch.randint(0, classes, (rows,), generator=generator)


def queued(seed):
    """A batch and a queue that holds copies of the batch's first three rows."""
    z, labels = batch(seed)
    ref, ref_labels = batch(seed + 100, rows=9)
    ref, ref_labels = torch.cat([z[:3], ref]), torch.cat([labels[:3], ref_labels])
    ids = torch.arange(14)
    return z, labels, {
        "ref": ref,
        "ref_labels": ref_labels,
        "ids": ids,
        "ref_ids": torch.cat([ids[:3], 100 + torch.arange(9)]),
    }  # fmt: skip


SETTINGS = {"batch": lambda seed: (*batch(seed), {}), "queue": queued}
both = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
seeds = pytest.mark.parametrize("seed", range(4))
any_tiles = pytest.mark.usefixtures("tile_size")


@pytest.fixture(params=["one tile", "small tiles"])
def tile_size(request, monkeypatch):
    """Tiles as they are, which hold these small batches whole, or of two anchors and chunks of one pair."""
    if request.param == "small tiles":
        monkeypatch.setattr(_comparison, "_ENTRIES", 1)
        monkeypatch.setattr(_comparison, "_FEWEST_ANCHORS", 2)
        monkeypatch.setattr(miners.triplets, "_CHUNK", 1)
        monkeypatch.setattr(miners.nearest, "_TILE", 3)


class Naive:
    """The definitions, by loops over rows."""

    def __init__(self, z, labels, ref=None, ref_labels=None, ids=None, ref_ids=None):
        unit = torch.nn.functional.normalize(z.double())
        other = unit if ref is None else torch.nn.functional.normalize(ref.double())
        self.distance = (unit[:, None] - other).norm(dim=2)
        self.similarity = unit @ other.T
        ref_labels = labels if ref is None else ref_labels
        if ids is None:
            ids = torch.arange(len(z))
            ref_ids = ids if ref is None else -1 - torch.arange(len(other))
        rows, columns = range(len(z)), range(len(other))
        self.rows = rows
        self.all_negatives = {
            a: [j for j in columns if ids[a] != ref_ids[j] and labels[a] != ref_labels[j]] for a in rows
        }
        self.positives = {
            a: [j for j in columns if ids[a] != ref_ids[j] and labels[a] == ref_labels[j]] for a in rows
        }
        self.negatives = {a: self.all_negatives[a] if self.positives[a] else [] for a in rows}

    def triplets(self, condition):
        return {
            (a, p, n)
            for a in self.rows
            for p in self.positives[a]
            for n in self.negatives[a]
            if condition(self.distance[a, n] - self.distance[a, p])
        }


def tuples(*vectors):
    listed = list(zip(*(vector.tolist() for vector in vectors), strict=True))
    assert len(set(listed)) == len(listed)
    assert all(vector.dtype == torch.int64 for vector in vectors)
    assert vectors[0].tolist() == sorted(vectors[0].tolist())
    return set(listed)


KINDS = {
    "all": lambda gap: gap <= 0.2,
    "hard": lambda gap: gap <= 0,
    "semi-hard": lambda gap: 0 < gap <= 0.2,
    "easy": lambda gap: gap > 0.2,
}


@both
@seeds
@any_tiles
@pytest.mark.parametrize("kind", KINDS)
def test_triplets_of_a_kind(setting, seed, kind):
    z, labels, candidates = setting(seed)
    expected = Naive(z, labels, **candidates).triplets(KINDS[kind])
    found = mine_triplets(z, labels, kind=kind, margin=0.2, **candidates)
    assert tuples(*found) == expected
    assert found.anchor is found[0]


def test_infinite_margin_gives_every_triplet():
    z, labels = batch(0)
    assert tuples(*mine_triplets(z, labels, margin=math.inf)) == Naive(z, labels).triplets(lambda _: True)


@any_tiles
def test_max_per_anchor_is_a_uniform_draw():
    z, labels = batch(1)
    every = tuples(*mine_triplets(z, labels, margin=0.5))
    size = Counter(a for a, _, _ in every)
    drawn: Counter[tuple[int, int, int]] = Counter()
    draws = 60
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        some = mine_triplets(z, labels, margin=0.5, max_per_anchor=3, generator=generator)
        listed = tuples(*some)
        assert listed <= every
        assert Counter(a for a, _, _ in listed) == {a: min(3, count) for a, count in size.items()}
        again = mine_triplets(
            z, labels, margin=0.5, max_per_anchor=3, generator=torch.Generator().manual_seed(seed)
        )
        assert all(torch.equal(x, y) for x, y in zip(some, again, strict=True))
        drawn.update(listed)
    for triplet in every:
        expected = draws * min(1, 3 / size[triplet[0]])
        assert abs(drawn[triplet] - expected) < 5 * math.sqrt(expected)


@both
@seeds
@any_tiles
@pytest.mark.parametrize("positive", ["hard", "easy", "semi-hard"])
@pytest.mark.parametrize("negative", ["hard", "easy", "semi-hard"])
def test_one_triplet_an_anchor(setting, seed, positive, negative):
    if positive == negative == "semi-hard":
        return
    z, labels, candidates = setting(seed)
    naive = Naive(z, labels, **candidates)
    d = naive.distance
    expected = set()
    for a in naive.rows:
        positives, negatives = naive.positives[a], naive.negatives[a]
        if not positives or not negatives:
            continue
        near, far = partial(min, key=d[a].__getitem__), partial(max, key=d[a].__getitem__)
        if positive == "semi-hard":
            n = far(negatives) if negative == "easy" else near(negatives)
            positives = [j for j in positives if d[a, j] < d[a, n]]
            if positives:
                expected.add((a, far(positives), n))
            continue
        p = far(positives) if positive == "hard" else near(positives)
        if negative == "semi-hard":
            negatives = [j for j in negatives if d[a, j] > d[a, p]]
        if negatives:
            expected.add((a, p, far(negatives) if negative == "easy" else near(negatives)))
    assert tuples(*mine_batch_hard(z, labels, positive=positive, negative=negative, **candidates)) == expected


@both
@seeds
@any_tiles
def test_multi_similarity(setting, seed):
    z, labels, candidates = setting(seed)
    naive = Naive(z, labels, **candidates)
    s = naive.similarity
    positive, negative = set(), set()
    for a in naive.rows:
        if naive.positives[a] and naive.negatives[a]:
            highest, lowest = s[a, naive.negatives[a]].max(), s[a, naive.positives[a]].min()
            positive |= {(a, p) for p in naive.positives[a] if s[a, p] - 0.1 < highest}
            negative |= {(a, n) for n in naive.negatives[a] if s[a, n] + 0.1 > lowest}
    found = mine_multi_similarity(z, labels, epsilon=0.1, **candidates)
    assert tuples(found.positive_anchor, found.positive) == positive
    assert tuples(found.negative_anchor, found.negative) == negative


@both
@seeds
@any_tiles
def test_pair_margin(setting, seed):
    z, labels, candidates = setting(seed)
    naive = Naive(z, labels, **candidates)
    found = mine_pair_margin(z, labels, positive_margin=1.2, negative_margin=1.3, **candidates)
    assert tuples(*found[:2]) == {
        (a, p) for a in naive.rows for p in naive.positives[a] if naive.distance[a, p] > 1.2
    }
    assert tuples(*found[2:]) == {
        (a, n) for a in naive.rows for n in naive.negatives[a] if naive.distance[a, n] < 1.3
    }


@both
@seeds
@any_tiles
def test_nearest_negatives(setting, seed):
    z, labels, candidates = setting(seed)
    naive = Naive(z, labels, **candidates)
    for k in (1, 4, 30):
        expected = [
            sorted(naive.all_negatives[a], key=lambda j: naive.distance[a, j])[:k] for a in naive.rows
        ]
        expected = [row + [-1] * (k - len(row)) for row in expected]
        assert mine_nearest_negatives(z, labels, k=k, **candidates).tolist() == expected


@any_tiles
def test_a_copy_in_the_queue_is_no_negative_even_without_labels():
    z, _, candidates = queued(0)
    candidates["ref_labels"] = 100 + torch.arange(len(candidates["ref"]))
    nearest = mine_nearest_negatives(z, torch.arange(14), k=1, **candidates)
    assert (nearest[:3, 0] != torch.arange(3)).all()
    del candidates["ids"], candidates["ref_ids"]
    nearest = mine_nearest_negatives(z, torch.arange(14), k=1, **candidates)
    assert (nearest[:3, 0] == torch.arange(3)).all()


def test_nearest_negatives_build_hard_batches():
    z, _ = batch(0, rows=60)
    neighbours = mine_nearest_negatives(z, torch.arange(60), k=3)
    assert sorted(chain(*HardNegativeBatchSampler(neighbours, 12))) == list(range(60))


@both
@any_tiles
def test_distance_weighted_draws_as_its_density_says(setting):
    z, labels, candidates = setting(3)
    naive = Naive(z, labels, **candidates)
    width, nearest, farthest = z.shape[1], 0.6, 1.5
    drawn: Counter[tuple[int, int, int]] = Counter()
    unlike = 0  # anchors whose positives drew different negatives
    draws = 400
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        found = mine_distance_weighted(
            z, labels, nearest=nearest, farthest=farthest, generator=generator, **candidates
        )
        listed = tuples(*found)
        drawn.update(listed)
        unlike += len({(a, n) for a, _, n in listed}) - len({a for a, _, _ in listed})
    assert unlike > draws
    pairs = {(a, p) for a, p, _ in listed}
    weights = {}
    for a in naive.rows:
        eligible = [n for n in naive.negatives[a] if naive.distance[a, n] < farthest]
        d = naive.distance[a, eligible].clamp_min(nearest)
        density = d ** (width - 2) * (1 - d**2 / 4) ** ((width - 3) / 2)
        weights[a] = dict(zip(eligible, (1 / density / (1 / density).sum()).tolist(), strict=True))
    assert pairs == {(a, p) for a in naive.rows for p in naive.positives[a] if weights[a]}
    assert {n for _, _, n in drawn} <= {n for of_anchor in weights.values() for n in of_anchor}
    for a, p in pairs:
        for n, share in weights[a].items():
            expected = draws * share
            assert abs(drawn[a, p, n] - expected) < 5 * math.sqrt(expected) + 1


MINERS = {
    "triplets": lambda z, labels, **k: mine_triplets(z, labels, margin=math.inf, **k),
    "drawn triplets": lambda z, labels, **k: mine_triplets(
        z, labels, max_per_anchor=2, generator=torch.Generator().manual_seed(0), **k
    ),
    "batch hard": mine_batch_hard,
    "distance weighted": lambda z, labels, **k: mine_distance_weighted(
        z, labels, generator=torch.Generator().manual_seed(0), **k
    ),
    "multi-similarity": mine_multi_similarity,
    "pair margin": lambda z, labels, **k: mine_pair_margin(
        z, labels, positive_margin=-1, negative_margin=math.inf, **k
    ),
}
all_miners = pytest.mark.parametrize("mine", MINERS.values(), ids=MINERS.keys())


@all_miners
def test_nothing_to_mine(mine):
    z, _ = batch(0)
    for labels in (torch.arange(14), torch.zeros(14, dtype=torch.long)):
        found = mine(z, labels)
        negatives = found[-1]
        assert negatives.shape == (0,)
        assert negatives.dtype == torch.int64
    one = mine(z[:1], torch.zeros(1, dtype=torch.long))
    assert all(vector.shape == (0,) for vector in one)
    nobody = mine(z, torch.arange(14), ref=z, ref_labels=torch.arange(14) + 50)
    assert all(vector.shape == (0,) for vector in nobody)


@all_miners
def test_anchors_without_a_positive_never_count(mine):
    z, labels = batch(2)
    labels[5] = 77
    found = mine(z, labels)
    assert 5 not in found[0]
    assert 5 not in (found[2] if isinstance(found, miners.Pairs) else found[0])


def test_a_row_without_a_positive_still_is_a_negative():
    z, labels = batch(2)
    labels[5] = 77
    assert 5 in mine_triplets(z, labels, margin=math.inf).negative
    assert 5 in mine_pair_margin(z, labels, negative_margin=2.1).negative
    assert (mine_nearest_negatives(z, labels, k=1) == 5).any()


@all_miners
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_float_type_inside_autocast_and_no_graph(mine, dtype):
    z, labels = batch(0, dtype=dtype)
    kept = z.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mine(z.requires_grad_(), labels)
    exact = mine(z.detach().double(), labels)
    assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))
    assert torch.equal(z, kept)


def test_rows_need_not_be_normalised():
    z, labels = batch(0)
    plain = mine_pair_margin(z, labels, positive_margin=2.5, negative_margin=0, normalize=False)
    distance = torch.cdist(z, z)
    expected = (distance > 2.5) & (labels[:, None] == labels)
    assert tuples(*plain[:2]) == set(map(tuple, expected.nonzero().tolist()))


@pytest.mark.parametrize(
    ("miner", "function"),
    [
        (TripletMarginMiner(margin=0.3, kind="hard"), mine_triplets),
        (BatchHardMiner(positive="easy", negative="semi-hard"), mine_batch_hard),
        (DistanceWeightedMiner(farthest=1.2, generator=torch.Generator()), mine_distance_weighted),
        (MultiSimilarityMiner(epsilon=0.3), mine_multi_similarity),
        (PairMarginMiner(positive_margin=0.5, normalize=False), mine_pair_margin),
    ],
)
def test_class_forms(miner, function):
    z, labels, candidates = queued(0)
    arguments = {field.name: getattr(miner, field.name) for field in dataclasses.fields(miner)}
    if "generator" in arguments and arguments["generator"] is not None:
        arguments["generator"] = torch.Generator()
    for given in ({}, candidates):
        found, expected = miner(z, labels, **given), function(z, labels, **arguments, **given)
        assert type(found) is type(expected)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert isinstance(miner, miners.TripletMiner | miners.PairMiner)
    assert type(miner).__name__ in repr(miner)


Z, Y = batch(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mine_triplets(Z, Y[1:]), r"labels must have shape \(14,\)"),
        (lambda: mine_triplets(Z, Y.double()), "labels must hold integers"),
        (lambda: mine_triplets(Z[0], Y), r"z must have shape \(N, D\)"),
        (lambda: mine_triplets(Z * math.nan, Y), "z must be finite"),
        (lambda: mine_triplets(Z, Y, kind="semihard"), "kind must be one of 'all', 'hard', 'semi-hard', 'easy'"),
        (lambda: mine_triplets(Z, Y, margin=-0.1), "margin must be at least 0, got -0.1"),
        (lambda: mine_triplets(Z, Y, margin="big"), "margin must be a number, got str"),
        (lambda: mine_triplets(Z, Y, max_per_anchor=0), "max_per_anchor must be at least 1, got 0"),
        (lambda: mine_triplets(Z, Y, ref=Z), "ref and ref_labels must be given together"),
        (lambda: mine_triplets(Z, Y, ref=Z[:, 1:], ref_labels=Y), "must have the same number of columns, got 5 and 4"),
        (lambda: mine_triplets(Z, Y, ids=Y), "ids and ref_ids must be given together"),
        (lambda: mine_triplets(Z, Y, ids=Y, ref_ids=Y), "ids must come with ref"),
        (lambda: mine_triplets(Z, Y, ref=Z, ref_labels=Y, ids=Y[1:], ref_ids=Y), r"ids must have shape \(14,\)"),
        (lambda: mine_batch_hard(Z.tolist(), Y), "z must be a tensor of shape"),
        (lambda: mine_batch_hard(Z, Y, positive="soft"), "positive must be one of"),
        (lambda: mine_batch_hard(Z, Y, positive="semi-hard", negative="semi-hard"), "must not both be 'semi-hard'"),
        (lambda: mine_distance_weighted(Z, Y, nearest=0.0), "nearest must be finite and > 0, got 0.0"),
        (lambda: mine_distance_weighted(Z, Y, farthest=2.1), "nearest < farthest <= 2 must hold, got 0.5 and 2.1"),
        (lambda: mine_multi_similarity(Z, Y, epsilon=-1), "epsilon must be at least 0"),
        (lambda: mine_pair_margin(Z, Y, positive_margin=math.nan), "positive_margin must be a number, got nan"),
        (lambda: mine_nearest_negatives(Z, Y, k=0), "k must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
