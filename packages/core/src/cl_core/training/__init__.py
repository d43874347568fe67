"""Training: the engine around a :class:`~cl_core.method.Method`; needs ``pip install "cl-core[train]"``.

``import cl_core.training`` is lazy, and :class:`~cl_core.training.data.Data` needs torch only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core.training.adaptor import LitMethod
    from cl_core.training.artifacts import export_method, load_export
    from cl_core.training.callbacks import Diagnostics, KNNMonitor, MovingAverage
    from cl_core.training.checkpoints import Checkpointing
    from cl_core.training.data import Data
    from cl_core.training.evaluating import Evaluation, embed_split, evaluate
    from cl_core.training.fitting import Drawing, FitResult, fit
    from cl_core.training.optimization import Optimization
    from cl_core.training.run import RunFolder
    from cl_core.training.scoring import ScoreMonitor, read_scores
    from cl_core.training.settings import Monitoring, TrainerOptions

_HOME = {
    "Checkpointing": "checkpoints",
    "Data": "data",
    "Diagnostics": "callbacks",
    "Drawing": "fitting",
    "Evaluation": "evaluating",
    "FitResult": "fitting",
    "KNNMonitor": "callbacks",
    "LitMethod": "adaptor",
    "Monitoring": "settings",
    "MovingAverage": "callbacks",
    "Optimization": "optimization",
    "RunFolder": "run",
    "ScoreMonitor": "scoring",
    "TrainerOptions": "settings",
    "embed_split": "evaluating",
    "evaluate": "evaluating",
    "export_method": "artifacts",
    "fit": "fitting",
    "load_export": "artifacts",
    "read_scores": "scoring",
}
__all__ = [
    "Checkpointing",
    "Data",
    "Diagnostics",
    "Drawing",
    "Evaluation",
    "FitResult",
    "KNNMonitor",
    "LitMethod",
    "Monitoring",
    "MovingAverage",
    "Optimization",
    "RunFolder",
    "ScoreMonitor",
    "TrainerOptions",
    "embed_split",
    "evaluate",
    "export_method",
    "fit",
    "load_export",
    "read_scores",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cl_core.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_core.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
