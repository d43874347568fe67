"""Checks at the door: one sentence that names the argument, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor

from cl_core._types import Impl, Reduction

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COLDEST = 1e-12  # of logits as large as its inverse float64 still tells a softmax to 1e-4
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require(condition: Tensor, message: str) -> None:
    """Raise ``ValueError(message)`` if a 0-d boolean tensor is false.

    On CPU in eager mode at once. Under ``torch.compile`` (where reading a value would break the graph) and on
    accelerators (where it would stall the stream) as an asynchronous assertion with the same message.
    """
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity."""
    tensor = tensor.detach()
    if not torch.compiler.is_compiling() and tensor.device.type == "cpu":
        # A finite sum proves all entries finite and costs one read; an overflowing sum proves nothing.
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
        if math.isfinite(total.item()):
            return
    require(torch.isfinite(tensor).all(), f"{name} must be finite, got NaN or infinity in it.")


def embeddings(name: str, z: Tensor, *, at_least: int = 1) -> None:
    """Refuse anything but a finite floating matrix (N, D) with N >= ``at_least`` and D >= 1."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (N, D), got {type(z).__name__}.")
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, D) with D >= 1, got {tuple(z.shape)}.")
    if z.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {z.dtype}.")
    if z.shape[0] < at_least:
        raise ValueError(f"{name} must have at least {at_least} row{'s' * (at_least > 1)}, got {z.shape[0]}.")
    finite(name, z)


def shares(name: str, values: Tensor) -> None:
    """Refuse entries outside [0, 1]."""
    values = values.detach()
    require(((values >= 0) & (values <= 1)).all(), f"{name} must lie in [0, 1], got other values.")


def same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of unequal shape, dtype or device."""
    _agree(tensors, "shape", lambda t: tuple(t.shape))
    compatible(**tensors)


def compatible(**tensors: Tensor) -> None:
    """Refuse tensors of unequal dtype or device."""
    _agree(tensors, "dtype", lambda t: t.dtype)
    _agree(tensors, "device", lambda t: t.device)


def same_width(**tensors: Tensor) -> None:
    """Refuse matrices with unequal numbers of columns, or of unequal dtype or device."""
    _agree(tensors, "number of columns", lambda t: t.shape[-1])
    compatible(**tensors)


def alongside(**tensors: Tensor) -> None:
    """Refuse matrices with unequal numbers of columns or of unequal device; a memory may have another float type."""
    _agree(tensors, "number of columns", lambda t: t.shape[-1])
    _agree(tensors, "device", lambda t: t.device)


def _agree(tensors: dict[str, Tensor], what: str, of) -> None:  # type: ignore[no-untyped-def]
    (first, one), *rest = tensors.items()
    for name, other in rest:
        if of(one) != of(other):
            raise ValueError(f"{first} and {name} must have the same {what}, got {of(one)} and {of(other)}.")


def labels(name: str, labels: Tensor, *, rows: int, of: str, device: torch.device) -> None:
    """Refuse anything but an integer vector with one entry a row of ``of``, on its device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be an integer tensor of shape ({rows},), got {type(labels).__name__}.")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}.")
    if tuple(labels.shape) != (rows,):
        raise ValueError(
            f"{name} must have shape ({rows},), one entry for each row of {of}, got {tuple(labels.shape)}."
        )
    if labels.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {labels.device}.")


def positive(name: str, value: float | Tensor, *, rows: int | None = None) -> None:
    """Refuse a number or tensor that is not finite and > 0; ``rows`` also allows a vector of that length."""
    if isinstance(value, Tensor):
        if value.ndim != 0 and tuple(value.shape) != (rows,):
            allowed = "0-d" if rows is None else f"0-d or of shape ({rows},)"
            raise ValueError(f"{name} must be {allowed} when a tensor, got shape {tuple(value.shape)}.")
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name} must be a floating tensor, got {value.dtype}.")
        held = value.detach()
        require(((held > 0) & held.isfinite()).all(), f"{name} must be finite and > 0, got another value.")
    elif not (isinstance(value, int | float) and not isinstance(value, bool)):
        raise TypeError(f"{name} must be a number > 0 or a tensor, got {type(value).__name__}.")
    elif not 0 < value < math.inf:  # the compiler can trace a comparison of symbols, but not math.isfinite
        raise ValueError(f"{name} must be finite and > 0, got {value}.")


def temperature(name: str, value: float | Tensor, *, rows: int | None = None) -> None:
    """Refuse what :func:`positive` refuses, and what is so small that gradients lose their digits, or overflow."""
    positive(name, value, rows=rows)
    message = f"{name} must be at least {_COLDEST}, got a smaller one."
    if isinstance(value, Tensor):
        require((value.detach() >= _COLDEST).all(), message)
    elif value < _COLDEST:
        raise ValueError(message)


def number(name: str, value: float, *, at_least: float = -math.inf, finite: bool = True) -> None:
    """Refuse anything but a number >= ``at_least``, finite unless told otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if value != value or (finite and abs(value) == math.inf):  # as in positive
        raise ValueError(f"{name} must be {'a finite' if finite else 'a'} number, got {value}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def count(name: str, value: int, *, at_least: int = 1) -> None:
    """Refuse anything but an integer >= ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value outside the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r:.40}.")


def scalar(name: str, value: float | Tensor) -> None:
    """Refuse anything but a finite number or a finite floating 0-d tensor."""
    if not isinstance(value, Tensor):
        number(name, value)
        return
    if value.ndim or value.dtype not in _FLOATS:
        raise ValueError(f"{name} must be a floating 0-d tensor, got {value.dtype} of {tuple(value.shape)}.")
    require(value.detach().isfinite().all(), f"{name} must be finite, got NaN or infinity.")


def flag(name: str, value: bool) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r:.40}.")


def group(value: object) -> None:
    """Refuse what can never be a group: anything but None, "world" and a process group."""
    if value is not None and value != "world" and not isinstance(value, torch.distributed.ProcessGroup):
        shown = repr(value) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"group must be None, 'world' or a process group, got {shown}.")


def reduction(value: Reduction) -> None:
    """Refuse an unknown reduction."""
    choice("reduction", value, get_args(Reduction))


def impl(value: Impl) -> None:
    """Refuse an unknown implementation."""
    choice("impl", value, get_args(Impl))
