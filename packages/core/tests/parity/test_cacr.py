"""CACR and its hosts against the stored results of the published functions."""

import pytest
import torch

from cl_core import similarity
from cl_core.functional import cacr_loss, cacr_momentum_loss, cacr_queue_loss
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-8, gradient_relative=1e-8, absolute=1e-12, gradient_absolute=1e-12
    ),
    torch.float32: parity.Tolerance(
        relative=5e-5, gradient_relative=5e-5, absolute=1e-6, gradient_absolute=1e-7
    ),
}
CHOICES = {
    "full": {},
    "none": {"t_pos": 0, "t_neg": 0},
    "without_w1": {"t_pos": 0},
    "without_w2": {"t_neg": 0},
}


def numbers(arrays, *names):
    """Parameters under our names: the stored tau_* multiply squared distances. Rows have unit length already."""
    return {name.replace("tau_p", "t_p").replace("tau_n", "t_n"): arrays.parameter(name) for name in names}


def run_small_scale(arrays):
    (views,) = arrays.leaves("views")
    sharpness = numbers(arrays, "tau_pos", "tau_neg") | {"normalize": False}
    weights = numbers(arrays, "alpha", "beta")
    rows = list(views)
    for choice, changes in CHOICES.items():
        options = sharpness | changes
        arrays.compare(f"attraction_{choice}", cacr_loss(rows, alpha=weights["alpha"], beta=0, **options))
        arrays.compare(f"repulsion_{choice}", cacr_loss(rows, alpha=0, beta=weights["beta"], **options))
        total = cacr_loss(rows, **weights, **options)
        arrays.compare(f"total_{choice}", total)
        arrays.compare_gradients(total, **{f"grad_{choice}": views})
    detached = cacr_loss(rows, detach_weights=True, **weights, **sharpness)
    arrays.compare("total_full_detached_weights", detached)
    arrays.compare_gradients(detached, grad_full_detached_weights=views)
    options = {"alpha": 0, "beta": weights["beta"], **sharpness}
    tau_plus = arrays.parameter("tau_plus")
    arrays.compare("repulsion_debiased", cacr_loss(rows, tau_plus=tau_plus, paper_code_sign=True, **options))
    kernel = cacr_loss(rows, cost="rbf", rbf_t=arrays.parameter("rbf_t"), **options)
    arrays.compare("repulsion_rbf", kernel)
    arrays.compare_gradients(kernel, grad_repulsion_rbf=views)
    compare_weights(arrays, views, **numbers(arrays, "tau_pos", "tau_neg"))


def compare_weights(arrays, views, t_pos, t_neg):
    """The weights that the sums are taken with, of the last query and of the last pair of views."""
    *others, query = views.detach()
    distances = torch.stack([(query - other).square().sum(1) for other in others], 1)
    arrays.compare("pos_weights_last_query", (t_pos * distances).softmax(1))
    rows, columns = views.detach()[-2], views.detach()[-1]
    log_sum, _ = similarity.expected_logits(2 * t_neg * rows, columns, over="different")
    weights = (2 * t_neg * rows @ columns.T - log_sum[:, None]).exp()
    away = ~torch.eye(len(rows), dtype=torch.bool)
    arrays.compare("neg_weights_last_pair", weights[away].view(len(rows), -1))


def run_queue_v2(arrays):
    (queries,) = arrays.leaves("queries")
    given = list(queries), list(arrays.tensor("keys")), arrays.tensor("queue")
    sharpness = numbers(arrays, "tau_pos", "tau_neg")
    alpha, beta = arrays.parameter("alpha"), arrays.parameter("beta")
    arrays.compare("attraction", cacr_queue_loss(*given, alpha=alpha, beta=0, **sharpness))
    # Stored with the batch's part of the weights attached, as shipped.
    for name, in_batch, detach in (("queue_plus_batch", True, "queue"), ("queue_only", False, True)):
        options = {"in_batch": in_batch, **sharpness}
        arrays.compare(f"repulsion_{name}", cacr_queue_loss(*given, alpha=0, beta=beta, **options))
        total = cacr_queue_loss(*given, alpha=alpha, beta=beta, detach_weights=detach, **options)
        (gradient,) = torch.autograd.grad(total, queries)
        # Stored without the normalisation, which takes away what points along the row.
        along = (arrays.tensor(f"grad_{name}") * queries.detach()).sum(-1, keepdim=True) * queries.detach()
        arrays.compare(f"grad_{name}", gradient + along)


def run_momentum_v3(arrays):
    (queries,) = arrays.leaves("queries")
    key, temperature = arrays.tensor("key"), arrays.parameter("temperature")
    kernel = 2 * temperature * cacr_momentum_loss(list(queries), key, temperature=temperature)
    arrays.compare("loss_rbf", kernel)
    arrays.compare_gradients(kernel, grad_rbf=queries)
    mean = cacr_momentum_loss(list(queries), key, temperature=temperature, cost="euclidean")
    arrays.compare("loss_euclidean_mean", mean)
    arrays.compare("loss_euclidean_as_shipped", len(key) * mean)
    arrays.compare_gradients(len(key) * mean, grad_euclidean_as_shipped=queries)


KINDS = {name.removeprefix("run_"): run for name, run in list(globals().items()) if name.startswith("run_")}
WAIVED = {"repulsion_as_shipped_cached": "the published cache bug: view 0's similarities used for every view"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("cacr", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype], waived=WAIVED) as arrays:
        run(arrays)
