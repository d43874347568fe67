"""k-means beside scikit-learn's: inertia, time and peak memory at equal starts and iterations.

    uv run --package cl-core python packages/core/benchmarks/clustering.py

Each case runs in a process of its own, so that the peak of resident memory is its own. Threads are torch's and
scikit-learn's default; set OMP_NUM_THREADS for a fixed number.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

CASES = [(20_000, 64, 50), (50_000, 128, 200), (50_000, 128, 1000)]
ITERATIONS = 10


def rows(count: int, width: int, clusters: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, width, generator=generator)
    index = torch.randint(clusters, (count,), generator=generator)
    return centres[index] + torch.randn(count, width, generator=generator)


def ours(z: torch.Tensor, clusters: int) -> float:
    from cl_core.clustering import kmeans

    generator = torch.Generator().manual_seed(0)
    return kmeans(z, clusters, max_iterations=ITERATIONS, tolerance=0, generator=generator).inertia


def theirs(z: torch.Tensor, clusters: int) -> float:
    import warnings

    from sklearn.cluster import KMeans

    warnings.simplefilter("ignore")  # that so few iterations do not converge
    model = KMeans(clusters, n_init=1, max_iter=ITERATIONS, tol=0, random_state=0, algorithm="lloyd")
    return float(model.fit(z.numpy()).inertia_)


def measure(name: str, count: int, width: int, clusters: int) -> None:
    run = {"cl-core": ours, "scikit-learn": theirs}[name]
    z = rows(count, width, clusters)
    run(z[:2000], 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    inertia = run(z, clusters)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sys.stdout.write(json.dumps({"inertia": inertia, "seconds": seconds, "peak": peak}))


def main() -> None:
    print(f"{'rows':>7} {'width':>5} {'K':>5} {'library':>13} {'inertia':>12} {'seconds':>8} {'extra MB':>8}")
    for case in CASES:
        for name in ("cl-core", "scikit-learn"):
            command = [sys.executable, __file__, name, *map(str, case)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{case[0]:>7} {case[1]:>5} {case[2]:>5} {name:>13} {found['inertia']:>12.5g} "
                f"{found['seconds']:>8.2f} {found['peak']:>8.0f}"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
