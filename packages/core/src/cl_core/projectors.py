"""Projection heads: from features to the space in which the loss compares."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cl_core import _checks


class Projector(nn.Module):
    """Base of every projection head: maps features (N, ``in_dim``) to (N, ``out_dim``).

    ``in_dim`` may be left None at construction; the method that owns the head then calls :meth:`build` with
    the encoder's ``dim``.
    """

    in_dim: int | None
    out_dim: int

    def build(self, in_dim: int) -> None:
        """Create the layers for features of ``in_dim`` columns and set ``self.in_dim``."""
        raise NotImplementedError(f"{type(self).__name__} must define build(in_dim).")

    def forward(self, features: Tensor) -> Tensor:
        """Projections of features (N, in_dim), shape (N, out_dim)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(features).")


class MLPProjector(Projector):
    """Multi-layer perceptron, ReLU or ELU between the layers, the last one linear (SimCLR's head) or normalised.

    Args:
        in_dim: columns of the features; None takes the encoder's when a method builds the head.
        hidden_dim: width of the hidden layers; None takes ``in_dim``.
        out_dim: columns of the projections.
        layers: number of linear layers; 1 is a linear head.
        norm: normalisation after each hidden layer: ``"batch"``, ``"layer"`` or ``"none"``.
        final_norm: of the projections: ``"batch"`` without scale and shift (SimSiam, MoCo v3), ``"layer"`` with them
            (Hydra), or ``"none"``.
        activation: after each hidden layer: ``"relu"``, or ``"elu"`` (GRACE).

    Reference: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, arXiv 2002.05709.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        layers: int = 2,
        norm: Literal["batch", "layer", "none"] = "batch",
        final_norm: Literal["batch", "layer", "none"] = "none",
        activation: Literal["relu", "elu"] = "relu",
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_dim", in_dim),
            ("hidden_dim", hidden_dim),
            ("out_dim", out_dim),
            ("layers", layers),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        _checks.choice("norm", norm, ("batch", "layer", "none"))
        _checks.choice("final_norm", final_norm, ("batch", "layer", "none"))
        _checks.choice("activation", activation, ("relu", "elu"))
        self.in_dim: int | None = None
        self.hidden_dim, self.out_dim, self.layers = hidden_dim, out_dim, layers
        self.norm, self.final_norm, self.activation = norm, final_norm, activation
        self.network: nn.Sequential | None = None
        if in_dim is not None:
            self.build(in_dim)

    def build(self, in_dim: int) -> None:
        """Create the layers for features of ``in_dim`` columns."""
        if self.network is not None:
            raise RuntimeError(f"this projector is already built, for in_dim={self.in_dim}.")
        modules: list[nn.Module] = []
        width, hidden = in_dim, self.hidden_dim or in_dim
        for _ in range(self.layers - 1):
            modules.append(nn.Linear(width, hidden, bias=self.norm == "none"))
            if self.norm != "none":
                modules.append(nn.BatchNorm1d(hidden) if self.norm == "batch" else nn.LayerNorm(hidden))
            modules.append(nn.ReLU(inplace=True) if self.activation == "relu" else nn.ELU(inplace=True))
            width = hidden
        modules.append(nn.Linear(width, self.out_dim, bias=self.final_norm == "none"))
        if self.final_norm == "batch":
            modules.append(nn.BatchNorm1d(self.out_dim, affine=False))
        elif self.final_norm == "layer":
            modules.append(nn.LayerNorm(self.out_dim))
        self.network = nn.Sequential(*modules)
        self.in_dim = in_dim

    def forward(self, features: Tensor) -> Tensor:
        """Projections of features (N, in_dim), shape (N, out_dim)."""
        if self.network is None:
            raise RuntimeError("this projector has no in_dim yet: give one, or let a method build it.")
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise ValueError(f"features must have shape (N, {self.in_dim}), got {tuple(features.shape)}.")
        projections: Tensor = self.network(features)
        return projections


class MultiHeadProjector(Projector):
    """Several independent heads, whose projections lie side by side in the columns.

    A loss of several heads (``AMCLLoss``) takes them apart again; between the two, hosts and queues see one row.

    Args:
        in_dim: columns of the features; None takes the encoder's (or the projector's) when a method builds the heads.
        heads: how many.
        hidden_dim: width of the hidden layers of a head; None takes its number of inputs.
        head_dim: columns of a head; ``out_dim`` is ``heads * head_dim``.
        layers: linear layers of a head.
        norm: as in :class:`MLPProjector`.
        final_norm: as in :class:`MLPProjector`.
        split: give each head its own share of the columns, as a predictor of several heads' projections wants it; a
            projector shows all features to all heads.

    Reference: Wang et al., "Adaptive Multi-head Contrastive Learning", ECCV 2024, arXiv 2310.05615.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        heads: int = 3,
        hidden_dim: int | None = None,
        head_dim: int = 128,
        layers: int = 2,
        norm: Literal["batch", "layer", "none"] = "none",
        final_norm: Literal["batch", "layer", "none"] = "none",
        split: bool = False,
    ) -> None:
        super().__init__()
        _checks.count("heads", heads)
        _checks.count("head_dim", head_dim)
        _checks.flag("split", split)
        self.in_dim: int | None = None
        self.heads, self.hidden_dim, self.head_dim, self.layers = heads, hidden_dim, head_dim, layers
        self.norm, self.final_norm, self.split = norm, final_norm, split
        self.out_dim = heads * head_dim
        self.networks = nn.ModuleList(
            MLPProjector(None, hidden_dim, head_dim, layers, norm, final_norm) for _ in range(heads)
        )
        if in_dim is not None:
            self.build(in_dim)

    def build(self, in_dim: int) -> None:
        """Create the layers for features of ``in_dim`` columns."""
        if self.split and in_dim % self.heads:
            raise ValueError(f"in_dim must be a multiple of heads={self.heads} to be split, got {in_dim}.")
        for network in self.networks:
            network.build(in_dim // self.heads if self.split else in_dim)  # type: ignore[operator]
        self.in_dim = in_dim

    def forward(self, features: Tensor) -> Tensor:
        """Projections of features (N, in_dim), shape (N, heads * head_dim)."""
        if self.in_dim is None:
            raise RuntimeError("this projector has no in_dim yet: give one, or let a method build it.")
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise ValueError(f"features must have shape (N, {self.in_dim}), got {tuple(features.shape)}.")
        given = features.chunk(self.heads, 1) if self.split else [features] * self.heads
        return torch.cat([network(part) for network, part in zip(self.networks, given, strict=True)], 1)


def built(name: str, head: Projector, in_dim: int, of: str) -> Projector:
    """A head for inputs of ``in_dim`` columns, built if it is not yet."""
    if head.in_dim is None:
        head.build(in_dim)
    if head.in_dim != in_dim:
        raise ValueError(f"{name}.in_dim must equal {of}, got {head.in_dim} and {in_dim}.")
    return head
