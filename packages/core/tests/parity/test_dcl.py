"""DCL and its hosts against the stored results of the published implementations."""

import pytest
import torch

from cl_core import diagnostics
from cl_core.functional import dcl_loss, dclw_loss, info_nce_loss, nt_xent_loss
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(relative=1e-9, gradient_relative=1e-9, absolute=1e-12),
    torch.float32: parity.Tolerance(relative=2e-5, gradient_relative=1e-4, absolute=1e-6),
}


def both_sides(function, arrays, z1, z2, **options):
    """Mean of the anchors of view 1 and of view 2."""
    temperature = arrays.parameter("temperature")
    each = function(z1, z2, temperature=temperature, reduction="none", **options)
    return each.view(2, -1).mean(1)


def run_dcl(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    loss_12, loss_21 = both_sides(dcl_loss, arrays, z1, z2, normalize=False)
    arrays.compare("loss_12", loss_12)
    arrays.compare("loss_21", loss_21)
    arrays.compare("loss_mean", (loss_12 + loss_21) / 2)
    arrays.compare("loss_sum", loss_12 + loss_21)
    arrays.compare_gradients(loss_12, grad12_z1=z1, grad12_z2=z2)
    arrays.compare_gradients(loss_12 + loss_21, gradsum_z1=z1, gradsum_z2=z2)


def run_batch_of_two(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    loss = both_sides(dcl_loss, arrays, z1, z2, normalize=False).sum()
    arrays.compare("loss_sum", loss)
    arrays.compare_gradients(loss, gradsum_z1=z1, gradsum_z2=z2)


def run_dclw(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    options = {"sigma": arrays.parameter("sigma"), "normalize": False}
    detached = both_sides(dclw_loss, arrays, z1, z2, **options)
    for name, value in zip(("loss_12", "loss_21"), detached, strict=True):
        arrays.compare(name, value)
    arrays.compare("loss_sum", detached.sum())
    arrays.compare_gradients(detached.sum(), gradsum_detached_weight_z1=z1, gradsum_detached_weight_z2=z2)
    through = both_sides(dclw_loss, arrays, z1, z2, detach_weight=False, **options).sum()
    arrays.compare_gradients(through, gradsum_through_weight_z1=z1, gradsum_through_weight_z2=z2)
    # dclw = dcl + (1 - w) s / T, so the weights can be read off the two values.
    temperature = arrays.parameter("temperature")
    similarities = (z1 * z2).sum(1)
    both = [
        f(z1, z2, temperature=temperature, reduction="none", normalize=False, **o)[: len(z1)]
        for f, o in ((dcl_loss, {}), (dclw_loss, {"sigma": options["sigma"]}))
    ]
    arrays.compare(
        "weights",
        1 + (both[0] - both[1]) * temperature / similarities,
        tolerance=parity.Tolerance(relative=1e-7 if arrays.dtype == torch.float64 else 1e-3),
    )


def run_unnormalised_inputs(arrays):
    x1, x2 = arrays.leaves("x1", "x2")
    temperature = arrays.parameter("temperature")
    loss = dcl_loss(x1, x2, temperature=temperature)
    arrays.compare("dcl_mean", loss)
    arrays.compare_gradients(loss, dcl_grad_x1=x1, dcl_grad_x2=x2)
    weighted = dclw_loss(x1, x2, temperature=temperature, sigma=arrays.parameter("sigma"))
    arrays.compare("dclw_mean_detached", weighted)
    arrays.compare_gradients(weighted, dclw_grad_x1=x1, dclw_grad_x2=x2)


def run_infonce(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    temperature = arrays.parameter("temperature")
    each = nt_xent_loss(z1, z2, temperature=temperature, reduction="none", normalize=False)
    for view, values in enumerate(each.view(2, -1), 1):
        arrays.compare(f"per_sample_view{view}", values)
        arrays.compare(f"npc_q_view{view}", -torch.expm1(-values))
    loss = nt_xent_loss(z1, z2, temperature=temperature, normalize=False)
    arrays.compare("loss_mean", loss)
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2)
    mean_factor = diagnostics.npc_factor(z1, z2, temperature=temperature)
    torch.testing.assert_close(mean_factor, -torch.expm1(-each).mean(), rtol=1e-4, atol=1e-6)


def run_moco_host(arrays):
    (query,) = arrays.leaves("q")
    key, queue = arrays.tensor("k"), arrays.tensor("queue")
    options = {"temperature": arrays.parameter("temperature"), "normalize": False}
    decoupled = dcl_loss(query, key, negatives=queue, **options)
    arrays.compare("loss_dcl", decoupled)
    arrays.compare_gradients(decoupled, grad_q_dcl=query)
    weighted = dclw_loss(query, key, negatives=queue, sigma=arrays.parameter("sigma"), **options)
    arrays.compare("loss_dclw_detached", weighted)
    arrays.compare_gradients(weighted, grad_q_dclw=query)
    coupled = info_nce_loss(query, key, queue, **options)
    arrays.compare("loss_infonce", coupled)
    arrays.compare_gradients(coupled, grad_q_infonce=query)


def run_nnclr_host(arrays):
    (predictions,) = arrays.leaves("p2")
    z1, support = arrays.tensor("z1"), arrays.tensor("support")
    nearest = (z1 @ support.t()).argmax(1)
    arrays.compare("nn_index", nearest)
    neighbours = support[nearest]
    temperature = arrays.parameter("temperature")
    loss = dcl_loss(neighbours, predictions, negatives="keys", temperature=temperature, normalize=False)
    arrays.compare("loss_dcl", loss)
    arrays.compare_gradients(loss, grad_p2=predictions)


def rank_loss(group, z1, z2, local, temperature):
    own = slice(torch.distributed.get_rank(group) * local, (torch.distributed.get_rank(group) + 1) * local)
    return dcl_loss(z1[own], z2[own], temperature=temperature, group=group)


def run_gathered_2ranks(arrays, ranks):
    z1, z2 = arrays.tensor("z1"), arrays.tensor("z2")
    temperature = arrays.parameter("temperature")
    losses = ranks.run(rank_loss, z1, z2, arrays.parameter("local_batch"), temperature, world_size=2)
    for rank, loss in enumerate(losses):
        arrays.compare(f"loss_rank{rank}", loss.detach())
    arrays.compare("loss_mean_over_ranks", torch.stack(losses).mean())
    arrays.compare("loss_single_process", dcl_loss(z1, z2, temperature=temperature))


KINDS = {name.removeprefix("run_"): run for name, run in list(globals().items()) if name.startswith("run_")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("dcl", beside=__file__), ids=str)
def test_matches_official(case, dtype, ranks):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays, ranks) if run is run_gathered_2ranks else run(arrays)
