"""What the hosts have in common: parts that fit together, and batches that hold two views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cl_core.losses import ContrastiveLoss
from cl_core.method import Method
from cl_vision.encoders import Encoder
from cl_vision.projectors import MLPProjector, Projector

if TYPE_CHECKING:
    from cl_vision.data import Views


def check_parts(
    encoder: Encoder, loss: ContrastiveLoss, kind: type[ContrastiveLoss], called_with: str
) -> None:
    """Refuse anything but an encoder and a loss of a kind."""
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder must be a cl_vision Encoder, got {type(encoder).__name__}.")
    if not isinstance(loss, kind):
        raise TypeError(
            f"loss must be a {kind.__name__}, called with {called_with}, got {type(loss).__name__}."
        )


def built(name: str, head: Projector, in_dim: int, of: str) -> Projector:
    """A head for inputs of ``in_dim`` columns, built if it is not yet."""
    if head.in_dim is None:
        head.build(in_dim)
    if head.in_dim != in_dim:
        raise ValueError(f"{name}.in_dim must equal {of}, got {head.in_dim} and {in_dim}.")
    return head


def with_predictor(
    encoder: Encoder, projector: Projector, predictor: Projector | None
) -> tuple[Projector, Projector]:
    """A projector for an encoder, and a predictor of its projections; None for two layers of 4096."""
    projector = built("projector", projector, encoder.dim, "the encoder's dim")
    predictor = predictor or MLPProjector(hidden_dim=4096, out_dim=projector.out_dim)
    predictor = built("predictor", predictor, projector.out_dim, "the projector's out_dim")
    if predictor.out_dim != projector.out_dim:
        raise ValueError(
            f"predictor.out_dim must equal the projector's, got {predictor.out_dim} and {projector.out_dim}."
        )
    return projector, predictor


def two_views(method: Method, batch: Views) -> tuple[Tensor, Tensor]:
    """The views of a batch of two or more images, exactly two."""
    check_views(method, batch)
    if len(batch.views) > 2:
        raise ValueError(
            f"{type(method).__name__} compares 2 views, got {len(batch.views)}: pass --data.num_views 2."
        )
    first, second = batch.views
    return first, second


def check_views(method: Method, batch: Views) -> None:
    """Refuse fewer than two views, or a lone image that has no others to be compared with."""
    name, views = type(method).__name__, len(batch.views)
    if views < 2:
        raise ValueError(
            f"{name} compares views, so a batch needs at least 2 of them, got {views}: pass --data.num_views 2."
        )
    if len(batch.views[0]) < 2 and getattr(method.criterion, "group", None) is None:
        raise ValueError(
            f"{name} compares images, so a batch needs at least 2 of them, got {len(batch.views[0])}: pass "
            "--data.batch_size 2 or more."
        )
