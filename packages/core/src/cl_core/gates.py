"""Gates of class pairs: which dimensions of an embedding a pair of classes may share, learnt from the two labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.distributed import shard

Fusion: TypeAlias = Literal["mean", "product"]
"""Where two classes become one gate: the mean of their embeddings, or the product of their gates."""

Overlap: TypeAlias = Literal["cosine", "jaccard"]
"""How alike two gates are: cosine of their values, or the share of their open dimensions that both open."""


class ClassPairGates(NamedTuple):
    """Gates (P, K) and the classes they belong to, two int64 vectors (P,)."""

    first: Tensor
    second: Tensor
    gates: Tensor


class Gate(nn.Module):
    """Base of gates in [0, 1]^K for pairs of classes.

    Args:
        num_classes: classes C, numbered 0 to C - 1.
        dim: dimensions K of the embeddings to be gated.
    """

    _at: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        _checks.count("num_classes", num_classes)
        _checks.count("dim", dim)
        super().__init__()
        self.num_classes, self.dim = num_classes, dim
        self.register_buffer(
            "_at", torch.empty(0), persistent=False
        )  # knows the device where there are no weights

    def forward(self, labels: Tensor, partners: Tensor | None = None) -> Tensor:
        """Gates of pairs of classes (B,) and (B,), or of single classes, shape (B, K)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(labels, partners).")

    @torch.no_grad()
    def lookup(self, labels: Tensor, partners: Tensor | None = None, *, tile: int = 8192) -> Tensor:
        """Gates as after training, whatever the mode: from the running statistics, without a gradient.

        Args:
            labels: as in :meth:`forward`.
            partners: as in :meth:`forward`.
            tile: pairs at a time.

        Returns:
            Shape (P, K).
        """
        _checks.count("tile", tile)
        given = self._checked(labels, partners)
        with _evaluating(self):
            parts = [self(*some) for some in zip(*(t.split(tile) for t in given), strict=True)]
        return torch.cat(parts)

    def gates_of_all_pairs(self, classes: Tensor | None = None, *, tile: int = 8192) -> ClassPairGates:
        """Gates of all unordered pairs of classes, those of a class with itself included, as by :meth:`lookup`.

        Args:
            classes: integers, shape (C',), to take pairs of these alone; None: of all C.
            tile: pairs at a time.

        Returns:
            The P = C' (C' + 1) / 2 pairs and their gates (P, K).

        Cost: O(P K) memory: half a gigabyte for 1,000 classes and K = 256.
        """
        device = self._at.device
        if classes is None:
            classes = torch.arange(self.num_classes, device=device)
        else:
            (classes,) = self._checked(classes.to(device) if isinstance(classes, Tensor) else classes)
        first, second = classes[torch.triu_indices(len(classes), len(classes), device=device)]
        return ClassPairGates(first, second, self.lookup(first, second, tile=tile))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_classes={self.num_classes}, dim={self.dim}"

    def _checked(self, labels: Tensor, partners: Tensor | None = None) -> list[Tensor]:
        """The labels, and the partners if there are any, as int64."""
        given = {"labels": labels} if partners is None else {"labels": labels, "partners": partners}
        rows = len(labels) if isinstance(labels, Tensor) and labels.ndim else 0
        for name, classes in given.items():
            _checks.labels(name, classes, rows=rows, of="the batch", device=self._at.device)
            inside = ((classes >= 0) & (classes < self.num_classes)).all()
            _checks.require(inside, f"{name} must lie in [0, {self.num_classes}), got another class.")
        return [classes.long() for classes in given.values()]


class OpenGate(Gate):
    """All dimensions open to all pairs: the control without a gate.

    Args:
        num_classes: classes C.
        dim: dimensions K.
    """

    def forward(self, labels: Tensor, partners: Tensor | None = None) -> Tensor:
        """Ones, shape (B, K)."""
        self._checked(labels, partners)
        return self._at.new_ones(len(labels), self.dim)


