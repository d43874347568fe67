"""How a method is optimised: the optimiser, its settings, and the learning rate over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

from cl_core import _checks
from cl_core.method import Method, Progress

MAIN = "main"
"""Name of the optimiser of parameter groups that name none."""


@dataclass(frozen=True)
class Optimization:
    """Optimiser and learning rate.

    Args:
        optimizer: "sgd", "adam", "adamw", or "lars": SGD whose rate for each matrix and filter is scaled by the ratio
            of the norms of weights and gradient (timm's, installed by ``cl-core[lars]``).
        lr: peak learning rate, for the batch size used; no scaling happens behind the scenes.
        weight_decay: on matrices and filters; ``Method.parameter_groups`` exempts biases and norms. "lars" needs some.
        momentum: of "sgd" and "lars".
        betas: of "adam" and "adamw".
        schedule: "cosine" falls towards ``final_lr``, which the step after the last would use; "step" is multiplied by
            ``decay`` at each milestone; "constant" stays.
        warmup_epochs: the rate rises linearly over this many epochs first; fractions allowed.
        warmup_lr: where that rise starts, and the last warm-up step then uses ``lr``; None starts one step above zero
            and reaches ``lr`` with the first step after it.
        final_lr: end of "cosine".
        milestones: epochs, of "step".
        decay: factor in (0, 1) at a milestone.
        trust_coefficient: > 0, of "lars": the ratio times this is the scale.
        trust_clip: for "lars", let no scaled rate exceed the rate itself (LARC).

    Reference of "lars": You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888. Parameters
    without weight decay, so biases and norms, are not scaled.
    """

    optimizer: Literal["sgd", "adam", "adamw", "lars"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float | None = None
    final_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    trust_coefficient: float = 0.001
    trust_clip: bool = False

    def __post_init__(self) -> None:
        _checks.choice("optimizer", self.optimizer, ("sgd", "adam", "adamw", "lars"))
        _checks.positive("trust_coefficient", self.trust_coefficient)
        _checks.choice("schedule", self.schedule, ("constant", "cosine", "step"))
        _checks.positive("lr", self.lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}.")
        for name in ("weight_decay", "momentum", "warmup_epochs", "warmup_lr", "final_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}.")
        if self.optimizer == "lars" and not self.weight_decay:
            raise ValueError(
                "weight_decay must be > 0 for optimizer='lars', which scales what decays and nothing else, got "
                f"{self.weight_decay}."
            )
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}.")
        rising = all(a < b for a, b in zip((0.0, *self.milestones), self.milestones, strict=False))
        if not rising or (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                "milestones must be rising epochs > 0 for schedule='step', and none for another, got "
                f"{self.milestones} for {self.schedule!r}."
            )

    def build(self, method: Method) -> dict[str, Optimizer]:
        """The optimisers of a method by name; one called "main" unless its groups name others.

        Raises:
            ValueError: if nothing is trainable or a parameter stands in two groups.
        """
        named: dict[str, list[dict[str, object]]] = {}
        for group in method.parameter_groups(self.weight_decay):
            settings = dict(group)
            name = str(settings.pop("optimizer", MAIN))
            settings["initial_lr"] = settings["lr"] = self.lr * float(settings.pop("lr_scale", 1.0))
            named.setdefault(name, []).append(settings)
        if not named:
            raise ValueError(f"{type(method).__name__} has no trainable parameter.")
        return {name: self._optimizer(groups) for name, groups in named.items()}

    def _optimizer(self, groups: list[dict[str, object]]) -> Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        if self.optimizer == "lars":
            try:
                from timm.optim.lars import Lars
            except ImportError:
                raise ValueError("optimizer 'lars' needs timm: pip install 'cl-core[lars]'.") from None
            trust = {"trust_coeff": self.trust_coefficient, "trust_clip": self.trust_clip}
            return Lars(groups, lr=self.lr, momentum=self.momentum, **trust)  # type: ignore[no-untyped-call]
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]))

    def factor(self, progress: Progress) -> float:
        """Share of the peak learning rate that the next step uses, a function of the progress alone.

        With w warm-up steps of S, step s (from 0) uses (s + 1) / (w + 1) while s < w, or with a ``warmup_lr``, as a
        share r of ``lr``, r + (1 - r) s / (w - 1). After that "cosine" uses f + (1 - f) (1 + cos(pi (s - w) / (S - w)))
        / 2 with f = final_lr / lr, and "step" ``decay`` to the number of milestones that lie behind.
        """
        warmup = min(round(self.warmup_epochs * progress.steps_per_epoch), progress.total_steps)
        if progress.step < warmup:
            if self.warmup_lr is None:
                return (progress.step + 1) / (warmup + 1)
            start = self.warmup_lr / self.lr
            return start + (1 - start) * progress.step / max(1, warmup - 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            behind = sum(
                progress.step >= round(epoch * progress.steps_per_epoch) for epoch in self.milestones
            )
            return float(self.decay**behind)
        done = (progress.step - warmup) / max(1, progress.total_steps - warmup)
        final = self.final_lr / self.lr
        return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    def set_rates(self, optimizers: dict[str, Optimizer], progress: Progress) -> None:
        """Give every parameter group its learning rate for the next step."""
        factor = self.factor(progress)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
