"""Momentum encoders: a copy of a module that follows it as an exponential moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage(nn.Module):
    """A copy of a module whose state follows the module's.

        state <- momentum * state + (1 - momentum) * state of the module

    Parameters and floating buffers (running statistics) are averaged, other buffers are copied. Momentum 0 copies
    all of it, momentum 1 changes nothing. The copy takes no gradients, neither in its parameters nor through its
    outputs. It starts in the mode of the module and then, like any submodule, in that of the module that holds it:
    ``method.train()`` puts a momentum encoder into training mode too, ``update`` leaves the mode alone.

    The average is kept in the copy's own precision and on its own device. In half precision, steps as small as
    momentum 0.999 takes are lost in rounding: for a model kept in half precision call ``.float()`` on this module.

    Args:
        model: what to follow; it is copied deeply.

    Reference: as a momentum encoder: He et al., "Momentum Contrast for Unsupervised Visual Representation
    Learning", CVPR 2020, arXiv 1911.05722.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the copy, without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float) -> None:
        """Move towards ``model``; call it once after each optimiser step.

        Args:
            model: the module that was copied, or one of equal structure.
            momentum: weight of the old state, in [0, 1].

        Raises:
            ValueError: if the names or shapes of the states differ or momentum is outside [0, 1].

        Cost: one pass over the state, in a few fused kernels.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}.")
        ours, theirs = dict(_state(self.module)), dict(_state(model))
        _check_same_structure(ours, theirs)
        if momentum < 1:
            _follow(ours, theirs, momentum)


def cosine_momentum(base: float, fraction: float) -> float:
    """Momentum that rises from ``base`` to 1 along half a cosine.

        1 - (1 - base) * (1 + cos(pi * fraction)) / 2

    Args:
        base: momentum at the start, in [0, 1].
        fraction: share of the training done, in [0, 1]; :attr:`cl_core.method.Progress.fraction` is this.

    Returns:
        The momentum, a float.

    Raises:
        ValueError: if an argument is outside [0, 1].

    Reference: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733.
    """
    for name, value in (("base", base), ("fraction", fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    return 1 - (1 - base) * (1 + math.cos(math.pi * fraction)) / 2


@torch.no_grad()
def _follow(ours: dict[str, Tensor], theirs: dict[str, Tensor], momentum: float) -> None:
    """Move tensors towards those of the same name, numbers that are not floating all the way."""
    averaged: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for name, target in ours.items():
        source = theirs[name].to(target)
        if momentum > 0 and (target.is_floating_point() or target.is_complex()):
            targets, sources = averaged.setdefault((target.dtype, target.device), ([], []))
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    for targets, sources in averaged.values():
        torch._foreach_lerp_(targets, sources, 1 - momentum)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, also those that are not saved; shared ones once."""
    return chain(module.named_parameters(), module.named_buffers())


def _check_same_structure(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if ours.keys() != theirs.keys():
        found = [f"lacks {name!r}" for name in sorted(ours.keys() - theirs.keys())[:1]]
        found += [f"has an additional {name!r}" for name in sorted(theirs.keys() - ours.keys())[:1]]
        raise ValueError(
            f"model must be built like the module that was copied, but it {' and '.join(found)}."
        )
    for name, target in ours.items():
        if theirs[name].shape != target.shape:
            raise ValueError(
                f"model must be built like the module that was copied, but its {name!r} has shape "
                f"{tuple(theirs[name].shape)} instead of {tuple(target.shape)}."
            )
