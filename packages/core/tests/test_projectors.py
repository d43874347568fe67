import pytest
import torch
from torch import nn

from cl_core.projectors import MLPProjector, MultiHeadProjector


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


@pytest.mark.parametrize("split", [False, True])
def test_heads_are_independent_and_lie_side_by_side(split):
    head = MultiHeadProjector(6, heads=3, hidden_dim=5, head_dim=4, split=split)
    rows = torch.randn(7, 6)
    found = head(rows)
    assert found.shape == (7, 12) == (7, head.out_dim)
    for place, network in enumerate(head.networks):
        given = rows[:, 2 * place : 2 * place + 2] if split else rows
        torch.testing.assert_close(found[:, 4 * place : 4 * place + 4], network(given))
    gradients = torch.autograd.grad(found[:, :4].square().sum(), list(head.parameters()))
    assert [bool(g.any()) for g in gradients] == [True] * 4 + [False] * 8


def test_heads_are_built_for_their_encoder():
    head = MultiHeadProjector(head_dim=4)
    with pytest.raises(RuntimeError, match="has no in_dim yet"):
        head(torch.randn(2, 6))
    head.build(6)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 6\), got \(2, 5\)"):
        head(torch.randn(2, 5))
    with pytest.raises(ValueError, match="in_dim must be a multiple of heads=3 to be split, got 7"):
        MultiHeadProjector(7, split=True)
