"""The contract of a published method: an ``nn.Module`` that anybody's loop can train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Progress:
    """Where training stands: counted in optimiser steps, not in batches."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: int

    @property
    def fraction(self) -> float:
        """Share of the optimiser steps done, in [0, 1]."""
        return self.step / max(1, self.total_steps)


class Method(nn.Module):
    """Base of every method.

    ``method(batch)`` is ``method.loss(batch)``, so that ``DistributedDataParallel(method)(batch)`` works and
    ``loss = method(batch); loss.backward()`` trains it in a bare loop; :mod:`cl_core.training` runs the same object
    under Lightning. An injected loss is stored as ``self.criterion``.
    """

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Loss of one training batch: a scalar, or a dict whose ``"loss"`` is optimised and whose rest is logged."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch).")

    def forward(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Same as :meth:`loss`."""
        return self.loss(batch)

    def embed(self, inputs: Any) -> Tensor:
        """What a downstream user wants: one row an input, shape (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} must define embed(inputs).")

    def on_fit_start(self, progress: Progress) -> None:  # noqa: B027
        """Hook: once before the first step, also after a resume."""

    def on_epoch_start(self, progress: Progress) -> None:  # noqa: B027
        """Hook: before the first batch of an epoch (clustering, curricula)."""

    def after_step(self, progress: Progress) -> None:  # noqa: B027
        """Hook: once per optimiser step, after it (momentum encoders, schedules), also under gradient accumulation."""

    def parameter_groups(self, weight_decay: float) -> Iterable[dict[str, Any]]:
        """Parameter groups for the optimiser; by default biases and vectors (norms) carry no weight decay."""
        decayed, exempt = [], []
        for parameter in self.parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim > 1 else exempt).append(parameter)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]
