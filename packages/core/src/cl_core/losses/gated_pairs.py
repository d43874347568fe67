"""SimLAP: samples of any two classes as positives, compared in the subspace that a gate opens for the two classes.

The gates come from :class:`cl_core.gates.PairGate`, the partner classes from :mod:`cl_core.samplers.partners`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_core import _checks, _tiles
from cl_core._dense import logits_of
from cl_core._ops import TiledForm, _wanted
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import shard
from cl_core.gates import gate_entropy, open_dimensions
from cl_core.losses._base import ClassPairLoss
from cl_core.losses._common import check_rows, inverse, reduce
from cl_core.scores import Scored, evenly
from cl_core.similarity import at_least_float32, scaled_rows

Similarity: TypeAlias = Literal["gated_cosine", "gated_dot"]
"""Cosine of the two gated rows, or the product of unit rows that are gated afterwards."""

Per: TypeAlias = Literal["pair", "anchor"]
"""What counts as one in a mean: a positive pair, or an anchor with the mean of its pairs."""

# Of a key whose largest entry is 1, behind a gate whose largest entry is 1; squared. At this length the gradient of the
# cosine is up to 1e12, and beyond it there is no direction to speak of.
_CLOSED = 1e-24
# Up to this many similarities all are kept, in about fifteen matrices of that size: 60 MB in float32.
_DENSE_ENTRIES = 1024 * 1024
_COLDEST_LEARNT = 0.01


def gated_pair_loss(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    partners: Tensor,
    gates: Tensor,
    *,
    key_labels: Tensor | None = None,
    similarity: Similarity = "gated_cosine",
    alpha: float | Tensor = 0.0,
    self_pairs: bool = True,
    per: Per = "pair",
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Draw queries of one class to keys of another class, in the dimensions that a gate opens for the two.

    Anchor i has class y_i, partner class p_i and gate g_i; key j has class c_j. With the similarity s of
    :func:`gated_similarity`, P(i) = {j: c_j = p_i} and N(i) = {j: c_j not in (y_i, p_i)},

        l_ij = -log( exp(s_ij / T) / (exp(s_ij / T) + sum_{n in N(i)} exp(s_in / T)) ),   j in P(i)

    Each positive has a denominator of its own, without the other positives. Keys of the anchor's own class are neither
    positive nor negative, unless the partner class is the same. An anchor whose partner class has no key has no
    positive and does not count; one without negatives (two classes in all) counts as 0.

    With partners = labels, gates of 1, the queries as keys and ``self_pairs=False`` this is
    ``sup_con_loss(form="pair")``.

    Args:
        query: embeddings of the anchors, shape (B, K); no row needs to have unit length.
        key: embeddings to compare with, shape (N, K), N = B without ``key_labels``. A second view, the queries
            themselves, or the output of a momentum encoder.
        labels: classes of the anchors, integers, shape (B,).
        partners: their partner classes, integers, shape (B,).
        gates: in [0, 1], shape (B, K), one row an anchor, which opens both sides of its comparisons. May have another
            floating type than query.
        key_labels: classes of the keys, integers, shape (N,); None: key j has the class of query j.
        similarity: "gated_cosine" or "gated_dot".
        alpha: share of the ungated similarity taken off a "gated_dot"; a 0-d tensor receives a gradient.
        self_pairs: whether key i may be a positive of query i, where p_i = y_i. False where the keys are the queries.
        per: what "mean" counts: the "pair", or the "anchor", each with the mean over its positives.
        temperature: T > 0; a 0-d tensor receives a gradient.
        reduction: "mean" over the positive pairs of the batch, or over the anchors that have any; "sum"; or "none" for
            shape (B,), an anchor's sum over its positives, or with ``per="anchor"`` its mean.
        group: process group whose keys are compared with, all ranks' with their classes and gradients; None keeps the
            loss local. Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (B,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if no anchor
        has a positive.

    Raises:
        ValueError: if shapes or labels do not fit, an input is empty or not finite, T <= 0, or an option does not go
            with another.

    Cost: O(B N K) time: two products forward, four backward ("gated_dot": one and two), those of the forward again if
    tiled. Memory O(B N) if dense; O((B + N) K) and 2^20 entries at a time if tiled (on accelerators 2^25).
    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200 ("Hydra" in its first
    version). The authors' first code is the default here; it gives nan where no anchor has a positive. Their later one
    is ``similarity="gated_dot", per="anchor"``; it divides by the count of an anchor's positives + 1e-6, and by the
    number of all anchors, those without a positive included.
    """
    _checks.reduction(reduction)
    _check_pairs(per, self_pairs)
    _checks.temperature("temperature", temperature)
    _checks.impl(impl)
    check_rows(group, query=query, key=key)
    _checks.labels("labels", labels, rows=len(query), of="query", device=query.device)
    _checks.labels("partners", partners, rows=len(query), of="query", device=query.device)
    if key_labels is None:
        _checks.same_shape(query=query, key=key)
    else:
        _checks.labels("key_labels", key_labels, rows=len(key), of="key", device=key.device)
        if not self_pairs:
            raise ValueError(
                "self_pairs must be True with key_labels, got False: which key is which query is not known."
            )
    labels, partners = labels.long(), partners.long()
    split = shard(key, group)
    own = None if self_pairs else split.offset
    factors = _factors(query, key, gates, similarity, alpha, temperature)
    factors = factors._replace(columns=split.gather(factors.columns))
    classes = labels, partners, split.gather(labels if key_labels is None else key_labels.long())
    sums = _pair_sums(factors, classes, own, impl)
    count = _count(*classes, self_pairs)
    if per == "anchor":
        return reduce(sums / count.clamp_min(1), reduction, split=split, valid=count > 0)
    return reduce(sums, reduction, split=split, weight=count)


