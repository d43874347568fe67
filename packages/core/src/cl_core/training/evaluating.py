"""Embeddings of a data set, and what they are worth: neighbours and a linear probe, chosen on validation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_core import _checks
from cl_core.evaluation import knn_predict, linear_probe
from cl_core.method import Method
from cl_core.training.data import SPLITS, Data, Split

METRICS = ("knn", "linear", "knn_validation", "linear_validation")
"""Accuracies that :func:`accuracies` always gives."""
CLASSIFIER = ("classifier", "classifier_validation")
"""Accuracies of a method's own classifier, where it defines :meth:`~cl_core.method.Method.classify`."""
SCORES = ("macro_f1", "auc", "nmi", "ari")
"""What :meth:`Data.scores` may add, each 1 at best."""
SHOWN = {
    "knn": "kNN",
    "linear": "linear probe",
    "macro_f1": "Macro-F1",
    "auc": "AUC",
    "nmi": "NMI",
    "ari": "ARI",
    "classifier": "classifier",
}
"""What the accuracies on the judged split are called in tables, in their order; :func:`shown` knows those on few labels
too."""
FEW = "few_"
"""How the names of the accuracies on few labels begin; the share follows."""
Embedding = tuple[Tensor, Tensor]
"""Rows (N, D) and their labels (N,), on the CPU."""


@dataclass(frozen=True)
class Evaluation:
    """How embeddings are evaluated.

    Args:
        neighbours: numbers of neighbours to choose from on the validation split.
        temperature: of the votes of the neighbours.
        regularizations: strengths of the linear probe's penalty to choose from on the validation split.
        batch_size: inputs embedded at a time.
        baselines: also evaluate the untrained encoder and the raw inputs.
        few_labels: shares in (0, 1) of the training labels, such as 0.01, on which a linear probe is fitted too; the
            same rows each time, as many of every class and at least one.
    """

    neighbours: tuple[int, ...] = (1, 5, 20, 100)
    temperature: float = 0.1
    regularizations: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    batch_size: int = 512
    baselines: bool = True
    few_labels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.neighbours:
            raise ValueError("neighbours must hold at least one number, got none.")
        for k in self.neighbours:
            _checks.count("neighbours", k)
        _checks.count("batch_size", self.batch_size)
        _checks.positive("temperature", self.temperature)
        if not self.regularizations:
            raise ValueError("regularizations must hold at least one number, got none.")
        for strength in self.regularizations:
            _checks.positive("regularizations", strength)
        for share in self.few_labels:
            _checks.positive("few_labels", share)
            if share >= 1:
                raise ValueError(f"few_labels must be shares in (0, 1), got {share}.")


