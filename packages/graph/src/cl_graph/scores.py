"""Scores of node embeddings beside accuracy: Macro-F1 and AUC of a probe, agreement of clusters with classes."""

from __future__ import annotations

import torch
from sklearn import metrics
from torch import Tensor

from cl_core import _checks
from cl_core.clustering import kmeans
from cl_core.evaluation import LinearProbe

_RUNS = 10


def probe_scores(probe: LinearProbe, z: Tensor, labels: Tensor) -> dict[str, float]:
    """Macro-F1 and area under the ROC curve of a probe; its accuracy is the Micro-F1.

    Args:
        probe: fitted on other rows.
        z: embeddings, shape (N, D).
        labels: class of each, shape (N,).

    Returns:
        ``macro_f1``, the mean over the classes that occur or are predicted; ``auc``, the mean over classes of one
        against the rest, by softmax, of those classes of the probe that some rows have and some have not; no ``auc``
        where there is none.
    """
    found = {"macro_f1": float(metrics.f1_score(labels, probe.predict(z), average="macro", zero_division=0))}
    shares = probe.scores(z).softmax(1)
    areas = [
        metrics.roc_auc_score(labels == label, shares[:, column])
        for column, label in enumerate(probe.classes.tolist())
        if 0 < int((labels == label).sum()) < len(labels)
    ]
    return found | ({"auc": float(sum(areas) / len(areas))} if areas else {})


def cluster_scores(z: Tensor, labels: Tensor, *, runs: int = _RUNS) -> dict[str, float]:
    """How well k-means with as many clusters as classes finds the classes: the mean over some runs.

    Args:
        z: embeddings, shape (N, D).
        labels: class of each, shape (N,).
        runs: seeds 0, 1, ... of k-means.

    Returns:
        ``nmi``, normalised by the arithmetic mean, and ``ari``.
    """
    _checks.embeddings("z", z)
    _checks.labels("labels", labels, rows=len(z), of="z", device=z.device)
    _checks.count("runs", runs)
    classes, found = len(labels.unique()), []
    for seed in range(runs):
        clusters = kmeans(z, classes, generator=torch.Generator().manual_seed(seed)).assignments
        found.append(
            (
                metrics.normalized_mutual_info_score(labels, clusters),
                metrics.adjusted_rand_score(labels, clusters),
            )
        )
    nmi, ari = (float(sum(each) / runs) for each in zip(*found, strict=True))
    return {"nmi": nmi, "ari": ari}
