"""What an encoder is worth on one's own labelled images: neighbours and a linear probe on its frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cl_core.method import Method
from cl_core.training.data import SPLITS
from cl_core.training.evaluating import Evaluation, evaluate
from cl_vision.data.folder import ImageFolder


class ProbeResult(NamedTuple):
    """Accuracies on the test images, in [0, 1], and what they rest on.

    Attributes:
        knn_accuracy: of weighted nearest neighbours.
        linear_accuracy: of a multinomial linear probe.
        neighbours: how many of them vote, chosen on the validation images.
        regularization: strength of the probe's penalty, chosen on the validation images.
        class_names: the classes.
        test_images: number of images that the accuracies are over.
    """

    knn_accuracy: float
    linear_accuracy: float
    neighbours: int
    regularization: float
    class_names: list[str]
    test_images: int


def probe_folder(
    method: Method,
    folder: str | Path,
    *,
    image_size: int = 64,
    channels: Literal[1, 3] = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    settings: Evaluation | None = None,
    validation: float = 0.2,
    test: float = 0.2,
    split_seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> ProbeResult:
    """Probe a trained method on one's own labelled folder; the encoder is not changed.

    The folder is laid out as for :class:`cl_vision.data.ImageFolder`: one subfolder a class, or ``train/``, ``val/``
    and ``test/`` with such. Both classifiers learn from the training images only; the validation images choose the
    number of neighbours and the penalty of the linear probe; the test images are looked at once.

    Args:
        method: gives the features by ``embed``; it stays on its device and in its mode.
        folder: the labelled images.
        image_size: height and width, in pixels, as in training.
        channels: 3 for colour, 1 for grey, as in training.
        mean: channel means of the normalisation, as in training; None for those of ``ImageFolder``.
        std: channel deviations, likewise.
        settings: numbers of neighbours and penalties to choose from; None for the defaults.
        validation: share of each class for validation where the folder has no such split.
        test: share of each class for testing where the folder has no such split.
        split_seed: of the held-out images.
        on_error: ``"raise"`` for an error that names an unreadable file; ``"skip"`` to leave such files out.

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
        on_error=on_error,
    )
    sizes = {split: len(data.evaluation_dataset(split)) for split in SPLITS}
    for split, size in sizes.items():
        if not size:
            raise ValueError(
                f"{folder} leaves no {split} images; each class needs at least 3, or its own folder."
            )
    parameter = next(method.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    found = evaluate(method, data, settings, device=device)
    return ProbeResult(
        knn_accuracy=found["knn"],
        linear_accuracy=found["linear"],
        neighbours=int(found["k"]),
        regularization=found["regularization"],
        class_names=data.class_names or [],
        test_images=sizes["test"],
    )
