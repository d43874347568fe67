"""Loss steps of the methods beside the form that the published code uses, and beside lightly: time and peak memory.

    uv run --all-packages python packages/vision/benchmarks/losses.py [NAME ...] [--write]

The published forms are written anew from the papers' formulas, with the operations that the published code is known to
use (broadcast distances, masks rebuilt at every step, a loop over views); where no code can be run, as the formula
reads. A step is forward and backward to the embeddings. Each repetition times all forms one after the other, in turns
from another one on, and a ratio is a median over repetitions. Values must agree before anything is timed. One thread;
set OMP_NUM_THREADS for more. Peak memory is the high water of resident memory over a step, less what was resident
before, in a process of its own. ``--write`` puts the table into RESULTS.md.

lightly takes part where it can be imported, and is no dependency; augmentation.py says how to have it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core.functional import (
    amcl_loss,
    cacr_loss,
    dcl_loss,
    dclw_loss,
    gated_pair_loss,
    swav_loss,
    transformed_info_nce_loss,
)
from cl_core.temperatures import PairTemperature

RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"
BEGIN, END = "<!-- losses: begin -->", "<!-- losses: end -->"


@dataclass(frozen=True)
class Case:
    """One method at one size.

    Attributes:
        method: name of the loss.
        size: what the size is, in words.
        given: makes the embeddings, side by side in one tensor.
        ours: our loss.
        published: the published form; None where it would take more than ten gigabytes and is not tried.
        tangential: whether the published form takes rows as of unit length, so that its gradient has a part along them.
        lightly: lightly's loss, where it has it and can be imported.
    """

    method: str
    size: str
    given: Callable[[], Tensor]
    ours: Callable[[Tensor], Tensor]
    published: Callable[[Tensor], Tensor] | None
    tangential: bool = True
    lightly: Callable[[Tensor], Tensor] | None = None


def lightly_loss(name: str, **options: float) -> Callable[..., Tensor] | None:
    try:
        from lightly import loss
    except ImportError:
        return None
    found: Callable[..., Tensor] = getattr(loss, name)(**options)
    return found


def unit_views(views: int, rows: int, width: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return F.normalize(torch.randn(views, rows, width, generator=generator), dim=2)

    return make


def published_dcl(views: Tensor, temperature: float = 0.1, sigma: float | None = None) -> Tensor:
    """Own and other view of each anchor in one matrix, the own sample's entries put out of the way by log(1e-45)."""
    total = views.new_zeros(())
    away = torch.eye(views.shape[1], dtype=views.dtype).repeat(1, 2) * torch.tensor(1e-45).log()
    for z, other in (views, views.flip(0)):
        cross = z @ other.T
        positive = cross.diag() / temperature
        if sigma is not None:
            positive = positive * (2 - len(z) * (cross.diag() / sigma).softmax(0)).detach()
        all_pairs = torch.cat([z @ z.T, cross], 1) / temperature
        total = total + (torch.logsumexp(all_pairs + away, 1) - positive).mean() / 2
    return total


def dcl(rows: int, width: int, *, weighted: bool = False, fits: bool = True) -> Case:
    options = {"sigma": 0.5} if weighted else {}
    ours = dclw_loss if weighted else dcl_loss
    theirs = lightly_loss("DCLWLoss" if weighted else "DCLLoss", temperature=0.1, **options)
    return Case(
        "DCLW" if weighted else "DCL",
        f"2 views of {rows} x {width}",
        unit_views(2, rows, width),
        lambda z: ours(z[0], z[1], temperature=0.1, **options),
        (lambda z: published_dcl(z, **options)) if fits else None,
        lightly=None if theirs is None or not fits else lambda z: theirs(z[0], z[1]),
    )


def published_swav(scores: Tensor, epsilon: float = 0.05, temperature: float = 0.1) -> Tensor:
    """Plain exponentials, normalised in place three times; a log-softmax for every pair of code and prediction."""
    crops, rows, prototypes = scores.shape
    total = scores.new_zeros(())
    for crop in range(2):
        with torch.no_grad():
            codes = torch.exp(scores[crop] / epsilon).t()
            codes /= codes.sum()
            for _ in range(3):
                codes /= codes.sum(1, keepdim=True)
                codes /= prototypes
                codes /= codes.sum(0, keepdim=True)
                codes /= rows
            codes = (codes * rows).t()
        others = [other for other in range(crops) if other != crop]
        for other in others:
            predicted = F.log_softmax(scores[other] / temperature, 1)
            total = total - (codes * predicted).sum(1).mean() / len(others) / 2
    return total


def swav(crops: int, rows: int, prototypes: int) -> Case:
    theirs = lightly_loss("SwaVLoss", temperature=0.1)
    return Case(
        "SwAV",
        f"{crops} crops of {rows}, {prototypes} prototypes",
        lambda: torch.rand(crops, rows, prototypes, generator=torch.Generator().manual_seed(0)) - 0.5,
        lambda scores: swav_loss(*scores),
        published_swav,
        tangential=False,
        lightly=None if theirs is None else lambda scores: theirs(list(scores[:2]), list(scores[2:])),
    )


