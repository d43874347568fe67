"""Supervised contrastive loss: rows of equal label are positives, in its three published forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks, _ring, similarity
from cl_core._tiles import Over
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard, shard
from cl_core.losses._base import LabelledLoss
from cl_core.losses._common import check_rows, inverse, reduce, root_scale

Form: TypeAlias = Literal["out", "in", "pair"]
"""Where the positives stand: outside the logarithm, inside it, or each pair on its own."""

_ROWS_AT_A_TIME = 2048


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    *,
    form: Form = "out",
    base_temperature: float | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Supervised contrastive loss over rows of equal label; several views are rows with repeated labels.

    With u = z / |z|, s_ij = u_i . u_j / T, P(i) the other rows of i's label, N(i) the rows of other labels:

        out    l_i  = -1/|P(i)| sum_{p in P(i)} s_ip + log sum_{j != i} exp(s_ij)
        in     l_i  = -log( sum_{p in P(i)} exp(s_ip) / sum_{j != i} exp(s_ij) )
        pair   l_ip = -log( exp(s_ip) / (exp(s_ip) + sum_{j in N(i)} exp(s_ij)) )

    Rows without a positive do not count (they still serve as negatives). For four rows with labels (0, 0, 1, 2) the
    anchors that count are rows 0 and 1; "out" averages l_0 = -s_01 + log(e^s_01 + e^s_02 + e^s_03) and l_1.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        form: "out", "in" or "pair".
        base_temperature: T_b; multiplies the loss by T / T_b as the authors' code does (0.07 there). None: by 1.
        ref: rows to compare with instead of z itself (a memory), shape (M, D), the same on all ranks.
        ref_labels: integers, shape (M,).
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the anchors with a positive ("pair": over the positive pairs), "sum", or "none" for
            shape (N,), zero for anchors without a positive ("pair": an anchor's sum over its pairs).
        group: process group whose other rows are compared with; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if no row
        has a positive.

    Raises:
        ValueError: if labels do not fit z, only one of ref and ref_labels is given, or T <= 0.

    Cost: "out": O(N^2 D) time as NT-Xent (positives by class sums, O(N D)). The others add the pairs of equal label.
    O(N D) memory beyond a few thousand rows.
    Reference: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362 ("out" and "in"). The
    authors' code gives nan for a row without a positive; here it does not count.
    """
    _checks.reduction(reduction)
    _checks.choice("form", form, get_args(Form))
    _checks.impl(impl)
    check_rows(group, z=z)
    _checks.labels("labels", labels, rows=z.shape[0], of="z", device=z.device)
    _checks.temperature("temperature", temperature)
    if base_temperature is not None:
        _checks.positive("base_temperature", base_temperature)
    comparison = _compare(z, labels, ref, ref_labels, temperature, normalize, group, impl)
    count = comparison.positive_count()
    valid = count > 0
    if form == "out":
        values = comparison.log_sum("others") - comparison.positive_sum() / count.clamp_min(1)
    elif form == "in":
        log_positives = comparison.log_sum("same").masked_fill(~valid, 0)
        values = F.softplus(comparison.log_sum("different") - log_positives, threshold=60)
    else:
        values = comparison.pair_sum(comparison.log_sum("different"))
    result = reduce(
        values, reduction, split=comparison.split, valid=valid, weight=count if form == "pair" else None
    )
    return result if base_temperature is None else result * (temperature / base_temperature)


