"""Batches of views: what a contrastive method on images is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_core import _checks
from cl_vision.transforms import BatchTransform, Finish, ViewTransform, view_seed

_ONE_CALL = 2**22  # numbers of all views of a batch
_HELD = 2**24  # numbers of images read from files that wait for their views to be made together


class Views(NamedTuple):
    """Random views of a batch of images; a sample has the same fields without the dimension N.

    Attributes:
        views: two or more tensors (N, C, H, W); row i of all is the same image.
        labels: class of each image, shape (N,), int64; -1 where unknown. Not for training: for monitors.
        index: row of each image in its data set, shape (N,), int64.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # a field, although every tuple has a method of that name


class ViewBatch(Sequence[Views]):
    """Samples that were made together: a sequence of them as any other, which :func:`collate_views` need not stack.

    Args:
        batch: the samples as a batch.
    """

    def __init__(self, batch: Views) -> None:
        self.batch = batch

    @overload
    def __getitem__(self, place: int) -> Views: ...
    @overload
    def __getitem__(self, place: slice) -> ViewBatch: ...
    def __getitem__(self, place: int | slice) -> Views | ViewBatch:
        """One sample, or some of them."""
        views, labels, index = self.batch
        found = Views(tuple(view[place] for view in views), labels[place], index[place])
        return ViewBatch(found) if isinstance(place, slice) else found

    def __len__(self) -> int:
        return len(self.batch.labels)


class Images(Protocol):
    """Images before any transform: uint8 tensors (C, H, W) by row, and all labels at hand."""

    labels: Tensor

    def __getitem__(self, row: int) -> Tensor:
        """Image of one row, uint8 (C, H, W)."""

    def __len__(self) -> int: ...


