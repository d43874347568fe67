"""Time and memory of the similarity losses, as ratios to the bare products they cannot do without.

    uv run --package cl-core python packages/core/benchmarks/similarity.py [--write]

The floor of a loss on N rows of width d is three products, outputs freshly allocated: S = Z Z^T, G Z and G^T Z for an
N x N matrix G. A step is forward and backward to the embeddings, normalisation included. Each repetition times floor
and step one after the other; the ratio is the median over repetitions. One thread is timed by its own CPU time, more by
the clock. Peak memory is the high water of resident memory over a step, less what was resident before, in a process of
its own. At 256 the limit is the textbook form in plain torch. ``--write`` puts the tables into RESULTS.md of the
package.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core.functional import clip_loss, dcl_loss, info_nce_loss, nt_xent_loss, siglip_loss, sup_con_loss

WIDTH, MEMBERS, TEMPERATURE = 128, 8, 0.1
TARGETS = {  # (group of losses, threads): {N: most it may cost}
    ("symmetric", 1): {1024: 1.2, 4096: 0.8, 8192: 0.8},
    ("symmetric", 2): {1024: 1.4, 4096: 0.85, 8192: 0.85},
    ("two-tower", 1): {4096: 1.4},
}
PEAK_TARGETS = {8192: 30.0, 32768: 130.0}
RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"


def halves(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss of two views or towers, of the two halves of the rows."""
    return lambda z: function(*z.chunk(2), temperature=TEMPERATURE)


def towers(function: Callable[..., Tensor], **options: float) -> Callable[[Tensor], Tensor]:
    """A loss of two towers of N rows each: an N x N matrix."""
    return lambda z: function(z, z.detach().flip(0).requires_grad_(), **options)


def labels(z: Tensor) -> Tensor:
    return torch.arange(len(z), device=z.device) % max(1, len(z) // MEMBERS)


OURS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "NT-Xent": ("symmetric", halves(nt_xent_loss)),
    "DCL": ("symmetric", halves(dcl_loss)),
    "SupCon": ("symmetric", lambda z: sup_con_loss(z, labels(z), temperature=TEMPERATURE)),
    "InfoNCE": ("two-tower", towers(info_nce_loss, temperature=TEMPERATURE)),
    "CLIP": ("two-tower", towers(clip_loss, logit_scale=1 / TEMPERATURE)),
    "SigLIP": ("pairwise", towers(siglip_loss, logit_scale=10.0, logit_bias=-10.0)),
}


def dense_two_views(z: Tensor, *, decoupled: bool = False) -> Tensor:
    """The textbook form: matrix, mask, cross entropy."""
    z, n = F.normalize(z, dim=1), len(z) // 2
    logits = (z @ z.t() / TEMPERATURE).masked_fill(
        torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf
    )
    partner = torch.arange(2 * n, device=z.device).roll(n)
    if not decoupled:
        return F.cross_entropy(logits, partner)
    positive = logits.gather(1, partner[:, None])
    return (logits.scatter(1, partner[:, None], -torch.inf).logsumexp(1) - positive[:, 0]).mean()


