"""Partner classes for the labels of a batch: which other class each sample is to be paired with.

Example:
    >>> import torch
    >>> from cl_core.samplers import DistinctPartners
    >>> partners = DistinctPartners(num_classes=3)(torch.tensor([0, 1, 2, 2]), torch.Generator().manual_seed(0))
    >>> bool((partners == torch.tensor([0, 1, 2, 2])).any())
    False
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_core import _checks, _rows


class PartnerClasses(nn.Module):
    """Base: ``draw(labels, generator)`` gives one partner class a label.

    What is drawn depends on labels and generator alone, also on which device the labels are. Of several processes each
    draws for its own labels; they should not have generators of the same seed.
    """

    def forward(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Partner classes of a batch.

        Args:
            labels: integers, shape (B,).
            generator: source of the draws; None takes torch's global one.

        Returns:
            Integers, shape (B,), of the type and on the device of the labels.

        Raises:
            ValueError: if labels is no vector, or holds a class that is not known.
        """
        rows = len(labels) if isinstance(labels, Tensor) and labels.ndim else 0
        device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
        _checks.labels("labels", labels, rows=rows, of="the batch", device=device)
        return self._draw(labels, generator).to(labels.dtype)

    def _draw(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Partners, of any integer type."""
        raise NotImplementedError(f"{type(self).__name__} must define _draw(labels, generator).")

    def extra_repr(self) -> str:
        """Show the numbers that it was made with."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return ", ".join(f"{name}={value!r}" for name, value in numbers.items() if name != "training")


class ArbitraryPartners(PartnerClasses):
    """The labels of the batch in a random order: any two of its classes, a class with itself included."""

    def _draw(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        return labels[
            torch.randperm(len(labels), generator=generator, device=_source(generator)).to(labels.device)
        ]


class IdenticalPartners(PartnerClasses):
    """The labels themselves: positives of the same class alone."""

    def _draw(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        return labels.clone()


class DistinctPartners(PartnerClasses):
    """For each label another class, each equally likely; (y + r) mod C with r drawn from 1 to C - 1.

    The batch may have no sample of it.

    Args:
        num_classes: classes C >= 2, numbered 0 to C - 1.
    """

    def __init__(self, num_classes: int) -> None:
        _checks.count("num_classes", num_classes, at_least=2)
        super().__init__()
        self.num_classes = num_classes

    def _draw(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        labels = _in_range(labels, self.num_classes)
        options: Any = {"generator": generator, "device": _source(generator)}
        steps = torch.randint(1, self.num_classes, labels.shape, **options)
        return (labels + steps.to(labels.device)) % self.num_classes


class WeightedPartners(PartnerClasses):
    r"""For each label a class at a distance d from it, drawn with a weight that falls with d.

        P(b | a) = w(d_ab) / sum_c w(d_ac),   w(d) = (1 + d)^(-exponent) if d < max_level, else 0

    Exponent 0 makes all classes within ``max_level`` equally likely; larger ones prefer near classes.

    Args:
        distances: d >= 0 of all classes, such as their distance in a hierarchy, shape (C, C); a tensor, or numbers row
            by row. Kept as numbers, which are what an export or a configuration can write down.
        exponent: >= 0.
        max_level: classes at this distance or farther are never drawn; None: all can be.

    Raises:
        ValueError: if distances is no square matrix of numbers >= 0, or a class has none within ``max_level``.

    Cost: O(C^2) memory, O(B C) a batch.
    """

    def __init__(
        self,
        distances: Sequence[Sequence[float]] | Tensor,
        exponent: float,
        *,
        max_level: float | None = None,
    ) -> None:
        distances = _matrix(distances)
        if distances.ndim != 2 or len(set(distances.shape)) != 1:
            raise ValueError(f"distances must be of shape (C, C), got {tuple(distances.shape)}.")
        if not bool(((distances >= 0) & (distances < math.inf)).all()):
            raise ValueError("distances must be finite and >= 0, got other values.")
        _checks.number("exponent", exponent, at_least=0)
        if max_level is not None:
            _checks.positive("max_level", max_level)
        super().__init__()
        self.distances: list[list[float]] = distances.tolist()
        self.num_classes, self.exponent, self.max_level = len(distances), exponent, max_level
        weights = (1 + distances.to(_rows.accumulation_dtype(distances.device))) ** -exponent
        if max_level is not None:
            weights = weights.masked_fill(distances >= max_level, 0)
        if not bool((weights.sum(1) > 0).all()):
            raise ValueError(
                f"distances must hold one below max_level {max_level} for every class, got a row without."
            )
        # No buffer: in half precision, which a method may be turned to, many classes would never be drawn.
        self._probabilities = weights / weights.sum(1, keepdim=True)

    @property
    def probabilities(self) -> Tensor:
        """P(b | a), row a, shape (C, C)."""
        return self._probabilities

    def _draw(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        labels = _in_range(labels, self.num_classes)
        table = self._probabilities.to(labels.device, _rows.accumulation_dtype(labels.device))
        self._probabilities = table
        options: Any = {"generator": generator, "device": _source(generator), "dtype": table.dtype}
        place = torch.rand(len(labels), 1, **options).to(labels.device)
        cumulative = table[labels].cumsum(1)
        # Divided by the last entry the sum is 1, so that a place below 1 is met; a class of no weight adds no room.
        return torch.searchsorted(cumulative / cumulative[:, -1:], place, right=True)[:, 0]


def _matrix(distances: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """Numbers row by row as a tensor."""
    if isinstance(distances, Tensor):
        return distances.detach()
    try:
        return torch.tensor(distances, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # rows of other lengths, or no numbers
        came = type(distances).__name__
        raise ValueError(
            f"distances must be of shape (C, C), a tensor or rows of numbers, got {came}."
        ) from None


def _source(generator: torch.Generator | None) -> torch.device:
    """Where numbers are drawn; on the CPU without a generator, so that the device of the labels does not matter."""
    return torch.device("cpu") if generator is None else generator.device


def _in_range(labels: Tensor, classes: int) -> Tensor:
    """Labels as int64, unless one is no class, or a partner would not fit their type."""
    if classes - 1 > torch.iinfo(labels.dtype).max:
        raise ValueError(f"labels must be of a type that holds {classes} classes, got {labels.dtype}.")
    inside = ((labels >= 0) & (labels < classes)).all()
    _checks.require(inside, f"labels must lie in [0, {classes}), got another class.")
    return labels.long()
