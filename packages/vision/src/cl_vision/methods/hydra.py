"""SimLAP and Hydra: images of any two classes as positives, each pair of classes in a subspace of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from cl_core import _checks
from cl_core.gates import Gate, PairGate, gate_entropy
from cl_core.losses import ClassPairLoss, InfoNCELoss, QueryKeyLoss
from cl_core.method import Method, Progress
from cl_core.momentum import ExponentialMovingAverage, cosine_momentum
from cl_core.projectors import MLPProjector, Projector, built
from cl_core.samplers import ArbitraryPartners, PartnerClasses
from cl_vision.encoders import Encoder
from cl_vision.methods._parts import check_labels, check_parts, two_views, with_predictor

if TYPE_CHECKING:
    from cl_vision.data import Views


class SimLAP(Method):
    """SimLAP: every image is drawn to images of a partner class, in the dimensions that a gate opens for the two.

        cl-vision fit --config hydra/digits

    With z = head(encoder(view)), labels y, drawn partner classes p and gates g = gate(y, p), the loss is
    loss(z of view 1, z of view 2, y, p, g); of one view (``--data.num_views 1``) it is compared with itself. It trains
    with the labels. After training the gate tells which classes share which dimensions.

    Each of several processes draws partners among its own labels, and its ``PairGate`` normalises over its own pairs:
    they train exactly as one process with the whole batch only with ``IdenticalPartners`` and ``OpenGate``.

    Args:
        encoder: what is trained and kept.
        loss: called with (query, key, labels, partners, gates), as ``GatedPairLoss``; of one view with its
            ``self_pairs`` off.
        num_classes: classes of the labels.
        projector: head between encoder and loss; None for two layers of 2048 to 256 columns with layer normalisation
            at the end (a batch normalisation there would keep the gates from closing).
        gate: from two classes to a gate; None for the paper's, a ``PairGate`` with an embedding of 512 and a hidden
            layer of 1024. ``OpenGate`` is the control without one.
        partners: how partner classes are drawn; None for arbitrary ones, a permutation of the batch's labels.
        entropy_weight: gamma >= 0 of the gates' entropy in the loss, which pushes them to 0 or 1.

    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ClassPairLoss,
        num_classes: int,
        projector: Projector | None = None,
        gate: Gate | None = None,
        partners: PartnerClasses | None = None,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, ClassPairLoss, called_with="(query, key, labels, partners, gates)")
        _checks.number("entropy_weight", entropy_weight, at_least=0)
        self.encoder, self.criterion = encoder, loss
        projector = projector or MLPProjector(hidden_dim=2048, out_dim=256, final_norm="layer")
        self.projector = built("projector", projector, encoder.dim, "the encoder's dim")
        self.num_classes, self.entropy_weight = num_classes, entropy_weight
        self.gate = _gate(gate, num_classes, self.projector.out_dim)
        self.partners = partners or ArbitraryPartners()

    def loss(self, batch: Views) -> dict[str, Tensor]:
        """Loss of one or two views with their labels, and the entropy of the gates."""
        if len(batch.views) > 1:
            two_views(self, batch)
        check_labels(self, batch.labels, self.num_classes)
        z = [self.project(view) for view in batch.views]
        partners = self.partners(batch.labels)
        gates = self.gate(batch.labels, partners)
        loss = self.criterion(z[0], z[-1], batch.labels, partners, gates)
        return _with_entropy(loss, gates, self)

    def project(self, images: Tensor) -> Tensor:
        """What the loss sees of images (N, C, H, W), shape (N, projector.out_dim)."""
        return self.projector(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)