class ImageArray:
    """Images held in memory.

    Args:
        images: shape (N, C, H, W), uint8.
        labels: shape (N,), int64; -1 where unknown.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}."
            )
        if tuple(labels.shape) != (len(images),):
            raise ValueError(f"labels must have shape ({len(images)},), got {tuple(labels.shape)}.")
        self.images, self.labels = images, labels.to(torch.int64)

    def __getitem__(self, row: int) -> Tensor:
        """Image of one row."""
        return self.images[row]

    def __len__(self) -> int:
        return len(self.images)


class ViewDataset(Dataset[Views]):
    """Random views of images, a pure function of (seed, epoch, row, view).

    A loader gets all samples of a batch in one call, and images of one size that follow each other have their views
    made together.

    Args:
        images: the images.
        transform: makes a view, or with :class:`~cl_vision.transforms.MultiCrop` views of several sizes.
        rows: rows of ``images`` that take part, shape (M,); None for all.
        num_views: views an image.
        seed: run seed.
        finish: applied to every view after the transform, for example a normalisation: to views (C, H, W) and to
            several at once, (n, C, H, W), one as the other.
    """

    def __init__(
        self,
        images: Images,
        transform: ViewTransform,
        *,
        rows: Tensor | None = None,
        num_views: int = 2,
        seed: int = 0,
        finish: Finish | None = None,
    ) -> None:
        _checks.count("num_views", num_views)
        if not isinstance(transform, ViewTransform):
            raise TypeError(
                f"transform must be a ViewTransform, got {type(transform).__name__}: wrap a pipeline in one."
            )
        self.images, self.transform, self.finish = images, transform, finish
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.num_views, self.seed = num_views, seed
        self._of_views = [transform.of_view(view) for view in range(num_views)]
        self._together = all(isinstance(maker, BatchTransform) for maker in self._of_views)
        # In shared memory, so that loader workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of ``epoch`` from now on; call it before the loader of that epoch starts."""
        self._epoch.fill_(epoch)

    @property
    def labels(self) -> Tensor:
        """Labels of all rows, shape (M,)."""
        return self.images.labels[self.rows]

    def __getitem__(self, index: int) -> Views:
        """Views of one image."""
        row = int(self.rows[index])
        image = self.images[row]
        if self._together:
            return self._batch(image[None], self.rows[index].view(1), [index])[0]
        seeds = self._seeds([index])
        views = [make(image, seed=seed) for make, seed in zip(self._of_views, seeds, strict=True)]
        if self.finish is not None:
            views = [self.finish(view) for view in views]
        return Views(tuple(views), self.images.labels[row], torch.tensor(index))

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Views]:
        """Views of several images: what torch's loaders ask for in place of one after the other."""
        if not self._together:
            return [self[index] for index in indices]
        batches = [
            self._batch(images, self.rows[torch.tensor(part)], part) for images, part in self._read(indices)
        ]
        return batches[0] if len(batches) == 1 else [sample for batch in batches for sample in batch]

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Images that can be stacked, a part of the indices after the other, without holding too many."""
        if isinstance(self.images, ImageArray):
            if indices:
                yield self.images.images[self.rows[torch.tensor(indices)]], indices
            return
        held: list[Tensor] = []
        for place, index in enumerate(indices):
            image = self.images[int(self.rows[index])]
            if held and (image.shape != held[0].shape or (len(held) + 1) * image.numel() > _HELD):
                yield torch.stack(held), indices[place - len(held) : place]
                held = []
            held.append(image)
        if held:
            yield torch.stack(held), indices[len(indices) - len(held) :]

    def _batch(self, images: Tensor, rows: Tensor, indices: Sequence[int]) -> ViewBatch:
        seeds = iter(torch.tensor(self._seeds(indices)).split(len(indices)))
        views: list[Tensor] = []
        for transform, same in groupby(self._of_views):
            assert isinstance(transform, BatchTransform)
            views += self._made(transform, images, [next(seeds) for _ in same])
        return ViewBatch(Views(tuple(views), self.images.labels[rows], torch.tensor(indices)))

    def _made(self, transform: BatchTransform, images: Tensor, seeds: list[Tensor]) -> Sequence[Tensor]:
        """Views of one transform, for the seeds of each."""
        # Small views are fastest all in one call. Large ones fill it by themselves, and in tensors of their own take
        # blocks of half the size, which the allocator is likelier to have.
        if images.shape[:2].numel() * len(seeds) * transform.size**2 > _ONE_CALL:
            return [transform.batch(images, of_view, self.finish) for of_view in seeds]
        images = images.repeat(len(seeds), 1, 1, 1)
        return transform.batch(images, torch.cat(seeds), self.finish).chunk(len(seeds))

    def _seeds(self, indices: Sequence[int]) -> list[int]:
        """Seeds of all first views, then of all second ones, and so on."""
        epoch = self.epoch
        return [
            view_seed(self.seed, epoch, index, view) for view in range(self.num_views) for index in indices
        ]

    def __len__(self) -> int:
        return len(self.rows)


class PlainDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels for evaluation, without randomness.

    Args:
        images: the images.
        transform: from an image to the encoder's input.
        rows: rows of ``images`` that take part, shape (M,); None for all.
    """

    def __init__(
        self, images: Images, transform: Callable[[Tensor], Tensor], *, rows: Tensor | None = None
    ) -> None:
        self.images, self.transform = images, transform
        self.rows = torch.arange(len(images)) if rows is None else rows

    @property
    def labels(self) -> Tensor:
        """Labels of all rows, shape (M,)."""
        return self.images.labels[self.rows]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W) and label of one row."""
        row = int(self.rows[index])
        return self.transform(self.images[row]), self.images.labels[row]

    def __len__(self) -> int:
        return len(self.rows)


def collate_views(samples: Sequence[Views]) -> Views:
    """Stack samples to a batch."""
    if isinstance(samples, ViewBatch):
        return samples.batch
    views = tuple(torch.stack(view) for view in zip(*(sample.views for sample in samples), strict=True))
    return Views(
        views,
        torch.stack([sample.labels for sample in samples]),
        torch.stack([sample.index for sample in samples]),
    )
