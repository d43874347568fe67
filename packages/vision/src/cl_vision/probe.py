"""What an encoder is worth on labelled images: neighbours and a linear probe on its frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_core.evaluation import knn_accuracy, linear_probe
from cl_core.method import Method
from cl_vision.data.folder import ImageFolder


class ProbeResult(NamedTuple):
    """Accuracies on the test images, in [0, 1], and what they rest on.

    Attributes:
        knn_accuracy: of weighted nearest neighbours.
        linear_accuracy: of a multinomial linear probe.
        regularization: strength of the probe's penalty, chosen on the validation images.
        class_names: the classes.
        test_images: number of images that the accuracies are over.
    """

    knn_accuracy: float
    linear_accuracy: float
    regularization: float
    class_names: list[str]
    test_images: int


def probe_folder(
    method: Method,
    folder: str | Path,
    *,
    image_size: int = 64,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    k: int = 20,
    temperature: float = 0.1,
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    batch_size: int = 256,
) -> ProbeResult:
    """Probe a trained method on one's own labelled folder; the encoder is not changed.

    The folder is laid out as for :class:`cl_vision.data.ImageFolder`: one subfolder a class, or ``train/``,
    ``val/`` and ``test/`` with such. Both classifiers learn from the training images only; the validation
    images choose the penalty of the linear probe; the test images are looked at once.

    Args:
        method: gives the features by ``embed``.
        folder: the labelled images.
        image_size: height and width, in pixels, as in training.
        channels: 3 for colour, 1 for grey, as in training.
        mean: channel means of the normalisation, as in training; None for that of ``ImageFolder``.
        std: channel deviations, likewise.
        k: neighbours that vote.
        temperature: of the neighbours' votes, T > 0.
        validation: share of each class for validation where the folder has no such split.
        test: share of each class for testing where the folder has no such split.
        split_seed: of the held-out images.
        batch_size: images at a time.

    Returns:
        Accuracies on the test images.

    Raises:
        FileNotFoundError: if the folder is missing or holds no images.
        ValueError: if it has no class folders, or a split without images.
    """
    data = ImageFolder(
        root=folder,
        image_size=image_size,
        channels=channels,
        labels=True,
        validation=validation,
        test=test,
        split_seed=split_seed,
        mean=mean,
        std=std,
    )
    train, validating, testing = (
        embed_dataset(method, data.evaluation_dataset(split), batch_size=batch_size)
        for split in ("train", "validation", "test")
    )
    for split, (_, labels) in (("validation", validating), ("test", testing)):
        if not len(labels):
            raise ValueError(
                f"{folder} leaves no {split} images; each class needs at least 3, or its own folder."
            )
    probe = linear_probe(*train, *validating)
    return ProbeResult(
        knn_accuracy=knn_accuracy(*train, *testing, k=k, temperature=temperature),
        linear_accuracy=probe.accuracy(*testing),
        regularization=probe.regularization,
        class_names=data.class_names or [],
        test_images=len(testing[1]),
    )


@torch.no_grad()
def embed_dataset(
    method: Method, dataset: Dataset[tuple[Tensor, Tensor]], *, batch_size: int = 256, num_workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, in its order, in evaluation mode.

    Args:
        method: gives the features by ``embed``; its training mode is restored afterwards.
        dataset: pairs of image and label, for example ``data.evaluation_dataset("test")``.
        batch_size: images at a time.
        num_workers: loader processes.

    Returns:
        Features (N, D) and labels (N,), both on the CPU.
    """
    parameter = next(method.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    training = method.training
    method.eval()
    try:
        features, labels = [], []
        for images, label in DataLoader(dataset, batch_size=batch_size, num_workers=num_workers):
            features.append(method.embed(images.to(device)).cpu())
            labels.append(label)
    finally:
        method.train(training)
    if not features:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels)
