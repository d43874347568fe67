"""Nearest neighbours and the linear probe against naive loops and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cl_core import evaluation
from cl_core.evaluation import knn_accuracy, knn_predict, knn_scores, linear_probe


def blobs(seed, rows=60, width=5, labels=(-3, 0, 7, 2**40), spread=0.7):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(labels)
    index = torch.randint(len(labels), (rows,), generator=generator)
    centres = torch.randn(len(labels), width, generator=generator)
    z = centres[index] + spread * torch.randn(rows, width, generator=generator)
    return z.double(), values[index]


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x)[order], torch.tensor(y)[order]


def naive_knn(train, labels, query, k, temperature):
    """Votes by plain loops: a dict label -> share for each query row."""
    votes = []
    for row in query.tolist():
        similarities = []
        for other, label in zip(train.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            similarities.append((dot / math.hypot(*row) / math.hypot(*other), label))
        nearest = sorted(similarities, reverse=True)[:k]
        total = sum(math.exp(s / temperature) for s, _ in nearest)
        share = dict.fromkeys(labels.tolist(), 0.0)
        for s, label in nearest:
            share[label] += math.exp(s / temperature) / total
        votes.append(share)
    return votes


@pytest.mark.parametrize("seed", range(4))
def test_knn_equals_plain_loops(seed, monkeypatch):
    monkeypatch.setattr(evaluation, "_TRAIN_TILE", 7)  # several merges
    train, labels = blobs(seed)
    query, _ = blobs(seed + 100, rows=11)
    k, temperature = [(1, 0.1), (5, 0.1), (20, 0.5), (1000, 0.05)][seed]
    scores, classes = knn_scores(train, labels, query, k=k, temperature=temperature, tile=4)
    assert classes.tolist() == sorted(set(labels.tolist()))
    for row, share in zip(scores, naive_knn(train, labels, query, k, temperature), strict=True):
        expected = torch.tensor([share[c] for c in classes.tolist()], dtype=torch.float64)
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12)
    predicted = knn_predict(train, labels, query, k=k, temperature=temperature, tile=4)
    assert torch.equal(predicted, classes[scores.argmax(1)])


def test_knn_equals_scikit_learn_on_digits(digits):
    x, y = digits
    reference = KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        weights=lambda distance: torch.tensor((1 - distance) / 0.1).exp().numpy(),
    ).fit(x[:1200].numpy(), y[:1200].numpy())
    assert torch.equal(
        knn_predict(x[:1200], y[:1200], x[1200:], k=20), torch.tensor(reference.predict(x[1200:].numpy()))
    )
    accuracy = knn_accuracy(x[:1200].float(), y[:1200], x[1200:].float(), y[1200:], k=20)
    assert accuracy == pytest.approx(reference.score(x[1200:].numpy(), y[1200:].numpy()), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_knn_is_finite_at_extremes(dtype):
    train, labels = blobs(0)
    train = train.to(dtype)
    for temperature in (1e-4, 1e4):
        scores, _ = knn_scores(train, labels, -train, k=3, temperature=temperature)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.sum(1), torch.ones(len(train)))
    if dtype == torch.float32:
        expected = knn_predict(train, labels, train[:9], k=3)
        assert torch.equal(expected, knn_predict(train * 1e20, labels, train[:9] * 1e-20, k=3))
    for temperature in (1e-40, 1e-300):  # neither is a float32 number with all its digits
        hard, classes = knn_scores(train, labels, train[:9], temperature=temperature)
        torch.testing.assert_close(hard.sum(1), torch.ones(9))
        nearest = (hard > 0).nonzero()  # equally near ones share the vote
        assert (labels[nearest[:, 0]] == classes[nearest[:, 1]]).any()
        own = (labels[:9, None] == classes).long().argmax(1)
        assert (hard[torch.arange(9), own] > 0).all()
    zero = torch.zeros(1, train.shape[1], dtype=dtype)
    assert knn_scores(train, labels, zero)[0].isfinite().all()


def test_knn_classes_and_empty_queries():
    train, _ = blobs(0)
    labels = torch.zeros(len(train), dtype=torch.uint8)
    labels[0] = 2
    scores, classes = knn_scores(train, labels, train, num_classes=4)
    assert scores.shape == (60, 4)
    assert classes.tolist() == [0, 1, 2, 3]
    assert scores[:, [1, 3]].eq(0).all()
    assert knn_predict(train, labels, train[:0]).shape == (0,)
    one_neighbour = knn_predict(train, labels, train[:1] * 3, k=1)
    assert one_neighbour.tolist() == [2]
    assert one_neighbour.dtype == torch.int64


def test_a_tied_vote_goes_to_the_smallest_label():
    train = torch.eye(2)
    assert knn_predict(train, torch.tensor([9, 4]), torch.ones(1, 2), k=2).tolist() == [4]


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_probe_equals_scikit_learn(digits, standardize, strength):
    # Without the pixels that are almost never set: standardised, they would magnify any tolerance.
    features = digits[0][:600, digits[0].std(0) > 1] / 16
    x, y = features[:400], digits[1][:400]
    validation, validation_labels = features[400:], digits[1][400:600]
    probe = linear_probe(
        x,
        y,
        validation,
        validation_labels,
        regularizations=[strength],
        standardize=standardize,
        tolerance=1e-8,
        tile=97,
    )
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(x.numpy())
    reference = LogisticRegression(C=1 / (strength * len(x)), solver="newton-cholesky", tol=1e-10)
    reference.fit(scaler.transform(x.numpy()), y.numpy())
    logits = torch.tensor(reference.decision_function(scaler.transform(validation.numpy())))
    ours = probe.scores(validation, tile=50)
    # A constant added to all classes is no difference: only centred logits are determined.
    ours, logits = (t - t.mean(1, keepdim=True) for t in (ours, logits))
    # A gradient of 1e-8 leaves the weights uncertain by 1e-8 / strength.
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-7 / strength)
    if not standardize:
        torch.testing.assert_close(probe.weight, torch.tensor(reference.coef_), rtol=0, atol=1e-7 / strength)
    assert probe.converged
    assert torch.equal(
        probe.predict(validation), torch.tensor(reference.predict(scaler.transform(validation.numpy())))
    )


def test_probe_chooses_on_validation_and_breaks_ties_to_the_stronger():
    x, y = blobs(3, rows=120, spread=1.5)
    probe = linear_probe(x[:60], y[:60], x[60:], y[60:], regularizations=[1e-4, 10.0, 1e-1])
    assert [strength for strength, _ in probe.path] == [10.0, 1e-1, 1e-4]
    best = max(accuracy for _, accuracy in probe.path)
    assert probe.validation_accuracy == best == probe.accuracy(x[60:], y[60:])
    assert probe.regularization == max(strength for strength, accuracy in probe.path if accuracy == best)
    apart = torch.cat([torch.full((5, 1), -1.0), torch.full((5, 1), 1.0)])
    labels = torch.arange(10) // 5
    tied = linear_probe(apart, labels, apart, labels)
    assert tied.path[0][1] == tied.path[-1][1] == 1.0
    assert tied.regularization == 10.0


def test_warm_start_reaches_the_same_solution_as_a_cold_one():
    x, y = blobs(5, rows=100)
    validation = (x[:20], y[:20])
    warm = linear_probe(x, y, *validation, regularizations=[1.0, 1e-2, 1e-3], tolerance=1e-9)
    cold = linear_probe(x, y, *validation, regularizations=[warm.regularization], tolerance=1e-9)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-6)


def test_refit_uses_all_rows():
    x, y = blobs(6, rows=100)
    refitted = linear_probe(x[:60], y[:60], x[60:], y[60:], refit=True, tolerance=1e-9)
    together = linear_probe(x, y, x, y, regularizations=[refitted.regularization], tolerance=1e-9)
    torch.testing.assert_close(refitted.weight, together.weight, rtol=0, atol=1e-6)
    plain = linear_probe(x[:60], y[:60], x[60:], y[60:], tolerance=1e-9)
    assert refitted.validation_accuracy == plain.validation_accuracy
    assert (refitted.weight - plain.weight).abs().max() > 1e-3


def test_probe_survives_constant_shifted_and_half_features():
    x, y = blobs(7, rows=80, width=4)
    plain = linear_probe(x, y, x, y, regularizations=[1e-2], tolerance=1e-9)
    shifted = torch.cat([1e3 * x + 1e4, torch.full((80, 1), 0.3)], dim=1)
    other = linear_probe(shifted, y, shifted, y, regularizations=[1e-2], tolerance=1e-9)
    torch.testing.assert_close(plain.scores(x), other.scores(shifted), rtol=0, atol=1e-5)
    half = linear_probe(x.half(), y, x.half(), y, regularizations=[1e-2])
    torch.testing.assert_close(plain.scores(x), half.scores(x.half()), rtol=0, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_probe(x.float(), y, x.float(), y, regularizations=[1e-2], tolerance=1e-9)
    torch.testing.assert_close(plain.scores(x), inside.scores(x.float()), rtol=0, atol=1e-5)


def test_unknown_validation_labels_count_as_errors():
    x, y = blobs(8)
    strange = y.clone()
    strange[:30] = 12345
    known = linear_probe(x, y, x[30:], y[30:], regularizations=[1e-2])
    probe = linear_probe(x, y, x, strange, regularizations=[1e-2])
    assert probe.validation_accuracy == pytest.approx(known.validation_accuracy / 2)


def test_max_iterations_is_kept_and_reported():
    x, y = blobs(9)
    assert not linear_probe(x, y, x, y, max_iterations=2, regularizations=[1e-4]).converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must be at least 1, got 0\."),
        ({"k": 2.0}, r"k must be an integer, got float\."),
        ({"temperature": 0.0}, r"temperature must be finite and > 0, got 0\.0\."),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, r"train_labels must have shape \(4,\)"),
        ({"train_labels": torch.zeros(4)}, r"train_labels must hold integers"),
        (
            {"train_labels": torch.tensor([0, 1, 2, 3]), "num_classes": 3},
            r"0 \.\. 2 \(num_classes\), got 0 \.\. 3\.",
        ),
        ({"query": torch.ones(2, 5)}, r"same number of columns, got 3 and 5\."),
        ({"query": torch.full((2, 3), float("nan"))}, r"query must be finite"),
        ({"tile": 0}, r"tile must be at least 1"),
    ],
)
def test_knn_refuses(change, message):
    good = {
        "train": torch.ones(4, 3),
        "train_labels": torch.zeros(4, dtype=torch.int64),
        "query": torch.ones(2, 3),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        knn_predict(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularizations": []}, r"regularizations must hold at least one"),
        ({"regularizations": [0.0]}, r"regularizations must be finite and > 0, got 0\.0\."),
        (
            {"validation_labels": torch.zeros(3, dtype=torch.int64)},
            r"validation_labels must have shape \(4,\)",
        ),
        ({"validation": torch.ones(4, 2)}, r"same number of columns, got 3 and 2\."),
        ({"max_iterations": 0}, r"max_iterations must be at least 1"),
    ],
)
def test_probe_refuses(change, message):
    labels = torch.zeros(4, dtype=torch.int64)
    good = {"train": torch.ones(4, 3), "train_labels": labels, "validation": torch.ones(4, 3)}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_probe(**(good | {"validation_labels": labels} | change))
    probe = linear_probe(**good, validation_labels=labels)
    assert probe.accuracy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)) == 1.0  # a single class
    with pytest.raises(ValueError, match=r"z must have 3 columns as in the fit, got 2\."):
        probe.predict(torch.ones(4, 2))
