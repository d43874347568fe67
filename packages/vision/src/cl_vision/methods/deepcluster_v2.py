"""DeepCluster-v2: crops find the cluster that their image had in the last epoch's embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core._types import Group
from cl_core.clustering import kmeans
from cl_core.distributed import refusing_together, shard
from cl_core.losses import PrototypeLoss
from cl_core.memory import InstanceBank
from cl_core.method import Method, Progress
from cl_core.projectors import MLPProjector, Projector, built
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_crops, check_parts, check_views, project_crops

if TYPE_CHECKING:
    from cl_vision.data import Views


class DeepClusterV2(Method):
    """DeepCluster-v2: before each epoch the embeddings are clustered, then crops predict the cluster of their image.

        cl-vision fit --config deepcluster-v2/digits

    A bank for each of the crops that are clustered holds the last embedding of every image. Spherical k-means, once
    for every head, makes prototypes of them, which no gradient moves. The first clustering is of the embeddings of the
    untrained network: in a loop of your own, call ``method.prepare(loader)`` once and ``on_epoch_start`` before each
    epoch.

    Args:
        encoder: what is trained and kept.
        loss: called with the embeddings of all crops, the prototypes of each head and the clusters of the images, as
            ``PrototypeNCELoss``.
        projector: head between encoder and prototypes; None for two layers of 2048 to 128 columns.
        num_prototypes: clusters of each head.
        assignment_crops: crops whose embeddings are clustered, one after the other by the heads in turn.
        kmeans_iterations: passes of k-means, from random rows.

    Cost: the banks, 4 bytes times images, crops and columns (1 GB for a million images, two crops and 128 columns), in
    memory on each process and in checkpoints and exports; a few times as much in memory while ``prepare`` fills them.
    Reference: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
    2020, arXiv 2006.09882, section 4. The authors' code makes the first embeddings in training mode, with the
    statistics of batches; these are made in evaluation mode. A bank row belongs to an image, where theirs belong to
    places in the order of the last epoch, which differs for images that an incomplete batch left out: theirs lose
    their cluster, ours keep their last embedding.
    """

    unbroadcast: ClassVar[tuple[str, ...]] = ("assignments", "prototypes", "epoch")
    """Buffers that are equal on all processes already, as the banks are."""
    assignments: Tensor
    prototypes: Tensor
    epoch: Tensor

    def __init__(
        self,
        encoder: Encoder,
        loss: PrototypeLoss,
        projector: Projector | None = None,
        num_prototypes: Sequence[int] = (3000, 3000, 3000),
        assignment_crops: Sequence[int] = (0, 1),
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, PrototypeLoss, called_with="(z, prototypes, assignments)")
        for name, numbers, least in (
            ("num_prototypes", num_prototypes, 2),
            ("assignment_crops", assignment_crops, 0),
        ):
            if not isinstance(numbers, Sequence):
                raise TypeError(f"{name} must be a sequence of numbers, got {type(numbers).__name__}.")
            if not numbers:
                raise ValueError(f"{name} must hold at least one number, got none.")
            for number in numbers:
                _checks.count(name, number, at_least=least)
        _checks.count("kmeans_iterations", kmeans_iterations)
        self.encoder, self.criterion = encoder, loss
        projector = projector or MLPProjector(hidden_dim=2048)
        self.projector = built("projector", projector, encoder.dim, "the encoder's dim")
        self.num_prototypes, self.assignment_crops = list(num_prototypes), list(assignment_crops)
        self.kmeans_iterations = kmeans_iterations
        self.register_buffer("prototypes", torch.zeros(sum(num_prototypes), self.projector.out_dim))
        self.register_buffer("epoch", torch.tensor(-1))  # whose clusters these are
        self._resize(0)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """Prototypes of each head, unit rows of shape (K, projector.out_dim)."""
        return self.prototypes.split(self.num_prototypes)

    def loss(self, batch: Views) -> Tensor:
        """Loss of two or more crops, largest first, a scalar; takes embeddings into the bank."""
        check_views(self, batch)
        check_crops(self, self.assignment_crops, batch)
        images = self.assignments.shape[1]
        _checks.require(
            (batch.index < images).all(),
            f"DeepClusterV2 has clusters of {images} images, got one of a higher number: call method.prepare(loader) "
            "with a loader over all images before training.",
        )
        crops = project_crops(self.encoder, self.projector, batch.views)
        clusters = self.assignments[:, batch.index].repeat(1, len(crops))
        loss = self.criterion(torch.cat(crops), list(self.heads), clusters.unbind())
        if self.training:
            for bank, crop in zip(self.banks, self.assignment_crops, strict=True):
                bank.update(batch.index, crops[crop], group=self._group)
                bank.embeddings  # noqa: B018 - no backward reads them, so they need not wait for the epoch's end
        return loss

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Any]) -> None:
        """Embed all images once and cluster them."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._group is None and several and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "loss must have a group where several processes train DeepClusterV2, so that all of them cluster all "
                "images: pass --model.loss.group world."
            )
        modes = {module: module.training for module in self.modules()}
        self.eval()
        index, rows = [], []
        try:
            for batch in batches:
                check_crops(self, self.assignment_crops, batch)
                crops = [batch.views[crop] for crop in self.assignment_crops]
                rows.append(torch.stack(project_crops(self.encoder, self.projector, crops), 1))
                index.append(batch.index)
        finally:
            for module, mode in modes.items():
                module.training = mode
        with refusing_together(self._group, self.prototypes.device):
            if not rows:
                raise ValueError("batches must hold at least one batch, got none.")
        own = torch.cat(index)
        self._resize(int(shard(own, self._group).gather(own).max()) + 1)
        for bank, crop in zip(self.banks, torch.cat(rows).unbind(1), strict=True):
            bank.update(own, crop, group=self._group)
        self._cluster(epoch=0)

    def on_epoch_start(self, progress: Progress) -> None:
        """Cluster what the last epoch left in the bank, unless this epoch has its clusters."""
        if self.assignments.numel() and self.epoch != progress.epoch:
            self._cluster(progress.epoch)

    @property
    def _group(self) -> Group:
        return getattr(self.criterion, "group", None)

    @torch.no_grad()
    def _cluster(self, epoch: int) -> None:
        rows = torch.stack([bank.seen for bank in self.banks]).all(0).nonzero().squeeze(1)
        if len(rows) < max(self.num_prototypes):
            raise ValueError(
                f"num_prototypes must be at most the number of images, {len(rows)}, got {max(self.num_prototypes)}."
            )
        # Processes hold equal banks and share the work; the first one's random rows decide.
        split = shard(rows, self._group)
        own = rows[split.rank :: split.world_size]
        split = shard(own, self._group)
        where = split.gather(own)
        self.assignments.fill_(-1)
        for head, (prototypes, clusters) in enumerate(zip(self.heads, self.assignments, strict=True)):
            bank = self.banks[head % len(self.banks)].embeddings
            found = kmeans(
                bank[own],
                len(prototypes),
                metric="cosine",
                initial=bank[self._start(rows, len(prototypes))],
                max_iterations=self.kmeans_iterations,
                tolerance=0,
                empty="keep",
                group=self._group,
            )
            prototypes.copy_(found.centroids)
            clusters[where] = split.gather(found.assignments)
        self.epoch.fill_(epoch)

    def _start(self, rows: Tensor, clusters: int) -> Tensor:
        """Rows of the bank that k-means starts from."""
        return rows[torch.randperm(len(rows))[:clusters].to(rows.device)]

    def _resize(self, images: int) -> None:
        like, heads = self.prototypes, len(self.num_prototypes)
        # A generator of their own: what rows not seen yet hold is never read, and must not move the random state.
        options = {"momentum": 0.0, "dtype": like.dtype, "generator": torch.Generator()}
        banks = [InstanceBank(max(1, images), like.shape[1], **options) for _ in self.assignment_crops]
        self.banks = nn.ModuleList(banks).to(like.device)
        start = torch.full((heads, images), -1, dtype=torch.int64, device=like.device)
        self.register_buffer("assignments", start)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "assignments")
        if isinstance(stored, Tensor) and stored.ndim == 2 and stored.shape[1] != self.assignments.shape[1]:
            self._resize(stored.shape[1])  # before the banks load theirs
        super()._load_from_state_dict(state_dict, prefix, *args)
