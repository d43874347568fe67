"""SimLAP's head and Hydra's instance loss against the stored results of the published code."""

import pytest
import torch

from cl_core.functional import info_nce_loss
from cl_core.projectors import MLPProjector
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(relative=1e-10, absolute=1e-12),
    torch.float32: parity.Tolerance(relative=2e-5, absolute=1e-6),
}


def run_loss_and_gate(arrays):
    given = {name.removeprefix("projparam_"): arrays.tensor(name) for name in arrays.matching("projparam_*")}
    inputs = arrays.tensor("projector_in")
    first, last = given["0.weight"], given["3.weight"]
    head = MLPProjector(first.shape[1], first.shape[0], last.shape[0], final_norm="layer")
    head = head.to(arrays.dtype).eval()
    state = head.network.state_dict()
    for name in state:
        if name in given:
            state[name] = given[name]
    # The published layer before the batch normalisation has a bias, which shifts its running mean and nothing else.
    state["1.running_mean"] = given["1.running_mean"] - given["0.bias"]
    head.network.load_state_dict(state)
    arrays.compare("projector_out_eval", head(inputs))
    query, key = arrays.tensor("z_query"), arrays.tensor("z_key")
    loss = info_nce_loss(query, key, temperature=arrays.parameter("temperature"))
    arrays.compare("infonce_q_k_loss", loss)
    arrays.waive("*", reason="the gated losses, gates and weights of pairs are compared in cl-core")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("hydra", beside=__file__), ids=str)
def test_matches_official(case, dtype):
    run = case.claim({"loss_and_gate": run_loss_and_gate})
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
