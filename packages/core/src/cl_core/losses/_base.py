"""What every loss module is, and the shapes of input a loss can ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_core import _checks, _rows, similarity
from cl_core.scores import Scored, _temperature_of, evenly

_CHECKS: dict[str, Callable[[Any], None]] = {
    "temperature": lambda value: _checks.positive("temperature", value),
    "reduction": _checks.reduction,
    "impl": _checks.impl,
    "group": _checks.group,
    "normalize": lambda value: _checks.flag("normalize", value),
    "symmetric": lambda value: _checks.flag("symmetric", value),
    "detach_weight": lambda value: _checks.flag("detach_weight", value),
}


class ContrastiveLoss(nn.Module):
    """Base of all losses: stores its hyper-parameters under their own names and shows them.

    Subclasses say by their base what they are called with, which is also how the battery of
    :mod:`cl_core.testing` knows what to feed them.

    Attributes:
        several_views: whether a list of two or more views may stand for ``z1, z2`` (and for queries, keys).
    """

    several_views: ClassVar[bool] = False

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        self._names = tuple(hyperparameters)
        for name, value in hyperparameters.items():
            _CHECKS.get(name, lambda _: None)(value)
            setattr(self, name, value)

    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments as they stand now: what the functional form is called with."""
        return {name: getattr(self, name) for name in self._names}

    def measures(self, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        """What is worth watching of a batch beside its loss: names and scalars, without gradient.

        Called as rarely as it is looked at, with the rows of this process alone, so that one rank may call it. Of too
        few rows to measure anything it is empty: a rank may hold one row, or none.

        Args:
            inputs: as :meth:`forward` takes them.
            options: likewise.
        """
        return {}

    def scored(self, *inputs: Any, **options: Any) -> Scored | None:
        """Scores of anchors with positives and negatives, for a record of them; None if it has no matrix of them.

        A loss that compares pairs of rows needs none: whoever records takes the products of its rows. Others give those
        of this process's rows.

        Args:
            inputs: as :meth:`forward` takes them.
            options: as :meth:`forward` takes them, and ``rows``: at most so many anchors, evenly spaced; None for all.
        """
        return None

    def advice(self, measures: Mapping[str, Tensor]) -> str | None:
        """A sentence to warn with if :meth:`measures` tell of trouble, or None."""
        return None

    def extra_repr(self) -> str:
        """Show the hyper-parameters."""
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())


class TwoViewLoss(ContrastiveLoss):
    """Called with ``(z1, z2)``: row i of both is the same sample."""

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z1, z2).")


class QueryKeyLoss(TwoViewLoss):
    """Called with ``(query, key, negatives=None)``: row i of ``key`` is the positive of row i of ``query``.

    Without negatives it is a loss of two views; with a queue of negatives, what MoCo asks for.
    """

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of queries (N, D) against keys (N, D) and optional extra negatives (K, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(query, key, negatives).")


class QueueLoss(ContrastiveLoss):
    """Called with ``(query, key, queue)``: two views of N samples, both compared with the K rows of a queue."""

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """Loss of queries (N, D) and keys (N, D) over a queue (K, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(query, key, queue).")


class LabelledLoss(ContrastiveLoss):
    """Called with ``(z, labels)``: rows of equal label are positives."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Loss of embeddings (N, D) with integer labels (N,)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, labels).")

    def scored(
        self, z: Tensor, labels: Tensor, *_: Any, rows: int | None = None, **options: Any
    ) -> Scored | None:
        """Products of the batch's rows: those of equal label are positives, those of another one negatives."""
        with _rows.measuring(z.device):
            unit = similarity.scaled_rows(z, normalize=bool(getattr(self, "normalize", True)))
            chosen = evenly(len(unit), rows, unit.device)
            same = labels[chosen, None] == labels
            itself = chosen[:, None] == torch.arange(len(unit), device=unit.device)
            return Scored(unit[chosen] @ unit.T, same & ~itself, ~same, _temperature_of(self))


class ClassPairLoss(ContrastiveLoss):
    """Called with ``(query, key, labels, partners, gates)``: each query is drawn to the keys of a partner class.

    Row i of all five belongs to one anchor: query and gate have the same width, labels and partners are integers.
    """

    def forward(self, query: Tensor, key: Tensor, labels: Tensor, partners: Tensor, gates: Tensor) -> Tensor:
        """Loss of queries and keys (B, K) with classes and partner classes (B,) and gates (B, K)."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(query, key, labels, partners, gates)."
        )


class EmbeddingLoss(ContrastiveLoss):
    """Called with ``(z)``: rows of one view."""

    def forward(self, z: Tensor) -> Tensor:
        """Loss of embeddings (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z).")


class PredictionLoss(ContrastiveLoss):
    """Called with ``(p, z)``: row i of ``p`` predicts row i of ``z``, a constant unless asked otherwise."""

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Loss of predictions (N, D) and targets (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(p, z).")


class ScoresLoss(ContrastiveLoss):
    """Called with ``(*scores, queue=None)``: scores of N samples over K prototypes, one tensor a crop."""

    def forward(self, *scores: Tensor, queue: Sequence[Tensor] | None = None) -> Tensor:
        """Loss of two or more crops' scores (N, K), with optional scores (Q, K) of earlier samples."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(*scores, queue).")


class PrototypeLoss(ContrastiveLoss):
    """Called with ``(z, prototypes, assignments, concentration=None)``: each row belongs to a prototype."""

    def forward(
        self,
        z: Tensor,
        prototypes: Tensor | Sequence[Tensor],
        assignments: Tensor | Sequence[Tensor],
        concentration: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Loss of embeddings (N, D) over prototypes (K, D), of which row i has number ``assignments[i]``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z, prototypes, assignments).")
