"""Scores over training: what the positives and negatives of every step look like, kept on their device.

    recorder = ScoreRecorder(every=100)
    for query, key in batches:                      # each step, beside the loss
        recorder.update(query, key, queue.embeddings)
    curves = recorder.flush()                       # now and then: tensors on the host, ready to be stored

They show whether positives saturate and whether negatives stay varied: a key encoder that follows too slowly or too
fast, a temperature or a head that does not suit, of any host and loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_core import _checks, _rows, similarity

CURVES = (
    "positive_mean",
    "positive_variance",
    "negative_mean",
    "negative_variance",
    "positive_log_mean_exp",
    "negative_log_mean_exp",
)
"""Names of the numbers kept of every step; see :meth:`ScoreRecorder.flush`."""

_TILE = (64, 4096)  # queries and negatives at a time: their scores fit the cache
_MOST_BINS = 255  # a bin and "not counted" are numbers of 8 bits


class Scored(NamedTuple):
    """Scores of a batch, and of what they are."""

    scores: Tensor
    """Of anchors with all that they are compared with, shape (R, K), without gradient."""
    positive: Tensor
    """Which are scores of positives, truth values of shape (R, K)."""
    negative: Tensor
    """Which are scores of negatives, likewise; what is neither does not count."""
    temperature: float | Tensor | None
    """What the loss divides them by, if it is one number."""


class _Block(NamedTuple):
    """Steps (S,) that share histograms (2, bins), and the numbers (S, 6) of each; on the host."""

    steps: Tensor
    curves: Tensor
    counts: Tensor


class ScoreRecorder:
    """Mean and variance of the positive and negative scores of every step, and histograms of every few.

    Everything stays on the device of the embeddings, and nothing waits for it, until ``every`` steps are full or
    :meth:`flush` is called. No N x K tensor is built beyond a few hundred thousand entries. Rows are those of this
    process.

    Args:
        every: steps that share a histogram, after which the numbers move to the host.
        bins: of a histogram, at most 255.
        limits: where the histograms begin and end; scores beyond count in the outermost bins. Extrapolated positives
            reach down to -9.
        rows: queries, evenly spaced, whose negatives are looked at in each step; None for all. Positives are all looked
            at.

    Attributes:
        steps: the number of the next step, counted from 0; set it where not every step is recorded.

    Reference: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021,
    arXiv 2108.02982. The authors' code writes five numbers of each query and step, rounded to half precision.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        bins: int = 64,
        limits: tuple[float, float] = (-1.0, 1.0),
        rows: int | None = None,
    ) -> None:
        _checks.count("every", every)
        _checks.count("bins", bins)
        if bins > _MOST_BINS:
            raise ValueError(f"bins must be at most {_MOST_BINS}, got {bins}.")
        for limit in limits:
            _checks.number("limits", limit)
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"limits must be two numbers, the smaller first, got {limits}.")
        if rows is not None:
            _checks.count("rows", rows)
        self.every, self.bins, self.rows = every, bins, rows
        self.limits = (float(limits[0]), float(limits[1]))
        self.steps = 0
        self._curves: Tensor
        self._counts: Tensor
        self._numbers: list[int] = []  # of the steps of the block that has begun
        self._blocks: list[_Block] = []
        self._begin(torch.device("cpu"))

    def update(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        normalize: bool = True,
    ) -> None:
        """Take in the scores of one step, called as a loss is.

        Args:
            query: shape (N, D).
            key: shape (N, D); row i is the positive of row i of query.
            negatives: a queue of shape (K, D); None takes the keys of the other rows for negatives.
            temperature: T > 0, a number or a 0-d tensor, for the means of exp(score / T); None leaves them out.
            normalize: scale rows to unit length first, so that scores are cosines.

        Raises:
            ValueError: if shapes do not fit, a value is not finite, or T <= 0.

        Cost: O(N K D) time, with ``rows`` O(rows K D).
        """
        _checks.embeddings("query", query)
        _checks.embeddings("key", key)
        _checks.same_shape(query=query, key=key)
        _checks.flag("normalize", normalize)
        if temperature is not None:
            _checks.temperature("temperature", temperature)
        if negatives is not None:
            _checks.embeddings("negatives", negatives)
            _checks.alongside(query=query, negatives=negatives)
        with _rows.measuring(query.device):
            query, key = (similarity.scaled_rows(z, normalize=normalize) for z in (query, key))
            if negatives is not None:
                negatives = similarity.scaled_rows(negatives, normalize=normalize, dtype=query.dtype)
            self._record(query, key, negatives, temperature)

    def update_scores(
        self,
        scores: Tensor,
        positive: Tensor,
        negative: Tensor,
        *,
        temperature: float | Tensor | None = None,
    ) -> None:
        """Take in the scores of one step, where they are not those of pairs of rows: all that are given.

        Args:
            scores: of anchors with all that they are compared with, shape (R, K).
            positive: truth values of shape (R, K), which of them are of positives; an anchor may have several, or none.
            negative: likewise of negatives; what is neither does not count.
            temperature: as in :meth:`update`.

        Raises:
            ValueError: if shapes do not fit, a score is not finite, or T <= 0.

        Cost: O(R K) time and memory.
        """
        _checks.embeddings("scores", scores)
        for name, mask in (("positive", positive), ("negative", negative)):
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != scores.shape:
                came = (
                    f"{mask.dtype} of {tuple(mask.shape)}"
                    if isinstance(mask, Tensor)
                    else type(mask).__name__
                )
                raise ValueError(f"{name} must hold truth values of shape {tuple(scores.shape)}, got {came}.")
        if temperature is not None:
            _checks.temperature("temperature", temperature)
        with _rows.measuring(scores.device):
            self._move(scores.device)
            scores = _rows.wide(scores.detach())
            negatives = self._of_negatives(scores[:, 0], [(scores.clone(), ~negative)], temperature)
            self._note(scores, ~positive, [negatives], temperature)

    def flush(self, *, keep_open: bool = False) -> dict[str, Tensor]:
        """Hand out what was recorded since the last flush, and forget it.

        Args:
            keep_open: go on with the block that has begun, which the next flush hands out again, longer; else the next
                step begins another.

        Returns:
            Contiguous tensors on the host: for S steps their numbers "step" (S,), and of each the mean of the positive
            scores over the queries, "positive_mean", and their variance, "positive_variance" (divided by N); of the
            negative scores the mean, "negative_mean", and the variance among those of a query (divided by K - 1)
            averaged over the queries, "negative_variance"; "positive_log_mean_exp" and "negative_log_mean_exp",
            logarithms of the means of exp(score / T), NaN without a temperature. float64 of shape (S,). For B blocks
            of ``every`` steps, the last perhaps shorter, "block_end" (B,), the number after that of a block's last
            step, "positive_histogram" and "negative_histogram" (B, bins), numbers of pairs; "edges" (bins + 1,).
        """
        steps, curves, counts, lengths = self._all([*self._blocks, *self._open_block()])
        self._blocks = []
        if not keep_open:
            self._begin(self._curves.device)
        return {
            "step": steps,
            **{name: curves[:, place].contiguous() for place, name in enumerate(CURVES)},
            "block_end": steps[lengths.cumsum(0) - 1] + 1,
            "positive_histogram": counts[:, 0].contiguous(),
            "negative_histogram": counts[:, 1].contiguous(),
            "edges": torch.linspace(*self.limits, self.bins + 1, dtype=torch.float64),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs, as tensors on the host."""
        steps, curves, counts, lengths = self._all([*self._blocks, *self._open_block()])
        return {
            "steps": torch.tensor(self.steps),
            "limits": torch.tensor(self.limits, dtype=torch.float64),
            "step": steps,
            "curves": curves,
            "counts": counts,
            "lengths": lengths,
            "open": torch.tensor(len(self._numbers)),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is damaged, or that of a recorder with another ``every``, ``bins`` or ``limits``; nothing
                is changed.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"state must be that of a ScoreRecorder, got one without {', '.join(missing)}.")
        counts, limits, lengths = state["counts"], tuple(state["limits"].tolist()), state["lengths"].tolist()
        steps = sum(lengths)
        shapes = {
            "step": (steps,),
            "curves": (steps, len(CURVES)),
            "counts": (len(lengths), 2, *counts.shape[2:3]),
        }
        for name, shape in shapes.items():
            if state[name].shape != shape:
                came = tuple(state[name].shape)
                raise ValueError(f"state must hold {name} of shape {shape} for its lengths, got {came}.")
        if int(state["open"]) not in (0, *lengths[-1:]):
            raise ValueError(
                f"state must hold no block open or the last one, got {int(state['open'])} steps of one."
            )
        longest = max([0, *lengths])
        if counts.shape[2] != self.bins or limits != self.limits or longest > self.every:
            raise ValueError(
                f"state must be of blocks of at most {self.every} steps, {self.bins} bins and limits {self.limits}, "
                f"got {longest}, {counts.shape[2]} and {limits}."
            )
        self.steps, filled = int(state["steps"]), int(state["open"])
        parts = state["step"].split(lengths), state["curves"].split(lengths), counts
        self._blocks = [_Block(*(part.clone() for part in block)) for block in zip(*parts, strict=True)]
        self._begin(torch.device("cpu"))
        if filled:
            steps, curves, self._counts = self._blocks.pop()
            self._curves[:filled], self._numbers = curves, steps.tolist()

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor | None = None,
    ) -> None:
        """Take in the scores of rows as they are, without a check; there may be none."""
        positives = similarity.row_products(query, key)
        if negatives is None:
            own = torch.arange(len(query), device=query.device)
            self._observe(positives, query, key, (own, own), temperature)
        else:
            self._observe(positives, query, negatives, None, temperature)

    def _observe(
        self,
        positives: Tensor,
        anchors: Tensor,
        columns: Tensor,
        keys: tuple[Tensor, Tensor] | None = None,
        temperature: float | Tensor | None = None,
    ) -> None:
        """Take in scores (N,) of positives, and of anchors (N, D) with columns (K, D) save where keys are equal."""
        with _rows.measuring(anchors.device):
            self._move(anchors.device)
            if self.rows is not None and self.rows < len(anchors):
                chosen = evenly(len(anchors), self.rows, anchors.device)
                anchors, keys = anchors[chosen], keys and (keys[0][chosen], keys[1])
            parts = []
            for tile in _rows.tiles(max(1, len(anchors)), _TILE[0]):
                products = _products(anchors[tile], columns, keys and (keys[0][tile], keys[1]))
                parts.append(self._of_negatives(anchors[tile].sum(1), products, temperature))
            self._note(positives, None, parts, temperature)

    def _move(self, device: torch.device) -> None:
        """Go on where the scores are."""
        if self._curves.device != device:
            self._curves, self._counts = self._curves.to(device), self._counts.to(device)

    def _note(
        self,
        positives: Tensor,
        left_out: Tensor | None,
        negatives: Sequence[tuple[Tensor, ...]],
        temperature: float | Tensor | None,
    ) -> None:
        """Write down a step: scores of positives save those left out, and what was found of negatives."""
        means, variances, log_sums, numbers = (torch.cat(part) for part in zip(*negatives, strict=True))
        self._counts[0] += self._counted(positives, left_out)
        if left_out is None:
            number = positives.new_full((), positives.numel())
            left_out = torch.zeros_like(positives, dtype=torch.bool)
        else:
            number = (~left_out).sum().to(positives.dtype)
        mean = positives.masked_fill(left_out, 0).sum() / number
        spread = (positives - mean).square().masked_fill_(left_out, 0).sum() / number
        logits = positives / (math.nan if temperature is None else temperature)
        numbers_of_step = [
            mean,
            spread,
            means.nanmean(),  # anchors without a negative do not count, nor for the variance those with one
            variances.nanmean(),
            logits.masked_fill(left_out, -math.inf).flatten().logsumexp(0) - number.clamp_min(1).log(),
            log_sums.logsumexp(0) - numbers.sum().log(),
        ]
        self._curves[len(self._numbers)] = torch.stack(numbers_of_step)
        self._numbers.append(self.steps)
        self.steps += 1
        if len(self._numbers) == self.every:
            self._blocks += self._open_block()
            self._begin(self._curves.device)

    def _of_negatives(
        self,
        like: Tensor,
        blocks: Iterable[tuple[Tensor, Tensor | None]],
        temperature: float | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance, log-sum-exp and number of the scores of some anchors, shape (N,) each; counts them, too.

        Args:
            like: any vector (N,) of their type.
            blocks: scores (N, some) of these anchors, which are written over, and which of them are left out.
            temperature: T > 0, or None.
        """
        mean, spread, number = like.new_zeros(3, len(like)).unbind()
        log_sum = torch.full_like(mean, math.nan if temperature is None else -math.inf)
        for scores, left_out in blocks:
            here = torch.full_like(number, scores.shape[1])
            if left_out is not None:
                here -= left_out.sum(1)
                scores.masked_fill_(left_out, 0)
            self._counts[1] += self._counted(scores, left_out)
            if temperature is not None:
                logits = scores / temperature
                logits = logits if left_out is None else logits.masked_fill_(left_out, -math.inf)
                log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            mean_here = scores.sum(1) / here.clamp_min(1)
            scores -= mean_here[:, None]
            scores = scores if left_out is None else scores.masked_fill_(left_out, 0)
            # The means and squared distances from them of two sets, put together.
            step, number = mean_here - mean, number + here
            share = here / number.clamp_min(1)
            spread += torch.linalg.vector_norm(scores, dim=1).square() + step.square() * share * (
                number - here
            )
            mean += step * share
        mean = torch.where(number > 0, mean, math.nan)
        return mean, torch.where(number > 1, spread / (number - 1), math.nan), log_sum, number

    def _counted(self, scores: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Histogram of scores."""
        if scores.device.type != "cpu":
            return self._counted_by_order(scores, left_out)
        low, high = self.limits
        place = ((scores - low) * (self.bins / (high - low))).clamp_(0, self.bins - 1).to(torch.uint8)
        if left_out is not None:
            place.masked_fill_(left_out, self.bins)
        return torch.bincount(place.flatten(), minlength=self.bins + 1)[: self.bins]

    def _counted_by_order(self, scores: Tensor, left_out: Tensor | None) -> Tensor:
        """The same by sorting: bincount would wait for the device, and adding up on it is not reproducible."""
        scores = scores if left_out is None else scores.masked_fill(left_out, math.inf)
        edges = torch.linspace(*self.limits, self.bins + 1, dtype=scores.dtype, device=scores.device)
        edges[0], edges[-1] = -math.inf, math.inf
        return torch.searchsorted(scores.flatten().sort().values, edges).diff()

    def _begin(self, device: torch.device) -> None:
        """Begin a block."""
        self._numbers = []
        self._curves = torch.zeros(
            self.every, len(CURVES), dtype=_rows.accumulation_dtype(device), device=device
        )
        self._counts = torch.zeros(2, self.bins, dtype=torch.int64, device=device)

    def _open_block(self) -> list[_Block]:
        """The block that has begun, if it has."""
        filled = len(self._numbers)
        if not filled:
            return []
        curves, counts = self._curves[:filled].cpu().clone(), self._counts.cpu().clone()
        return [_Block(torch.tensor(self._numbers), curves, counts)]

    def _all(self, blocks: Sequence[_Block]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps (S,), their numbers (S, 6) and histograms (B, 2, bins) of blocks, and how many steps each has."""
        steps = [torch.zeros(0, dtype=torch.int64), *(block.steps for block in blocks)]
        curves = [torch.zeros(0, len(CURVES), dtype=torch.float64), *(block.curves for block in blocks)]
        counts = [torch.zeros(0, 2, self.bins, dtype=torch.int64), *(block.counts[None] for block in blocks)]
        lengths = torch.tensor([len(block.steps) for block in blocks], dtype=torch.int64)
        return torch.cat(steps), torch.cat(curves), torch.cat(counts), lengths


def evenly(count: int, some: int | None, device: torch.device) -> Tensor:
    """Numbers of at most ``some`` of so many rows, evenly spaced; of all for None."""
    if some is None or some >= count:
        return torch.arange(count, device=device)
    return torch.arange(some, device=device) * count // some


def _products(
    anchors: Tensor, columns: Tensor, keys: tuple[Tensor, Tensor] | None
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Scores of anchors (N, D) with columns (K, D), some at a time, and which have equal keys."""
    for tile in _rows.tiles(len(columns), _TILE[1]):
        yield anchors @ columns[tile].T, None if keys is None else keys[0][:, None] == keys[1][tile]


def _temperature_of(loss: object) -> float | Tensor | None:
    """The temperature of a loss, None unless it has one that is a single number."""
    value = getattr(loss, "temperature", None)
    single = value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, int | float)
    return value if single else None
