"""A MoCo loss step with transformed features: ours, by mixed logits, and as the published code does it.

    uv run --package cl-core python packages/core/benchmarks/feature_transform.py

A step draws the weights and goes forward and backward to the queries, rows being of unit length already. The published
form is written anew from the paper's formulas with the operations that its code is known to use: weights from NumPy's
older generator, two copies of the queue, one of the permuted rows, one of the mixture. Mixing logits instead of
features is possible for one weight in all. Also the draws alone, and what recording the scores takes beside InfoNCE's
own step. Each repetition times all forms one after the other by the CPU time of one thread; numbers are medians, ratios
medians of ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core.losses import FeatureTransform, InfoNCELoss
from cl_core.scores import ScoreRecorder
from cl_core.transforms import NegativeInterpolation, PositiveExtrapolation, symmetric_beta

WIDTH, TEMPERATURE, REPETITIONS = 128, 0.07, 9
POSITIVE, NEGATIVE = 2.0, 1.6
NUMPY = np.random.RandomState(0)
Step = Callable[[Tensor, Tensor, Tensor], object]


def published(granularity: str) -> Step:
    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        shapes = [None if granularity == "scalar" else tuple(z.shape) for z in (query, queue)]
        lam = torch.as_tensor(1 + NUMPY.beta(POSITIVE, POSITIVE, shapes[0]), dtype=query.dtype)
        mu = torch.as_tensor(NUMPY.beta(NEGATIVE, NEGATIVE, shapes[1]), dtype=query.dtype)
        first, second = queue.clone(), queue.clone()[torch.randperm(len(queue))]
        mixed = mu * first + (1 - mu) * second
        moved, target = lam * query + (1 - lam) * key, lam * key + (1 - lam) * query
        logits = torch.cat([(moved * target).sum(1, keepdim=True), moved @ mixed.t()], 1)
        return F.cross_entropy(logits / TEMPERATURE, torch.zeros(len(query), dtype=torch.int64))

    return step(loss)


def ours(granularity: str) -> Step:
    loss = InfoNCELoss(TEMPERATURE, normalize=False)
    return step(
        FeatureTransform(
            loss,
            positive=PositiveExtrapolation(POSITIVE, granularity),
            negative=NegativeInterpolation(NEGATIVE, granularity),
        )
    )


def mixed_logits(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    lam, mu = 1 + symmetric_beta(POSITIVE, ()), symmetric_beta(NEGATIVE, ())
    moved, target = torch.lerp(key, query, lam), torch.lerp(query, key, lam)
    scores = (moved / TEMPERATURE) @ queue.t()
    mixed = torch.lerp(scores.index_select(1, torch.randperm(len(queue))), scores, mu)
    return F.softplus(mixed.logsumexp(1) - (moved * target).sum(1) / TEMPERATURE).mean()


def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    return lambda query, key, queue: loss(query.detach().requires_grad_(), key, queue).backward()


def recording(rows: int | None) -> Step:
    recorder = ScoreRecorder(rows=rows)
    return lambda query, key, queue: recorder.update(query, key, queue)


def drawing(draw: Callable[[tuple[int, ...]], object]) -> Step:
    return lambda query, key, queue: draw(tuple(queue.shape))


def compare(title: str, rows: int, size: int, forms: dict[str, Step]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = F.normalize(torch.randn(2, rows, WIDTH, generator=generator), dim=2)
    queue = F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in range(REPETITIONS + 1):
        for name, form in forms.items():
            start = time.process_time()
            form(query, key, queue)
            if repetition:  # the first warms up
                seconds[name].append(time.process_time() - start)
    print(f"{title}, N = {rows}, K = {size}, D = {WIDTH}")
    first = seconds[next(iter(forms))]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"  {name:<28}{1e3 * statistics.median(own):9.1f} ms  {ratio:6.2f}")


def main() -> None:
    torch.set_num_threads(1)
    for rows, size in ((64, 65536), (256, 65536), (256, 4096)):
        scalar = {
            "published": published("scalar"),
            "ours": ours("scalar"),
            "mixed logits": step(mixed_logits),
        }
        compare("one weight in all", rows, size, scalar)
        compare("a weight an entry", rows, size, {"published": published("dim"), "ours": ours("dim")})
    draws = {
        "NumPy": lambda shape: NUMPY.beta(NEGATIVE, NEGATIVE, shape),
        "torch": lambda shape: torch.distributions.Beta(NEGATIVE, NEGATIVE).sample(shape),
        "ours": lambda shape: symmetric_beta(NEGATIVE, shape),
    }
    compare("draws", 1, 65536, {name: drawing(draw) for name, draw in draws.items()})
    for rows, size in ((256, 4096), (256, 65536)):
        forms = {"InfoNCE": step(InfoNCELoss(TEMPERATURE)), "recording all": recording(None)}
        forms |= {f"recording {count} queries": recording(count) for count in (64, 32, 16)}
        compare("recording", rows, size, forms)


if __name__ == "__main__":
    main()
