"""What every loss module is, and the three shapes of input a loss can ask for."""

from __future__ import annotations

import inspect

from torch import Tensor, nn


class ContrastiveLoss(nn.Module):
    """Base of all losses: stores its hyper-parameters under their own names and shows them.

    Subclasses say by their base what they are called with, which is also how the battery of
    :mod:`cl_core.testing` knows what to feed them.
    """

    def extra_repr(self) -> str:
        """Show the constructor's arguments as stored."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class TwoViewLoss(ContrastiveLoss):
    """Called with ``(z1, z2)``: row i of both is the same sample."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z1, z2).")


class QueryKeyLoss(ContrastiveLoss):
    """Called with ``(query, key, negatives=None)``: row i of ``key`` is the positive of row i of ``query``."""

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of queries (N, D) against keys (N, D) and optional extra negatives (K, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(query, key, negatives).")


class LabelledLoss(ContrastiveLoss):
    """Called with ``(z, labels)``: rows of equal label are positives."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Loss of embeddings (N, D) with integer labels (N,)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, labels).")
