"""What the hosts have in common: parts that fit together, and batches that hold two views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core.losses import ContrastiveLoss
from cl_core.method import Method
from cl_core.projectors import MLPProjector, Projector, built
from cl_vision.encoders import Encoder

if TYPE_CHECKING:
    from cl_vision.data import Views


def check_parts(
    encoder: Encoder, loss: ContrastiveLoss, *kinds: type[ContrastiveLoss], called_with: str
) -> None:
    """Refuse anything but an encoder and a loss of one of the kinds."""
    check_encoder(encoder)
    if not isinstance(loss, kinds):
        names = " or a ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"loss must be a {names}, called with {called_with}, got {type(loss).__name__}.")


def check_encoder(encoder: Encoder) -> None:
    """Refuse anything but an encoder."""
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder must be a cl_vision Encoder, got {type(encoder).__name__}.")


def check_labels(method: Method, labels: Tensor, num_classes: int | None = None) -> None:
    """Refuse images without a label, and labels from ``num_classes`` on."""
    if bool((labels < 0).any()):
        name = type(method).__name__
        raise ValueError(f"{name} needs a label for every image, got some without: choose labelled data.")
    if num_classes is not None and bool((labels >= num_classes).any()):
        raise ValueError(
            f"num_classes must be above every label, got {num_classes} and label {int(labels.max())}: pass "
            "--model.num_classes."
        )


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


def project_crops(encoder: Encoder, projector: Projector, crops: Sequence[Tensor]) -> list[Tensor]:
    """Unit embeddings of crops (N, C, H, W), shape (N, projector.out_dim) each.

    Crops of one size pass through the encoder together, all of them through the head, whose batch statistics are of
    all.
    """
    features = []
    for _, of_size in groupby(crops, key=lambda crop: crop.shape[1:]):
        features.append(encoder(torch.cat(list(of_size))))
    rows = projector(torch.cat(features))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return list(F.normalize(rows.to(dtype), dim=1).split([len(crop) for crop in crops]))


def two_views(method: Method, batch: Views) -> tuple[Tensor, Tensor]:
    """The views of a batch of two or more images, exactly two."""
    check_views(method, batch)
    if len(batch.views) > 2:
        raise ValueError(
            f"{type(method).__name__} compares 2 views, got {len(batch.views)}: pass --data.num_views 2."
        )
    first, second = batch.views
    return first, second


def views_for(method: Method, batch: Views) -> tuple[Tensor, ...]:
    """The views of a batch of two or more images, more than two where the criterion takes them."""
    check_views(method, batch)
    count = len(batch.views)
    if count > 2 and not method.criterion.several_views:  # type: ignore[union-attr]
        name = type(method.criterion).__name__
        raise ValueError(
            f"{name} compares 2 views, got {count}: pass --data.num_views 2, or a loss that takes more, such as "
            "CACRLoss."
        )
    return batch.views


def check_crops(method: Method, crops: Sequence[int], batch: Views) -> None:
    """Refuse a batch without the crops, counted from 0, that a method needs beside any others."""
    count = len(batch.views)
    if max(crops) >= count:
        raise ValueError(
            f"{type(method).__name__} needs crops {list(crops)}, counted from 0, got {count} of them: pass "
            f"--data.num_views {max(crops) + 1} or more."
        )


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
