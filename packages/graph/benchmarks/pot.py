"""POT's regulariser beside the dense form that the published code uses: time and peak memory of a step, ratios.

    uv run --all-packages python packages/graph/benchmarks/pot.py [--nodes 1000 3000 10000]

The published form is written anew from the paper's formulas and the dense matrices that its code holds: bounds of all
n x n entries of the adjacency, restricted and made sparse in each step, biases as the diagonal of a product, one matrix
as wide as the features. A step is both directions, forward and backward to the encoder; graphs are random, of 10 edges a
node, features 500 wide. Each form runs in a process of its own, so that its peak of resident memory is its own; the two
take turns, and medians are compared. The floor is the products that no form can do without: the first layer's, and one
with the adjacency for each layer and view, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES, HIDDEN, DIM, RATE = 500, 256, 128, 0.3
FORMS = ("published form", "official", "tight", "floor")


def graph(nodes: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    one_way = torch.randint(nodes, (2, 5 * nodes), generator=generator)
    one_way = one_way[:, one_way[0] != one_way[1]]
    edges = torch.cat([one_way, one_way.flip(0)], dim=1).unique(dim=1)
    views = [edges[:, torch.rand(edges.shape[1], generator=generator) >= RATE] for _ in range(2)]
    return torch.rand(nodes, FEATURES, generator=generator), edges, views


def dense_bounds(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    degree = torch.bincount(edges[1], minlength=nodes) + 1
    dropped = torch.minimum((degree - 2).clamp_min(0), (RATE * (degree - 1).double()).round().long())
    scale = (degree - dropped).float().rsqrt()
    linked = torch.eye(nodes)
    linked[edges[0], edges[1]] = 1
    return linked * scale[:, None] * scale, (1 / degree.float()).diag()


def normalized(edges: Tensor, nodes: int) -> Tensor:
    loops = torch.arange(nodes).expand(2, -1)
    source, target = torch.cat([edges, loops], dim=1)
    scale = torch.bincount(target, minlength=nodes).float().rsqrt()
    return torch.sparse_coo_tensor(
        torch.stack([source, target]), scale[source] * scale[target], (nodes, nodes)
    )


def published_form(encoder, x, edges, view, other, bounds) -> Tensor:  # type: ignore[no-untyped-def]
    """-> the mean of softplus(-score), every step as dense as the published code has it."""
    nodes, (first, second) = len(x), encoder.convs
    upper, lower = bounds
    centre, reach = ((upper + lower) / 2).to_sparse(), ((upper - lower) / 2).to_sparse()
    clean = normalized(edges, nodes).t()
    weights = [first.lin.weight.t(), second.lin.weight.t()]
    inputs = [x @ weights[0]]
    inputs.append(torch.relu(clean @ inputs[0] + first.bias) @ weights[1])
    unit = F.normalize(other, dim=1)
    given = unit * nodes / (nodes - 1) - unit.sum(0) / (nodes - 1)
    biases = []
    for m, weight, conv in zip(reversed(inputs), reversed(weights), (second, first), strict=True):
        middle, width = centre @ m + conv.bias, reach @ m.abs()
        low, high = middle - width, middle + width
        both = (low < 0) & (high > 0)
        slope = torch.where(both, high / (high - low).where(both, torch.ones(())), (low >= 0).float())
        offset = torch.where((given < 0) & both, -low, torch.zeros(()))
        through = slope * given
        biases.append((through @ (offset + conv.bias).t()).diagonal())
        given = through @ weight.t()
    matrix = normalized(view, nodes)
    score = (x * given).sum(1, keepdim=True)
    for bias in reversed(biases):
        score = matrix @ score + bias[:, None]
    return F.softplus(-score).mean()


def floor(encoder, x, views) -> None:  # type: ignore[no-untyped-def]
    from cl_graph.adjacency import Adjacency

    given = x @ encoder.convs[0].lin.weight.t()
    for view in views:
        adjacency = Adjacency.normalized(view, len(x))
        hidden = adjacency.gather(given)
        adjacency.gather(hidden @ encoder.convs[1].lin.weight.t()).sum().backward(retain_graph=True)


def measure(form: str, nodes: int) -> None:
    from cl_graph.encoders import GCN
    from cl_graph.pot import EdgeDropBounds, node_compactness

    torch.manual_seed(0)
    encoder = GCN(FEATURES, HIDDEN, DIM)
    x, edges, views = graph(nodes)
    others = [torch.randn(nodes, DIM, requires_grad=True) for _ in views]
    if form == "published form":
        bounds = dense_bounds(edges, nodes)

    def step() -> float:
        encoder.zero_grad()
        if form == "floor":
            floor(encoder, x, views)
            return 0.0
        total = torch.zeros(())
        for view, other in zip(views, others, strict=True):
            if form == "published form":
                total = total + published_form(encoder, x, edges, view, other, bounds)
            else:
                limits = EdgeDropBounds.of_drops(edges, nodes, RATE)
                score = node_compactness(encoder, x, edges, view, other, limits, variant=form)  # type: ignore[arg-type]
                total = total + F.softplus(-score).mean()
        total.backward()
        return total.item()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = step()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if form == "published form":
        peak += 2 * 4 * nodes**2 / 2**20  # the bounds, which it holds between steps
    start = time.perf_counter()
    step()
    print(json.dumps({"value": found, "seconds": time.perf_counter() - start, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    print(
        "| n | form | ms | times the tight one | extra MB | times the tight one |\n|---|---|---|---|---|---|"
    )
    for nodes in asked.nodes:
        found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(asked.repetitions):
            for form in FORMS:
                command = [sys.executable, "-W", "ignore", __file__, "--measure", form, str(nodes)]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[form].append(json.loads(text))
        medians = {
            form: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
            for form, runs in found.items()
        }
        agree = abs(medians["official"]["value"] / medians["published form"]["value"] - 1)
        if agree > 1e-4:
            raise SystemExit(f"the official variant differs from the published form by {agree:.1e}")
        ours = medians["tight"]
        for form, each in medians.items():
            ratios = each["seconds"] / ours["seconds"], each["peak"] / max(ours["peak"], 1)
            print(
                f"| {nodes:,} | {form} | {1e3 * each['seconds']:.0f} | {ratios[0]:.2g} | {each['peak']:.0f} | "
                f"{ratios[1]:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        warnings.simplefilter("ignore")
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main()
