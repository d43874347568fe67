"""Handwritten digits that come with scikit-learn: the data set that needs no download."""

from __future__ import annotations

import torch
from torch.nn import functional

from cl_core.training.data import Split
from cl_vision.data.base import ImageData
from cl_vision.data.subsets import Subset
from cl_vision.data.views import ImageArray, Images
from cl_vision.transforms import SmallGrayTransform, ViewTransform


class Digits(ImageData):
    """1,797 grey handwritten digits of 8x8 pixels, ten classes, inside scikit-learn.

    There is no official split: a fifth of each class is held out for testing and a fifth of the rest for
    validation.

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        image_size: height and width to which the images are enlarged (bilinear), at least 8.
        transform: makes the random views; None for affine maps, crops and contrast.
        num_views: random views an image.
        validation: share of the training images held out for validation.
        test: share of all images held out for testing.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all.
    """

    mean = (0.305,)
    std = (0.319,)

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        image_size: int = 16,
        transform: ViewTransform | None = None,
        num_views: int = 2,
        validation: float = 0.2,
        test: float = 0.2,
        split_seed: int = 0,
        subset: Subset | None = None,
    ) -> None:
        if image_size < 8:
            raise ValueError(f"image_size must be >= 8, the size of the digits, got {image_size}.")
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=image_size,
            transform=transform,
            num_views=num_views,
            validation=validation,
            test=test,
            split_seed=split_seed,
            subset=subset,
        )

    def default_transform(self) -> ViewTransform:
        """Affine maps, crops and contrast, no flips: a mirrored digit is another digit."""
        return SmallGrayTransform(self.image_size)

    def read(self) -> dict[Split, Images]:
        """All digits as training images, enlarged once."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        if self.image_size != 8:
            images = functional.interpolate(images, size=self.image_size, mode="bilinear")
        labels = torch.from_numpy(digits.target)
        return {"train": ImageArray(images.round().to(torch.uint8), labels)}

    @property
    def class_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(10)]
