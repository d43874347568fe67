"""Measurements of a representation against naive loops, closed forms and stored arrays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cl_core.diagnostics import (
    alignment,
    collapse_warning,
    effective_rank,
    npc_factor,
    score_statistics,
    uniformity,
)
from cl_core.functional import info_nce_loss

STORED = sorted((Path(__file__).parent / "parity" / "dcl").glob("infonce_*.npz"))


def views(seed, rows=24, width=6, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return z1, z1 + noise * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("seed", range(3))
def test_alignment_and_uniformity_equal_plain_loops(seed):
    z1, z2 = views(seed)
    alpha, t = [(2.0, 2.0), (1.0, 0.5), (3.0, 8.0)][seed]
    distances = [math.dist(a, b) for a, b in zip(unit(z1).tolist(), unit(z2).tolist(), strict=True)]
    expected = sum(d**alpha for d in distances) / len(distances)
    assert alignment(5 * z1, z2, alpha=alpha).item() == pytest.approx(expected, rel=1e-12)
    points = unit(z1).tolist()
    kernel = [math.exp(-t * math.dist(a, b) ** 2) for a in points for b in points if a is not b]
    expected = math.log(sum(kernel) / len(kernel))
    assert uniformity(3 * z1, t=t).item() == pytest.approx(expected, rel=1e-12)


def test_alignment_and_uniformity_at_their_ends():
    z1, _ = views(0)
    assert alignment(z1, 2 * z1).item() == pytest.approx(0, abs=1e-15)
    assert alignment(z1, -z1).item() == pytest.approx(4)
    assert uniformity(torch.ones(7, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-8)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), t=500.0).item() == pytest.approx(-2000)


def test_measurements_ignore_gradients_and_autocast():
    z1, z2 = (z.float().requires_grad_() for z in views(1))
    outside = (alignment(z1, z2), uniformity(z1), npc_factor(z1, z2), effective_rank(z1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (alignment(z1, z2), uniformity(z1), npc_factor(z1, z2), effective_rank(z1))
        statistics = score_statistics(z1, z2)
    assert not any(value.requires_grad for value in outside)
    assert all(a.equal(b) for a, b in zip(outside, inside, strict=True))
    assert statistics.positive.mean.equal(score_statistics(z1, z2).positive.mean)
    assert alignment(z1.detach().half(), z2.detach().half()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (9, 9)])
@pytest.mark.parametrize("center", [False, True])
def test_effective_rank_equals_the_singular_values(shape, center):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    shifted = z - z.mean(0) if center else z
    share = torch.linalg.svdvals(shifted)
    share = share / share.sum()
    expected = torch.exp(-(share * share.clamp_min(1e-300).log()).sum())
    torch.testing.assert_close(effective_rank(z, center=center, tile=7), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_effective_rank_at_its_ends(scale):
    assert effective_rank(scale * torch.eye(6)).item() == pytest.approx(6)
    line = torch.outer(torch.arange(1.0, 50.0), torch.randn(16, generator=torch.Generator().manual_seed(0)))
    assert effective_rank(scale * line.double()).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.full((5, 3), scale), center=True).item() == 0
    assert effective_rank(torch.zeros(5, 3)).item() == 0
    for rows in (3, 7, 1000):  # whose mean rounding would not give back exactly
        equal = scale * torch.tensor([3.3, 0.1, 0.7, 1.7, 2.9]).expand(rows, 5)
        assert effective_rank(equal, center=True).item() == 0
        assert effective_rank(equal.double(), center=True).item() == 0


@pytest.mark.parametrize("kind", ["views", "labels", "both"])
@pytest.mark.parametrize("tile", [7, 1024])
def test_score_statistics_equal_all_pairs(kind, tile):
    z1, z2 = views(2, rows=40)
    labels = torch.arange(40) % 3 if kind != "views" else None
    rows = unit(z1 if kind == "labels" else torch.cat([z1, z2]))
    keys = torch.arange(40) if labels is None else labels
    keys = keys if kind == "labels" else keys.repeat(2)
    above = torch.ones(len(rows), len(rows)).triu(1).bool()
    same = keys[:, None] == keys
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    statistics = score_statistics(
        z1, None if kind == "labels" else z2, labels=labels, quantiles=levels, tile=tile
    )
    for summary, mask in ((statistics.positive, above & same), (statistics.negative, above & ~same)):
        scores = (rows @ rows.T)[mask]
        assert summary.count.item() == len(scores) == summary.histogram.sum().item()
        torch.testing.assert_close(summary.mean, scores.mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(summary.variance, scores.var(correction=0), rtol=1e-10, atol=1e-12)
        histogram = torch.histc(scores, bins=64, min=-1, max=1).long()
        assert torch.equal(summary.histogram, histogram)
        # The empirical quantile lies between the order statistics around it.
        ordered = scores.sort().values
        for level, value in zip(levels, summary.quantiles.tolist(), strict=True):
            place = level * len(scores)
            low = ordered[max(0, math.ceil(place) - 1)].item()
            assert low - 1 / 2048 <= value <= low + 1 / 2048


def test_overlap_is_what_the_two_distributions_share():
    z1, z2 = views(2, rows=40)
    statistics = score_statistics(z1, z2)
    rows = unit(torch.cat([z1, z2]))
    scores = (rows @ rows.T)[torch.ones(80, 80).triu(1).bool()]
    positive = (unit(z1) * unit(z2)).sum(1)
    everything = torch.histc(scores, bins=64, min=-1, max=1)
    of_positive = torch.histc(positive, bins=64, min=-1, max=1)
    expected = torch.minimum(of_positive / 40, (everything - of_positive) / (len(scores) - 40)).sum()
    torch.testing.assert_close(statistics.overlap.double(), expected)
    assert 0 < expected < 1
    apart = torch.cat([torch.eye(3), torch.eye(3)])
    assert score_statistics(apart, labels=torch.arange(6) % 3).overlap.item() == 0
    assert score_statistics(torch.ones(4, 2), labels=torch.arange(4) % 2).overlap.item() == 1
    assert score_statistics(torch.eye(3), labels=torch.arange(3)).overlap.isnan()


def test_score_statistics_without_a_positive_pair():
    statistics = score_statistics(torch.eye(3), labels=torch.arange(3))
    assert statistics.positive.count.item() == 0
    assert statistics.positive.mean.isnan()
    assert statistics.positive.quantiles.isnan().all()
    assert statistics.negative.mean.item() == 0
    alone = score_statistics(torch.ones(1, 2), torch.ones(1, 2))
    assert alone.positive.histogram[-1] == 1
    assert alone.negative.count.item() == 0


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_npc_factor_equals_the_stored_arrays(path):
    numpy = pytest.importorskip("numpy")
    with numpy.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name].copy()) for name in stored.files}
    expected = torch.cat([arrays["npc_q_view1"], arrays["npc_q_view2"]])
    temperature = arrays["temperature"].item()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        z1, z2 = arrays["z1"].to(dtype), arrays["z2"].to(dtype)
        factors = npc_factor(z1, z2, temperature=temperature, reduction="none")
        torch.testing.assert_close(factors, expected.to(dtype), rtol=tolerance, atol=tolerance)
        mean = npc_factor(z1, z2, temperature=temperature)
        torch.testing.assert_close(mean, expected.mean().to(dtype), rtol=tolerance, atol=0)


def test_stored_arrays_are_there():
    assert len(STORED) >= 2


def test_npc_factor_between_nothing_and_everything():
    z1, z2 = views(0)
    assert npc_factor(z1[:1], z2[:1]).item() == 0
    assert npc_factor(torch.eye(8), torch.eye(8), temperature=0.01).item() == pytest.approx(0, abs=1e-30)
    assert npc_factor(z1, -z1, temperature=0.01).item() == pytest.approx(1, abs=1e-9)
    equal = npc_factor(torch.ones(5, 3), torch.ones(5, 3))
    assert equal.item() == pytest.approx(8 / 9)


@pytest.mark.parametrize("seed", range(3))
def test_collapse_warning_speaks_only_when_there_is_reason(seed):
    generator = torch.Generator().manual_seed(seed)
    healthy = torch.randn(200, 32, generator=generator)
    assert collapse_warning(healthy) is None
    assert collapse_warning(healthy.relu() + 0.1) is None
    assert collapse_warning(torch.randn(200, 2, generator=generator)) is None
    few = torch.randn(10, 32, generator=generator)[torch.randint(10, (200,), generator=generator)]
    assert collapse_warning(few) is None
    assert "equal" in collapse_warning(torch.ones(9, 4))
    assert "equal" in collapse_warning(torch.zeros(9, 4))
    assert "almost the same way" in collapse_warning(torch.ones(200, 32) + 0.02 * healthy)
    assert "almost the same way" in collapse_warning(
        torch.rand(50, 1, generator=generator) + torch.zeros(50, 4)
    )
    line = torch.randn(200, 1, generator=generator) * torch.randn(1, 32, generator=generator)
    message = collapse_warning(line + 1e-3 * healthy)
    assert message.startswith("dimensional collapse: 200 embeddings of width 32 have effective rank 1.")
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: alignment(z, z[:2]), r"z1 and z2 must have the same shape, got \(4, 3\) and \(2, 3\)\."),
        (lambda z: alignment(z, z, alpha=0), r"alpha must be finite and > 0, got 0\."),
        (lambda z: uniformity(z[:1]), r"z must have at least 2 rows, got 1\."),
        (lambda z: uniformity(z * float("inf")), r"z must be finite"),
        (lambda z: effective_rank(z[0]), r"z must have shape \(N, D\)"),
        (lambda z: score_statistics(z), r"needs z2 or labels"),
        (
            lambda z: score_statistics(z, z, quantiles=[1.5]),
            r"quantiles must lie in \[0, 1\], got \(1\.5,\)\.",
        ),
        (lambda z: score_statistics(z, labels=torch.arange(3)), r"labels must have shape \(4,\)"),
        (lambda z: npc_factor(z, z, temperature=-1.0), r"temperature must be finite and > 0"),
        (
            lambda z: npc_factor(z, z, reduction="sum"),
            r"reduction must be one of 'mean', 'none', got 'sum'\.",
        ),
        (lambda z: collapse_warning(z[:1]), r"z must have at least 2 rows, got 1\."),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 3))


@pytest.mark.parametrize("symmetric", [False, True])
def test_npc_factor_over_keys_is_that_of_infonce(symmetric):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    options = {"temperature": 0.3, "reduction": "none"}
    each = info_nce_loss(query, key, symmetric=symmetric, **options)
    factors = npc_factor(query, key, negatives="cross" if symmetric else "keys", **options)
    torch.testing.assert_close(factors, -torch.expm1(-each))


@pytest.mark.parametrize("rows", [1, 6])
def test_npc_factor_over_a_queue_is_that_of_infonce(rows):
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, rows, 9))
    each = info_nce_loss(query, key, queue, temperature=0.3, reduction="none")
    factors = npc_factor(query, key, negatives=queue, temperature=0.3, reduction="none")
    torch.testing.assert_close(factors, -torch.expm1(-each))
    torch.testing.assert_close(
        npc_factor(query, key, negatives=queue.float(), temperature=0.3), factors.mean(), atol=1e-6, rtol=0
    )