def gated_similarity(
    query: Tensor,
    key: Tensor,
    gates: Tensor,
    *,
    similarity: Similarity = "gated_cosine",
    alpha: float | Tensor = 0.0,
) -> Tensor:
    r"""Similarities of queries with keys, each query's with the gate of that query on both sides.

    With the products written out by dimension,

        gated_cosine   s_ij = (g_i z_i) . (g_i k_j) / (|g_i z_i| |g_i k_j|)
        gated_dot      s_ij = sum_d (g_id^2 - alpha) u_id v_jd,   u = z / |z|, v = k / |k|

    computed as matrix products, |g_i k_j|^2 being g_i^2 . k_j^2. A cosine does not depend on how large a gate is, only
    on its direction; a dot product falls as the gate closes. alpha > 0 rewards rows that are similar inside of the
    gate alone. A key with nothing in the open dimensions has the cosine 0, without gradient.

    Args:
        query: shape (B, K).
        key: shape (N, K).
        gates: in [0, 1], shape (B, K).
        similarity: "gated_cosine" or "gated_dot".
        alpha: a number, or a 0-d tensor, which receives a gradient; for "gated_dot".

    Returns:
        Shape (B, N), in [-1, 1] if alpha is in [0, 1]. float32 for half inputs.

    Raises:
        ValueError: if shapes do not fit, an input is empty or not finite, or alpha comes with "gated_cosine".

    Cost: O(B N K) time, O(B N) memory.
    Reference: Wu et al., "Rethinking Positive Pairs in Contrastive Learning", arXiv 2410.18200.
    """
    check_rows(None, query=query, key=key)
    return _logits(*_factors(query, key, gates, similarity, alpha, 1.0))


def _check_similarity(similarity: Similarity, alpha: float | Tensor) -> None:
    _checks.choice("similarity", similarity, get_args(Similarity))
    _checks.scalar("alpha", alpha)
    if similarity != "gated_dot" and (isinstance(alpha, Tensor) or alpha != 0):
        raise ValueError(f"alpha must be 0 unless similarity='gated_dot', got {alpha} with {similarity!r}.")


def _check_pairs(per: Per, self_pairs: bool) -> None:
    _checks.choice("per", per, get_args(Per))
    _checks.flag("self_pairs", self_pairs)


class _Factors(NamedTuple):
    """The logits are the products rows_i . columns_j, each over sqrt(squares_i . columns_j^2) if there are squares."""

    rows: Tensor
    squares: Tensor | None
    columns: Tensor


