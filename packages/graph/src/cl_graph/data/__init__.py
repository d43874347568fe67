"""Graphs to train on, and splits of their labelled nodes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_graph.data.base import GraphData, NodeDataset
    from cl_graph.data.benchmarks import Amazon, CitationFull, Coauthor, KarateClub, Planetoid
    from cl_graph.data.splits import NodeSplit, PerClassSplit, PublicSplit, RandomSplit
    from cl_graph.graphs import NodeBatch

_HOME = {
    "Amazon": "data.benchmarks",
    "CitationFull": "data.benchmarks",
    "Coauthor": "data.benchmarks",
    "GraphData": "data.base",
    "KarateClub": "data.benchmarks",
    "NodeBatch": "graphs",
    "NodeDataset": "data.base",
    "NodeSplit": "data.splits",
    "PerClassSplit": "data.splits",
    "Planetoid": "data.benchmarks",
    "PublicSplit": "data.splits",
    "RandomSplit": "data.splits",
}
__all__ = [
    "Amazon",
    "CitationFull",
    "Coauthor",
    "GraphData",
    "KarateClub",
    "NodeBatch",
    "NodeDataset",
    "NodeSplit",
    "PerClassSplit",
    "Planetoid",
    "PublicSplit",
    "RandomSplit",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cl_graph.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_graph.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