class Hydra(Method):
    """Hydra: MoCo v3, and beside it SimLAP's loss on the same predictions and keys.

        cl-vision fit --config hydra/moco-digits

    With queries q = predictor(head(encoder(view))) and keys k = head(encoder(view)) of the moving average, and with L
    the gated loss of queries, keys, labels, partner classes and gates, the loss is

        ( (instance(q1, k2) + instance(q2, k1)) / 2 + balance (L(q1, k2) + L(q2, k1)) / 2 ) / (1 + balance)

    Several processes draw and normalise as in :class:`SimLAP`.

    Args:
        encoder: what is trained and kept.
        loss: L, as for :class:`SimLAP`.
        num_classes: classes of the labels.
        instance_loss: called with queries (N, D) and keys (N, D); None for InfoNCE at temperature 0.2, with the
            ``group`` of the loss.
        projector: head between encoder and loss; None for three layers of 4096 to 256 columns with layer normalisation
            at the end.
        predictor: from projections to queries; None for two layers of 4096.
        gate: as for :class:`SimLAP`.
        partners: as for :class:`SimLAP`.
        separate: let the gated loss have a predictor of its own, two layers of the same widths.
        balance: weight >= 0 of the gated loss beside 1.
        entropy_weight: as for :class:`SimLAP`.
        momentum: weight of the old key network in each step.
        schedule: "cosine" lets ``momentum`` rise to 1 over the training, "constant" keeps it.

    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200. Unlike MoCo v3 the
    losses are not multiplied by 2 T. In the authors' code the penalty of the gates has no gradient; here it has.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: ClassPairLoss,
        num_classes: int,
        instance_loss: QueryKeyLoss | None = None,
        projector: Projector | None = None,
        predictor: Projector | None = None,
        gate: Gate | None = None,
        partners: PartnerClasses | None = None,
        separate: bool = False,
        balance: float = 1.0,
        entropy_weight: float = 0.0,
        momentum: float = 0.99,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        check_parts(encoder, loss, ClassPairLoss, called_with="(query, key, labels, partners, gates)")
        _checks.flag("separate", separate)
        _checks.number("balance", balance, at_least=0)
        _checks.number("entropy_weight", entropy_weight, at_least=0)
        _checks.choice("schedule", schedule, ("cosine", "constant"))
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        self.encoder, self.criterion = encoder, loss
        self.instance_loss = instance_loss or InfoNCELoss(0.2, group=getattr(loss, "group", None))
        projector = projector or MLPProjector(hidden_dim=4096, out_dim=256, layers=3, final_norm="layer")
        self.projector, self.predictor = with_predictor(encoder, projector, predictor)
        self.num_classes, self.separate, self.balance = num_classes, separate, balance
        self.entropy_weight, self.momentum, self.schedule = entropy_weight, momentum, schedule
        width = self.projector.out_dim
        self.gated_predictor = MLPProjector(width, 4096, width) if separate else None
        self.gate = _gate(gate, num_classes, width)
        self.partners = partners or ArbitraryPartners()
        self.key_network = ExponentialMovingAverage(nn.Sequential(self.encoder, self.projector))

    def loss(self, batch: Views) -> dict[str, Tensor]:
        """Loss of two views with their labels, its two parts, and the entropy of the gates."""
        views = two_views(self, batch)
        labels = batch.labels
        check_labels(self, labels, self.num_classes)
        projections = [self.projector(self.encoder(view)) for view in views]
        queries = [self.predictor(z) for z in projections]
        gated = queries if self.gated_predictor is None else [self.gated_predictor(z) for z in projections]
        keys = [self.key_network(view) for view in views]
        partners = self.partners(labels)
        gates = self.gate(labels, partners)
        crossed = ((0, 1), (1, 0))
        instance = sum(self.instance_loss(queries[x], keys[y]) for x, y in crossed) / 2
        pairs = sum(self.criterion(gated[x], keys[y], labels, partners, gates) for x, y in crossed) / 2
        loss = (instance + self.balance * pairs) / (1 + self.balance)
        return _with_entropy(loss, gates, self) | {"instance": instance, "pairs": pairs}  # type: ignore[dict-item]

    def embed(self, images: Tensor) -> Tensor:
        """Features of images (N, C, H, W), shape (N, encoder.dim)."""
        return self.encoder(images)

    def after_step(self, progress: Progress) -> None:
        """Let the key network follow."""
        cosine = self.schedule == "cosine"
        momentum = cosine_momentum(self.momentum, progress.fraction) if cosine else self.momentum
        self.key_network.update(nn.Sequential(self.encoder, self.projector), momentum)


def _gate(gate: Gate | None, num_classes: int, width: int) -> Gate:
    """A gate for so many classes and dimensions."""
    gate = gate or PairGate(num_classes, width)
    if (gate.num_classes, gate.dim) != (num_classes, width):
        raise ValueError(
            f"gate must be of {num_classes} classes and {width} dimensions, num_classes and the projector's out_dim, "
            f"got one of {gate.num_classes} and {gate.dim}."
        )
    return gate


def _with_entropy(loss: Tensor, gates: Tensor, method: SimLAP | Hydra) -> dict[str, Tensor]:
    """The loss with the penalty of the gates, where there is one."""
    if not method.entropy_weight:
        return {"loss": loss}
    entropy = gate_entropy(gates, group=getattr(method.criterion, "group", None))
    return {"loss": loss + method.entropy_weight * entropy, "entropy_penalty": entropy}
