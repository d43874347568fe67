import pytest
import torch
from torch import nn

from cl_vision.projectors import MLPProjector


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_and_shapes(norm, layers):
    projector = MLPProjector(12, hidden_dim=20, out_dim=7, layers=layers, norm=norm)
    assert sum(isinstance(module, nn.Linear) for module in projector.modules()) == layers
    assert projector(torch.randn(4, 12)).shape == (4, 7)


def test_hidden_width_defaults_to_the_input():
    assert MLPProjector(12).network[0].out_features == 12


def test_can_be_built_later():
    projector = MLPProjector(out_dim=5)
    assert projector.in_dim is None
    with pytest.raises(RuntimeError, match="no in_dim yet"):
        projector(torch.randn(4, 12))
    projector.build(12)
    assert projector.in_dim == 12
    assert projector(torch.randn(4, 12)).shape == (4, 5)
    with pytest.raises(RuntimeError, match="already built"):
        projector.build(12)


def test_bad_input():
    with pytest.raises(ValueError, match="layers must be an integer >= 1, got 0"):
        MLPProjector(12, layers=0)
    with pytest.raises(ValueError, match="norm must be one of"):
        MLPProjector(12, norm="group")
    with pytest.raises(ValueError, match=r"features must have shape \(N, 12\), got \(4, 11\)"):
        MLPProjector(12)(torch.randn(4, 11))
