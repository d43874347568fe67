"""The words that signatures share: how to reduce, where to compute, with whom."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch.distributed import ProcessGroup

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""``"mean"`` over the anchors that count, ``"sum"``, or ``"none"`` for one value an anchor."""

Impl: TypeAlias = Literal["auto", "dense", "tiled"]
"""``"dense"`` keeps the similarity matrix, ``"tiled"`` never builds it, ``"auto"`` picks by size."""

Group: TypeAlias = ProcessGroup | Literal["world"] | None
"""Whose rows take part: ``None`` only this process's, ``"world"`` or a process group all of its ranks'."""
