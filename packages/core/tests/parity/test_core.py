"""The losses, miners and memory of the core against stored results of lightly, PML, solo-learn, PyGCL and open_clip."""

import pytest
import torch

from cl_core.testing import parity

KINDS = parity.kinds("core", beside=__file__)
WAIVED = {
    "loss_f32": "the peer's own rounding",
    "peer_*": "the peer run wholly in half precision",
    "error_*": "kept as evidence that the peer raised",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("core", beside=__file__), ids=str)
def test_matches_peer(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, waived=WAIVED) as arrays:
        run(arrays)
