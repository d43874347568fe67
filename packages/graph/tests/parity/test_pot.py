"""Hosts of node contrast against the stored results of the published code."""

import pytest
import torch
from torch.nn import functional

from cl_core.losses import InfoNCELoss, NTXentLoss
from cl_core.projectors import MLPProjector
from cl_core.testing import parity
from cl_graph.adjacency import Adjacency
from cl_graph.centrality import drop_weights, edge_drop_probabilities, pagerank_centrality
from cl_graph.encoders import GCN
from cl_graph.mixture import BetaMixture, fit_beta_mixture, mixture_nce_loss
from cl_graph.pot import (
    EdgeDropBounds,
    _Bound,
    _Clean,
    _interval,
    bounded_layers,
    contrast_vectors,
    node_compactness,
    relax,
)

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-8, absolute=1e-10, gradient_relative=1e-8, gradient_absolute=1e-10
    ),
    torch.float32: parity.Tolerance(
        relative=2e-5, absolute=1e-6, gradient_relative=1e-4, gradient_absolute=1e-6
    ),
}


SINGLE = parity.Tolerance(relative=1e-6)  # of what was added up in single precision


def projector_of(arrays):
    weights = [arrays.tensor(name) for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    hidden, dim = weights[0].shape
    projector = MLPProjector(dim, hidden, dim, norm="none", activation="elu").to(arrays.dtype)
    for parameter, value in zip(projector.parameters(), weights, strict=True):
        parameter.data = value
    return projector


def run_grace_loss(arrays):
    projector, (z1, z2) = projector_of(arrays), arrays.leaves("z1", "z2")
    h1, h2 = projector(z1), projector(z2)
    arrays.compare("h1", h1)
    arrays.compare("h2", h2)
    temperature = arrays.parameter("tau")
    each = NTXentLoss(temperature, reduction="none")(h1, h2)
    for name, part in zip(("semi_12", "semi_21"), each.chunk(2), strict=True):
        arrays.compare(name, part)
    loss = NTXentLoss(temperature)(h1, h2)
    arrays.compare("loss", loss)
    arrays.compare("loss_batched", NTXentLoss(temperature, impl="tiled")(h1, h2))
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2)
    arrays.waive("batch_size", reason="a tile's size is ours")


def run_linear_bounds(arrays):
    slope, lift = relax(arrays.tensor("l"), arrays.tensor("u"), arrays.parameter("slope"))
    offset, none = torch.where(slope > 0, lift / slope, 0), torch.zeros_like(lift)
    for name, value in {"alpha_L": slope, "alpha_U": slope, "beta_U": offset, "beta_L": none}.items():
        arrays.compare(name, value)


def encoder_of(arrays):
    """The stored encoder, and its parameters by the names of their gradients."""
    stored = {name.removeprefix("param/"): arrays.tensor(name) for name in arrays.matching("param/*")}
    hidden, width = stored["conv.0.lin.weight"].shape
    slope = stored.get("activation.weight")
    activation = "relu" if slope is None else "prelu"
    encoder = GCN(width, hidden, len(stored["conv.1.bias"]), activation=activation).to(arrays.dtype)
    named = {
        f"grad/{name.replace('convs', 'conv').replace('act.', 'activation.')}": parameter
        for name, parameter in encoder.named_parameters()
    }
    for name, parameter in named.items():
        parameter.data = stored[name.replace("grad", "param").removeprefix("param/")]
    assert bounded_layers(encoder)[1] == pytest.approx(arrays.parameter("prelu_slope"))
    return encoder, named


