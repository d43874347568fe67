"""Where two objects differ: batches of any make, states."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def differences(
    one: Any, other: Any, path: str = "it", seen: set[tuple[int, int]] | None = None
) -> Iterator[str]:
    """Where two objects differ, bit for bit, in the tensors and values that they hold, whatever their kind."""
    seen = set() if seen is None else seen
    if one is other:
        return
    if type(one) is not type(other):
        yield f"{path} is {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{path} is {tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
        else:
            a, b = one.detach().to_dense(), other.detach().to_dense()
            unequal = (a != b) & ~((a != a) & (b != b))  # NaN where there was NaN is no difference
            if unequal.any():
                yield f"{path} differs in {int(unequal.sum())} of {unequal.numel()} entries"
    elif (id(one), id(other)) not in seen:  # objects may hold each other
        seen.add((id(one), id(other)))
        yield from _of_parts(one, other, path, seen)


def _of_parts(one: Any, other: Any, path: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    if isinstance(one, Mapping):
        if list(one) != list(other):
            yield f"{path} has keys {list(one)} and {list(other)}"
            return
        parts = [(f"{path}[{key!r}]", one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{path} has {len(one)} and {len(other)} entries"
            return
        parts = [(f"{path}[{place}]", *pair) for place, pair in enumerate(zip(one, other, strict=True))]
    elif hasattr(one, "__dict__") and not isinstance(one, type) and not inspect.isroutine(one):
        parts = [(f"the attributes of {path}", vars(one), vars(other))]
    else:
        if pickle.dumps(one) != pickle.dumps(other):
            yield f"{path} is {one!r} and {other!r}"
        return
    for name, mine, theirs in parts:
        yield from differences(mine, theirs, name, seen)


def assert_same(one: Any, other: Any, why: str) -> None:
    """Raise AssertionError with the first difference, after ``why``."""
    for difference in differences(one, other):
        raise AssertionError(f"{why}: {difference}")