def published_cacr(views: Tensor, t_pos: float = 1.0, t_neg: float = 2.0) -> Tensor:
    """Differences of all pairs of rows, their norm squared, view by view."""
    count, rows, _ = views.shape
    attraction, repulsion = views.new_zeros(()), views.new_zeros(())
    for x in range(count):
        others = torch.stack([views[y] for y in range(count) if y != x], 1)
        c = (views[x][:, None] - others).norm(dim=2).pow(2)
        attraction = attraction + ((t_pos * c).softmax(1) * c).sum(1).mean() / count
        for y in range(x + 1, count):
            away = torch.from_numpy(~torch.eye(rows, dtype=torch.bool).numpy())
            c = (views[x][:, None] - views[y][None]).norm(dim=2).pow(2)[away].view(rows, rows - 1)
            repulsion = repulsion - ((-t_neg * c).softmax(1) * c).sum(1).mean() * 2 / (count * (count - 1))
    return attraction + repulsion


def cacr(views: int, rows: int, width: int, *, fits: bool = True) -> Case:
    return Case(
        "CACR",
        f"{views} views of {rows} x {width}",
        unit_views(views, rows, width),
        lambda z: cacr_loss(list(z), t_neg=2.0),
        published_cacr if fits else None,
    )


def classes_of(rows: int, count: int = 100) -> tuple[Tensor, Tensor]:
    """Labels of a batch, and partner classes: the labels in another order."""
    labels = torch.arange(rows) % count
    return labels, labels[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]


def published_simlap(given: Tensor, temperature: float = 0.1) -> Tensor:
    """Every key behind every anchor's gate, rows x rows x width; plain exponentials less the row's mean logit."""
    query, key, gates = given[0], given[1], given[2].sigmoid()
    labels, partners = classes_of(len(query))
    anchors, keys = F.normalize(gates * query, dim=1), F.normalize(gates[:, None] * key[None], dim=2)
    logits = (anchors[:, None] * keys).sum(2) / temperature
    logits = logits - logits.mean(1, keepdim=True).detach()
    positive = partners[:, None] == labels
    negative = ~(positive | (labels[:, None] == labels))
    exponentials = logits.exp()
    of_negatives = (exponentials * negative).sum(1, keepdim=True)
    return (((exponentials + of_negatives).log() - logits) * positive).sum() / positive.sum()


def ours_simlap(given: Tensor) -> Tensor:
    labels, partners = classes_of(given.shape[1])
    return gated_pair_loss(given[0], given[1], labels, partners, given[2].sigmoid())


def simlap(rows: int, width: int, *, fits: bool = True) -> Case:
    """Queries, keys and what the gates are the sigmoid of."""
    return Case(
        "SimLAP",
        f"{rows} x {width}, a gate each",
        lambda: torch.randn(3, rows, width, generator=torch.Generator().manual_seed(0)),
        ours_simlap,
        published_simlap if fits else None,
        tangential=False,
    )


def plain_amcl(views: Tensor, network: PairTemperature, beta: float = 0.1) -> Tensor:
    """Head by head: all similarities and the temperatures of all pairs, then the hardest. No code was published."""
    width, total = network.dim, views.new_zeros(())
    own = torch.arange(views.shape[1]).repeat(2)
    partners = torch.arange(len(own)).roll(views.shape[1])[:, None]
    parameters = [network.weight1, network.bias1.view(network.heads, -1), network.weight2, network.bias2]
    for head, z in enumerate(views.flatten(0, 1).split(width, 1)):
        weight1, bias1, weight2, bias2 = (p[head].to(z.dtype) for p in parameters)
        u = F.normalize(z, dim=1)
        similarity = u @ u.T
        pairs = [u[:, None].expand(-1, len(u), -1), u[None].expand(len(u), -1, -1)]
        hidden = F.relu(F.linear(torch.cat(pairs, 2), weight1, bias1))
        logits = F.linear(hidden, weight2)[..., 0] + bias2
        tau = network.minimum + (network.maximum - network.minimum) * logits.sigmoid()
        values = similarity / tau - beta * (width / 2 * tau.log() + 1 / tau)
        hardest = similarity.masked_fill(own[:, None] == own, -torch.inf).argmax(1, keepdim=True)
        total = total + (values.gather(1, hardest) - values.gather(1, partners)).mean()
    return total


def amcl(rows: int, width: int, heads: int = 3, *, fits: bool = True) -> Case:
    torch.manual_seed(0)
    network = PairTemperature(width, heads=heads)
    return Case(
        "AMCL",
        f"2 views of {rows} x {heads} heads of {width}",
        unit_views(2, rows, heads * width),
        lambda z: amcl_loss(z[0], z[1], heads=heads, temperature=network),
        (lambda z: plain_amcl(z, network)) if fits else None,
    )