def run_pot(arrays):
    """Official score of a view, every step on the way to it, and the gradients of its loss."""
    encoder, named = encoder_of(arrays)
    x, nodes, (z2,) = arrays.tensor("x"), arrays.tensor("node_list"), arrays.leaves("z2")
    clean, view, n = arrays.tensor("edge_index"), arrays.tensor("edge_index_1"), len(x)
    adaptive = "edge_drop_prob" in arrays
    dropped = arrays.parameter("drop_rate")
    if adaptive:
        dropped = torch.tensor(arrays.parameter("edge_drop_prob"), dtype=torch.float64)
        expected = torch.zeros(n, dtype=torch.float64).index_add(0, clean[1], dropped)
        arrays.compare("expected_dropped", expected, tolerance=SINGLE)
    bounds = EdgeDropBounds.of_drops(clean, n, dropped)
    upper = torch.zeros(n, n, dtype=arrays.dtype)
    upper[tuple(bounds.edge_index)] = bounds.upper(arrays.dtype)
    arrays.compare("A_upper", upper)
    arrays.compare("A_lower", bounds.lower(arrays.dtype).diag())
    whole = _Clean.of(encoder, x, clean, nodes, "induced")
    layers, entries = whole.layers, whole.entries(bounds)
    intervals = [
        _interval(values, values, layer.bias, *entries)
        for values, layer in zip(whole.inputs, layers, strict=True)
    ]
    for place, (lower, upper) in enumerate(intervals, 1):
        arrays.compare(f"l{place}", lower)
        arrays.compare(f"u{place}", upper)
    contrast = contrast_vectors(z2)
    arrays.compare("W_cl", contrast)
    local = Adjacency.normalized(view, n, arrays.dtype).within(nodes)
    bound = _Bound(layers, whole.slope, whole.inputs, [(m, m) for m in whole.inputs], *entries, local, None)
    given = contrast
    for place in (2, 1):
        through, constant = bound._backwards(place - 1, given)
        given = through @ layers[place - 1].weight
        arrays.compare(f"W_tilde_{place}", given)
        arrays.compare(f"b_tilde_{place}", constant)
    score = node_compactness(
        encoder, x, clean, view, z2, bounds, nodes=nodes, variant="official", neighbors="induced"
    )
    arrays.compare("score", score)
    loss = functional.softplus(-score).mean()
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z2=z2, **named)
    arrays.waive("z1", "edge_index_2", reason="the score of view 1 does not read them")


def run_gca_drop_prob(arrays):
    edges, rate, threshold = (
        arrays.tensor("edge_index"),
        arrays.parameter("rate"),
        arrays.parameter("threshold"),
    )
    n = int(edges.max()) + 1
    degrees = torch.bincount(edges[1], minlength=n).double()
    ranks = pagerank_centrality(edges, n, steps=200)
    stored_in_single = parity.Tolerance(relative=1e-5)
    for short, name, central in (("degree", "degree", degrees), ("pr", "pagerank", ranks)):
        weights = drop_weights(central[edges[1]].log())
        arrays.compare(f"{short}_weight", weights, tolerance=stored_in_single)
        made = edge_drop_probabilities(edges, n, rate, centrality=name, threshold=threshold)
        arrays.compare(f"{short}_prob", made, tolerance=SINGLE)


def run_progcl_bmm(arrays):
    mixture = fit_beta_mixture(
        arrays.tensor("x"), false_share=arrays.parameter("weight_init"), steps=arrays.parameter("iters")
    )
    tolerance = parity.Tolerance(relative=1e-6 if arrays.dtype == torch.float64 else 1e-5)
    for name, value in mixture._asdict().items():
        arrays.compare(name, value, tolerance=tolerance)
    posterior = torch.sigmoid(-mixture.log_odds()(arrays.tensor("query")))
    arrays.compare("posterior0", posterior, tolerance=tolerance)


def run_progcl_losses(arrays):
    mixture = BetaMixture(*(arrays.tensor(name) for name in BetaMixture._fields))
    z1, z2 = arrays.leaves("z1", "z2")
    n = len(z1)
    cosines = functional.normalize(z1.detach()) @ functional.normalize(z2.detach()).T
    others = ~torch.eye(n, dtype=torch.bool)
    arrays.compare("B", (mixture.log_odds().log_weights(cosines).exp() / 2)[others].view(n, n - 1))
    options = {"temperature": arrays.parameter("tau"), "mixed": arrays.parameter("sel_num")}
    order = arrays.tensor("mix_perm")
    for mode in ("weight", "mix"):
        semi = mixture_nce_loss(
            z1, z2, (mixture, mixture), mode=mode, permutation=order, reduction="none", **options
        )[:n]
        arrays.compare(f"semi_{mode}", semi)
        arrays.compare_gradients(semi.mean(), **{f"grad_z1_{mode}_mean": z1, f"grad_z2_{mode}_mean": z2})


def run_costa_loss(arrays):
    projector, (z1, z2) = projector_of(arrays), arrays.leaves("z1", "z2")
    projection = arrays.tensor("sketch")
    h1, h2 = (projector(projection @ z) for z in (z1, z2))
    arrays.compare("h1", h1)
    arrays.compare("h2", h2)
    criterion = InfoNCELoss(arrays.parameter("tau"), symmetric=True, reduction="none")
    for name, part in zip(("loss_12", "loss_21"), criterion(h1, h2).chunk(2), strict=True):
        arrays.compare(name, part.mean())
    criterion.reduction = "mean"
    loss = criterion(h1, h2)
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2)


RUNS = {
    "costa_loss": run_costa_loss,
    "gca_drop_prob": run_gca_drop_prob,
    "grace_loss": run_grace_loss,
    "linear_bounds": run_linear_bounds,
    "pot": run_pot,
    "progcl_bmm": run_progcl_bmm,
    "progcl_losses": run_progcl_losses,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("pot", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(RUNS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