def dense_sup_con(z: Tensor) -> Tensor:
    """The textbook form with an N x N label matrix."""
    own, z = torch.eye(len(z), dtype=torch.bool, device=z.device), F.normalize(z, dim=1)
    logits = (z @ z.t() / TEMPERATURE).masked_fill(own, -torch.inf)
    same = (labels(z)[:, None] == labels(z)[None]) & ~own
    return -(logits.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def dense_clip(z: Tensor) -> Tensor:
    """The textbook form of both sides."""
    other = F.normalize(z.detach().flip(0).requires_grad_(), dim=1)
    logits, own = F.normalize(z, dim=1) @ other.t() / TEMPERATURE, torch.arange(len(z), device=z.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


DENSE = {
    "NT-Xent": dense_two_views,
    "DCL": lambda z: dense_two_views(z, decoupled=True),
    "SupCon": dense_sup_con,
    "CLIP": dense_clip,
}


def floor(z: Tensor) -> None:
    matrix = z @ z.t()
    _, _ = matrix @ z, matrix.t() @ z


def step(loss: Callable[[Tensor], Tensor], z: Tensor) -> None:
    z.grad = None
    loss(z).backward()


def clock(device: str, threads: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time() if threads == 1 else time.perf_counter()


def ratios(names: list[str], n: int, threads: int, device: str, repeats: int) -> dict[str, float]:
    """Median over repetitions of step / floor, for our losses and the textbook forms."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, WIDTH, generator=generator).to(device).requires_grad_()
    unit = F.normalize(z.detach(), dim=1)
    cases = {name: OURS[name][1] for name in names}
    if n <= 1024 or device == "cuda":
        cases |= {f"dense {name}": DENSE[name] for name in names if name in DENSE}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(repeats + 1):
        for name, loss in cases.items():
            start = clock(device, threads)
            floor(unit)
            middle = clock(device, threads)
            step(loss, z)
            end = clock(device, threads)
            if repetition:  # the first warms up
                found[name].append((end - middle) / (middle - start))
    return {name: statistics.median(values) for name, values in found.items()}


def peak(name: str, n: int) -> float:
    """Peak extra MB of one step, measured in this process."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    step(OURS[name][1], torch.randn(512, WIDTH, requires_grad=True))
    step(OURS[name][1], torch.randn(3000, WIDTH, requires_grad=True))
    z = torch.randn(n, WIDTH, requires_grad=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(OURS[name][1], z)
    return status("VmHWM") - before


def peak_elsewhere(name: str, n: int) -> float:
    command = [sys.executable, __file__, "--peak-of", name, str(n)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def table(rows: list[list[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def marked(value: float, target: float | None, form: str) -> str:
    text = format(value, form)
    return text if target is None else f"{text} ({'<=' if value <= target else 'MISSES'} {target:.3g})"


def write(text: str) -> None:
    """Replace the block between the markers in RESULTS.md."""
    start, end = "<!-- similarity.py -->\n", "<!-- end of similarity.py -->\n"
    old = RESULTS.read_text()
    before, rest = old.split(start)
    after = rest.split(end)[1]
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(before + start + text + "\n" + end + after)
    temporary.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--losses", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--peak-sizes", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak(arguments.peak_of[0], int(arguments.peak_of[1])))
        return

    blocks = []
    for threads in arguments.threads if arguments.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        rows = [["loss, time / floor", *(f"N = {n}" for n in arguments.sizes)]]
        columns = [
            ratios(arguments.losses, n, threads, arguments.device, max(3, min(100, 40 * 1024**2 // n**2)))
            for n in arguments.sizes
        ]
        for name in columns[0]:
            kind = OURS[name][0] if name in OURS else ""
            targets = TARGETS.get((kind, threads), {}) if arguments.device == "cpu" else {}
            if targets and kind == "symmetric" and threads == 1 and 256 in arguments.sizes:
                targets = {**targets, 256: columns[arguments.sizes.index(256)][f"dense {name}"]}
            cells = [
                marked(column[name], targets.get(n), ".2f") if name in column else ""
                for n, column in zip(arguments.sizes, columns, strict=True)
            ]
            rows.append([name, *cells])
        where = (
            f"{threads} thread{'s' * (threads > 1)}"
            if arguments.device == "cpu"
            else torch.cuda.get_device_name()
        )
        blocks.append(f"{where}, float32, d = {WIDTH}:\n\n{table(rows)}")
        print(blocks[-1], flush=True)
    if arguments.peak_sizes and arguments.device == "cpu" and sys.platform == "linux":
        rows = [["loss, peak extra MB", *(f"N = {n}" for n in arguments.peak_sizes)]]
        for name in arguments.losses:
            values = [peak_elsewhere(name, n) for n in arguments.peak_sizes]
            cells = [
                marked(v, PEAK_TARGETS.get(n), ".0f")
                for v, n in zip(values, arguments.peak_sizes, strict=True)
            ]
            rows.append([name, *cells])
        blocks.append(table(rows))
        print("\n" + blocks[-1], flush=True)
    if arguments.write:
        blocks.insert(
            0, f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {processor()}."
        )
        write("\n\n".join(blocks))


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