def _factors(
    query: Tensor,
    key: Tensor,
    gates: Tensor,
    similarity: Similarity,
    alpha: float | Tensor,
    temperature: float | Tensor,
) -> _Factors:
    """Check what is compared; the factors of the similarities over the temperature."""
    _checks.same_width(query=query, key=key)
    _checks.embeddings("gates", gates, at_least=0)
    _checks.shares("gates", gates)
    _checks.alongside(query=query, gates=gates)
    if len(gates) != len(query):
        raise ValueError(f"gates must have one row for each of query, {len(query)}, got {len(gates)}.")
    _check_similarity(similarity, alpha)
    scale = inverse(temperature)
    gates = gates.to(torch.promote_types(query.dtype, torch.float32))
    if similarity == "gated_dot":
        rows = scaled_rows(query, scale=scale) * (gates.square() - alpha)
        return _Factors(rows, None, scaled_rows(key))
    gates, columns = _relative(gates), _relative(at_least_float32(key))
    rows = scaled_rows(at_least_float32(query) * gates, scale=scale, source=query.dtype) * gates
    return _Factors(rows, gates.square(), columns)


def _relative(rows: Tensor) -> Tensor:
    """Rows over their largest entry: a cosine does not depend on it, so it is a constant, and no square overflows."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1)


def _logits(rows: Tensor, squares: Tensor | None, columns: Tensor) -> Tensor:
    logits = logits_of(rows, columns)
    if squares is None:
        return logits
    lengths = logits_of(squares, columns.square())
    closed = lengths < _CLOSED
    return logits * lengths.masked_fill(closed, 1).rsqrt().masked_fill(closed, 0)


def _count(labels: Tensor, partners: Tensor, key_labels: Tensor, self_pairs: bool) -> Tensor:
    """Positives of each anchor, shape (B,)."""
    ordered, partners = key_labels.sort().values, partners.contiguous()
    count = torch.searchsorted(ordered, partners, right=True) - torch.searchsorted(ordered, partners)
    return count if self_pairs else count - (labels == partners).long()


def _pair_sums(
    factors: _Factors, classes: tuple[Tensor, Tensor, Tensor], own: int | None, impl: Impl
) -> Tensor:
    """Sum over an anchor's positives, shape (B,).

    Args:
        factors: of the logits.
        classes: of the anchors, of their partners and of the keys.
        own: number of the key that is anchor 0 itself; None if none is.
        impl: "dense", "tiled" or "auto".
    """
    rows, squares, columns = factors
    if impl == "dense" or (impl == "auto" and len(rows) * len(columns) <= _DENSE_ENTRIES):
        return _terms(_logits(*factors), *classes, own).sum(1)
    squares = rows.new_empty(0, rows.shape[1]) if squares is None else squares
    return _tiled_pair_sums(rows, squares, columns, *classes, own).to(rows.dtype)  # type: ignore[no-any-return]


def _terms(logits: Tensor, labels: Tensor, partners: Tensor, key_labels: Tensor, own: int | None) -> Tensor:
    """Loss of every pair, 0 where it is no positive one, in differentiable operations."""
    positive, no_negative = _kinds(labels, partners, key_labels, own)
    log_negatives = _without(logits, no_negative).logsumexp(1, keepdim=True)
    return F.softplus(log_negatives - logits, threshold=60).masked_fill(~positive, 0)


def _kinds(labels: Tensor, partners: Tensor, key_labels: Tensor, own: int | None) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which are no negatives, shape (B, N) each."""
    positive = partners[:, None] == key_labels
    no_negative = positive | (labels[:, None] == key_labels)
    if own is not None:
        anchors = torch.arange(own, own + len(labels), device=labels.device)
        positive = positive & (anchors[:, None] != torch.arange(len(key_labels), device=labels.device))
    return positive, no_negative


def _without(logits: Tensor, left_out: Tensor) -> Tensor:
    """Logits with some as low as can be, but finite.

    So the log-sum-exp of a row without negatives is a number so low that softplus makes it 0, with no gradient.
    """
    return logits.masked_fill(left_out, torch.finfo(logits.dtype).min / 2)


def _gated_pair_sums(
    rows: Tensor,
    squares: Tensor,
    columns: Tensor,
    labels: Tensor,
    partners: Tensor,
    key_labels: Tensor,
    own: int | None,
) -> Tensor:
    """The sums of :func:`_terms`, some anchors at a time; no rows of squares for plain products."""
    walk = _Walk(rows, squares, columns)
    total = rows.new_empty(len(rows), dtype=torch.float64)
    for start, stop in walk.panels():
        logits, _ = walk.logits(start, stop)
        numbers = labels[start:stop], partners[start:stop], key_labels
        total[start:stop] = _terms(logits, *numbers, None if own is None else own + start).sum(1)
    return total


