"""What every image data set is: splits, random views for training, plain images for evaluation."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.training.data import SPLITS, Data, Split
from cl_vision.data.subsets import Subset
from cl_vision.data.views import Images, PlainDataset, ViewDataset, Views, collate_views
from cl_vision.transforms import EvaluationTransform, SimCLRTransform, ViewTransform

_LOG = logging.getLogger(__name__)


def data_root(root: str | Path | None) -> Path:
    """The folder asked for, else ``$CL_DATA``, else ``data`` in the working directory."""
    if root == "":
        raise ValueError("root must name a folder, or be None for $CL_DATA, got an empty text.")
    return Path(root if root is not None else os.environ.get("CL_DATA") or "data").expanduser()


def stratified_split(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a fraction of every class, the same rows for the same seed.

    Args:
        labels: shape (N,), int64; rows of label -1 (unknown) are never held out.
        fraction: share of each class to hold out, in [0, 1); rounded to whole rows, but a class of two rows
            or more gives at least one when the fraction is not zero, and always keeps one.
        seed: of the draw.

    Returns:
        Rows kept and rows held out, both ascending.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        if label >= 0 and fraction > 0 and len(rows) > 1:
            count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
            held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def check_sizes(**sizes: int | None) -> None:
    """Refuse anything but a number of images, or None for all."""
    for name, size in sizes.items():
        if size is not None:
            _checks.count(name, size)


class ImageData(Data):
    """Base of every image data set.

    A subclass reads; splits, views and evaluation are the same for all. Splits that the source does not have
    are carved out of its training images, class by class, always with the same seed: the rows do not depend
    on the run seed. Unlabelled images (label -1) train, and are evaluated only where there are no labels at
    all (to embed them).

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        root: folder of the data; None for ``$CL_DATA``, else ``data`` in the working directory.
        image_size: height and width at evaluation, and of the default views.
        transform: makes the random views; None for the default of the data set.
        num_views: random views an image.
        validation: share of the training images held out for validation where the source has no such split.
        test: share of all images held out for testing where the source has no such split.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all. Evaluation uses all.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        root: str | Path | None = None,
        image_size: int = 32,
        transform: ViewTransform | None = None,
        num_views: int = 2,
        validation: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        subset: Subset | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        for name, value in (("validation", validation), ("test", test)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}.")
        _checks.count("image_size", image_size)
        _checks.count("num_views", num_views)
        self.root = data_root(root)
        self.image_size, self.num_views = image_size, num_views
        self.validation, self.test, self.split_seed, self.subset = validation, test, split_seed, subset
        self.transform = self.default_transform() if transform is None else transform
        self.evaluation_transform = EvaluationTransform(image_size, self.mean, self.std)

    @abstractmethod
    def read(self) -> dict[Split, Images]:
        """The splits that the source has; ``"train"`` is always among them."""

    def default_transform(self) -> ViewTransform:
        """Random view used when none is given."""
        return SimCLRTransform(self.image_size, jitter=0.5, blur=0.0)

    @cached_property
    def splits(self) -> dict[Split, tuple[Images, Tensor]]:
        """Images and rows of each split."""
        sources = self.read()
        train = sources["train"]
        kept = torch.arange(len(train))
        splits: dict[Split, tuple[Images, Tensor]] = {}
        fractions: dict[Split, float] = {"test": self.test, "validation": self.validation}
        for split, fraction in fractions.items():
            if split in sources:
                splits[split] = sources[split], torch.arange(len(sources[split]))
            else:
                rest, held = stratified_split(train.labels[kept], fraction, seed=self.split_seed)
                splits[split] = train, kept[held]
                kept = kept[rest]
        splits["train"] = train, kept
        return splits

    @property
    def labelled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.splits["train"][0].labels >= 0).any())

    def train_dataset(self) -> ViewDataset:
        """Random views of the training images."""
        images, rows = self.splits["train"]
        if self.subset is not None:
            rows = self.subset.select(rows, images.labels[rows], total=len(images))
        if len(rows) < 2:
            raise ValueError(
                f"{type(self).__name__} has {len(rows)} training image{'s' * (len(rows) != 1)}, but images are "
                "learnt from by comparing them, which takes at least 2."
            )
        size = getattr(self.transform.of_view(0), "size", self.image_size)
        if size != self.image_size:
            _LOG.warning(
                "views are of %s pixels, but images are evaluated at %s: choose image_size and the transform's size "
                "alike, unless this is meant.",
                size,
                self.image_size,
            )
        return ViewDataset(
            images,
            self.transform,
            rows=rows,
            num_views=self.num_views,
            seed=self.seed,
            finish=self.evaluation_transform.normalize,
        )

    def evaluation_dataset(self, split: Split) -> PlainDataset:
        """Plain images and labels of one split."""
        _checks.choice("split", split, SPLITS)
        images, rows = self.splits[split]
        if self.labelled:
            rows = rows[images.labels[rows] >= 0]
        return PlainDataset(images, self.evaluation_transform, rows=rows)

    def collate(self, items: Sequence[Views]) -> Views:
        """Stack training samples to a batch."""
        return collate_views(items)

    @property
    @abstractmethod
    def class_names(self) -> list[str] | None:
        """Name of each class, in the order of the labels, or None where images have no labels."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None where images have no labels."""
        return None if self.class_names is None else len(self.class_names)
