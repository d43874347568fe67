"""Benchmarks in torchvision's folder layouts: Fashion-MNIST, CIFAR-10 and CIFAR-100, STL-10."""

from __future__ import annotations

import gzip
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from cl_core.training.data import Split
from cl_vision.data.base import ImageData, check_sizes
from cl_vision.data.subsets import Subset
from cl_vision.data.views import ImageArray, Images
from cl_vision.transforms import SimCLRTransform, SmallGrayTransform, ViewTransform


class _Benchmark(ImageData):
    """A data set that torchvision knows how to fetch, and that is fetched only when asked for."""

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
        download: bool = False,
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
        self.train_size, self.test_size, self.download = train_size, test_size, download

    def _first(self, split: Split, images: Tensor, labels: Tensor) -> ImageArray:
        size = self.train_size if split == "train" else self.test_size
        return ImageArray(images[:size], labels[:size])

    def _missing(self, expected: str) -> NoReturn:
        raise FileNotFoundError(
            f"no {type(self).__name__} in {self.root}: expected {expected} (torchvision's layout); "
            "pass --data.root FOLDER, or --data.download true to fetch it."
        )


class FashionMNIST(_Benchmark):
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28, ten classes.

    Read from ``FashionMNIST/raw/`` in the root (or in its folder ``fashion-mnist``), unpacked or as ``.gz``.

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        root: folder of the data; None for ``$CL_DATA``, else ``data`` in the working directory.
        image_size: height and width at evaluation, and of the default views.
        transform: makes the random views; None for small affine maps, crops and flips.
        num_views: random views an image.
        validation: share of each class of the training images held out for validation.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all.
        train_size: use only so many training images, the first ones, before validation is held out.
        test_size: use only so many test images, the first ones.
        download: fetch the files through torchvision where they are missing.
    """

    mean = (0.2860,)
    std = (0.3530,)

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        root: str | Path | None = None,
        image_size: int = 28,
        transform: ViewTransform | None = None,
        num_views: int = 2,
        validation: float = 0.1,
        split_seed: int = 0,
        subset: Subset | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        download: bool = False,
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
            train_size=train_size,
            test_size=test_size,
            download=download,
        )

    def default_transform(self) -> ViewTransform:
        """Mild views with flips: a mirrored shoe is a shoe."""
        return SmallGrayTransform(self.image_size, flip=0.5)

    def read(self) -> dict[Split, Images]:
        """The official training and test images."""
        if self.download:
            datasets.FashionMNIST(str(self.root), download=True)
        folder = self._folder()
        prefixes: dict[Split, str] = {"train": "train", "test": "t10k"}
        return {split: self._read(folder, split, prefix) for split, prefix in prefixes.items()}

    def _read(self, folder: Path, split: Split, prefix: str) -> ImageArray:
        images = read_idx(self._file(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(self._file(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
        return self._first(split, images[:, None], labels)

    def _folder(self) -> Path:
        candidates = [
            self.root / "FashionMNIST" / "raw",
            self.root / "fashion-mnist" / "FashionMNIST" / "raw",
        ]
        for folder in candidates:
            if folder.is_dir():
                return folder
        self._missing("FashionMNIST/raw/train-images-idx3-ubyte[.gz] and its three companions")

    def _file(self, folder: Path, name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        self._missing(f"FashionMNIST/raw/{name}[.gz]")

    @property
    def class_names(self) -> list[str]:
        """The ten kinds of clothes."""
        return list(datasets.FashionMNIST.classes)


class CIFAR10(_Benchmark):
    """CIFAR-10: 50,000 + 10,000 colour images, 32x32, ten classes.

    Read from ``cifar-10-batches-py/`` in the root by torchvision, whose pickles are opened only after their
    MD5 sums are found right. For the packed JPEG form see ``PackedCIFAR10``.

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
        train_size: use only so many training images, the first ones, before validation is held out.
        test_size: use only so many test images, the first ones.
        download: fetch the files through torchvision where they are missing.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    _reader: Callable[..., Any] = datasets.CIFAR10
    _layout = "cifar-10-batches-py"

    def read(self) -> dict[Split, Images]:
        """The official training and test images."""
        if not self.download and not (self.root / self._layout).is_dir():
            self._missing(f"{self._layout}/ with torchvision's files")
        splits: dict[Split, Images] = {}
        names: tuple[Split, ...] = ("train", "test")
        for split in names:
            data = self._open(split == "train")
            self._names = list(data.classes)
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            splits[split] = self._first(split, pixels, torch.tensor(data.targets))
        return splits

    def _open(self, train: bool) -> Any:
        with warnings.catch_warnings():
            # The official pickles were written by an old numpy; numpy >= 2.4 remarks on it at every read.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            try:
                return type(self)._reader(str(self.root), train=train, download=self.download)
            except RuntimeError as error:
                raise ValueError(
                    f"{self.root / self._layout} is incomplete or does not have torchvision's MD5 sums, "
                    "so it was not opened (its files are pickles)."
                ) from error

    @property
    def class_names(self) -> list[str]:
        """The classes, as the data set names them."""
        self.splits  # noqa: B018 - reading the set reads the names
        return self._names


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 + 10,000 colour images, 32x32, a hundred classes.

    Read from ``cifar-100-python/`` in the root; otherwise as :class:`CIFAR10`, with the same arguments.
    """

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    _reader = datasets.CIFAR100
    _layout = "cifar-100-python"


class STL10(_Benchmark):
    """STL-10: 5,000 + 8,000 labelled colour images, 96x96, ten classes, and 100,000 without labels.

    Read from ``stl10_binary/`` in the root by torchvision. The unlabelled images take part in training only.

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        root: folder of the data; None for ``$CL_DATA``, else ``data`` in the working directory.
        image_size: height and width at evaluation, and of the default views.
        transform: makes the random views; None for SimCLR's at jitter 0.5.
        num_views: random views an image.
        validation: share of each class of the training images held out for validation.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all.
        train_size: use only so many training images, the first ones, before validation is held out.
        test_size: use only so many test images, the first ones.
        download: fetch the files through torchvision where they are missing.
        unlabelled: train on the unlabelled images as well (2.8 GB in memory).
    """

    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        root: str | Path | None = None,
        image_size: int = 96,
        transform: ViewTransform | None = None,
        num_views: int = 2,
        validation: float = 0.1,
        split_seed: int = 0,
        subset: Subset | None = None,
        train_size: int | None = None,
        test_size: int | None = None,
        download: bool = False,
        unlabelled: bool = True,
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
            train_size=train_size,
            test_size=test_size,
            download=download,
        )
        self.unlabelled = unlabelled

    def default_transform(self) -> ViewTransform:
        """SimCLR's views, blur included: at 96 pixels it matters."""
        return SimCLRTransform(self.image_size, jitter=0.5)

    def read(self) -> dict[Split, Images]:
        """The official training (with the unlabelled, if wanted) and test images."""
        if not self.download and not (self.root / "stl10_binary").is_dir():
            self._missing("stl10_binary/ with train_X.bin and its companions")
        names: dict[Split, str] = {"train": "train+unlabeled" if self.unlabelled else "train", "test": "test"}
        return {split: self._open(split, name) for split, name in names.items()}

    def _open(self, split: Split, name: str) -> ImageArray:
        try:
            data = datasets.STL10(str(self.root), split=name, download=self.download)
        except RuntimeError as error:
            raise ValueError(
                f"{self.root / 'stl10_binary'} is incomplete or does not have torchvision's MD5 sums."
            ) from error
        labels = torch.from_numpy(np.asarray(data.labels)).long()
        return self._first(split, torch.from_numpy(np.ascontiguousarray(data.data)), labels)

    @property
    def class_names(self) -> list[str]:
        """The ten classes, in the order of the labels."""
        return ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Array of unsigned bytes from an idx file, plain or ``.gz``.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each size as a
    big-endian 32-bit integer, then the values.

    Args:
        path: the file.
        dimensions: number of dimensions that it must have.

    Returns:
        uint8 tensor.

    Raises:
        ValueError: if it is no such file, or not whole.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}).") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes with {dimensions} dimension(s).")
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if len(content) - header != math.prod(sizes):
        raise ValueError(
            f"{path} is not whole: it holds {len(content) - header:,} values, "
            f"its header says {math.prod(sizes):,}."
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(sizes)