def _gated_pair_sums_backward(
    gradient: Tensor,
    rows: Tensor,
    squares: Tensor,
    columns: Tensor,
    total: Tensor,
    labels: Tensor,
    partners: Tensor,
    key_labels: Tensor,
    own: int | None,
    need: list[bool],
) -> list[Tensor]:
    """Gradient of :func:`_gated_pair_sums`.

    An anchor's positives have the share q_ij = sigmoid(log sum_n exp(l_in) - l_ij), its negatives their softmax P_ij;
    the gradient of the logits is G_ij = P_ij sum_p q_ip - q_ij, times the anchor's. With r_ij = 1 / |g_i k_j|, the
    logits are r_ij (rows_i . columns_j) and d r = -r^3/2 d(squares_i . columns_j^2): rows get (G r) columns, squares
    get -1/2 (G l r^2) columns^2.
    """
    walk, gradient = _Walk(rows, squares, columns), gradient.to(rows.dtype)
    of_rows, of_squares = torch.empty_like(rows), torch.empty_like(squares)
    of_columns, of_column_squares = torch.zeros_like(columns), torch.zeros_like(walk.square_columns)
    for start, stop in walk.panels():
        part = slice(start, stop)
        logits, over = walk.logits(start, stop)
        first = None if own is None else own + start
        positive, no_negative = _kinds(labels[part], partners[part], key_labels, first)
        negatives = _without(logits, no_negative)
        share = (negatives.logsumexp(1, keepdim=True) - logits).sigmoid_().masked_fill_(~positive, 0)
        share.mul_(gradient[part, None])
        weight = negatives.softmax(1).mul_(share.sum(1, keepdim=True)).sub_(share)
        if over is not None:
            bent = torch.mul(weight, logits, out=share).mul_(over).mul_(over)
            weight.mul_(over)
            if need[1]:
                torch.mm(bent, walk.square_columns, out=of_squares[part]).mul_(-0.5)
            if need[2]:
                of_column_squares.addmm_(bent.t(), squares[part])
        if need[0]:
            torch.mm(weight, columns, out=of_rows[part])
        if need[2]:
            of_columns.addmm_(weight.t(), rows[part])
    if len(squares):
        of_columns.addcmul_(columns, of_column_squares, value=-1)
    return [_wanted(g, n) for g, n in zip((of_rows, of_squares, of_columns), need, strict=True)]


