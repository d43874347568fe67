"""gCooL's augmentation, which is GCA's, against the stored results of the published code."""

import pytest
import torch

from cl_core.testing import parity
from cl_graph.centrality import (
    degree_centrality,
    drop_weights,
    edge_drop_probabilities,
    eigenvector_centrality,
    feature_mask_probabilities,
    pagerank_centrality,
)

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-8, absolute=1e-10, gradient_relative=1e-8, gradient_absolute=1e-10
    ),
    torch.float32: parity.Tolerance(
        relative=2e-5, absolute=1e-6, gradient_relative=1e-4, gradient_absolute=1e-6
    ),
}
SINGLE = parity.Tolerance(relative=1e-6)  # of what was worked out in single precision
EIGENVECTOR = parity.Tolerance(relative=1e-5)


def run_drop_weights(arrays):
    edges = arrays.tensor("edge_index")
    binary, dense = arrays.tensor("x_binary"), arrays.tensor("x_dense")
    n, (p_edge, p_feat) = len(binary), (arrays.parameter(name) for name in ("p_edge", "p_feat"))
    ranks, vector = pagerank_centrality(edges, n), eigenvector_centrality(edges, n)
    arrays.compare("degree", degree_centrality(edges, n))
    arrays.compare("pagerank_k10", pagerank_centrality(edges, n, steps=10), tolerance=SINGLE)
    arrays.compare("pagerank_k200", ranks, tolerance=SINGLE)
    arrays.compare("eigenvector_centrality", vector, tolerance=EIGENVECTOR)
    centralities = {
        "degree": ("degree", degree_centrality(edges, n), SINGLE),
        "pr": ("pagerank", ranks, SINGLE),
        "evc": ("eigenvector", vector + 1e-8, EIGENVECTOR),
    }
    for short, (name, central, tolerance) in centralities.items():
        weights = drop_weights(central[edges[1]].log())
        arrays.compare(f"edge_w_{short}", weights, tolerance=tolerance)
        for kind, x, magnitude in (("", binary, False), ("dense_", dense, True)):
            # A rate so small that nothing is cut off gives the weights.
            for given in (x, x.to_sparse_coo()):
                made = feature_mask_probabilities(
                    given, edges, 1e-3, centrality=name, threshold=1.0, magnitude=magnitude
                )
                arrays.compare(f"feat_w_{kind}{short}", made / 1e-3, tolerance=tolerance)
    options = {"threshold": arrays.parameter("threshold")}
    for short, name in (("degree", "degree"), ("pr", "pagerank")):
        made = edge_drop_probabilities(edges, n, p_edge, centrality=name, **options)
        arrays.compare(f"edge_drop_prob_{short}", made, tolerance=SINGLE)
    made = feature_mask_probabilities(binary, edges, p_feat, **options)
    arrays.compare("feat_drop_prob_degree", made, tolerance=SINGLE)


RUNS = {"drop_weights": run_drop_weights}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("gcool", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(RUNS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
