"""Which training images take part: imbalanced classes, a fraction of each, or rows listed in a file.

A subset thins out what a method is trained on and nothing else: neighbours and probes are still fitted to all training
images, so that an encoder learnt from imbalanced images is judged on balanced ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.training.files import write_atomically


class Subset:
    """Base of every subset."""

    def select(self, rows: Tensor, labels: Tensor, *, total: int | None = None) -> Tensor:
        """The rows that are kept, ascending.

        Args:
            rows: row numbers in the source, shape (N,).
            labels: class of each, shape (N,); -1 where unknown.
            total: rows of the source, with those held out; None if these are all up to the last.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(rows, labels, total).")


class LinearImbalance(Subset):
    """Class i of C, in the order of the labels, keeps a share (i + 1) / C of its images.

    The subset of arXiv 2105.03746, whose draw (by NumPy, seed 2021) is not reproduced.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int = 2021) -> None:
        _checks.count("seed", seed, at_least=0)
        self.seed = seed

    def select(self, rows: Tensor, labels: Tensor, *, total: int | None = None) -> Tensor:
        """The rows that are kept, ascending."""
        return _by_class(rows, labels, lambda place, classes: (place + 1) / classes, self.seed)


class ExponentialImbalance(Subset):
    """Class i of C keeps a share ratio^(-i / (C - 1)): the first all of its images, the last one in ``ratio``.

    Args:
        ratio: of the largest class to the smallest, >= 1.
        seed: of the draw.

    Reference: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    """

    def __init__(self, ratio: float = 100.0, seed: int = 0) -> None:
        _checks.number("ratio", ratio, at_least=1)
        _checks.count("seed", seed, at_least=0)
        self.ratio, self.seed = ratio, seed

    def select(self, rows: Tensor, labels: Tensor, *, total: int | None = None) -> Tensor:
        """The rows that are kept, ascending."""
        return _by_class(rows, labels, lambda i, classes: self.ratio ** (-i / max(classes - 1, 1)), self.seed)


class Fraction(Subset):
    """An equal share of every class; images without a label count as one class.

    Args:
        share: in (0, 1].
        seed: of the draw.
    """

    def __init__(self, share: float = 0.1, seed: int = 0) -> None:
        _checks.positive("share", share)
        if share > 1:
            raise ValueError(f"share must be in (0, 1], got {share}.")
        _checks.count("seed", seed, at_least=0)
        self.share, self.seed = share, seed

    def select(self, rows: Tensor, labels: Tensor, *, total: int | None = None) -> Tensor:
        """The rows that are kept, ascending."""
        return _by_class(rows, labels - labels.min(), lambda *_: self.share, self.seed)


class IndexFile(Subset):
    """Rows listed in a text file, one number a line; what follows a ``#`` is a remark.

    They count the source's training images from 0, before any are held out for validation; those held out stay out.

    Args:
        path: the file; :func:`write_rows` makes one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def select(self, rows: Tensor, labels: Tensor, *, total: int | None = None) -> Tensor:
        """The rows that are kept, ascending."""
        listed, last = self._read(), int(rows.max()) if total is None else total - 1
        if max(listed) > last:
            raise ValueError(f"{self.path} lists row {max(listed)}, but there are rows 0 to {last} only.")
        return rows[torch.isin(rows, torch.tensor(listed))]

    def _read(self) -> list[int]:
        if not self.path.is_file():
            raise FileNotFoundError(f"no file of rows {self.path}: pass one with a row number a line.")
        numbers = []
        for number, line in enumerate(self.path.read_text("utf-8", errors="replace").splitlines(), 1):
            text = line.partition("#")[0].strip()
            if text and not (text.isascii() and text.isdecimal()):
                raise ValueError(f"{self.path}, line {number}, must be a row number >= 0, got {text!r:.40}.")
            if text:
                numbers.append(int(text))
        if not numbers:
            raise ValueError(f"{self.path} lists no row.")
        return numbers


def write_rows(path: str | Path, rows: Tensor) -> None:
    """Write row numbers as :class:`IndexFile` reads them.

    Args:
        path: where to.
        rows: shape (N,), integers >= 0.
    """
    _checks.labels("rows", rows, rows=len(rows), of="rows", device=rows.device)
    text = "".join(f"{row}\n" for row in rows.tolist())
    write_atomically(Path(path), lambda temporary: temporary.write_text(text))


def _by_class(rows: Tensor, labels: Tensor, share: Callable[[int, int], float], seed: int) -> Tensor:
    """Keep a drawn share of each class, at least one image; ``share`` is told the class's place and their number."""
    if bool((labels < 0).any()):
        raise ValueError("a subset by class needs labelled training images, got some without a label.")
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    kept = []
    for place, label in enumerate(classes):
        members = rows[labels == label]
        count = max(1, round(len(members) * share(place, len(classes))))
        kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(kept).sort().values