class _Walk:
    """Visits the logits of some anchors at a time with all keys, each panel written into the same buffers.

    Products write into what is given: autocast leaves those alone.
    """

    def __init__(self, rows: Tensor, squares: Tensor, columns: Tensor) -> None:
        self.rows, self.squares, self.columns = rows, squares, columns
        self.square_columns = columns.square() if len(squares) else columns[:0]
        # Entries of a panel, of which about six exist at a time: on CPU what keeps them near the cache.
        entries = 2**20 if rows.device.type == "cpu" else 2**25
        self._height = max(1, entries // len(columns))
        height = min(self._height, len(rows))
        self._buffers = [rows.new_empty(height, len(columns)) for _ in range(1 + bool(len(squares)))]

    def panels(self) -> Iterator[tuple[int, int]]:
        return _tiles.panels(0, len(self.rows), self._height)

    def logits(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Logits of some anchors, and the inverse lengths of the gated keys."""
        logits = self._buffers[0][: stop - start]
        torch.mm(self.rows[start:stop], self.columns.t(), out=logits)
        if not len(self.squares):
            return logits, None
        over = self._buffers[1][: stop - start]
        torch.mm(self.squares[start:stop], self.square_columns.t(), out=over)
        closed = over < _CLOSED
        over.rsqrt_().masked_fill_(closed, 0)
        return logits.mul_(over), over


_tiled_pair_sums = TiledForm(_gated_pair_sums, _gated_pair_sums_backward, differentiable=3, keys=3)


class GatedPairLoss(ClassPairLoss):
    """Module form of :func:`gated_pair_loss`.

    Args:
        temperature: T > 0.
        similarity: "gated_cosine" or "gated_dot".
        alpha: share of the ungated similarity taken off a "gated_dot".
        learn_temperature: train the temperature, as the parameter ``log_scale`` = log(1/T), from ``temperature`` on. It
            is brought back to T >= 0.01 before each use.
        learn_alpha: train alpha, as the parameter ``learnt_alpha``, from ``alpha`` on; for "gated_dot".
        self_pairs: whether key i may be a positive of query i; False where the keys are the queries.
        per: what "mean" counts: the "pair", or the "anchor", each with the mean over its positives.
        reduction: "mean", "sum" or "none".
        group: process group whose keys are compared with: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        similarity: Similarity = "gated_cosine",
        alpha: float = 0.0,
        learn_temperature: bool = False,
        learn_alpha: bool = False,
        self_pairs: bool = True,
        per: Per = "pair",
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _check_similarity(similarity, alpha)
        _check_pairs(per, self_pairs)
        _checks.flag("learn_temperature", learn_temperature)
        _checks.flag("learn_alpha", learn_alpha)
        if learn_alpha and similarity != "gated_dot":
            raise ValueError(f"learn_alpha needs similarity='gated_dot', got {similarity!r}.")
        super().__init__(
            temperature=temperature,
            similarity=similarity,
            alpha=alpha,
            learn_temperature=learn_temperature,
            learn_alpha=learn_alpha,
            self_pairs=self_pairs,
            per=per,
            reduction=reduction,
            group=group,
            impl=impl,
        )
        if learn_temperature and temperature < _COLDEST_LEARNT:
            raise ValueError(
                f"temperature must be at least {_COLDEST_LEARNT} to be learnt, got {temperature}."
            )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.learnt_alpha = nn.Parameter(torch.tensor(float(alpha))) if learn_alpha else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor,
        partners: Tensor,
        gates: Tensor,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of queries (B, K) against keys (N, K), by classes and partner classes (B,) and gates (B, K)."""
        return gated_pair_loss(query, key, labels, partners, gates, key_labels=key_labels, **self._options())

    def _options(self) -> dict[str, Any]:
        options = self.hyperparameters()
        del options["learn_temperature"], options["learn_alpha"]
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=-math.log(_COLDEST_LEARNT))
            options["temperature"] = (-self.log_scale).exp()
        if self.learnt_alpha is not None:
            options["alpha"] = self.learnt_alpha
        return options

    @torch.no_grad()
    def scored(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor,
        partners: Tensor,
        gates: Tensor,
        key_labels: Tensor | None = None,
        *,
        rows: int | None = None,
    ) -> Scored:
        """Gated similarities: keys of the partner's class are positives, those of neither class negatives."""
        chosen = evenly(len(query), rows, query.device)
        options = self._options()
        temperature = options["temperature"]
        options = {name: options[name] for name in ("similarity", "alpha")}
        similarities = gated_similarity(query[chosen], key, gates[chosen], **options)
        key_labels = labels if key_labels is None else key_labels
        positive, no_negative = _kinds(labels[chosen], partners[chosen], key_labels, None)
        if not self.self_pairs:
            positive = positive & (chosen[:, None] != torch.arange(len(key), device=key.device))
        return Scored(similarities, positive, ~no_negative, temperature)

    @torch.no_grad()
    def measures(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor,
        partners: Tensor,
        gates: Tensor,
        key_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Mean similarity with keys of the partner's class, of the own and of other classes, and how open gates are.

        Of this process's rows. What no pair is of is left out.
        """
        if not len(query) or not len(key):
            return {}
        key_labels = labels if key_labels is None else key_labels
        options = {name: value for name, value in self._options().items() if name in ("similarity", "alpha")}
        similarities = gated_similarity(query, key, gates, **options)
        of_partner, no_negative = _kinds(labels, partners, key_labels, None if self.self_pairs else 0)
        of_own = (labels[:, None] == key_labels) & (partners != labels)[:, None]
        kinds = {"partner": of_partner, "own": of_own, "other": ~no_negative}
        found = {
            f"{name}_similarity": similarities[mask].mean() for name, mask in kinds.items() if mask.any()
        }
        return found | {
            "gate_entropy": gate_entropy(gates),
            "open_dimensions": open_dimensions(gates).float().mean(),
        }
