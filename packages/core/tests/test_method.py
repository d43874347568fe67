from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_core.method import Method, Progress


class Tiny(Method):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def loss(self, batch):
        return self.layers(batch).square().mean()


def test_calling_a_method_is_its_loss():
    method, batch = Tiny(), torch.randn(5, 3)
    assert torch.equal(method(batch), method.loss(batch))
    method(batch).backward()
    assert method.layers[0].weight.grad is not None


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    method = Tiny()
    decayed, exempt = method.parameter_groups(0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(method.layers[0].weight), id(method.layers[2].weight)}
    assert {p.ndim for p in exempt["params"]} == {1}
    assert len(exempt["params"]) == 4


def test_what_a_module_names_does_not_decay():
    class Named(nn.Module):
        undecayed = ("table.weight",)

        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(5, 3), nn.Linear(3, 2)

    method = Tiny()
    method.add_module("named", Named())
    decayed, exempt = method.parameter_groups(0.1)
    assert any(p is method.named.table.weight for p in exempt["params"])
    assert any(p is method.named.layer.weight for p in decayed["params"])
    assert len(decayed["params"]) == 3


@pytest.mark.parametrize("name", ["loss", "embed", "classify", "update"])
def test_what_a_method_must_define_says_so(name):
    arguments = {"update": (None, {}, None)}.get(name, (None,))
    with pytest.raises(NotImplementedError, match="Method "):
        getattr(Method(), name)(*arguments)


def test_fraction_of_the_progress():
    assert Progress(3, 12, 0, 4).fraction == 0.25
    assert Progress(0, 0, 0, 0).fraction == 0.0
    assert Progress(9, 6, 0, 1).fraction == 1.0


def test_modules_may_ask_for_another_rate():
    class Slow(nn.Linear):
        lr_scale = 0.1

    class Two(Method):
        def __init__(self):
            super().__init__()
            self.fast, self.slow = nn.Linear(2, 2), Slow(2, 2)

    method = Two()
    groups = method.parameter_groups(0.3)
    assert [(g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups] == [
        (1, 0.3),
        (1, 0),
        (0.1, 0.3),
        (0.1, 0),
    ]
    wanted = [method.fast.weight, method.fast.bias, method.slow.weight, method.slow.bias]
    assert all(group["params"][0] is parameter for group, parameter in zip(groups, wanted, strict=True))