class PairGate(Gate):
    r"""A gate in (0, 1)^K for a pair of classes, from a trainable embedding e of every class.

        mean      g(a, b) = sigmoid(MLP((e_a + e_b) / 2))
        product   g(a, b) = sigmoid(MLP(e_a)) sigmoid(MLP(e_b))

    with MLP = ReLU, BatchNorm, Linear(E, M), ReLU, BatchNorm, Linear(M, K). Symmetric in a and b. While training, the
    gates of a pair depend on the other pairs of the batch, as BatchNorm does; :meth:`lookup` and
    :meth:`gates_of_all_pairs` use the running statistics and leave them alone. A batch of one pair has no statistics of
    its own and takes the running ones. Weight decay would draw the embeddings of rare classes together, so
    :meth:`cl_core.method.Method.parameter_groups` exempts them.

    Args:
        num_classes: classes C, numbered 0 to C - 1.
        dim: dimensions K of the embeddings to be gated.
        embedding_dim: width E of a class's embedding.
        hidden_dim: width M of the hidden layer.
        fusion: "mean" or "product".

    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200. "product" takes its
    batch statistics over both classes of all pairs at once.
    """

    undecayed: ClassVar[tuple[str, ...]] = ("embedding.weight",)

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        embedding_dim: int = 512,
        hidden_dim: int = 1024,
        fusion: Fusion = "mean",
    ) -> None:
        _checks.count("embedding_dim", embedding_dim)
        _checks.count("hidden_dim", hidden_dim)
        _checks.choice("fusion", fusion, get_args(Fusion))
        super().__init__(num_classes, dim)
        self.fusion = fusion
        self.embedding_dim, self.hidden_dim = embedding_dim, hidden_dim
        self.embedding = nn.Embedding(num_classes, embedding_dim)
        self.mlp = nn.Sequential(
            nn.ReLU(),
            _BatchNorm(embedding_dim),
            nn.Linear(embedding_dim, hidden_dim),
            nn.ReLU(),
            _BatchNorm(hidden_dim),
            nn.Linear(hidden_dim, dim),
        )

    def forward(self, labels: Tensor, partners: Tensor | None = None) -> Tensor:
        """Gates of pairs of classes.

        Args:
            labels: integers in [0, C), shape (B,).
            partners: integers in [0, C), shape (B,); None gives the gates of single classes, sigmoid(MLP(e)).

        Returns:
            Shape (B, K), at least float32.

        Raises:
            ValueError: if shapes differ or a class is out of range.
        """
        given = self._checked(labels, partners)
        if partners is None:
            return self._gates(self.embedding(given[0]))
        both = self.embedding(torch.stack(given))
        if self.fusion == "mean":
            return self._gates(both.mean(0))
        first, second = self._gates(both.flatten(0, 1)).chunk(2)
        return first * second

    def extra_repr(self) -> str:
        """Show the sizes and the fusion."""
        return f"{super().extra_repr()}, fusion={self.fusion!r}"

    def _gates(self, embedded: Tensor) -> Tensor:
        logits: Tensor = self.mlp(embedded)
        return _rows.wide(logits).sigmoid()


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes its running statistics where a batch has none, because it is a single row."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """All parts of a module in evaluation mode, and after that each in the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def gate_entropy(gates: Tensor, *, group: Group = None) -> Tensor:
    r"""Mean entropy of gates as probabilities; as a penalty it pushes them to 0 or 1.

        1/(B K) sum_id ( -g_id log g_id - (1 - g_id) log(1 - g_id) )

    in nats, between 0 and log 2. A gate that has rounded to 0 or 1 has no gradient.

    Args:
        gates: shape (B, K), in [0, 1].
        group: process group over which the rows are spread.

    Returns:
        Scalar, at least float32, with a gradient.

    Raises:
        ValueError: if gates is no matrix of numbers in [0, 1].

    Cost: O(B K).
    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200. In the authors' code
    the penalty has no gradient and takes all single classes; for that, give it their gates.
    """
    _check_gates(gates, at_least=1 if group is None else 0)
    gates = _rows.wide(gates)
    rounding = torch.finfo(gates.dtype).eps
    inside = gates.clamp(rounding, 1 - rounding)
    values = torch.special.entr(inside) + torch.special.entr(1 - inside)
    split = shard(gates, group)
    total: Tensor = values.mean(1).sum()
    return total * (split.world_size / split.total)