def published_transform(rows: Tensor, queue: Tensor, lam: Tensor, mu: Tensor, order: Tensor) -> Tensor:
    """Copies of the queue, one in another order, mixed entry by entry; then all logits in one matrix."""
    query, key = rows[0], rows[1].detach()
    memory = queue.clone().detach()
    memory = mu * memory + (1 - mu) * queue.clone().detach()[order]
    moved = lam * query + (1 - lam) * key
    positive = (moved * (lam * key + (1 - lam) * query)).sum(1, keepdim=True)
    logits = torch.cat([positive, moved @ memory.T], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def transform(rows: int, width: int, size: int, *, entries: bool) -> Case:
    """With weights that are drawn beforehand."""
    generator = torch.Generator().manual_seed(1)
    queue = F.normalize(torch.randn(size, width, generator=generator), dim=1)
    order = torch.randperm(size, generator=generator)
    lam = 1 + torch.rand((rows, width) if entries else (), generator=generator)
    mu = torch.rand((size, width) if entries else (), generator=generator)

    def ours(z: Tensor) -> Tensor:
        lam_, mu_, memory = (t.to(z.dtype) for t in (lam[: z.shape[1]] if entries else lam, mu, queue))
        options = {"positive_lam": lam_, "negative_lam": mu_, "permutation": order, "normalize": False}
        return transformed_info_nce_loss(z[0], z[1].detach(), memory, temperature=0.2, **options)

    def published(z: Tensor) -> Tensor:
        lam_, mu_, memory = (t.to(z.dtype) for t in (lam[: z.shape[1]] if entries else lam, mu, queue))
        return published_transform(z, memory, lam_, mu_, order)

    weights = "a weight an entry" if entries else "one weight"
    name = f"{rows} x {width}, queue of {size}, {weights}"
    return Case("FeatureTransform", name, unit_views(2, rows, width), ours, published, tangential=False)


CASES = [
    dcl(256, 128),
    dcl(4096, 128),
    dcl(16384, 128, fits=False),
    dcl(4096, 128, weighted=True),
    swav(2, 256, 3000),
    swav(8, 256, 3000),
    cacr(2, 128, 128),
    cacr(5, 128, 128),
    cacr(2, 1024, 128),
    cacr(5, 4096, 128, fits=False),
    simlap(128, 256),
    simlap(512, 256),
    simlap(2048, 256, fits=False),
    amcl(64, 128),
    amcl(256, 128),
    amcl(4096, 128, fits=False),
    transform(64, 128, 65536, entries=False),
    transform(64, 128, 65536, entries=True),
]


def step(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def check(case: Case) -> None:
    """Values and gradients must agree in float64; of a published form that keeps a radial part, the tangential one."""
    z = case.given()[:, :64].double()
    value, ours = step(case.ours, z)
    for other in (case.published, case.lightly):
        if other is None:
            continue
        theirs, gradient = step(other, z)
        torch.testing.assert_close(value, theirs.reshape(()))
        if case.tangential:
            gradient = gradient - (gradient * z).sum(-1, keepdim=True) * z
        torch.testing.assert_close(ours, gradient)


def seconds(loss: Callable[[Tensor], Tensor], z: Tensor) -> float:
    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    step(loss, z)
    return (time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start


def times(case: Case, repetitions: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each form, and the median ratio to ours."""
    z = case.given()
    forms = {"ours": case.ours, "published": case.published, "lightly": case.lightly}
    taking_part = {name: loss for name, loss in forms.items() if loss is not None}
    step(case.ours, z)
    rounds, order = [], list(taking_part)
    for _ in range(repetitions):
        rounds.append({name: seconds(taking_part[name], z) for name in order})
        order.append(order.pop(0))  # what runs before leaves memory in one state or another
    return {
        name: (
            statistics.median(each[name] for each in rounds),
            statistics.median(each[name] / each["ours"] for each in rounds),
        )
        for name in taking_part
    }


def peak(number: int, form: str) -> float:
    """Megabytes, in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(number), form]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def status(field: str) -> float:
    """A field of this process's status in megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure_peak(number: int, form: str) -> float:
    case = CASES[number]
    loss: Callable[[Tensor], Tensor] = getattr(case, form)
    z = case.given()
    step(loss, z[:, :32].contiguous())  # what is loaded once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(loss, z)
    return status("VmHWM") - before


def short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table(names: list[str], repetitions: int) -> list[str]:
    lines = [
        "| loss | size | ours, ms | published form, ms | ratio | lightly, ms | ratio | ours, MB | published form, MB | "
        "lightly, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, case in enumerate(CASES):
        if names and case.method not in names:
            continue
        check(case)
        found = times(case, repetitions)
        cells = [short(1000 * found["ours"][0])]
        for form in ("published", "lightly"):
            middle, ratio = found.get(form, (None, None))
            cells += [""] * 2 if middle is None else [short(1000 * middle), short(ratio)]
        cells += [
            f"{peak(number, form):.0f}" if form in found else "" for form in ("ours", "published", "lightly")
        ]
        lines.append(f"| {case.method} | {case.size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods; all if none is given")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(measure_peak(int(given.peak[0]), given.peak[1])))
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lines = table(given.names, given.repetitions)
    if given.write:
        text = RESULTS.read_text()
        before, rest = text.split(BEGIN)
        processor = platform.processor() or platform.machine()
        machine = f"{processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        body = "\n".join([BEGIN, "", *lines, "", f"Hardware: {machine}.", ""])
        RESULTS.write_text(before + body + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
