"""Batteries that any package can run on its own losses and methods; nothing here is needed to train.

A name is imported when it is first touched, and pytest is never required.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"parity": "cl_core.testing.parity"}  # public name -> the module that is it or holds it
__all__ = ["parity"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cl_core.testing' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if module.__name__.rpartition(".")[2] == name else getattr(module, name)
