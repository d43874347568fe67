"""Hosts of node contrast against the stored results of the published code."""

import pytest
import torch

from cl_core.losses import NTXentLoss
from cl_core.projectors import MLPProjector
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(
        relative=1e-8, absolute=1e-10, gradient_relative=1e-8, gradient_absolute=1e-10
    ),
    torch.float32: parity.Tolerance(
        relative=2e-5, absolute=1e-6, gradient_relative=1e-4, gradient_absolute=1e-6
    ),
}


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


RUNS = {"grace_loss": run_grace_loss}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("pot", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim(RUNS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