@dataclass(frozen=True)
class _Comparison:
    """Anchors and what they are compared with: their own batch, that of all ranks, or other rows.

    Labels are renumbered 0, 1, ... below ``classes``, over all ranks alike. Ids tell a row from itself; None if no
    column can be a row. ``unit`` says that all rows are equally long.
    """

    rows: Tensor
    columns: Tensor
    row_labels: Tensor
    column_labels: Tensor
    ids: Tensor | None
    classes: int
    split: Shard
    unit: bool
    bound: float | None
    impl: Impl

    def log_sum(self, over: Literal["others", "same", "different"]) -> Tensor:
        """Log-sum-exp of an anchor's logits with all other columns, or those of its label, or of other labels."""
        pairs: Over = "same" if over == "same" else "different"
        if self.ids is None:
            pairs = "all" if over == "others" else pairs
            return similarity.cross_log_sum_exp(
                self.rows, self.columns, over=pairs, impl=self.impl, **self._keys()
            )
        if self.split.group is None:
            keys = None if over == "others" else self.row_labels
            options = {"bound": self.bound, "impl": self.impl}
            return similarity.self_log_sum_exp(self.rows, keys=keys, over=pairs, **options)  # type: ignore[arg-type]
        keys_of = {"row_keys": self.ids, "column_keys": self.ids} if over == "others" else self._keys()
        return _ring.log_sum_exp(self.rows, self.columns, self.split, over=pairs, impl=self.impl, **keys_of)

    def pair_sum(self, offset: Tensor) -> Tensor:
        """Sum over an anchor's positives of softplus(offset - logit)."""
        if self._spread:
            return _ring.softplus_sum(
                -self.rows, self.columns, offset, self.split, over="same", impl=self.impl, **self._keys()
            )
        return similarity.softplus_sum(
            -self.rows, self.columns, offset, over="same", impl=self.impl, **self._keys()
        )

    def positive_count(self) -> Tensor:
        """Number of positives of each anchor."""
        ones = torch.ones_like(self.column_labels)
        counts = self._over_ranks(ones.new_zeros(self.classes).index_add(0, self.column_labels, ones))
        return counts[self.row_labels] - int(self.ids is not None)

    def positive_sum(self) -> Tensor:
        """Sum of an anchor's logits with its positives: one product with the sum of its class."""
        others = None if self.ids is not None else self.columns
        split = self.split if self._spread else None
        form = _plain_class_products if torch.compiler.is_compiling() else _ClassProducts.apply
        labels = self.row_labels, self.column_labels
        return form(self.rows, others, *labels, self.classes, split, self.unit)

    @property
    def _spread(self) -> bool:
        """Whether the columns are spread over ranks (other rows to compare with are the same on all)."""
        return self.ids is not None and self.split.group is not None

    def _over_ranks(self, of_columns: Tensor) -> Tensor:
        return self.split.sum(of_columns) if self._spread else of_columns

    def _keys(self) -> dict[str, Any]:
        return {
            "row_keys": self.row_labels,
            "column_keys": self.column_labels,
            "row_ids": self.ids,
            "column_ids": self.ids,
        }


def _compare(
    z: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    temperature: float | Tensor,
    normalize: bool,
    group: Group,
    impl: Impl,
) -> _Comparison:
    bound = similarity.logit_bound(temperature, normalize)
    split = shard(z, group)
    labels, count = labels.long(), len(labels)
    if ref is not None or ref_labels is not None:
        if ref is None or ref_labels is None:
            raise ValueError("ref and ref_labels must be given together, got only one of them.")
        _checks.embeddings("ref", ref)
        _checks.alongside(z=z, ref=ref)
        _checks.labels("ref_labels", ref_labels, rows=ref.shape[0], of="ref", device=ref.device)
        numbers, classes = _renumbered(torch.cat([labels, ref_labels.long()]))
        rows = similarity.scaled_rows(z, scale=inverse(temperature), normalize=normalize)
        columns = similarity.scaled_rows(ref, normalize=normalize, dtype=rows.dtype)
        return _Comparison(
            rows, columns, numbers[:count], numbers[count:], None, classes, split, normalize, bound, impl
        )
    rows = similarity.scaled_rows(z, scale=root_scale(temperature), normalize=normalize)
    numbers, classes = _renumbered(split.gather(labels), count_them=split.group is not None)
    own = numbers[split.offset : split.offset + count]
    ids = torch.arange(split.offset, split.offset + count, device=rows.device)
    return _Comparison(rows, rows, own, own, ids, classes, split, normalize, bound, impl)


def _renumbered(labels: Tensor, *, count_them: bool = False) -> tuple[Tensor, int]:
    """Labels as 0, 1, ... in ascending order, and how many there are, or an upper bound.

    All shapes are independent of the values; counting would break a graph, or stall an accelerator that is not waiting
    for other ranks anyway.
    """
    compiling = torch.compiler.is_compiling()
    if labels.device.type == "cpu" and not compiling:
        values, numbers = labels.unique(return_inverse=True)
        return numbers, len(values)
    ordered, order = labels.sort()
    steps = torch.zeros_like(ordered)
    steps[1:] = ordered[1:] != ordered[:-1]
    numbers = steps.cumsum(0)
    count = len(labels)
    if count and count_them and not compiling:
        count = int(numbers[-1]) + 1
    return torch.empty_like(labels).index_copy(0, order, numbers), count


