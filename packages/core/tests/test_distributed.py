"""Gathers and sums over ranks, the pool of ranks itself, and what losses refuse together."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cl_core import distributed
from cl_core.functional import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss
from cl_core.losses import CLIPLoss, HardNegativeNCELoss, NTXentLoss, SigLIPLoss
from cl_core.memory import FeatureQueue, InstanceBank, PrototypeBank
from cl_core.testing import Ranks


def gathered(group, counts):
    rank = dist.get_rank(group)
    rows = (torch.arange(counts[rank] * 2.0).view(-1, 2) + 100 * rank).requires_grad_()
    split = distributed.shard(rows, group)
    everyone = split.gather(rows)
    weight = torch.arange(1.0, 1 + everyone.numel()).view_as(everyone) * (rank + 1)
    (everyone * weight).sum().backward()
    total = split.sum(rows.detach().sum())
    return split.counts, split.offset, split.total, everyone.detach(), rows.grad, total


@pytest.mark.parametrize("counts", [(2, 3), (0, 2, 1), (1, 1, 1, 1), (3, 0, 0, 1)])
def test_gather_and_its_gradient(counts, ranks):
    results = ranks.run(gathered, counts, world_size=len(counts))
    expected = torch.cat([torch.arange(n * 2.0).view(-1, 2) + 100 * rank for rank, n in enumerate(counts)])
    weight = torch.arange(1.0, 1 + expected.numel()).view_as(expected) * sum(range(1, 1 + len(counts)))
    for rank, (found, offset, total, everyone, gradient, summed) in enumerate(results):
        assert found == counts
        assert offset == sum(counts[:rank])
        assert total == sum(counts)
        assert torch.equal(everyone, expected)
        assert torch.equal(gradient, weight[offset : offset + counts[rank]])
        assert summed == expected.sum()


def refused(group, kind):
    rank = dist.get_rank(group)
    rows = {
        "no rows": torch.zeros(0, 4),
        "width": torch.randn(3, 4 + rank),
        "dtype": torch.randn(3, 4, dtype=torch.float64 if rank else torch.float32),
    }[kind]
    try:
        nt_xent_loss(rows, rows, group=group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("no rows", "at least 1 row on some rank"), ("width", "one width"), ("dtype", "one width")],
)
def test_all_ranks_refuse_what_one_cannot_use(kind, message, ranks):
    assert all(message in found for found in ranks.run(refused, kind, world_size=3))


def fails_on_one(group):
    if dist.get_rank(group) == 1:
        raise ArithmeticError("planted")
    dist.barrier(group)


def rank_of(group):
    return dist.get_rank(group)


def test_the_pool_tells_who_failed_and_goes_on(ranks):
    with pytest.raises(RuntimeError, match=r"rank 1 of 3 failed in fails_on_one(.|\n)*planted"):
        ranks.run(fails_on_one, world_size=3)
    assert ranks.run(rank_of, world_size=4) == [0, 1, 2, 3]


def three():
    return 3


def call(group, function):
    return function()


def test_a_fresh_pool_takes_functions_of_the_file_as_arguments():
    with Ranks(1) as pool:
        assert pool.run(call, three, world_size=1) == [3]


@pytest.mark.parametrize("group", ["wrold", 1, True])
def test_what_is_no_group(group):
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="group must be None, 'world' or a process group"):
        nt_xent_loss(z, z, group=group)
    with pytest.raises(ValueError, match="group must be None, 'world' or a process group"):
        NTXentLoss(group=group)


def test_a_group_before_there_is_one():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="initialised first"):
        nt_xent_loss(z, z, group="world")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: nt_xent_loss(z, z, normalize="yes"), "normalize must be True or False"),
        (lambda z: info_nce_loss(z, z, symmetric="no"), "symmetric must be True or False"),
        (lambda z: info_nce_loss(z, z, in_batch="no"), "in_batch must be True or False"),
        (lambda z: nt_xent_loss(None, None), "z1 must be a tensor"),
        (lambda z: nt_xent_loss(z), "z2 must be given"),
        (lambda z: nt_xent_loss([z]), "at least 2"),
        (lambda z: siglip_loss(z, z, logit_scale=1.0, logit_bias=torch.zeros(4, 1)), "logit_bias must be"),
        (
            lambda z: siglip_loss(z, z, logit_scale=1.0, logit_bias=torch.tensor(torch.nan)),
            "logit_bias must be",
        ),
        (lambda z: HardNegativeNCELoss(beta=float("nan")), "beta must be"),
        (lambda z: CLIPLoss(200.0), "must not exceed"),
    ],
)
def test_refusals_that_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(4, 3))


def test_a_temperature_in_half_precision_is_taken_at_its_value():
    z1, z2 = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor(0.07, dtype=torch.bfloat16, requires_grad=True)
    loss = nt_xent_loss(z1, z2, temperature=temperature)
    torch.testing.assert_close(loss, nt_xent_loss(z1, z2, temperature=temperature.item()))
    loss.backward()
    assert temperature.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [CLIPLoss, SigLIPLoss])
def test_a_scale_above_its_cap_comes_back(kind):
    loss = kind(10.0, max_scale=20.0)
    with torch.no_grad():
        loss.log_scale.fill_(10)
    z1, z2 = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    loss(z1, z2).backward()
    torch.testing.assert_close(loss.logit_scale, torch.tensor(20.0))
    assert loss.log_scale.grad != 0
    reference = clip_loss if kind is CLIPLoss else siglip_loss
    options = {} if kind is CLIPLoss else {"logit_bias": -10.0}
    torch.testing.assert_close(loss(z1, z2), reference(z1, z2, logit_scale=20.0, **options))


class Remembering(nn.Module):
    """Running statistics, and two memories inside another module."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.memories = nn.ModuleDict({"queue": FeatureQueue(4, 3), "bank": InstanceBank(5, 3)})

    def forward(self, rows):
        return self.norm(rows).sum()


def test_memories_need_no_broadcast():
    names = {*distributed.unbroadcast_buffers(Remembering())}
    queue = {f"memories.queue.{name}" for name in ("_embeddings", "_labels", "_ids")}
    bank = {f"memories.bank.{name}" for name in ("_embeddings", "_seen")}
    assert names == queue | bank
    assert distributed.unbroadcast_buffers(FeatureQueue(4, 3)) == ["_embeddings", "_labels", "_ids"]
    assert len(distributed.unbroadcast_buffers(PrototypeBank(5, [2, 3], 3))) == 5


def forward_twice(group):
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    module = Remembering()
    queue, bank = module.memories["queue"], module.memories["bank"]
    queue.enqueue(torch.eye(3)[[rank]])
    before = queue.embeddings.clone(), bank.embeddings.clone()
    seen = []
    module.norm.register_forward_pre_hook(lambda norm, _: seen.append(norm.running_mean.clone()))
    names = distributed.unbroadcast_buffers(module)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    wrapped = DistributedDataParallel(module, process_group=group)
    for _ in range(2):
        wrapped(torch.randn(6, 3)).backward()
    return (
        all(map(torch.equal, before, (queue.embeddings, bank.embeddings))),
        seen[1],
        module.norm.running_mean,
    )


def test_each_rank_keeps_its_memories_while_statistics_are_those_of_the_first(ranks):
    results = ranks.run(forward_twice)
    assert [kept for kept, _, _ in results] == [True, True]
    (_, seen, mean), (_, seen_there, mean_there) = results
    assert torch.equal(seen, seen_there)
    assert seen.abs().sum() > 0
    assert not torch.equal(mean, mean_there)  # each has added its own batch since
