"""Anchors against candidates, some anchors at a time: distances, and who is whose positive or negative."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._rows import accumulation_dtype, tiles
from cl_core.similarity import scaled_rows

# Entries of a tile: 2 MB in float64. Not fewer than 16 anchors at a time, or products become slow.
_ENTRIES = 1 << 18
_FEWEST_ANCHORS = 16


class Comparison:
    """Anchors (N, D), the candidates (M, D) they are compared with, and the labels of both.

    A candidate of the anchor's label is a positive, any other a negative; never the anchor itself, nor a
    candidate of the anchor's id. An anchor without a positive has no negatives either, so that it never
    counts.

    Rows are in float64 (float32 where the device has none): margins compare nearly equal distances, and a
    distance taken from products, sqrt(2 - 2 s), has half the digits of the product.

    Args:
        z: anchors, shape (N, D).
        labels: integers, shape (N,).
        ref: candidates, shape (M, D); None compares z with itself.
        ref_labels: integers, shape (M,).
        ids: integers, shape (N,): which sample an anchor is, to tell it from its own copy in ``ref``.
        ref_ids: integers, shape (M,).
        normalize: scale rows to unit length first.
    """

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        ref: Tensor | None = None,
        ref_labels: Tensor | None = None,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
        normalize: bool = True,
    ) -> None:
        _checks.embeddings("z", z)
        _checks.labels("labels", labels, rows=len(z), of="z", device=z.device)
        _together(ref=ref, ref_labels=ref_labels)
        _together(ids=ids, ref_ids=ref_ids)
        self.dtype = torch.promote_types(z.dtype, torch.float32)  # of results
        self.rows = self.columns = self._prepare(z, normalize)
        self.alone = ref is None  # z is compared with itself
        self.row_labels = self.column_labels = labels
        self.row_ids, self.column_ids = ids, ref_ids
        if ref is not None and ref_labels is not None:
            _checks.embeddings("ref", ref)
            _checks.alongside(z=z, ref=ref)
            _checks.labels("ref_labels", ref_labels, rows=len(ref), of="ref", device=z.device)
            self.columns, self.column_labels = self._prepare(ref, normalize), ref_labels
        elif ids is not None:
            raise ValueError(
                "ids must come with ref, got them without; rows of z are told apart by their place."
            )
        else:
            self.row_ids = self.column_ids = torch.arange(len(z), device=z.device)
        if ids is not None and ref_ids is not None:
            _checks.labels("ids", ids, rows=len(z), of="z", device=z.device)
            _checks.labels("ref_ids", ref_ids, rows=len(self.columns), of="ref", device=z.device)

    @staticmethod
    def _prepare(z: Tensor, normalize: bool) -> Tensor:
        return scaled_rows(z.to(accumulation_dtype(z.device)), normalize=normalize, source=z.dtype)

    def parts(self) -> list[slice]:
        """Slices of anchors whose comparison with all candidates is one tile."""
        return list(tiles(len(self.rows), max(_FEWEST_ANCHORS, _ENTRIES // len(self.columns))))

    def masks(self, part: slice) -> tuple[Tensor, Tensor]:
        """Which candidates are positives and which are negatives of some anchors, two boolean (T, M)."""
        positive = self.row_labels[part, None] == self.column_labels
        negative = ~positive
        if self.row_ids is not None and self.column_ids is not None:
            other = self.row_ids[part, None] != self.column_ids
            positive &= other
            negative &= other
        return positive, negative & positive.any(1, keepdim=True)

    def distances(self, part: slice) -> Tensor:
        """Euclidean distances of some anchors to all candidates, (T, M)."""
        return euclidean(self.rows[part], self.columns)

    def similarities(self, part: slice) -> Tensor:
        """Dot products of some anchors with all candidates, (T, M)."""
        return products(self.rows[part], self.columns)

    def anchors(self) -> Tensor:
        """Which anchors have a positive, boolean (N,)."""
        found = torch.empty(len(self.rows), dtype=torch.bool, device=self.rows.device)
        for part in self.parts():
            found[part] = self.masks(part)[0].any(1)
        return found

    def most_positives(self) -> int:
        """Largest number of positives that an anchor can have; while compiling, where labels are unknown, a bound."""
        if torch.compiler.is_compiling():
            return len(self.columns)
        return int(torch.unique(self.column_labels, return_counts=True)[1].max())

    def each(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Part by part: the slice of anchors, their positives and their negatives."""
        for part in self.parts():
            yield part, *self.masks(part)


def products(x: Tensor, y: Tensor) -> Tensor:
    """All dot products, in the precision of the rows whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.t()


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """All Euclidean distances."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    return from_square(scale - 2 * products(x, y), scale)


def from_square(square: Tensor, scale: Tensor) -> Tensor:
    """Distance from its square, with a gradient of zero where rows coincide.

    Rows coincide if the square is within the rounding of the terms it is a difference of, whose sum is
    ``scale``.
    """
    apart = square > 64 * torch.finfo(square.dtype).eps * scale
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _together(**tensors: Tensor | None) -> None:
    first, second = tensors
    if (tensors[first] is None) != (tensors[second] is None):
        raise ValueError(f"{first} and {second} must be given together, got only one of them.")
