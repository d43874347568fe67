import pytest
import torch

from cl_core.evaluation import linear_probe
from cl_graph.scores import cluster_scores, probe_scores


def rows(per_class, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    return 4 * torch.eye(len(per_class))[labels] + spread * torch.randn(
        len(labels), len(per_class), generator=generator
    ), labels


def probe_on(train):
    return linear_probe(*train, *train, regularizations=(0.1,))


def test_separate_classes_score_one():
    z, labels = rows([20, 20, 20], 0.1)
    assert probe_scores(probe_on((z, labels)), z, labels) == {"macro_f1": 1, "auc": 1}
    assert cluster_scores(z, labels) == pytest.approx({"nmi": 1, "ari": 1})


def test_noise_scores_nothing():
    z, labels = rows([200, 200], 1000.0)
    probe = probe_on(rows([20, 20], 1000.0, seed=1))
    found = probe_scores(probe, z, labels) | cluster_scores(z, labels)
    assert found["macro_f1"] == pytest.approx(0.5, abs=0.1) and found["auc"] == pytest.approx(0.5, abs=0.1)
    assert abs(found["ari"]) < 0.05 and found["nmi"] < 0.05


def test_macro_f1_counts_classes_alike():
    """Of 90 and 10 rows, all called the larger class: F1 of 0.947 and 0."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.zeros(100, 2), (torch.arange(100) >= 90).long()
    few = torch.randn(10, 2, generator=generator)
    probe = probe_on((few, (torch.arange(10) >= 9).long()))
    assert (probe.predict(z) == 0).all()
    assert probe_scores(probe, z, labels)["macro_f1"] == pytest.approx((2 * 90 / 190) / 2)


def test_a_split_of_one_class_has_no_auc():
    z, labels = rows([20, 20], 0.1)
    probe = probe_on((z, labels))
    assert "auc" not in probe_scores(probe, z[:20], labels[:20])


def test_scores_of_a_run(make_data):
    from cl_core.losses import NTXentLoss
    from cl_core.training.evaluating import evaluate, evaluate_raw
    from cl_graph.encoders import GCN
    from cl_graph.methods import GRACE

    data, method = make_data(), GRACE(GCN(12, dim=8), NTXentLoss())
    for found in (evaluate(method, data), evaluate_raw(data)):
        assert {"macro_f1", "auc", "nmi", "ari"} <= found.keys()
