"""A folder of images: one's own data, with or without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from cl_core import _checks
from cl_core.training.data import Split
from cl_vision.data.base import ImageData
from cl_vision.data.subsets import Subset
from cl_vision.data.views import Images
from cl_vision.transforms import SimCLRTransform, ViewTransform

_LOG = logging.getLogger(__name__)
_ENDINGS = (*IMG_EXTENSIONS, ".avif", ".gif", ".heic", ".heif", ".jfif")
_SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
    "testing": "test",
}
_RUN_FILES = {"config.yaml", "versions.json"}


class ImageFolder(ImageData):
    """Images in a folder, in one of three layouts.

    - flat: ``folder/*.jpg``, images directly in the folder (and below it): no labels;
    - classes: ``folder/cat/*.jpg``, ``folder/dog/*.jpg``: one class a subfolder, as for torchvision's
      ``ImageFolder``;
    - splits: ``folder/train/``, and where there are such ``folder/val/`` and ``folder/test/``, each one of
      the above. Also ``training``, ``validation``, ``valid`` and ``testing``, in capitals or not.

    It is splits if all subfolders with images have such names. One folder of such a name beside others is a
    class if its images lie directly in it; anything between the two is refused.

    Images below a subfolder belong to it, however deep, also by way of links. What is hidden (its name begins
    with a dot), subfolders without images and the folders of training runs are left out.

    Images are read when they are needed, the first frame of an animation, turned upright by their EXIF tag,
    laid on white where they are transparent, and converted to the wanted channels.

    Args:
        batch_size: images a training batch.
        num_workers: loader processes; 0 reads in the main one.
        root: the folder of the images; None for ``$CL_DATA``, else ``data`` in the working directory.
        image_size: height and width at evaluation, and of the default views.
        transform: makes the random views; None for SimCLR's.
        num_views: random views an image.
        validation: share of each class held out for validation where there is no folder for it.
        test: share of each class held out for testing where there is no folder for it.
        split_seed: of the held-out rows.
        subset: which of the remaining training images are trained on; None for all.
        channels: 3 for colour, 1 for grey.
        labels: True: subfolders, at least two, are classes; False: they are not; None: they are if there are
            that many and no images beside them.
        on_error: ``"raise"`` for an error that names an unreadable file; ``"skip"`` to leave such files out,
            for which every file is read once at the start.
        mean: mean of each channel for images in [0, 1]; None for ImageNet's (its average for grey images).
        std: standard deviation of each channel, likewise.
    """

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        root: str | Path | None = None,
        image_size: int = 64,
        transform: ViewTransform | None = None,
        num_views: int = 2,
        validation: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        subset: Subset | None = None,
        channels: Literal[1, 3] = 3,
        labels: bool | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        _checks.choice("channels", channels, (1, 3))
        _checks.choice("on_error", on_error, ("raise", "skip"))
        if channels == 1:
            self.mean, self.std = (0.449,), (0.226,)
        self.mean, self.std = mean or self.mean, std or self.std
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} must hold one number a channel, {channels}, got {len(values)}.")
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            root=root,
            image_size=image_size,
            transform=transform,
            num_views=num_views,
            validation=validation,
            test=test,
            split_seed=split_seed,
            subset=subset,
        )
        self.channels, self.labels, self.on_error = channels, labels, on_error

    def default_transform(self) -> ViewTransform:
        """SimCLR's views."""
        return SimCLRTransform(self.image_size, jitter=0.5)

    def read(self) -> dict[Split, Images]:
        """The files of each split that has a folder, else all as training images."""
        found: dict[Split, Images] = {}
        for split, (paths, labels) in self._found[1].items():
            files = ImageFiles(paths, torch.tensor(labels), channels=self.channels)
            found[split] = files.readable() if self.on_error == "skip" else files
        return found

    def row_names(self, split: Split) -> list[str]:
        """File of each evaluated row, below the root where it lies there."""
        dataset = self.evaluation_dataset(split)
        files: Any = dataset.images
        paths = [files.paths[row] for row in dataset.rows.tolist()]
        return [
            path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
            for path in paths
        ]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the class folders, sorted, or None where there are none."""
        return self._found[0] or None

    @cached_property
    def _found(self) -> tuple[list[str], dict[Split, tuple[list[Path], list[int]]]]:
        """Names of the classes; paths and labels of each split."""
        folders = self._split_folders()
        names = self._class_folders(folders["train"])
        return names, {split: _labelled(folder, names) for split, folder in folders.items()}

    def _split_folders(self) -> dict[Split, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no folder {self.root}: expected images, one subfolder a class, or train/ with either; "
                "pass --data.root FOLDER."
            )
        images, folders = _listing(self.root)
        named = [folder for folder in folders if folder.name.lower() in _SPLIT_FOLDERS]
        beside = images + [folder for folder in folders if folder not in named and _holds_images(folder)]
        if not named or (beside and len(named) == 1 and not any(map(_holds_images, _listing(named[0])[1]))):
            return {"train": self.root}
        if beside:
            raise ValueError(
                f"{self.root} holds {named[0].name!r}, the name of a split, beside {beside[0].name!r}, which is "
                "none, so its folders could be splits or classes: move or rename one of the two."
            )
        found: dict[Split, Path] = {}
        for folder in named:
            split = _SPLIT_FOLDERS[folder.name.lower()]
            if split in found:
                raise ValueError(
                    f"{self.root} holds {found[split].name!r} and {folder.name!r}, two folders of {split} images; "
                    "keep one of them."
                )
            found[split] = folder
        if "train" not in found:
            raise ValueError(
                f"{self.root} holds {named[0].name!r} but no folder 'train' beside it; add one, or pass "
                f"--data.root {named[0]}."
            )
        return found

    def _class_folders(self, folder: Path) -> list[str]:
        if self.labels is False:
            return []
        images, folders = _listing(folder)
        names = [entry.name for entry in folders if _holds_images(entry)]
        if self.labels is None and (images or len(names) < 2):
            return []
        if len(names) < 2:
            found = f"only the class folder {names[0]!r}" if names else "no class folders"
            raise ValueError(f"{folder} has {found}; expected two or more, {folder.name}/CLASS/*.jpg.")
        for entry in folders:
            if entry.name not in names:
                _LOG.warning("%s is no class: there are no images in it.", entry)
        return names


class UnreadableImageError(ValueError):
    """An image file that cannot be read; the message names it.

    A loader process hands on its errors as text: torch builds the error again with the whole traceback for a
    message. The sentence is what follows the name of the class there.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].strip())


class ImageFiles:
    """Images that are read from their files when asked for.

    Args:
        paths: one file an image.
        labels: shape (N,), int64; -1 where unknown.
        channels: 3 for colour, 1 for grey.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, *, channels: Literal[1, 3] = 3) -> None:
        self.paths, self.labels, self.channels = list(paths), labels, channels

    def __getitem__(self, row: int) -> Tensor:
        """Image of one row, uint8 (C, H, W).

        Raises:
            UnreadableImageError: a ValueError, if the file cannot be read; names it.
        """
        path = self.paths[row]
        try:
            with Image.open(path) as image:
                plain = _opaque(_eight_bits(ImageOps.exif_transpose(image)))
                return functional.pil_to_tensor(plain.convert("RGB" if self.channels == 3 else "L"))
        except Exception as error:  # a decoder may raise anything at a damaged file
            raise UnreadableImageError(
                f"{path} cannot be read ({_reason(error)}); pass --data.on_error skip to leave such files out."
            ) from error

    def readable(self) -> ImageFiles:
        """The same without the files that cannot be read; each of these is logged, and how many they are."""
        kept = []
        for row, path in enumerate(self.paths):
            try:
                self[row]
            except UnreadableImageError as error:
                _LOG.warning("left out %s: %s.", path, _reason(error.__cause__))
            else:
                kept.append(row)
        if not kept:
            raise ValueError(
                f"none of the {len(self.paths)} images can be read, the first is {self.paths[0]}."
            )
        if left := len(self.paths) - len(kept):
            _LOG.warning("%d of %d images left out: they cannot be read.", left, len(self.paths))
        return ImageFiles([self.paths[row] for row in kept], self.labels[kept], channels=self.channels)

    def __len__(self) -> int:
        return len(self.paths)


def _labelled(folder: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images of one split and their labels."""
    if names:
        extra = {entry.name for entry in _listing(folder)[1] if _holds_images(entry)} - set(names)
        if extra:
            raise ValueError(
                f"{folder} has a class folder {min(extra)!r} that the training images do not have."
            )
    paths: list[Path] = []
    labels: list[int] = []
    for label, part in [(label, folder / name) for label, name in enumerate(names)] or [(-1, folder)]:
        found = sorted(_images_below(part, set())) if part.is_dir() else []
        paths += found
        labels += [label] * len(found)
    if not paths and names and _holds_images(folder):
        raise ValueError(
            f"{folder} holds images but no class folders, unlike the training images (such as {names[0]!r}): sort "
            "them into class folders, move them away, or pass --data.labels false."
        )
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: expected files that end in {', '.join(_ENDINGS)}.")
    return paths, labels


def _holds_images(folder: Path) -> bool:
    return next(_images_below(folder, set()), None) is not None


def _images_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Images in a folder and below it; where links lead to one folder by several ways, once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    images, folders = _listing(folder)
    yield from images
    for entry in folders:
        yield from _images_below(entry, seen)


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and subfolders in a folder, by name, without hidden ones; neither in the folder of a run."""
    images: list[Path] = []
    folders: list[Path] = []
    real = folder.resolve()
    with os.scandir(folder) as listed:
        entries = sorted(listed, key=lambda entry: entry.name)
    if {entry.name for entry in entries} >= _RUN_FILES:  # its figures are images too
        return images, folders
    for entry in entries:
        path, link = folder / entry.name, entry.is_symlink()
        if entry.name.startswith("."):
            continue
        if path.is_dir() if link else entry.is_dir():
            # A link to a folder that it lies in would bring in what lies beside it, and itself.
            if not (link and real.is_relative_to(path.resolve())):
                folders.append(path)
        elif (link or entry.is_file()) and path.suffix.lower() in _ENDINGS:
            images.append(path)  # also a link that leads nowhere: to be named when it is read
    return images, folders


def _reason(error: BaseException | None) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _opaque(image: Image.Image) -> Image.Image:
    """What is transparent becomes white, as pages show it: the colour stored there is arbitrary."""
    if not (image.mode.endswith(("A", "a")) or "transparency" in image.info):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8, which Pillow would clip to white; a scale that nobody knows is refused."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"mode {image.mode} has no known largest value; convert it to 8 or 16 bits first")
    return image
