"""Batteries that any package can run on its own losses and methods; nothing here is needed to train.

A name is imported when it is first touched, and pytest is never required.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "parity": "cl_core.testing.parity",
    "Ranks": "cl_core.testing.ranks",
    "check_group": "cl_core.testing.losses",
    "check_loss": "cl_core.testing.losses",
    "check_method": "cl_core.testing.methods",
    "loss_checks": "cl_core.testing.losses",
    "method_checks": "cl_core.testing.methods",
}  # public name -> the module that is it or holds it
__all__ = ["Ranks", "check_group", "check_loss", "check_method", "loss_checks", "method_checks", "parity"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cl_core.testing' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if module.__name__.rpartition(".")[2] == name else getattr(module, name)
