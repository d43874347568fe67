"""A folder of images: one's own data, with or without labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from cl_core import _checks
from cl_core.training.data import Split
from cl_vision.data.base import ImageData
from cl_vision.data.views import Images
from cl_vision.transforms import SimCLRTransform, ViewTransform

_LOG = logging.getLogger(__name__)
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}


class ImageFolder(ImageData):
    """Images in a folder, in one of three layouts.

    - flat: ``folder/*.jpg``, images directly in the folder (and below it): no labels;
    - classes: ``folder/cat/*.jpg``, ``folder/dog/*.jpg``: one class a subfolder, as for torchvision's
      ``ImageFolder``;
    - splits: ``folder/train/``, and where there are such ``folder/val/`` and ``folder/test/``, each one of
      the above.

    Images are read when they are needed, turned upright by their EXIF tag and converted to the wanted
    channels.

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
        channels: 3 for colour, 1 for grey.
        labels: True: subfolders are classes; False: they are not; None: they are unless images lie beside
            them.
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
        )
        self.channels, self.labels, self.on_error = channels, labels, on_error

    def default_transform(self) -> ViewTransform:
        """SimCLR's views."""
        return SimCLRTransform(self.image_size, jitter=0.5)

    def read(self) -> dict[Split, Images]:
        """The files of each split that has a folder, else all as training images."""
        folders = self._split_folders()
        names = self.class_names or []
        return {split: self._files(folder, names) for split, folder in folders.items()}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the class folders, sorted, or None where there are none."""
        if self.labels is False:
            return None
        folder = self._split_folders()["train"]
        names = sorted(path.name for path in folder.iterdir() if _visible(path) and path.is_dir())
        if self.labels is None and any(_is_image(path) for path in folder.iterdir()):
            return None
        if self.labels and not names:
            raise ValueError(f"{folder} has no class folders; expected {folder.name}/CLASS/*.jpg.")
        return names or None

    def _split_folders(self) -> dict[Split, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no folder {self.root}: expected images, one subfolder a class, or train/ with either; "
                "pass --data.root FOLDER."
            )
        if not (self.root / "train").is_dir():
            return {"train": self.root}
        found: dict[Split, Path] = {}
        for split, names in _SPLIT_FOLDERS.items():
            for name in names:
                if (self.root / name).is_dir():
                    found[split] = self.root / name
                    break
        return found

    def _files(self, folder: Path, names: Sequence[str]) -> ImageFiles:
        extra = {path.name for path in folder.iterdir() if _visible(path) and path.is_dir()} - set(names)
        if names and extra:
            raise ValueError(
                f"{folder} has a class folder {min(extra)!r} that the training images do not have."
            )
        paths, labels = [], []
        for label, part in [(names.index(name), folder / name) for name in names] or [(-1, folder)]:
            found = sorted(path for path in part.rglob("*") if _is_image(path)) if part.is_dir() else []
            paths += found
            labels += [label] * len(found)
        if not paths:
            endings = ", ".join(IMG_EXTENSIONS)
            raise FileNotFoundError(f"no images in {folder}: expected files that end in {endings}.")
        files = ImageFiles(paths, torch.tensor(labels), channels=self.channels)
        return files.readable() if self.on_error == "skip" else files


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
            ValueError: if the file cannot be read; names it.
        """
        path = self.paths[row]
        try:
            with Image.open(path) as image:
                upright = _eight_bits(ImageOps.exif_transpose(image))
                upright = upright.convert("RGB" if self.channels == 3 else "L")
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise ValueError(
                f"{path} cannot be read ({reason}); pass --data.on_error skip to leave such files out."
            ) from error
        return functional.pil_to_tensor(upright)

    def readable(self) -> ImageFiles:
        """The same without the files that cannot be read; each of these is logged."""
        kept = []
        for row, path in enumerate(self.paths):
            try:
                self[row]
            except ValueError as error:
                _LOG.warning("left out %s: %s", path, error.__cause__)
            else:
                kept.append(row)
        if not kept:
            raise ValueError(
                f"none of the {len(self.paths)} images can be read, the first is {self.paths[0]}."
            )
        return ImageFiles([self.paths[row] for row in kept], self.labels[kept], channels=self.channels)

    def __len__(self) -> int:
        return len(self.paths)


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _is_image(path: Path) -> bool:
    return _visible(path) and path.suffix.lower() in IMG_EXTENSIONS and path.is_file()


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8, which Pillow would clip to white; a scale that nobody knows is refused."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"mode {image.mode} has no known largest value; convert it to 8 or 16 bits first")
    return image
