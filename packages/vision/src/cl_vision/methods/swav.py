"""SwAV: a view predicts to which prototypes other views of its image are assigned."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_core import _checks
from cl_core.distributed import shard
from cl_core.losses import ScoresLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Method, Progress
from cl_core.projectors import MLPProjector, Projector, built
from cl_core.transforms import PositiveExtrapolation
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_crops, check_parts, check_views, project_crops

if TYPE_CHECKING:
    from cl_vision.data import Views


class SwAV(Method):
    """SwAV: unit embeddings, scored against unit prototypes; codes of some crops are predicted by all others.

        cl-vision fit --config swav/digits

    The crops that give codes (``assignment_crops`` of the loss) come first; small crops after them only predict
    (``--data.transform MultiCrop``). Crops of one size pass through the encoder together, all of them through the head.

    In small batches a queue of earlier embeddings takes part in balancing the codes: one for each crop that gives
    codes, filled from epoch ``queue_from_epoch`` on and used once it is full. Under several processes (a loss with a
    ``group``) it takes in the rows of all.

    Args:
        encoder: what is trained and kept.
        loss: called with the scores (N, K) of each crop, and those of the queue, as ``SwAVLoss``.
        projector: head between encoder and prototypes; None for two layers of 2048 to 128 columns.
        num_prototypes: K. Codes use all of them about equally, which takes K rows in batch and queue: ten times the
            number of classes is plenty.
        freeze_epochs: the prototypes stay as they are for so many epochs; fractions allowed. (One in the paper, whose
            code counts iterations: 313 or 5005 are one epoch of its batches.)
        queue_size: rows of a queue, 0 for none.
        queue_from_epoch: when it starts to fill, best when the loss is clearly below its start at log K.
        positive: moves the embeddings of the first two crops apart before they predict (feature transformation); codes
            and queue stay with the embeddings as they are.

    Reference: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
    2020, arXiv 2006.09882. Unlike the authors' code the queue need not be a multiple of the batch, and biases and norms
    carry no weight decay.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ScoresLoss,
        projector: Projector | None = None,
        num_prototypes: int = 3000,
        freeze_epochs: float = 1.0,
        queue_size: int = 0,
        queue_from_epoch: int = 15,
        positive: PositiveExtrapolation | None = None,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, ScoresLoss, called_with="(*scores, queue)")
        _checks.count("num_prototypes", num_prototypes, at_least=2)
        _checks.number("freeze_epochs", freeze_epochs, at_least=0)
        _checks.count("queue_size", queue_size, at_least=0)
        _checks.count("queue_from_epoch", queue_from_epoch, at_least=0)
        self.encoder, self.criterion = encoder, loss
        projector = projector or MLPProjector(hidden_dim=2048)
        self.projector = built("projector", projector, encoder.dim, "the encoder's dim")
        self.num_prototypes, self.freeze_epochs = num_prototypes, freeze_epochs
        self.queue_size, self.queue_from_epoch = queue_size, queue_from_epoch
        self.positive = positive
        width = self.projector.out_dim
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, width), dim=1))
        self.assignment_crops = tuple(getattr(loss, "assignment_crops", (0, 1)))
        count = len(self.assignment_crops) if queue_size else 0
        self.queues = nn.ModuleList(FeatureQueue(queue_size, width) for _ in range(count))
        self._epoch, self._warned = 0, False

    def loss(self, batch: Views) -> Tensor:
        """Loss of two or more crops, largest first, a scalar; takes their embeddings into the queue."""
        check_views(self, batch)
        check_crops(self, self.assignment_crops, batch)
        self._warn_of_too_many_prototypes(batch.views[0])
        embeddings = project_crops(self.encoder, self.projector, batch.views)
        scores = [self.scores(rows) for rows in embeddings]
        options = {"queue": self._queue_scores()}
        if self.positive is not None and self.training:
            moved = self.positive(embeddings[0], embeddings[1])
            options["predictions"] = [*map(self.scores, moved), *scores[2:]]
        loss = self.criterion(*scores, **options)
        if self.training and self._epoch >= self.queue_from_epoch:
            group = getattr(self.criterion, "group", None)
            for queue, crop in zip(self.queues, self.assignment_crops, strict=False):
                queue.enqueue(embeddings[crop], group=group)
        return loss

    def scores(self, rows: Tensor) -> Tensor:
        """Products of rows (N, D) with the prototypes, shape (N, K), in full precision: codes are made of them."""
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(self.prototypes.dtype) @ self.prototypes.t()

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)

    def on_fit_start(self, progress: Progress) -> None:
        """Note the epoch, also after a resume; a training that begins has no use for the queue of another."""
        self._epoch = progress.epoch
        if progress.step == 0:
            for queue in self.queues:
                queue.reset()

    def on_epoch_start(self, progress: Progress) -> None:
        """Note the epoch."""
        self._epoch = progress.epoch

    def before_step(self, progress: Progress) -> None:
        """Hold the prototypes still in the beginning."""
        if progress.step < self.freeze_epochs * progress.steps_per_epoch:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Bring the prototypes back to unit length."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    @torch.no_grad()
    def _queue_scores(self) -> list[Tensor] | None:
        """Scores of the rows of each queue once they are full."""
        if not self.queues or any(queue.filled < queue.size for queue in self.queues):
            return None
        return [self.scores(queue.embeddings) for queue in self.queues]

    def _warn_of_too_many_prototypes(self, images: Tensor) -> None:
        if self._warned or not self.training:
            return
        self._warned = True
        split = shard(images, getattr(self.criterion, "group", None), at_least=0)
        if split.total + self.queue_size < self.num_prototypes and split.rank == 0:
            warnings.warn(
                f"SwAV has {self.num_prototypes} prototypes, but a batch of {split.total} images and a queue of "
                f"{self.queue_size} rows to spread over them, so most stay empty: use fewer prototypes, a larger batch "
                "or a longer queue.",
                stacklevel=2,
            )
