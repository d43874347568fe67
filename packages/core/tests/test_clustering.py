"""k-means against its own definition, scikit-learn, and itself on several ranks."""

from __future__ import annotations

import math

import pytest
import torch

from cl_core import clustering
from cl_core.clustering import kmeans, nearest_centroid
from cl_core.memory import FeatureQueue, InstanceBank, PrototypeBank


def blobs(seed, rows=300, width=4, clusters=6, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(clusters, width, generator=generator)
    index = torch.randint(clusters, (rows,), generator=generator)
    return centres[index] + spread * torch.randn(rows, width, generator=generator)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def entered(z, metric):
    return z / z.norm(dim=1, keepdim=True) if metric == "cosine" else z


def check_definition(z, result, metric):
    """Nearest assignments, their inertia, and centroids that are the means of their rows."""
    x = entered(z, metric).double()
    centroids = result.centroids.double()
    squared = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    nearest = squared.amin(dim=1)
    torch.testing.assert_close(
        squared.gather(1, result.assignments[:, None])[:, 0], nearest, rtol=1e-4, atol=1e-5
    )
    assert result.inertia == pytest.approx(nearest.sum().item(), rel=1e-4, abs=1e-5)
    for cluster in result.assignments.unique():
        mean = x[result.assignments == cluster].mean(0)
        mean = mean / mean.norm() if metric == "cosine" else mean
        torch.testing.assert_close(centroids[cluster], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", range(3))
def test_result_is_a_fixed_point_of_the_definition(metric, seed, monkeypatch):
    monkeypatch.setattr(clustering, "_CENTROID_TILE", 4)
    z = blobs(seed) + 1
    result = kmeans(z, 9, metric=metric, tolerance=0, generator=seeded(seed), tile=37)
    assert result.converged
    assert result.assignments.unique().numel() == 9
    check_definition(z, result, metric)
    if metric == "cosine":
        torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(9))
    whole = kmeans(z, 9, metric=metric, tolerance=0, generator=seeded(seed))
    torch.testing.assert_close(whole.centroids, result.centroids, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "blobs", "noise"])
def test_inertia_is_as_low_as_scikit_learns(name):
    from sklearn import datasets
    from sklearn.cluster import KMeans

    if name == "blobs":
        x, clusters = blobs(0, rows=1500, width=8, clusters=25), 25
    elif name == "noise":
        x, clusters = torch.randn(800, 8, generator=seeded(0)), 20
    else:
        x = torch.tensor(getattr(datasets, f"load_{name}")().data)
        clusters = {"digits": 10, "iris": 5, "wine": 6}[name]
    for seed in range(3):
        reference = KMeans(clusters, n_init=10, random_state=seed).fit(x.numpy())
        ours = kmeans(x, clusters, restarts=10, generator=seeded(seed))
        assert ours.converged
        assert ours.inertia <= 1.02 * reference.inertia_


