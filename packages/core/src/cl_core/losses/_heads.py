"""Rows of several heads, compared pair by pair with a temperature for each: what the losses of AMCL compute with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cl_core import _checks, _rows, similarity
from cl_core._dense import product
from cl_core._types import Group
from cl_core.distributed import Shard, shard
from cl_core.losses._common import check_rows
from cl_core.temperatures import PairTemperature

Temperature: TypeAlias = float | Tensor | Callable[[Tensor, Tensor], Tensor]
"""One T > 0 for all pairs, or a function of anchors and others, stacks (C, N, d) both, giving (C, N)."""

# Numbers kept of the pairs of some anchors with all their negatives: on a CPU no more than its caches hold.
_GRID_ENTRIES, _GRID_ENTRIES_CPU = 1 << 23, 1 << 20


class Rows(NamedTuple):
    """Rows of C heads, two stacks (C, N, d): what is compared, and what the temperature sees of it."""

    unit: Tensor
    seen: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """The same of both stacks, once if they are one."""
        unit = function(self.unit)
        return Rows(unit, unit if self.seen is self.unit else function(self.seen))

    def part(self, start: int, count: int) -> Rows:
        return self.each(lambda stack: stack[:, start : start + count])

    def others_of_pairs(self) -> Rows:
        """For rows that lie side by side in twos, each one's neighbour."""
        return self.each(lambda stack: stack.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))

    def chosen(self, index: Tensor) -> Rows:
        """In each head the rows of the numbers (C, A)."""
        heads, count, width = self.unit.shape
        place = (index + count * torch.arange(heads, device=index.device)[:, None]).flatten()
        return self.each(lambda stack: stack.reshape(-1, width).index_select(0, place).view(heads, -1, width))


class Pairs(NamedTuple):
    """Similarities and temperatures of one pair an anchor and head, shape (C, A), and d."""

    similarity: Tensor
    temperature: Tensor
    width: int

    def value(self, beta: float) -> Tensor:
        return self.similarity / self.temperature - beta * omega(self.temperature, self.width)