@torch.no_grad()
def embed_dataset(
    embed: Callable[[Any], Tensor],
    dataset: Dataset[Any],
    data: Data,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Embedding:
    """Embeddings and labels of an evaluation data set, in its order.

    Args:
        embed: from a batch of inputs to rows (N, D).
        dataset: pairs of input and label.
        data: whose ``collate_evaluation`` and ``num_workers`` are used.
        device: where ``embed`` computes.
        batch_size: inputs at a time.

    Returns:
        Embeddings, float32 unless float64, and labels, int64; both on the CPU.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=data.evaluation_batch_size(batch_size),
        num_workers=data.num_workers,
        collate_fn=data.collate_evaluation,
        generator=torch.Generator(),  # the global state stays as it is
    )
    rows, labels = [], []
    for inputs, label in loader:
        z = embed(_to(inputs, device))
        rows.append((z if z.dtype == torch.float64 else z.float()).cpu())
        labels.append(torch.as_tensor(label))
    if not rows:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return torch.cat(rows), torch.cat(labels).long()


def embed_split(
    method: Method,
    data: Data,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    limit: int | None = None,
) -> Embedding:
    """Embeddings and labels of one split, in evaluation mode; the method is left on ``device``.

    ``limit`` takes at most so many rows, evenly spaced. The method's training mode is restored.
    """
    dataset: Dataset[Any] = data.evaluation_dataset(split)
    size = len(dataset)  # type: ignore[arg-type]
    if limit is not None and size > limit:
        chosen = torch.linspace(0, size - 1, limit).round().long().tolist()
        dataset = torch.utils.data.Subset(dataset, chosen)
    with in_evaluation(method, device):
        return embed_dataset(method.embed, dataset, data, device=device, batch_size=batch_size)


@contextmanager
def in_evaluation(method: Method, device: torch.device | str) -> Iterator[None]:
    """Evaluation mode on a device, where the method stays; its modes are restored."""
    modes = {module: module.training for module in method.modules()}
    method.to(device).eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def raw_split(data: Data, split: Split, *, batch_size: int = 512) -> Embedding | None:
    """Inputs of one split as the data say they are without an encoder; None if they do not."""
    dataset: Dataset[Any] = data.evaluation_dataset(split)
    if len(dataset) == 0 or data.raw(data.collate_evaluation([dataset[0]])[0]) is None:  # type: ignore[arg-type]
        return None
    return embed_dataset(_raw_of(data), dataset, data, batch_size=batch_size)


def _raw_of(data: Data) -> Callable[[Any], Tensor]:
    def raw(inputs: Any) -> Tensor:
        rows = data.raw(inputs)
        if rows is None:
            raise ValueError(f"{type(data).__name__}.raw must give rows for all inputs or for none.")
        return rows

    return raw


def has_labels(data: Data) -> bool:
    """Whether there are classes to tell apart, and rows that choose and rows that judge."""
    return bool(data.num_classes) and all(
        len(data.evaluation_dataset(split)) > 0  # type: ignore[arg-type]
        for split in SPLITS
    )


def neighbour_accuracies(train: Embedding, judged: Embedding, settings: Evaluation) -> dict[int, float]:
    """Accuracy on one set of rows for each number of neighbours to choose from."""
    return {
        k: _accuracy(knn_predict(*train, judged[0], k=k, temperature=settings.temperature), judged[1])
        for k in settings.neighbours
    }


def accuracies(
    train: Embedding, validation: Embedding, test: Embedding, settings: Evaluation, data: Data | None = None
) -> dict[str, float]:
    """Accuracy of neighbours and of a linear probe on ``test``, their hyper-parameters chosen on ``validation``.

    Rows without a label (negative) take no part.

    Args:
        train: rows and labels that are learnt from.
        validation: those that choose.
        test: those that judge.
        settings: how.
        data: that they are of, which may have scores of their own.

    Returns:
        ``knn`` and ``linear`` on test, ``knn_validation`` and ``linear_validation``, the chosen ``k`` and
        ``regularization``; what :meth:`Data.scores` gives; for each of ``few_labels``, ``few_<share>`` on test.
    """
    train, validation, test = (labelled(*part) for part in (train, validation, test))
    scores = neighbour_accuracies(train, validation, settings)
    k = max(scores, key=lambda key: (scores[key], -key))
    probe = linear_probe(*train, *validation, regularizations=settings.regularizations)
    found = {
        "knn": _accuracy(knn_predict(*train, test[0], k=k, temperature=settings.temperature), test[1]),
        "linear": _accuracy(probe.predict(test[0]), test[1]),
        "knn_validation": scores[k],
        "linear_validation": probe.validation_accuracy,
        "k": k,
        "regularization": probe.regularization,
    }
    if data is not None:
        found |= data.scores(probe, train=train, validation=validation, test=test)
    for share in settings.few_labels:
        few = few_of_each_class(train[1], share)
        probe = linear_probe(
            train[0][few], train[1][few], *validation, regularizations=settings.regularizations
        )
        found[few_name(share)] = _accuracy(probe.predict(test[0]), test[1])
    return found


def few_name(share: float) -> str:
    """Name of the accuracy that a share of the labels gives."""
    return f"{FEW}{share:g}"


def shown(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Accuracies on the judged split that any of some results has: what tables call each, in their order."""
    names = {name for each in results for name in each}
    found = (re.fullmatch(FEW + r"(\d+(?:\.\d+)?(?:e-\d+)?)", name) for name in names)
    shares = sorted((float(match[1]), match[0]) for match in found if match)
    few = {name: f"probe on {100 * share:g}% of labels" for share, name in shares}
    return {name: title for name, title in (SHOWN | few).items() if name in names}


def few_of_each_class(labels: Tensor, share: float) -> Tensor:
    """Rows of a share of every class, at least one, ascending; the same for the same labels."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        count = max(1, round(len(rows) * share))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def evaluate(
    method: Method,
    data: Data,
    settings: Evaluation | None = None,
    *,
    device: torch.device | str = "cpu",
    judged: Split = "test",
) -> dict[str, float]:
    """Accuracies of a method's embeddings, and of its own classifier where it has one.

    Args:
        method: is left on ``device``.
        data: with labels.
        settings: how to evaluate.
        device: where to compute.
        judged: split in place of the test one.

    Returns:
        As :func:`accuracies` and :func:`classifier_accuracies`.
    """
    settings = settings or Evaluation()
    size = settings.batch_size
    rows = {
        split: embed_split(method, data, split, device=device, batch_size=size)
        for split in dict.fromkeys(("train", "validation", judged))
    }
    found = accuracies(rows["train"], rows["validation"], rows[judged], settings, data)
    return found | classifier_accuracies(method, data, settings, device=device, judged=judged)


def has_classifier(method: Method) -> bool:
    """Whether a method defines :meth:`~cl_core.method.Method.classify`."""
    return type(method).classify is not Method.classify


def classifier_accuracies(
    method: Method,
    data: Data,
    settings: Evaluation | None = None,
    *,
    device: torch.device | str = "cpu",
    judged: Split = "test",
) -> dict[str, float]:
    """Share of labelled rows whose label has the largest of the scores that a method's own classifier gives.

    Args:
        method: is left on ``device``.
        data: with labels.
        settings: of which only ``batch_size`` counts.
        device: where to compute.
        judged: split in place of the test one.

    Returns:
        ``classifier`` on the judged split and ``classifier_validation``; nothing for a method that defines no
        :meth:`~cl_core.method.Method.classify`.

    Raises:
        ValueError: if the scores are not of shape (N, C).
    """
    if not has_classifier(method):
        return {}
    size, shares = (settings or Evaluation()).batch_size, {}
    with in_evaluation(method, device):
        for split in dict.fromkeys((judged, "validation")):
            dataset = data.evaluation_dataset(split)
            scores, labels = labelled(
                *embed_dataset(method.classify, dataset, data, device=device, batch_size=size)
            )
            if scores.ndim != 2 or scores.shape[1] == 0:
                raise ValueError(
                    f"{type(method).__name__}.classify must return scores of shape (N, C), got "
                    f"{tuple(scores.shape)} for {len(labels)} rows."
                )
            shares[split] = _accuracy(scores.argmax(dim=1), labels)
    return dict(zip(CLASSIFIER, (shares[judged], shares["validation"]), strict=True))


def evaluate_raw(data: Data, settings: Evaluation | None = None) -> dict[str, float] | None:
    """Accuracies of the inputs themselves, as :meth:`Data.raw` gives them; None if it gives none."""
    settings = settings or Evaluation()
    parts = [raw_split(data, split, batch_size=settings.batch_size) for split in SPLITS]
    train, validation, test = parts
    if train is None or validation is None or test is None:
        return None
    return accuracies(train, validation, test, settings, data)


def labelled(rows: Tensor, labels: Tensor) -> Embedding:
    """The rows that have a label: it is not negative."""
    known = labels >= 0
    return rows[known], labels[known]


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def _to(inputs: Any, device: torch.device | str) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: _to(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(_to(value, device) for value in inputs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(_to(value, device) for value in inputs)
    return inputs