def _plain_class_products(
    rows: Tensor,
    others: Tensor | None,
    row_labels: Tensor,
    column_labels: Tensor,
    classes: int,
    split: Shard | None,
    unit: bool,
) -> Tensor:
    """rows_i . (sum of the others of i's label); without others, of all rows of that label but row i."""
    wide = rows.double()
    columns = wide if others is None else others.double()
    sums = wide.new_zeros(classes, rows.shape[1]).index_add(0, column_labels, columns)
    sums = sums if split is None else split.sum(sums)
    total = similarity.row_products(wide, sums.index_select(0, row_labels))
    return (total - similarity.row_products(wide, wide) if others is None else total).to(rows.dtype)


class _ClassProducts(torch.autograd.Function):
    """The same with sums in float64, taken some rows at a time.

    Where rows are not equally long, a class and its own row may nearly cancel: then all is in float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        others: Tensor | None,
        row_labels: Tensor,
        column_labels: Tensor,
        classes: int,
        split: Shard | None,
        unit: bool,
    ) -> Tensor:
        columns = rows if others is None else others
        work = rows.dtype if unit else torch.float64
        sums = rows.new_zeros(classes, rows.shape[1], dtype=torch.float64)
        for part, labels in _parts(columns, column_labels):
            sums.index_add_(0, labels, part.double())
        sums = (sums if split is None else split.sum(sums)).to(work)
        products = []
        for part, labels in _parts(rows, row_labels):
            own, rest = part.to(work), sums.index_select(0, labels)
            products.append((rest.sub_(own) if others is None else rest).mul_(own).sum(1))
        ctx.options = classes, split, unit
        ctx.save_for_backward(rows, others, row_labels, column_labels, sums)
        return torch.cat(products).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, row_labels, column_labels, sums = ctx.saved_tensors
        _, split, _ = ctx.options
        if torch.is_grad_enabled():
            wanted = [t for t in (rows, others) if t is not None and t.requires_grad]
            value = _plain_class_products(rows, others, row_labels, column_labels, *ctx.options)
            found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=True))
            given = (next(found) if t is not None and t.requires_grad else None for t in (rows, others))
            return *given, *[None] * 5
        gradient, weighted = gradient.to(sums.dtype)[:, None], None
        if others is None or ctx.needs_input_grad[1]:
            weighted = torch.zeros_like(sums, dtype=torch.float64)
            for part, labels, g in _parts(rows, row_labels, gradient):
                weighted.index_add_(0, labels, (part * g).double())
            weighted = (weighted if split is None else split.sum(weighted)).to(sums.dtype)
        of_rows, of_others = [], None
        for part, labels, g in _parts(rows, row_labels, gradient):
            rest = sums.index_select(0, labels)
            if others is None:
                assert weighted is not None
                rest.sub_(part, alpha=2).mul_(g).add_(weighted.index_select(0, labels))
            else:
                rest.mul_(g)
            of_rows.append(rest.to(rows.dtype))
        if others is not None and weighted is not None:
            parts = _parts(column_labels)
            of_others = torch.cat([weighted.index_select(0, labels).to(rows.dtype) for (labels,) in parts])
        return torch.cat(of_rows), of_others, *[None] * 5


def _parts(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time, so that what is made of them in float64 stays small."""
    if len(vectors[0]) <= _ROWS_AT_A_TIME:
        return iter([vectors])
    return zip(*(v.split(_ROWS_AT_A_TIME) for v in vectors), strict=True)


class SupConLoss(LabelledLoss):
    """Module form of :func:`sup_con_loss`.

    Args:
        temperature: T > 0.
        form: "out", "in" or "pair".
        base_temperature: T_b; multiplies the loss by T / T_b. None: by 1.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows are compared with: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: Form = "out",
        base_temperature: float | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _checks.choice("form", form, get_args(Form))
        if base_temperature is not None:
            _checks.positive("base_temperature", base_temperature)
        super().__init__(
            temperature=temperature,
            form=form,
            base_temperature=base_temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(
        self, z: Tensor, labels: Tensor, ref: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """Loss of embeddings (N, D) with integer labels (N,), or against a memory (M, D) with labels (M,)."""
        return sup_con_loss(z, labels, ref=ref, ref_labels=ref_labels, **self.hyperparameters())
