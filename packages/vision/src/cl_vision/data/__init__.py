"""Image data sets: readers, splits, random views."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_vision.data.base import ImageData, stratified_split
    from cl_vision.data.benchmarks import CIFAR10, CIFAR100, STL10, FashionMNIST
    from cl_vision.data.digits import Digits
    from cl_vision.data.folder import ImageFolder
    from cl_vision.data.packed import PackedCIFAR10
    from cl_vision.data.subsets import (
        ExponentialImbalance,
        Fraction,
        IndexFile,
        LinearImbalance,
        Subset,
        write_rows,
    )
    from cl_vision.data.views import ImageArray, PlainDataset, ViewDataset, Views, collate_views

_HOME = {
    "CIFAR10": "benchmarks",
    "CIFAR100": "benchmarks",
    "Digits": "digits",
    "ExponentialImbalance": "subsets",
    "FashionMNIST": "benchmarks",
    "Fraction": "subsets",
    "ImageArray": "views",
    "ImageData": "base",
    "ImageFolder": "folder",
    "IndexFile": "subsets",
    "LinearImbalance": "subsets",
    "PackedCIFAR10": "packed",
    "PlainDataset": "views",
    "STL10": "benchmarks",
    "Subset": "subsets",
    "ViewDataset": "views",
    "Views": "views",
    "collate_views": "views",
    "stratified_split": "base",
    "write_rows": "subsets",
}
__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "Digits",
    "ExponentialImbalance",
    "FashionMNIST",
    "Fraction",
    "ImageArray",
    "ImageData",
    "ImageFolder",
    "IndexFile",
    "LinearImbalance",
    "PackedCIFAR10",
    "PlainDataset",
    "Subset",
    "ViewDataset",
    "Views",
    "collate_views",
    "stratified_split",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cl_vision.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_vision.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