def test_lloyd_from_the_same_start_equals_scikit_learn():
    from sklearn.cluster import KMeans

    for seed in range(3):
        z = blobs(seed, spread=2.0).double() + 100
        initial = z[:7]
        reference = KMeans(7, init=initial.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(z.numpy())
        ours = kmeans(z, 7, initial=initial, tolerance=0)
        torch.testing.assert_close(ours.centroids, torch.tensor(reference.cluster_centers_))
        assert torch.equal(ours.assignments, torch.tensor(reference.labels_).long())
        assert ours.inertia == pytest.approx(reference.inertia_)


def test_seeding_beats_random_starts():
    z = blobs(3, rows=400, clusters=20)
    ours = [kmeans(z, 20, max_iterations=1, generator=seeded(s)).inertia for s in range(10)]
    random = [
        kmeans(z, 20, max_iterations=1, initial=z[torch.randperm(400, generator=seeded(s))[:20]]).inertia
        for s in range(10)
    ]
    assert max(ours) < min(random)


def test_warm_start_stays_and_restarts_only_improve():
    z = blobs(4, spread=1.5)
    settled = kmeans(z, 8, tolerance=0, generator=seeded(0))
    again = kmeans(z, 8, initial=settled.centroids, tolerance=0)
    assert again.iterations == 1
    assert torch.equal(again.assignments, settled.assignments)
    more = kmeans(z, 8, initial=settled.centroids, restarts=8, generator=seeded(1))
    assert more.inertia <= settled.inertia * (1 + 1e-6)
    single = [kmeans(z, 8, generator=seeded(s)).inertia for s in range(5)]
    assert max(single) > 1.001 * min(single)  # starts do differ here
    assert kmeans(z, 8, restarts=20, generator=seeded(0)).inertia <= min(single) * 1.001


def test_same_seed_same_result():
    z = blobs(5)
    first, second = (kmeans(z, 7, restarts=2, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    state = torch.get_rng_state()
    kmeans(z, 7, generator=seeded(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_empty_clusters_are_filled(metric):
    z = blobs(6, rows=200)
    initial = torch.cat([z[:2], z[0].expand(6, -1), 50 * z[1].expand(2, -1)])
    result = kmeans(z, 10, metric=metric, initial=initial, tolerance=0)
    assert result.assignments.unique().numel() == 10
    check_definition(z, result, metric)
    repeated = kmeans(z, 10, metric=metric, initial=initial, tolerance=0)
    assert torch.equal(result.centroids, repeated.centroids)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_empty_clusters_may_keep_their_centroid(metric):
    z = blobs(6, rows=200)
    z[:, 0] = z[:, 0].abs() + 10
    initial = torch.cat([z[:3], torch.zeros_like(z[:1])])
    initial[3, 0] = -50 if metric == "euclidean" else -1  # behind all others
    result = kmeans(z, 4, metric=metric, initial=initial, tolerance=0, empty="keep")
    assert 3 not in result.assignments
    torch.testing.assert_close(result.centroids[3], initial[3])
    moved = kmeans(z, 4, metric=metric, initial=initial, tolerance=0)
    assert moved.assignments.unique().numel() == 4
    with pytest.raises(ValueError, match="empty must be one of"):
        kmeans(z, 4, empty="drop")


def test_an_empty_cluster_takes_the_farthest_row_out_of_its_cluster():
    z = torch.tensor([[0.0], [1.0], [10.0], [-4.0], [-5.0]])
    result = kmeans(z, 3, initial=torch.tensor([[0.5], [-4.5], [100.0]]), max_iterations=1, tolerance=0)
    # Row 10 was with 0 and 1, whose mean is then of the two that are left.
    torch.testing.assert_close(result.centroids, torch.tensor([[0.5], [-4.5], [10.0]]))
    assert result.assignments.tolist() == [0, 0, 2, 1, 1]


def test_fewer_distinct_rows_than_clusters():
    z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0]]).repeat(5, 1)
    for metric in ("euclidean", "cosine"):
        result = kmeans(z, 6, metric=metric, generator=seeded(0))
        assert result.converged
        assert result.centroids.isfinite().all()
        assert result.inertia == pytest.approx(0, abs=1e-5)
    every = kmeans(blobs(0, rows=9), 9, generator=seeded(0))
    assert every.inertia == pytest.approx(0, abs=1e-5)
    one = kmeans(blobs(0, rows=9), 1)
    torch.testing.assert_close(one.centroids[0], blobs(0, rows=9).mean(0))
    assert kmeans(torch.zeros(4, 2), 2, metric="cosine").centroids.isfinite().all()


def test_far_from_the_origin_and_in_half_precision():
    z = blobs(7)
    near = kmeans(z, 6, restarts=3, generator=seeded(0))
    far = kmeans(z + 1000, 6, restarts=3, generator=seeded(0))
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)
    half = kmeans(z.bfloat16(), 6, restarts=3, generator=seeded(0))
    assert half.centroids.dtype == torch.float32
    assert half.inertia == pytest.approx(near.inertia, rel=0.05)
    huge = kmeans(z * 1e19, 6, metric="cosine", generator=seeded(0))
    assert torch.equal(huge.assignments, kmeans(z, 6, metric="cosine", generator=seeded(0)).assignments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kmeans(z, 6, restarts=3, generator=seeded(0))
    assert inside.inertia == near.inertia


@pytest.mark.parametrize("exponent", [-120, -80, 50, 83, 124])
def test_rows_of_any_size(exponent):
    unit = 2.0**exponent  # rounds nothing
    z, start = blobs(7), blobs(7)[:6]
    for initial in (None, start):
        scaled = None if initial is None else initial * unit
        result = kmeans(z * unit, 6, initial=scaled, generator=seeded(0))
        expected = kmeans(z, 6, initial=initial, generator=seeded(0))
        assert torch.equal(result.assignments, expected.assignments)
        torch.testing.assert_close(result.centroids / unit, expected.centroids, rtol=1e-6, atol=0)
        assert result.inertia == pytest.approx(expected.inertia * unit * unit, rel=1e-6)
    if exponent > -80:
        index, squared = nearest_centroid(z * unit, start * unit)
        expected_index, expected_squared = nearest_centroid(z, start)
        assert torch.equal(index, expected_index)
        assert torch.equal(squared, expected_squared * unit * unit)
    beyond = nearest_centroid(
        z, torch.stack([z[0] * 2.0**100, z[0]])
    )  # far away, and its square not a number
    assert beyond[0].eq(1).all()


def test_seeding_from_a_part_of_many_rows(monkeypatch):
    monkeypatch.setattr(clustering, "_SEEDING_ROWS", 100)
    z = blobs(8, rows=2000)
    ours = kmeans(z, 6, restarts=3, generator=seeded(0))
    monkeypatch.undo()
    assert ours.inertia == pytest.approx(kmeans(z, 6, restarts=3, generator=seeded(0)).inertia, rel=1e-3)


def test_nearest_centroid():
    z, centroids = blobs(0), blobs(1, rows=11)
    for metric in ("euclidean", "cosine"):
        index, squared = nearest_centroid(z, centroids, metric=metric, tile=7)
        distances = torch.cdist(entered(z, metric).double(), entered(centroids, metric).double())
        assert torch.equal(index, distances.argmin(1))
        torch.testing.assert_close(squared.double(), distances.min(1).values ** 2, rtol=1e-4, atol=1e-4)
    index, squared = nearest_centroid(z[:0], centroids)
    assert index.shape == squared.shape == (0,)


def cluster_shard(group, parts, initial, metric):
    result = kmeans(
        parts[group.rank()], 8, metric=metric, initial=initial, restarts=2, tolerance=0, generator=seeded(group.rank()),
        group=group,
    )  # fmt: skip
    return [result.centroids, result.assignments, result.inertia, result.iterations, result.converged]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_and_equal_one_process(world_size, metric, ranks):
    z = blobs(9, spread=1.0).double()
    parts = list(z.split([200, 100] if world_size == 2 else [170, 0, 130]))
    for initial in (None, z[0].expand(8, -1)):  # the second starts with seven empty clusters
        results = ranks.run(cluster_shard, parts, initial, metric, world_size=world_size)
        one = kmeans(z, 8, metric=metric, initial=initial, restarts=2, tolerance=0, generator=seeded(0))
        for centroids, _, inertia, iterations, converged in results:
            assert torch.equal(centroids, results[0][0])
            torch.testing.assert_close(centroids, one.centroids)
            assert inertia == pytest.approx(one.inertia)
            assert (iterations, converged) == (one.iterations, one.converged)
        assert torch.equal(torch.cat([assignments for _, assignments, *_ in results]), one.assignments)


def cluster_from_own_rows(group):
    z = blobs(group.rank()) + group.rank()
    return kmeans(z, 8, initial=z[:8], max_iterations=1, group=group).centroids


def test_ranks_start_from_the_first_ranks_centroids(ranks):
    one, other = ranks.run(cluster_from_own_rows)
    z = torch.cat([blobs(0), blobs(1) + 1])
    torch.testing.assert_close(one, kmeans(z, 8, initial=z[:8], max_iterations=1).centroids)
    assert torch.equal(one, other)


USES = {
    "kmeans": lambda z, index, group: kmeans(z, 2, initial=z[:2], group=group),
    "queue": lambda z, index, group: FeatureQueue(9, 3).enqueue(z, ids=index, group=group),
    "instances": lambda z, index, group: InstanceBank(9, 3).update(index, z, group=group),
    "prototypes": lambda z, index, group: PrototypeBank(9, [2], 3).refresh(z, index=index, group=group),
}
UNFIT = {
    "a value": torch.full((4, 3), math.nan),
    "a kind": [1.0],
    "a dtype": torch.ones(4, 3, dtype=torch.float64),
    "a number of rows": torch.ones(1, 3),
}


def refusal(group, use, unfit):
    z = UNFIT[unfit] if group.rank() == 1 else torch.eye(4, 3)
    try:
        USES[use](z, torch.arange(4), group)
    except (ValueError, TypeError) as error:
        return str(error)


@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("use", USES)
def test_all_ranks_refuse_what_one_refuses(use, unfit, ranks):
    found = ranks.run(refusal, use, unfit, world_size=3)
    if unfit == "a dtype" and use == "queue":
        assert found == [None] * 3  # it stores all rows in its own
    elif unfit == "a dtype":
        assert all(text.startswith("rows must have one width and dtype on all ranks") for text in found)
    else:
        told = "all ranks must have valid arguments, got others on ranks [1]: see the errors there."
        assert found[::2] == [told, told]
        assert found[1] is not None
        assert found[1] != told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 5}, r"num_clusters must be at most the number of rows, 4, got 5\."),
        ({"num_clusters": 0}, r"num_clusters must be at least 1, got 0\."),
        ({"metric": "manhattan"}, r"metric must be one of 'cosine', 'euclidean', got 'manhattan'\."),
        (
            {"initial": torch.ones(2, 2)},
            r"initial must have shape \(2, 3\), \(num_clusters, D\), got \(2, 2\)\.",
        ),
        ({"z": torch.full((4, 3), math.nan)}, r"z must be finite"),
        ({"z": torch.ones(0, 3)}, r"z must have at least 1 row, got 0\."),
        ({"tolerance": -1.0}, r"tolerance must be finite and >= 0, got -1\.0\."),
        ({"restarts": 0}, r"restarts must be at least 1, got 0\."),
        ({"group": "world"}, r"needs torch.distributed to be initialised"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        kmeans(**({"z": torch.ones(4, 3), "num_clusters": 2} | change))
