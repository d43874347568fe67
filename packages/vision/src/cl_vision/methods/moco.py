"""MoCo: a momentum encoder's keys, compared with a queue of earlier ones (v1, v2) or with the batch (v3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core.distributed import shard
from cl_core.losses import PredictionLoss, QueryKeyLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Method, Progress
from cl_core.momentum import ExponentialMovingAverage, cosine_momentum
from cl_core.projectors import MLPProjector, Projector, built
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_parts, views_for, with_predictor

if TYPE_CHECKING:
    from cl_vision.data import Views


class MoCo(Method):
    """MoCo v1 and v2: queries against keys of a slowly moving copy of the network and a queue of earlier keys.

        cl-vision fit --config moco/digits

    With q = head(encoder(view 1)), k = the moving average's head(encoder(view 2)), which takes no gradient, and the
    queue Q of the keys of earlier batches, the loss is ``loss(q, k, Q)``. Any loss of queries and keys goes in:
    ``InfoNCELoss`` is MoCo's own, ``DCLLoss`` its decoupled form. Of more than two views, for losses that take several
    (``CACRLoss``), each is a query, drawn to the keys of the others, and the last one's keys enter the queue.

    Batch statistics would let a query recognise its key, as both come from one batch while the queue does not. Under
    several processes the keys are therefore encoded in another order than the queries (where the loss has a
    ``group``), and in one process ``batch_splits`` normalises parts of the batch apart, the keys in a drawn order.

    Args:
        encoder: what is trained and kept.
        loss: called with queries (N, D), keys (N, D) and the queue (K, D).
        projector: head between encoder and loss; None for v2's, two layers to 128 columns without normalisation. One
            layer (``MLPProjector(layers=1)``) is v1's.
        queue_size: keys held. They start at random, as the authors' do.
        momentum: weight of the old key encoder in each step.
        symmetric: let each of two views serve as query once and average.
        batch_splits: parts of a batch that are normalised apart; 1 for none.

    Reference: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv
    1911.05722; Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: QueryKeyLoss,
        projector: Projector | None = None,
        queue_size: int = 4096,
        momentum: float = 0.999,
        symmetric: bool = False,
        batch_splits: int = 1,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, QueryKeyLoss, called_with="(query, key, negatives)")
        _check_momentum(momentum)
        _checks.flag("symmetric", symmetric)
        _checks.count("batch_splits", batch_splits)
        self.encoder, self.criterion = encoder, loss
        self.projector = built(
            "projector", projector or MLPProjector(norm="none"), encoder.dim, "the encoder's dim"
        )
        self.queue_size, self.momentum = queue_size, momentum
        self.symmetric, self.batch_splits = symmetric, batch_splits
        self.key_network = ExponentialMovingAverage(nn.Sequential(self.encoder, self.projector))
        self.queue = FeatureQueue(queue_size, self.projector.out_dim)
        self.queue.enqueue(torch.randn(queue_size, self.projector.out_dim))

    def loss(self, batch: Views) -> Tensor:
        """Loss of two views, or of more where the criterion takes lists; a scalar. Takes the keys into the queue."""
        views = views_for(self, batch)
        if len(views) > 2:
            every = [self.keys(view) for view in views]
            loss = self.criterion([self.project(view) for view in views], every, self.queue.embeddings)
            keys = every[-1]
        else:
            keys = self.keys(views[1])
            loss = self.criterion(self.project(views[0]), keys, self.queue.embeddings)
            if self.symmetric:
                others = self.keys(views[0])
                loss = (loss + self.criterion(self.project(views[1]), others, self.queue.embeddings)) / 2
                keys = torch.cat([keys, others])
        if self.training:
            self.queue.enqueue(keys, group=getattr(self.criterion, "group", None))
        return loss

    def project(self, images: Tensor) -> Tensor:
        """Queries of images (N, C, H, W), shape (N, projector.out_dim)."""
        return _in_parts(nn.Sequential(self.encoder, self.projector), images, self.batch_splits)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Keys of images (N, C, H, W), shape (N, projector.out_dim), a constant."""
        split = shard(images, getattr(self.criterion, "group", None), at_least=0)
        if split.group is None and self.batch_splits == 1:
            return self.key_network(images)
        everywhere = split.gather(images)
        order = torch.randperm(len(everywhere)).to(images.device)
        if split.group is not None:  # the ranks draw each for themselves, and must agree
            torch.distributed.broadcast(
                order, torch.distributed.get_global_rank(split.group, 0), group=split.group
            )
        own = slice(split.offset, split.offset + split.counts[split.rank])
        keys = split.gather(_in_parts(self.key_network, everywhere[order[own]], self.batch_splits))
        return torch.empty_like(keys).index_copy_(0, order, keys)[own]

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)

    def after_step(self, progress: Progress) -> None:
        """Let the key network follow."""
        self.key_network.update(nn.Sequential(self.encoder, self.projector), self.momentum)


class MoCoV3(Method):
    """MoCo v3: two views, each predicting the other's key among those of the batch; no queue.

        cl-vision fit --config mocov3/digits

    With queries q = predictor(head(encoder(view))) and keys k = head(encoder(view)) of the moving average, the loss is

        scale / V sum_v loss(queries of the other views, key of view v)

    with V = 2 views, or more for losses that take several queries (``CACRMomentumLoss``).

    Args:
        encoder: what is trained and kept.
        loss: called with queries (N, D) and keys (N, D), which also serve as negatives; or a loss of predictions
            without any: with ``BYOLLoss`` and a two-layer head this is BYOL.
        projector: head between encoder and loss; None for three layers of 4096 to 256 columns, batch normalisation
            between them. Unlike the authors' it ends without one.
        predictor: from projections to queries; None for two layers of 4096.
        momentum: weight of the old key network in each step.
        schedule: "cosine" lets ``momentum`` rise to 1 over the training, "constant" keeps it.
        scale: factor > 0 of the mean over keys; None for 4 T, MoCo v3's 2 T (loss(q1, k2) + loss(q2, k1)), and 2 for
            losses without a temperature.

    Reference: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, arXiv
    2104.02057.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: QueryKeyLoss | PredictionLoss,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        momentum: float = 0.99,
        schedule: Literal["cosine", "constant"] = "cosine",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, QueryKeyLoss, PredictionLoss, called_with="(query, key)")
        if scale is not None:
            _checks.positive("scale", scale)
        _check_momentum(momentum)
        _checks.choice("schedule", schedule, ("cosine", "constant"))
        self.encoder, self.criterion = encoder, loss
        projector = projector or MLPProjector(hidden_dim=4096, out_dim=256, layers=3)
        self.projector, self.predictor = with_predictor(encoder, projector, predictor)
        self.momentum, self.schedule, self.scale = momentum, schedule, scale
        self.key_network = ExponentialMovingAverage(nn.Sequential(self.encoder, self.projector))

    def loss(self, batch: Views) -> Tensor:
        """Loss of two views, or of more where the criterion takes a list of queries; a scalar."""
        views = views_for(self, batch)
        queries = [self.project(view) for view in views]
        losses = []
        for v, view in enumerate(views):
            others = [query for other, query in enumerate(queries) if other != v]
            losses.append(self.criterion(others if len(others) > 1 else others[0], self.key_network(view)))
        scale = 4 * getattr(self.criterion, "temperature", 0.5) if self.scale is None else self.scale
        return scale * torch.stack(losses).mean()

    def project(self, images: Tensor) -> Tensor:
        """Queries of images (N, C, H, W), shape (N, predictor.out_dim)."""
        return self.predictor(self.projector(self.encoder(images)))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)

    def after_step(self, progress: Progress) -> None:
        """Let the key network follow."""
        cosine = self.schedule == "cosine"
        momentum = cosine_momentum(self.momentum, progress.fraction) if cosine else self.momentum
        self.key_network.update(nn.Sequential(self.encoder, self.projector), momentum)


def _in_parts(network: nn.Module, images: Tensor, parts: int) -> Tensor:
    """Outputs of parts of a batch that do not share batch statistics."""
    if parts == 1:
        return network(images)
    return torch.cat([network(part) for part in images.tensor_split(min(parts, max(1, len(images))))])


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
