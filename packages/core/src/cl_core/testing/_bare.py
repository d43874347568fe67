"""A bare training loop that does what the engine does, for the battery of methods."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cl_core.method import Method, Progress

STEPS_PER_EPOCH = 3
"""So that a resume after two steps stands in the middle of an epoch and meets the next one."""


@dataclass(frozen=True)
class Case:
    """A method with what it is tried on; see :func:`check_method`."""

    factory: Callable[[], Method]
    batches: list[Any]
    inputs: Any
    rows: int
    lr: float
    stored_loss: float | None


class BareTraining:
    """A bare loop that does what the engine does, in its order; resumable through bytes.

    Args:
        case: what to train.
        total_steps: of the whole training, as :class:`Progress` tells the method.
        seed: set before the method is made.
        weight_decay: handed to ``parameter_groups``.
        eps: of Adam.
        saved: what :meth:`save` returned, to go on from there.
    """

    def __init__(
        self,
        case: Case,
        *,
        total_steps: int = 4,
        seed: int = 0,
        weight_decay: float = 1e-4,
        eps: float = 1e-8,
        saved: bytes | None = None,
    ) -> None:
        self.case, self.total_steps, self.step = case, total_steps, 0
        self.method = made(case, seed=seed)
        self.optimizers = optimizers_of(self.method, case.lr, weight_decay, eps)
        self.backwards = 0  # calls of what an update of the method's own is given
        if saved is None:
            self.method.on_fit_start(self._progress(0))
            return
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.step = state["step"]
        self.method.load_state_dict(state["method"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.method.on_fit_start(self._progress(self.step // STEPS_PER_EPOCH))
        torch.set_rng_state(state["random"])

    def run(self, steps: int) -> list[float]:
        """Take optimiser steps on the batches in turn; the loss of each."""
        losses = []
        for _ in range(steps):
            epoch = self.step // STEPS_PER_EPOCH
            if self.step % STEPS_PER_EPOCH == 0:
                self.method.on_epoch_start(self._progress(epoch))
            loss = self._update(self.case.batches[self.step % len(self.case.batches)])
            self.step += 1
            self.method.after_step(self._progress(epoch))
            losses.append(loss.item())
        return losses

    def save(self) -> bytes:
        """All there is to go on from: method, optimisers, random state."""
        buffer = io.BytesIO()
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state = {"method": self.method.state_dict(), "optimizers": optimizers, "step": self.step}
        torch.save(state | {"random": torch.get_rng_state()}, buffer)
        return buffer.getvalue()

    def _progress(self, epoch: int) -> Progress:
        epochs = math.ceil(self.total_steps / STEPS_PER_EPOCH)
        return Progress(self.step, self.total_steps, epoch, epochs, STEPS_PER_EPOCH)

    def _update(self, batch: Any) -> Tensor:
        if type(self.method).update is not Method.update:
            return scalar_loss(self.method.update(batch, self.optimizers, self._backward), "update")
        loss = scalar_loss(self.method(batch))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        self.method.before_step(self._progress(self.step // STEPS_PER_EPOCH))
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        self.backwards += 1
        loss.backward()


def optimizers_of(method: Method, lr: float, weight_decay: float, eps: float) -> dict[str, Optimizer]:
    named: dict[str, list[dict[str, Any]]] = {}
    for group in method.parameter_groups(weight_decay):
        settings = dict(group)
        name, scale = settings.pop("optimizer", "main"), settings.pop("lr_scale", 1.0)
        named.setdefault(name, []).append(settings | {"lr": lr * scale})
    return {name: torch.optim.AdamW(groups, lr=lr, eps=eps) for name, groups in named.items()}


def made(case: Case, *, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = case.factory()
    method.prepare(case.batches)
    return method


def named_losses(losses: Any, source: str) -> Mapping[str, Tensor]:
    """What ``loss`` or ``update`` returned, as a dict."""
    named = {"loss": losses} if isinstance(losses, Tensor) else losses
    assert isinstance(named, Mapping), (
        f"{source} returns {type(losses).__name__}, not a scalar or a dict of scalars"
    )
    assert "loss" in named, f"there is no 'loss' among the {list(named)} that {source} returns"
    for name, value in named.items():
        assert isinstance(value, Tensor), f"{name} is {type(value).__name__}, not a tensor"
    return named


def scalar_loss(losses: Any, source: str = "loss") -> Tensor:
    return named_losses(losses, source)["loss"]