@dataclass(frozen=True)
class Compared:
    """Anchors, their positives, and the rows their negatives are among.

    Attributes:
        anchors: A rows.
        positives: A rows.
        candidates: M rows.
        start: where the anchors lie among the candidates, of which those of the anchor's own sample do not count, two
            side by side; None if all candidates count.
        sides: anchors of a sample, side by side.
        temperature: of pairs.
        split: how the samples are spread over ranks.
    """

    anchors: Rows
    positives: Rows
    candidates: Rows
    start: int | None
    sides: int
    temperature: Temperature
    split: Shard

    def positive(self) -> Pairs:
        return _pairs(self.anchors, self.positives, self.temperature)

    def hardest(self) -> Pairs:
        rows, columns = self.anchors.unit, self.candidates.unit
        found = [similarity.nearest(x, y, **self._negatives()) for x, y in zip(rows, columns, strict=True)]
        return _pairs(self.anchors, self.candidates.chosen(torch.stack(found)), self.temperature)

    def _negatives(self) -> dict[str, Any]:
        """Which candidates count, for :func:`cl_core.similarity.nearest`."""
        if self.start is None:
            return {"over": "all"}
        if self.split.group is None:  # decided by places, without a mask
            return {"over": "different", "group_size": 2}
        row_keys, column_keys = self._samples()
        return {"over": "different", "row_keys": row_keys, "column_keys": column_keys}

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Which sample each anchor and each candidate is of."""
        assert self.start is not None
        columns = torch.arange(self.candidates.unit.shape[1], device=self.candidates.unit.device)
        columns = columns.div(2, rounding_mode="floor")
        return columns[self.start : self.start + self.anchors.unit.shape[1]], columns

    def log_sum_exp(self, beta: float) -> Tensor:
        """Log-sum-exp of the values of all negatives, shape (C, A), some anchors at a time."""
        (heads, count, width), columns = self.anchors.unit.shape, self.candidates.unit
        temperatures, entries = _grid(self.temperature, self.anchors.seen, self.candidates.seen)
        samples = None if self.start is None else self._samples()

        def on_part(part: slice) -> Tensor:
            products = product(self.anchors.unit[:, part], columns.mT)
            values = Pairs(products, temperatures(part), width).value(beta)
            if samples is not None:
                values = values.masked_fill(samples[0][part, None] == samples[1], -torch.inf)
            return values.logsumexp(2)

        budget = _GRID_ENTRIES_CPU if columns.device.type == "cpu" else _GRID_ENTRIES
        size = max(1, budget // (heads * columns.shape[1] * entries))
        if count <= size:
            return on_part(slice(count))
        # Nothing of a part is kept: the backward computes it again, with the same random numbers where a caller's
        # function may draw some.
        draws = callable(self.temperature) and not isinstance(self.temperature, PairTemperature)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
        return torch.cat([checkpoint(on_part, part, **options) for part in _rows.tiles(count, size)], 1)


def lay_out(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None,
    *,
    group: Group,
    temperature: Temperature,
    **options: Any,
) -> Compared:
    """Check two views, or queries, keys and a queue, and lay them out as stacks."""
    check_rows(group, z1=z1, z2=z2)
    _checks.same_shape(z1=z1, z2=z2)
    if negatives is not None:
        _checks.embeddings("negatives", negatives)
        _checks.alongside(z1=z1, negatives=negatives)
    check_temperature(temperature, options["heads"], z1)
    split, source = shard(z1, group), z1.dtype
    first, second = similarity.at_least_float32(z1), similarity.at_least_float32(z2)
    if negatives is not None:
        anchors, positives = (_stacks(view, source=source, **options) for view in (first, second))
        queue = _stacks(negatives.to(first.dtype), source=negatives.dtype, **options)
        return Compared(anchors, positives, queue, None, 1, temperature, split)
    if split.total < 2:
        raise ValueError(
            f"amcl_loss needs at least 2 rows (the other rows are the negatives), got {split.total}; pass a group, or "
            "a queue as negatives."
        )
    everyone = split.gather(torch.stack([first, second], 1).flatten(0, 1), each=2)
    candidates, start = _stacks(everyone, source=source, **options), 2 * split.offset
    anchors = candidates.part(start, 2 * len(z1)) if split.group is not None else candidates
    return Compared(anchors, anchors.others_of_pairs(), candidates, start, 2, temperature, split)


def predicted_pairs(
    p: Tensor, z: Tensor, *, group: Group, temperature: Temperature, **options: Any
) -> tuple[Pairs, Shard]:
    """Check predictions and targets; their pairs, and how they are spread."""
    check_rows(group, p=p, z=z)
    _checks.same_shape(p=p, z=z)
    check_temperature(temperature, options["heads"], p, "p")
    rows, targets = (
        _stacks(similarity.at_least_float32(view), source=p.dtype, **options) for view in (p, z.detach())
    )
    return _pairs(rows, targets, temperature), shard(p, group)


def _stacks(z: Tensor, *, heads: int, normalize: bool, raw_input: bool, source: torch.dtype) -> Rows:
    """Rows (N, C d) as stacks of heads."""
    check_options(raw_input=raw_input)
    raw = z.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()
    unit = similarity.scaled_rows(raw.flatten(0, 1), normalize=normalize, source=source).view_as(raw)
    return Rows(unit, raw if raw_input else unit)


def _pairs(anchors: Rows, others: Rows, temperature: Temperature) -> Pairs:
    """Each anchor with the other of its place."""
    products = (anchors.unit * others.unit).sum(2)
    return Pairs(products, _temperatures(temperature, anchors.seen, others.seen), anchors.unit.shape[2])


def _temperatures(temperature: Temperature, u: Tensor, v: Tensor) -> Tensor:
    """Temperatures of the pairs of two stacks (C, N, d), shape (C, N)."""
    if isinstance(temperature, Tensor):
        return temperature.to(u.dtype).expand(u.shape[:2])
    if not callable(temperature):
        return u.new_full((), temperature).expand(u.shape[:2])
    tau = temperature(u, v)
    if not isinstance(tau, Tensor) or tau.shape != u.shape[:2]:
        came = tuple(tau.shape) if isinstance(tau, Tensor) else type(tau).__name__
        raise ValueError(
            f"temperature must give shape {tuple(u.shape[:2])}, one an anchor and head, got {came}."
        )
    if not isinstance(temperature, PairTemperature):
        held = tau.detach()
        message = "temperature must give finite values > 0, got others."
        _checks.require(((held > 0) & held.isfinite()).all(), message)
    return tau


def _grid(temperature: Temperature, u: Tensor, v: Tensor) -> tuple[Callable[[slice], Tensor], int]:
    """Temperatures (C, R, M) of some anchors with all of M others, and how many numbers are computed a pair."""
    (heads, columns, width) = v.shape
    if isinstance(temperature, PairTemperature):
        network, anchors, others = (
            temperature,
            temperature.of_anchors(u)[:, :, None],
            temperature.of_others(v),
        )
        return lambda part: network.between(anchors[:, part], others[:, None]), network.hidden_dim

    def evaluate(part: slice) -> Tensor:
        some = u[:, part]
        shape = (heads, some.shape[1], columns, width)
        pair = (some[:, :, None].expand(shape).flatten(1, 2), v[:, None].expand(shape).flatten(1, 2))
        return _temperatures(temperature, *pair).view(shape[:3])

    if callable(temperature):
        return evaluate, 2 * width
    return lambda part: _temperatures(temperature, u[:, part], v)[:, :1, None], 1


def omega(tau: Tensor, width: int) -> Tensor:
    """The regulariser: least at 2 / d, convex up to 4 / d."""
    return width / 2 * tau.log() + tau.reciprocal()


def width_of_heads(heads: int, **embeddings: Tensor) -> int:
    """d, refusing numbers of columns that are not C d."""
    check_options(heads=heads)
    ((name, z),) = embeddings.items()
    if z.shape[1] % heads:
        raise ValueError(
            f"{name} must have a number of columns that heads={heads} divides, got {z.shape[1]}."
        )
    return z.shape[1] // heads


def check_temperature(temperature: Temperature, heads: int, z: Tensor, name: str = "z1") -> None:
    """Refuse a temperature that is none, or whose heads are not those of the embeddings."""
    if isinstance(temperature, PairTemperature):
        if temperature.heads != heads:
            raise ValueError(f"heads must be those of the temperature, got {heads} and {temperature.heads}.")
        if z.shape[1] != heads * temperature.dim:
            wanted = f"heads * dim = {heads} * {temperature.dim} = {heads * temperature.dim}"
            raise ValueError(f"{name} must have {wanted} columns, got {z.shape[1]}.")
    elif not callable(temperature):
        _checks.temperature("temperature", temperature)
    width_of_heads(heads, **{name: z})


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("dim", "heads", "hidden_dim"), _checks.count),
    **dict.fromkeys(("include_positive", "shared", "detach_input", "raw_input"), _checks.flag),
    **dict.fromkeys(("beta", "lambd"), lambda name, value: _checks.number(name, value, at_least=0)),
    "eps": _checks.positive,
    "pooling": lambda name, value: _checks.choice(name, value, ("max", "lse")),
}


def check_options(**options: Any) -> None:
    """Refuse values out of range of the options named so."""
    for name in _CHECKS.keys() & options.keys():
        _CHECKS[name](name, options[name])
