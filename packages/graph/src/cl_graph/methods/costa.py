"""COSTA: random mixtures of nodes agree in two views, in place of the nodes themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.losses import TwoViewLoss
from cl_core.projectors import Projector
from cl_graph._geometric import Graph
from cl_graph.encoders import Encoder
from cl_graph.hosts import EncodedView, NodeContrast, Regulariser
from cl_graph.views import GraphView

# Entries of a random projection that exist at a time: 16 MB in float32. One of no more is kept for the backward.
_ENTRIES = 2048 * 2048


class COSTA(NodeContrast):
    """COSTA: the embeddings' rows are mixed at random into fewer, and those are compared.

        cl-graph fit --config costa/cora

    With embeddings z_v (N, D) of view v and a random projection P (k, N) over the nodes, entries normal with variance
    1 / k and drawn anew each step, the projector's outputs h_v = g(P z_v) are compared, row by row. Published is the
    loss with negatives of the other view alone: ``InfoNCELoss(temperature=0.4, symmetric=True)``. Both views share P.

    With ``single_view`` one view is projected twice, by a P of its own each time. Beware of it: given z, row a of one
    projection has no more to do with row a of the other than with any, so the expected loss is never below log k, and
    training leads to where all projections point one way. It is here as the authors' code is known to do it, for
    comparison.

    A row of a sketch is no node. So the host says nothing of single nodes, while a regulariser does: ``POT`` reads
    the embeddings of the nodes before they are mixed and draws from all that are compared. With ``single_view`` it is
    given the one view twice, and scores each node against the view itself.

    Args:
        encoder: what is trained and kept.
        loss: compares the projected sketches, for example ``InfoNCELoss(temperature=0.4, symmetric=True)``.
        first_view: makes one of the views; None for ``UniformView()``.
        second_view: makes the other one; for ``single_view`` there is none.
        projector: head between encoder and loss; None for two layers with ELU between them, as wide as the embedding.
        regulariser: adds to the loss, for example ``POT(kappa=0.2)``; None for nothing.
        ratio: sketches for each node that is compared, in (0, 1]; there are at least two.
        single_view: draw one view and two projections of it.

    Cost: that of the encoder, once or twice, O(k N D) time for the sketches, and of the loss O(k^2 D) time. Of the
    projection some rows exist at a time, drawn again in the backward: O(N D) memory.

    Reference: Zhang et al., "COSTA: Covariance-Preserving Feature Augmentation for Graph Contrastive Learning", KDD
    2022, arXiv 2206.04726. The authors' code masks features of the second view at the rate of the first. POT's code
    draws its nodes from the first k only.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: TwoViewLoss,
        first_view: GraphView | None = None,
        second_view: GraphView | None = None,
        projector: Projector | None = None,
        regulariser: Regulariser | None = None,
        ratio: float = 0.5,
        single_view: bool = False,
    ) -> None:
        super().__init__(encoder, loss, first_view, second_view, projector, regulariser)
        if not isinstance(loss, TwoViewLoss):
            raise TypeError(f"loss must be a TwoViewLoss, called with (z1, z2), got {type(loss).__name__}.")
        _checks.positive("ratio", ratio)
        if ratio > 1:
            raise ValueError(f"ratio must be in (0, 1], got {ratio}.")
        _checks.flag("single_view", single_view)
        if single_view and second_view is not None:
            raise ValueError(
                f"second_view must be None with single_view=True, got {type(second_view).__name__}."
            )
        self.ratio, self.single_view = ratio, single_view
        if single_view:
            self.second_view = None

    def views(self, graph: Graph, nodes: Tensor | None) -> list[EncodedView]:
        """Draw and embed both views, or the one view, which then stands there twice."""
        if not self.single_view:
            return super().views(graph, nodes)
        return [self.encoded(self.first_view, graph, nodes)] * 2

    def contrast(self, views: Sequence[EncodedView]) -> Tensor:
        """Loss of the projected sketches, a scalar."""
        first, second = (view.compared for view in views)
        rows = max(2, int(self.ratio * len(first)))
        if self.single_view:
            sketches = sketch(first, rows), sketch(second, rows)
        else:
            sketches = sketch(torch.cat([first, second], dim=1), rows).chunk(2, dim=1)
        return self.criterion(*(self.projector(mixed) for mixed in sketches))


def sketch(z: Tensor, rows: int) -> Tensor:
    """A random projection over the rows of a matrix: P z, with P (rows, N) of normal entries of variance 1 / rows.

    On average it leaves z^T z as it is. P is drawn from a seed that torch's global generator gives.

    Args:
        z: shape (N, D).
        rows: of the result.

    Returns:
        Shape (rows, D).

    Cost: O(rows N D) time; O((N + rows) D) memory: P exists in parts, which are drawn again in the backward.
    """
    _checks.embeddings("z", z)
    _checks.count("rows", rows)
    return _Sketch.apply(z, rows, int(torch.randint(2**63 - 1, ())))


class _Sketch(torch.autograd.Function):
    """Product with a projection that is drawn part by part, in both directions from the same seed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: int, seed: int) -> Tensor:
        height = max(1, _ENTRIES // len(z))
        ctx.drawn = seed, rows, len(z), height
        parts = list(_parts(ctx.drawn, z)) if rows <= height else _parts(ctx.drawn, z)
        ctx.kept = parts if isinstance(parts, list) else None
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([part @ z for part in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, _, n, height = ctx.drawn
        of_z = gradient.new_zeros(n, gradient.shape[1])
        for part, of_part in zip(
            ctx.kept or _parts(ctx.drawn, gradient), gradient.split(height), strict=True
        ):
            of_z.addmm_(part.t(), of_part)
        return of_z, None, None


def _parts(drawn: tuple[int, int, int, int], like: Tensor) -> Iterator[Tensor]:
    """The projection, some rows at a time."""
    seed, rows, n, height = drawn
    generator = torch.Generator(like.device).manual_seed(seed)
    for start in range(0, rows, height):
        size = min(height, rows - start)
        part = torch.randn(size, n, generator=generator, dtype=like.dtype, device=like.device)
        yield part.mul_(rows**-0.5)
