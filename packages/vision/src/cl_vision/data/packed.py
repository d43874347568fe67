"""CIFAR-10 packed as JPEG streams in one ``.npz`` file.

The file ``cifar10_jpeg.npz`` holds, for ``train`` and ``test``:

- ``{split}_jpeg``: uint8, all JPEG streams one after the other;
- ``{split}_offsets``: int64, shape (N + 1,): image i is the bytes from ``offsets[i]`` to ``offsets[i + 1]``;
- ``{split}_labels``: uint8, shape (N,);

and ``class_names``, shape (10,). The classes are interleaved, so every prefix of 10 n images is balanced.
JPEG is lossy: accuracies come close to those on the original images, not equal to the last half point.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cl_core.training.data import Split
from cl_vision.data.base import ImageData, check_sizes
from cl_vision.data.subsets import Subset
from cl_vision.data.views import ImageArray, Images
from cl_vision.transforms import ViewTransform


class PackedCIFAR10(ImageData):
    """CIFAR-10 from ``cifar10_jpeg.npz`` in the root (or in its folder ``cifar10-jpeg``).

    All 60,000 images decode in about 5 seconds of one core, into 184 MB.

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        root: folder of the data; None for ``$CL_DATA``, else ``data`` in the working directory.
        image_size: height and width at evaluation, and of the default views.
        transform: makes the random views; None for SimCLR's at jitter 0.5, without blur.
        num_views: random views an image.
        validation: share of each class of the training images held out for validation.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all.
        train_size: use only this many training images (a balanced prefix, before validation is held out).
        test_size: use only this many test images.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

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
        split_seed: int = 0,
        subset: Subset | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            root=root,
            image_size=image_size,
            transform=transform,
            num_views=num_views,
            validation=validation,
            split_seed=split_seed,
            subset=subset,
        )
        check_sizes(train_size=train_size, test_size=test_size)
        self.train_size, self.test_size = train_size, test_size

    def read(self) -> dict[Split, Images]:
        """Training and test images, decoded."""
        path = self._file()
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                self._names = [str(name) for name in arrays["class_names"]]
                return {
                    "train": self._decode(arrays, "train", self.train_size),
                    "test": self._decode(arrays, "test", self.test_size),
                }
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is not a whole packed CIFAR-10 ({str(error).splitlines()[0]})."
            ) from error

    def _decode(self, arrays: np.lib.npyio.NpzFile, split: str, size: int | None) -> ImageArray:
        stream, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"].tolist()
        labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
        if offsets[-1] != len(stream) or len(offsets) != len(labels) + 1:
            raise ValueError(
                f"{split}_jpeg holds {len(stream):,} bytes and {split}_labels {len(labels):,} images, "
                f"{split}_offsets say {offsets[-1]:,} and {len(offsets) - 1:,}"
            )
        labels = labels[:size]
        images = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
        for row in range(len(labels)):
            with Image.open(io.BytesIO(stream[offsets[row] : offsets[row + 1]].tobytes())) as image:
                images[row] = np.asarray(image.convert("RGB"))
        return ImageArray(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)

    def _file(self) -> Path:
        for path in (self.root / "cifar10_jpeg.npz", self.root / "cifar10-jpeg" / "cifar10_jpeg.npz"):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"no packed CIFAR-10 in {self.root}: expected cifar10_jpeg.npz or cifar10-jpeg/cifar10_jpeg.npz; "
            "pass --data.root FOLDER."
        )

    @property
    def class_names(self) -> list[str]:
        """The ten classes, as the file names them."""
        self.splits  # noqa: B018 - reading the file reads the names
        return self._names
