"""The contract of a published method: an ``nn.Module`` that anybody's loop can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Progress:
    """Where training stands: counted in optimiser steps, not in batches.

    Attributes:
        step: optimiser steps done.
        total_steps: optimiser steps of the whole training.
        epoch: number of the running epoch, from 0.
        total_epochs: epochs of the whole training, of which a limit of steps may cut the last one short.
        epoch_steps: optimiser steps of a whole epoch; None where no epoch is cut short.
    """

    step: int
    total_steps: int
    epoch: int
    total_epochs: int
    epoch_steps: int | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps of a whole epoch: what lengths in epochs are multiplied by."""
        return self.epoch_steps or self.total_steps / max(1, self.total_epochs)

    @property
    def fraction(self) -> float:
        """Share of the optimiser steps done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.total_steps))


class Method(nn.Module):
    """Base of every method.

    ``method(batch)`` is ``method.loss(batch)``, so that ``DistributedDataParallel(method)(batch)`` works and
    ``loss = method(batch); loss.backward()`` trains it in a bare loop; :mod:`cl_core.training` runs the same
    object under Lightning. An injected loss is stored as ``self.criterion`` (an attribute called ``loss``
    would hide behind the method); every other argument of the constructor under its own name, which is what
    an export writes down. Random numbers come from torch's global generators, which the loop seeds and
    restores; a method sets no seed.
    """

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Loss of one training batch: a scalar, or a dict whose ``"loss"`` is optimised, the rest logged."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch).")

    def forward(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """Same as :meth:`loss`."""
        return self.loss(batch)

    def embed(self, inputs: Any) -> Tensor:
        """What a downstream user wants: one row an input, shape (N, D), whatever other inputs are there."""
        raise NotImplementedError(f"{type(self).__name__} must define embed(inputs).")

    def classify(self, inputs: Any) -> Tensor:
        """Define it where the method has a classifier of its own: a score for every class, shape (N, C).

        Column c speaks for label c and the largest score of a row is its answer, whatever other inputs are there. An
        evaluation then also gives the share of right answers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no classifier of its own.")

    def build(self, data: Any) -> None:
        """Hook: before anything else, also before weights are loaded, with the data set that they are for.

        For parts whose shapes follow from the data (a layer as wide as an input has features). What is built is kept
        in the arguments that an export writes down; called again, it builds nothing anew.
        """

    def prepare(self, batches: Iterable[Any]) -> None:
        """Hook: once before a training that begins, not before one that goes on, with the batches of an epoch.

        For methods that must have seen the data before they can learn from them (a first clustering, statistics).
        Under several processes each gets its own part of the batches.
        """

    def on_fit_start(self, progress: Progress) -> None:
        """Hook: once before the first step, also after a resume."""

    def on_epoch_start(self, progress: Progress) -> None:
        """Hook: before the first batch of an epoch (clustering, curricula)."""

    def before_step(self, progress: Progress) -> None:
        """Hook: after the backward, before each optimiser steps (a gradient set to None holds its parameter still)."""

    def after_step(self, progress: Progress) -> None:
        """Hook: after each optimiser step, once (momentum encoders, schedules), also when accumulating."""

    def parameter_groups(self, weight_decay: float) -> Iterable[dict[str, Any]]:
        """Parameter groups for the optimiser; by default biases and vectors (norms) carry no weight decay.

        Nor do the parameters that a module names in an attribute ``undecayed``, such as ``("embedding.weight",)``.
        The parameters of a module with an attribute ``lr_scale`` learn at so many times the rate.

        A group may scale the learning rate by ``"lr_scale"`` and name its ``"optimizer"``: groups of one name
        share an optimiser. All optimisers step on the one loss, unless :meth:`update` is defined.
        """
        undecayed: set[Tensor] = set()
        scales: dict[Tensor, float] = {}
        for module in self.modules():
            undecayed |= {module.get_parameter(name) for name in getattr(module, "undecayed", ())}
            if (scale := getattr(module, "lr_scale", None)) is not None:
                scales |= dict.fromkeys(module.parameters(), float(scale))
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                spared = parameter.ndim <= 1 or parameter in undecayed
                key = scales.get(parameter, 1.0), 0.0 if spared else weight_decay
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": params, "weight_decay": decay} | ({} if scale == 1 else {"lr_scale": scale})
            for (scale, decay), params in sorted(
                groups.items(), key=lambda entry: (-entry[0][0], -entry[0][1])
            )
        ]

    def update(
        self, batch: Any, optimizers: Mapping[str, Optimizer], backward: Callable[[Tensor], None]
    ) -> Tensor | dict[str, Tensor]:
        """Define it when optimisers take turns: do all steps of one batch, return what :meth:`loss` would.

        Args:
            batch: the training batch.
            optimizers: by the names of :meth:`parameter_groups`; zero, step and order them freely.
            backward: call it instead of ``loss.backward()``: it also scales for mixed precision.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no update of its own.")