def open_dimensions(gates: Tensor, *, threshold: float = 0.5) -> Tensor:
    """How many dimensions each gate opens: entries above the threshold; int64, shape (P,).

    Args:
        gates: shape (P, K), in [0, 1].
        threshold: in [0, 1).
    """
    _check_gates(gates)
    count: Tensor = _open(gates, threshold).sum(1)
    return count


def dimension_usage(gates: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Share of the gates that open each dimension, shape (K,); 0 where no pair uses it, 1 where all do.

    Args:
        gates: shape (P, K), in [0, 1].
        threshold: in [0, 1).
    """
    _check_gates(gates)
    return _open(gates, threshold).float().mean(0)


def gate_overlap(
    gates: Tensor, others: Tensor | None = None, *, kind: Overlap = "cosine", threshold: float = 0.5
) -> Tensor:
    r"""How much the gates of class pairs share.

        cosine    g_p . g_q / (|g_p| |g_q|)
        jaccard   |open_p and open_q| / |open_p or open_q|,   0 where both open nothing

    Args:
        gates: shape (P, K), in [0, 1].
        others: shape (Q, K); None compares the gates with one another.
        kind: "cosine" or "jaccard".
        threshold: in [0, 1); a dimension is open above it.

    Returns:
        Shape (P, Q), in [0, 1], without gradient.

    Cost: O(P Q K) time, O(P Q) memory.
    """
    _check_gates(gates)
    _checks.choice("kind", kind, get_args(Overlap))
    if others is None:
        others = gates
    _check_gates(others, name="others")
    _checks.alongside(gates=gates, others=others)
    with _rows.measuring(gates.device):
        if kind == "cosine":
            gates, others = (z.to(torch.promote_types(gates.dtype, others.dtype)) for z in (gates, others))
            return (_rows.unit(gates) @ _rows.unit(others).T).clamp_(0, 1)
        ours, theirs = (_open(g, threshold).float() for g in (gates, others))
        shared = ours @ theirs.T
        return shared / (ours.sum(1)[:, None] + theirs.sum(1) - shared).clamp_min_(1)


def most_alike(
    gates: Tensor, count: int = 10, *, kind: Overlap = "cosine", threshold: float = 0.5, tile: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a matrix of gates that share most.

    Args:
        gates: shape (P, K), in [0, 1].
        count: how many pairs of rows.
        kind: as in :func:`gate_overlap`.
        threshold: as in :func:`gate_overlap`.
        tile: rows of the overlaps at a time.

    Returns:
        Row numbers p < q, two int64 vectors, and their overlaps, the largest first; fewer than ``count`` where there
        are no more pairs.

    Cost: O(P^2 K) time, O(tile P) memory.
    """
    _checks.count("count", count)
    _checks.count("tile", tile)
    _check_gates(gates)
    best = torch.empty(0, device=gates.device), torch.empty(0, dtype=torch.int64, device=gates.device)
    for block in _rows.tiles(len(gates), tile):
        overlaps = gate_overlap(gates[block], gates, kind=kind, threshold=threshold)
        number = torch.arange(overlaps.numel(), device=gates.device) + block.start * len(gates)
        above = overlaps.new_ones(overlaps.shape, dtype=torch.bool).triu_(block.start + 1).flatten()
        values = torch.cat([best[0], overlaps.flatten()[above]])
        numbers = torch.cat([best[1], number[above]])
        values, order = values.topk(min(count, len(values)))
        best = values, numbers[order]
    return best[1] // len(gates), best[1] % len(gates), best[0]


def _open(gates: Tensor, threshold: float) -> Tensor:
    _checks.number("threshold", threshold, at_least=0)
    if threshold >= 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}.")
    return gates > threshold


def _check_gates(gates: Tensor, *, name: str = "gates", at_least: int = 1) -> None:
    _checks.embeddings(name, gates, at_least=at_least)
    _checks.shares(name, gates)
