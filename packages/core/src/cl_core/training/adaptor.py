"""The Lightning module around a method."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cl_core import _checks
from cl_core.distributed import unbroadcast_buffers
from cl_core.gradient_cache import Portions, check_rows_are_alone, method_gradient_cache
from cl_core.method import Method, Progress
from cl_core.training.data import Data
from cl_core.training.loader import TrainLoader
from cl_core.training.optimization import Optimization

STATE = "cl_core"
"""Key of our entry in a checkpoint."""


class LitMethod(pl.LightningModule):
    """Any :class:`~cl_core.method.Method` under Lightning.

    One optimiser runs under Lightning's automatic optimisation. Several, or a method with an
    :meth:`~cl_core.method.Method.update` of its own, run under manual optimisation, for which Lightning's
    Trainer knows neither accumulation nor clipping: give these here (:func:`cl_core.training.fit` does).

    Checkpoints hold tensors and plain values only, among them the random state of every process, which is put
    back where training goes on: what was drawn while everything was set up then leaves no trace.

    Args:
        method: what is trained; never pickled.
        optimization: optimiser and learning rate.
        accumulate_batches: batches an optimiser step, under manual optimisation.
        gradient_clip: largest norm of the gradient of an optimiser, under manual optimisation; None for any.
        max_steps: optimiser steps after which to stop, under manual optimisation; -1 for no such limit.
        gradient_cache_chunk: rows encoded at a time, for batches whose activations do not fit; None for all. See
            :mod:`cl_core.gradient_cache`.
        data: what to train on; None if the loader is given to the Trainer's ``fit``.
    """

    def __init__(
        self,
        method: Method,
        optimization: Optimization | None = None,
        *,
        accumulate_batches: int = 1,
        gradient_clip: float | None = None,
        max_steps: int = -1,
        gradient_cache_chunk: int | None = None,
        data: Data | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.optimization = optimization or Optimization()
        self.accumulate_batches = accumulate_batches
        self.gradient_clip = gradient_clip
        self.max_steps = max_steps
        self.gradient_cache_chunk = gradient_cache_chunk
        self.data = data
        self.own_update = type(method).update is not Method.update
        self.named_optimizers = self.optimization.build(method)
        plain = len(self.named_optimizers) == 1 and not self.own_update
        self.automatic_optimization = plain and gradient_cache_chunk is None
        if gradient_cache_chunk is not None:
            _checks.count("gradient_cache_chunk", gradient_cache_chunk)
            check_rows_are_alone(method)
        if self.own_update and gradient_cache_chunk is not None:
            raise ValueError(
                f"{type(method).__name__} makes its own updates, so it cannot use a gradient cache."
            )
        if self.own_update and accumulate_batches > 1:
            raise ValueError(
                f"{type(method).__name__} makes its own updates, so accumulate_grad_batches must be 1, "
                f"got {accumulate_batches}."
            )
        self.steps_done = 0
        self.started = False  # whether training goes on: everything has been restored
        self._batches: int | None = None  # of an epoch, as the checkpoint counts
        self._random_state: dict[str, Any] | None = None
        self.last_losses: dict[str, Tensor] = {}
        self.epoch_metrics: dict[str, float] = {}
        self.shown_metrics: dict[str, float] = {}

    @property
    def progress(self) -> Progress:
        """Where training stands; needs a running trainer."""
        trainer, limit = self.trainer, self._limit
        steps = math.ceil(trainer.num_training_batches / self._accumulate)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        total = steps * epochs if epochs else limit
        if limit > 0:
            total = min(total, limit)
        epochs = math.ceil(total / max(1, steps))
        return Progress(self.steps_done, int(total), trainer.current_epoch, epochs, steps)

    @property
    def _limit(self) -> int:
        """Optimiser steps after which to stop, -1 for no such limit."""
        return self.trainer.max_steps if self.automatic_optimization else self.max_steps

    @property
    def _accumulate(self) -> int:
        """Batches an optimiser step."""
        return (
            self.trainer.accumulate_grad_batches if self.automatic_optimization else self.accumulate_batches
        )

    def train_dataloader(self) -> TrainLoader:
        """Loader of ``data``, made when the number of processes is known."""
        if self.data is None:
            raise ValueError("LitMethod has no data: pass data=..., or a loader to Trainer.fit.")
        return TrainLoader(self.data, pin_memory=self.device.type == "cuda")

    def configure_optimizers(self) -> list[Optimizer]:
        """The method's optimisers; their rates are set before each step, so there is no scheduler."""
        return list(self.named_optimizers.values())

    def forward(self, inputs: Any) -> Tensor:
        """Embeddings, as ``method.embed``."""
        return self.method.embed(inputs)

    def setup(self, stage: str) -> None:
        """Before the method is wrapped: leave out of the broadcast at every forward what does not need it."""
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, unbroadcast_buffers(self))

    def on_fit_start(self) -> None:
        """After it is wrapped and moved: what the wrapper leaves alone begins as on the first process."""
        if self.trainer.world_size > 1:
            for name in unbroadcast_buffers(self):
                torch.distributed.broadcast(self.get_buffer(name), 0)

    def on_train_start(self) -> None:
        """Tell the method, after Lightning has restored everything, and put back the random state."""
        if self._batches not in (None, self.trainer.num_training_batches):
            raise ValueError(
                f"the checkpoint counts {self._batches} batches an epoch, this run "
                f"{self.trainer.num_training_batches}: resume with the same data, batch size and number of "
                "processes, or start anew with --init_from."
            )
        if self.steps_done == 0 and type(self.method).prepare is not Method.prepare:
            self.method.prepare(self._batches_of_an_epoch())
        self.method.on_fit_start(self.progress)
        if self._random_state is not None:
            restore_random_state(self._random_state)
        self.started = True

    def on_train_epoch_start(self) -> None:
        """Tell the loader and the method which epoch begins."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainLoader):
            loader.set_epoch(self.trainer.current_epoch)
        self._random_state = None  # a whole epoch begins: nothing was drawn since on_train_start
        self.method.on_epoch_start(self.progress)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put back the random state of a run resumed in the middle of an epoch; set the learning rates."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None
        self.optimization.set_rates(self.named_optimizers, self.progress)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One batch: under automatic optimisation its loss, else all of its updates."""
        if self.automatic_optimization:
            losses = self._losses(self.method(batch))
            self._log(losses)
            return losses["loss"]
        if self.own_update:
            losses = self._losses(
                self.method.update(
                    batch, self._lightning_optimizers(), lambda loss: self.manual_backward(loss)
                )
            )
            self._after_step()
        elif self.gradient_cache_chunk is not None:
            value, portions = method_gradient_cache(self.method, batch, chunk_size=self.gradient_cache_chunk)
            losses = {"loss": value}
            self._shared_update(portions, batch_idx)
        else:
            losses = self._losses(self.method(batch))
            self._shared_update(Portions(iter([losses["loss"]]), 1), batch_idx)
        self._log(losses)
        return None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, then the method's ``after_step``: once a step, whatever is accumulated."""
        super().optimizer_step(*args, **kwargs)
        self._after_step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Tell the method, and clip under manual optimisation; gradients are no longer scaled for half precision."""
        self.method.before_step(self.progress)
        if not self.automatic_optimization and self.gradient_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the step count and every process's random state, as tensors."""
        limit, steps = self._limit, math.ceil(self.trainer.num_training_batches / self._accumulate)
        checkpoint[STATE] = {
            "steps_done": self.steps_done,
            "ended_inside": 0 < limit <= self.steps_done and self.steps_done % steps != 0,
            "batches": int(self.trainer.num_training_batches),
            "random_states": gathered(random_state()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        state = checkpoint[STATE]
        self.steps_done, self._batches = state["steps_done"], state["batches"]
        epochs, limit = self.trainer.max_epochs, self._limit
        if epochs is not None and 0 < epochs <= checkpoint["epoch"]:
            raise ValueError(
                f"max_epochs must be at least {checkpoint['epoch'] + 1}, begun so far, got {epochs}."
            )
        if 0 < limit < self.steps_done:
            raise ValueError(f"max_steps must be at least {self.steps_done}, done so far, got {limit}.")
        if state.get("ended_inside") and limit != self.steps_done:
            raise ValueError(
                f"max_steps was {self.steps_done} and ended the run inside an epoch, whose other batches are lost: "
                f"start another run from its weights with --init_from, got {limit}."
            )
        states = state["random_states"]
        # Another number of processes is another training: nothing to be exact about.
        self._random_state = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def report(self, name: str, value: float, *, show: str | None = None) -> None:
        """Note a number of this epoch, for the table, the loggers and (under ``show``) the progress bar."""
        self.epoch_metrics[name] = value
        if show is not None:
            self.shown_metrics[show] = value
        if self.trainer.loggers:
            self.log(name, value, on_step=False, on_epoch=True, rank_zero_only=True)

    def _batches_of_an_epoch(self) -> Iterator[Any]:
        """The training data once, on the device, which the loader that trains takes no note of."""
        loader: Any = self.trainer.train_dataloader
        if isinstance(loader, TrainLoader):
            loader = loader.in_order(*process())
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "looking_at"):
                loader = callback.looking_at(loader)
        for batch in loader:
            yield self.trainer.strategy.batch_to_device(batch)

    def _shared_update(self, portions: Portions, batch_idx: int) -> None:
        """Back-propagate the portions of a loss; step all optimisers if it is time."""
        last = batch_idx + 1 == self.trainer.num_training_batches
        steps = last or (batch_idx + 1) % self.accumulate_batches == 0
        # Processes average their gradients once a step, with the last portion of all.
        alone = self.trainer.world_size == 1
        block = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        for portion in portions:
            with contextlib.nullcontext() if alone or (steps and not len(portions)) else block():
                self.manual_backward(portion / self.accumulate_batches)
        if steps:
            for optimizer in self._lightning_optimizers().values():
                optimizer.step()
                optimizer.zero_grad()
            self._after_step()

    def _lightning_optimizers(self) -> dict[str, Any]:
        wrapped = self.optimizers()
        return dict(
            zip(self.named_optimizers, wrapped if isinstance(wrapped, list) else [wrapped], strict=True)
        )

    def _after_step(self) -> None:
        self.steps_done += 1
        self.method.after_step(self.progress)
        if not self.automatic_optimization and 0 < self.max_steps <= self.steps_done:
            self.trainer.should_stop = True

    def _losses(self, losses: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = {"loss": losses} if isinstance(losses, Tensor) else dict(losses)
        if "loss" not in losses:
            raise ValueError(
                f"{type(self.method).__name__}.loss must return a scalar or a dict with a 'loss', "
                f"got keys {', '.join(map(repr, losses)) or 'none'}."
            )
        return losses

    def _log(self, losses: Mapping[str, Tensor]) -> None:
        self.last_losses = {name: value.detach() for name, value in losses.items()}
        if self.trainer.loggers:
            self.log_dict({f"train/{name}": value for name, value in self.last_losses.items()})


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_version": version,
        "python_gauss": gauss,
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": int(position),
        "numpy_has_gauss": int(has_gauss),
        "numpy_gauss": float(cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo everything drawn since :func:`random_state`."""
    random.setstate((state["python_version"], tuple(state["python"].tolist()), state["python_gauss"]))
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        ("MT19937", keys, state["numpy_position"], state["numpy_has_gauss"], state["numpy_gauss"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def process() -> tuple[int, int]:
    """Number of this process, and of all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes, in their order; every process has to call it."""
    processes = process()[1]
    if processes == 1:
        return [state]
    states: list[Any] = [None] * processes
    torch.distributed.all_gather_object(states, state)
    return states
