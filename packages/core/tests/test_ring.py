"""Around the ring: the same result as by gathering, without any rank holding all rows."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cl_core import _ring, plugins
from cl_core.distributed import shard
from cl_core.testing import Ranks
from cl_core.testing.losses import encoded_loss, inputs

SPLITS = {2: [5, 3], 3: [4, 0, 4], 4: [3, 1, 0, 4]}
CASES = [
    ("NTXentLoss", {}),
    ("DCLLoss", {}),
    ("DCLWLoss", {"detach_weight": False}),
    ("HardNegativeNCELoss", {}),
    ("InfoNCELoss", {"symmetric": True}),
    ("CACRLoss", {}),
    ("CACRLoss", {"cost": "rbf", "detach_weights": True}),
    ("CACRMomentumLoss", {"cost": "euclidean"}),
    ("CLIPLoss", {}),
    ("SigLIPLoss", {}),
    ("SupConLoss", {"form": "out"}),
    ("SupConLoss", {"form": "in"}),
    ("SupConLoss", {"form": "pair"}),
    ("UniformityLoss", {}),
]


def around_the_ring(group, loss, parts, options):
    ring_from, _ring.RING_FROM = _ring.RING_FROM, 2
    try:
        return encoded_loss(
            group, loss, tuple(part[torch.distributed.get_rank(group)] for part in parts), options
        )
    finally:
        _ring.RING_FROM = ring_from


@pytest.mark.parametrize("world_size", SPLITS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_one_process(name, options, world_size, ranks):
    loss = plugins.load_loss(name)
    given = tuple(t.detach() for t in inputs(loss, rows=sum(SPLITS[world_size]), width=5))
    value, gradients = encoded_loss(None, loss, given, options)
    parts = [t.split(SPLITS[world_size]) for t in given]
    values, of_ranks = zip(
        *ranks.run(around_the_ring, loss, parts, options, world_size=world_size), strict=True
    )
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=1e-6, atol=1e-9)
    for one, *others in zip(gradients, *of_ranks, strict=True):
        torch.testing.assert_close(torch.stack(others).mean(0), one, rtol=1e-6, atol=1e-9)


def on_each_rank(group, loss, parts, options):
    return encoded_loss(
        group, loss, tuple(part[torch.distributed.get_rank(group)] for part in parts), options
    )


@pytest.fixture(scope="module")
def eight_ranks():
    with Ranks(8) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "CLIPLoss", "SigLIPLoss"])
def test_eight_ranks_go_around_the_ring_unasked(name, eight_ranks):
    assert _ring.RING_FROM == 8
    loss, split = plugins.load_loss(name), [3, 1, 0, 4, 2, 1, 5, 2]
    given = tuple(t.detach() for t in inputs(loss, rows=sum(split), width=5))
    value, gradients = encoded_loss(None, loss, given, {})
    parts = [t.split(split) for t in given]
    values, of_ranks = zip(*eight_ranks.run(on_each_rank, loss, parts, {}, world_size=8), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), value, rtol=1e-6, atol=1e-9)
    for one, *others in zip(gradients, *of_ranks, strict=True):
        torch.testing.assert_close(torch.stack(others).mean(0), one, rtol=1e-6, atol=1e-9)


def types_around_the_ring(group, dtype):
    before, _ring.RING_FROM = _ring.RING_FROM, 2
    try:
        rows = torch.randn(4, 5, dtype=dtype, requires_grad=True)
        split, options = shard(rows, group), {"over": "different"}
        keys = split.offset + torch.arange(4)
        found = _ring.log_sum_exp(rows, rows, split, row_keys=keys, column_keys=keys, **options)
        return found.dtype, torch.autograd.grad(found.sum(), rows)[0].dtype
    finally:
        _ring.RING_FROM = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_have_the_type_of_the_rows(dtype, ranks):
    assert ranks.run(types_around_the_ring, dtype, world_size=2) == [(dtype, dtype)] * 2


class MostRows(TorchFunctionMode):
    """Records the most rows of any tensor of the embeddings' width."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.width:
                self.rows = max(self.rows, tensor.shape[0])
        return result


def most_rows(group, width, ring_from):
    before, _ring.RING_FROM = _ring.RING_FROM, ring_from
    try:
        rows = torch.randn(10, width, requires_grad=True)
        split = shard(rows, group)
        with MostRows(width) as most:
            _ring.log_sum_exp(rows, rows * 2, split).sum().backward()
        return most.rows
    finally:
        _ring.RING_FROM = before


def test_no_rank_holds_all_rows(ranks):
    assert ranks.run(most_rows, 37, 2, world_size=2) == [10] * 2
    assert ranks.run(most_rows, 37, 2, world_size=4) == [10] * 4
    assert ranks.run(most_rows, 37, 8, world_size=4) == [40] * 4


def second_derivative(group):
    before, _ring.RING_FROM = _ring.RING_FROM, 2
    try:
        rows = torch.randn(3, 4, requires_grad=True)
        total = _ring.log_sum_exp(rows, rows, shard(rows, group)).sum()
        torch.autograd.grad(total, rows, create_graph=True)
    except RuntimeError as error:
        return str(error)
    finally:
        _ring.RING_FROM = before


def test_second_derivative_is_refused(ranks):
    assert all("impl='dense'" in message for message in ranks.run(second_derivative, world_size=2))
