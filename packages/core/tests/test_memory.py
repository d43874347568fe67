"""Memories against plain lists, through files, before a pending backward, and on several ranks."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
import torch

from cl_core.memory import FeatureQueue, InstanceBank, PrototypeBank

PARITY = Path(__file__).parent / "parity" / "core"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class ListRing:
    """The ring, row by row."""

    def __init__(self, size):
        self.slots, self.pointer, self.size = [], 0, size

    def enqueue(self, rows):
        for row in rows:
            if len(self.slots) < self.size:
                self.slots.append(row)
            else:
                self.slots[self.pointer] = row
            self.pointer = (self.pointer + 1) % self.size


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("read_often", [True, False])
def test_queue_is_a_ring(seed, read_often):
    generator = seeded(seed)
    size = int(torch.randint(1, 9, (), generator=generator))
    queue, ring = FeatureQueue(size, 3, normalize=False), ListRing(size)
    count = 0
    for _ in range(30):
        rows = int(torch.randint(0, 2 * size + 3, (), generator=generator))
        z = torch.randn(rows, 3, generator=generator)
        ids = torch.arange(count, count + rows)
        count += rows
        queue.enqueue(z, labels=ids % 4, ids=ids)
        ring.enqueue(zip(z.tolist(), (ids % 4).tolist(), ids.tolist(), strict=True))
        z.zero_()  # the queue keeps values, not our tensor
        if read_often:
            held = zip(queue.embeddings.tolist(), queue.labels.tolist(), queue.ids.tolist(), strict=True)
            assert list(held) == ring.slots
    assert (queue.filled, queue.pointer) == (len(ring.slots), ring.pointer)
    held = zip(queue.embeddings.tolist(), queue.labels.tolist(), queue.ids.tolist(), strict=True)
    assert list(held) == ring.slots


@pytest.mark.parametrize("path", sorted(PARITY.glob("pml_xbm_*.npz")), ids=lambda path: path.stem)
def test_queue_equals_the_stored_cross_batch_memory(path):
    import numpy

    with numpy.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name].copy()) for name in stored.files}
    batches, labels = arrays["in_Z"].double(), arrays["in_Y"]
    queue = FeatureQueue(
        int(arrays["param_memory_size"]), batches.shape[-1], dtype=torch.float64, normalize=False
    )
    for z, y in zip(batches, labels, strict=True):
        queue.enqueue(z, labels=y)
    torch.testing.assert_close(queue.embeddings, arrays["out_memory"], rtol=0, atol=0)
    assert torch.equal(queue.labels, arrays["out_labels_mem"])
    assert queue.pointer == int(arrays["out_queue_idx"])


def test_queue_starts_and_resets_empty():
    queue = FeatureQueue(4, 2)
    assert queue.embeddings.shape == (0, 2)
    assert queue.labels.shape == queue.ids.shape == (0,)
    queue.enqueue(torch.ones(3, 2))
    assert queue.labels.tolist() == queue.ids.tolist() == [-1, -1, -1]
    queue.enqueue(torch.ones(2, 2))
    queue.reset()
    assert (queue.filled, queue.pointer) == (0, 0)
    assert all(tensor.eq(0).all() or tensor.eq(-1).all() for tensor in queue.buffers())


def test_queue_normalises_detaches_and_keeps_its_dtype():
    z = torch.tensor([[3e20, 4e20], [0.0, 0.0]], requires_grad=True)
    queue = FeatureQueue(4, 2)
    queue.enqueue(z)
    torch.testing.assert_close(queue.embeddings, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert not queue.embeddings.requires_grad
    half = FeatureQueue(4, 2, dtype=torch.bfloat16)
    half.enqueue(z)
    assert half.embeddings.dtype == torch.bfloat16
    assert queue.embeddings.data_ptr() == queue.embeddings.data_ptr()  # a view, no copy


def test_a_queue_goes_on_exactly_after_a_file():
    generator = seeded(0)
    queue = FeatureQueue(7, 3)
    for step in range(5):
        queue.enqueue(torch.randn(4, 3, generator=generator), ids=torch.arange(4) + 4 * step)
    state = through_a_file(queue.state_dict())  # with rows that nobody has read yet
    other = FeatureQueue(7, 3)
    other.enqueue(torch.ones(5, 3))
    other.load_state_dict(state)
    again = copy.deepcopy(queue)
    for rows in (3, 1, 9):
        z = torch.randn(rows, 3, generator=generator)
        for one in (queue, other, again):
            one.enqueue(z, labels=torch.arange(rows))
    for one in (other, again):
        assert (one.filled, one.pointer) == (queue.filled, queue.pointer)
        for name in ("embeddings", "labels", "ids"):
            assert torch.equal(getattr(one, name), getattr(queue, name))
    with pytest.raises(ValueError, match=r"what a queue of size 7 can have, got pointer 9 and 7 rows\."):
        other.set_extra_state(torch.tensor([9, 7]))


def filled_memories():
    queue, bank = FeatureQueue(4, 3), InstanceBank(4, 3, generator=seeded(0))
    prototypes = PrototypeBank(6, [2, 3], 3)
    queue.enqueue(torch.randn(3, 3, generator=seeded(1)), ids=torch.arange(3))
    bank.update(torch.arange(2), torch.randn(2, 3, generator=seeded(1)))
    prototypes.refresh(torch.randn(6, 3, generator=seeded(1)), generator=seeded(1))
    return queue, bank, prototypes


@pytest.mark.parametrize(
    ("which", "entry", "value", "message"),
    [
        (
            0,
            "_embeddings",
            torch.zeros(8, 3),
            r"must be torch.float32 of shape \(4, 3\), got torch.float32 of",
        ),
        (0, "_ids", torch.zeros(4), r"_ids must be torch.int64 of shape \(4,\), got torch.float32"),
        (0, "_extra_state", torch.tensor([1, 3]), r"size 4 can have, got pointer 1 and 3 rows"),
        (0, "_extra_state", torch.tensor([0.0, 4.0]), r"_extra_state must be two integers"),
        (0, "_extra_state", 3, r"_extra_state must be two integers"),
        (0, "_labels", None, r"Missing key\(s\) in state_dict: \"_labels\""),
        (1, "_seen", [True] * 4, r"_seen must be torch.bool of shape \(4,\), got list\."),
        (1, "_seen", None, r"Missing key\(s\)"),
        (2, "_prototypes_1", torch.zeros(4, 3), r"_prototypes_1 must be"),
    ],
)
def test_a_refused_state_changes_nothing(which, entry, value, message):
    memory, untouched = filled_memories()[which], filled_memories()[which].state_dict()
    state = type(memory)(*((4, 3), (4, 3), (6, [2, 3], 3))[which]).state_dict()
    if value is None:
        del state[entry]
    else:
        state[entry] = value
    holder = torch.nn.ModuleDict({"memory": memory})
    with pytest.raises(RuntimeError, match=message):
        memory.load_state_dict(state)
    with pytest.raises(RuntimeError):
        holder.load_state_dict({f"memory.{name}": entry for name, entry in state.items()})
    for name, tensor in memory.state_dict().items():  # rows that nobody had read included
        assert torch.equal(tensor, untouched[name])


def test_a_conversion_takes_unread_rows_along():
    queue = FeatureQueue(4, 2, normalize=False)
    queue.enqueue(torch.full((2, 2), 1 / 3))
    queue.bfloat16().float()
    rounded = torch.full((2, 2), 1 / 3).bfloat16().float()
    assert torch.equal(queue.embeddings, rounded)
    queue.double()
    queue.enqueue(torch.full((2, 2), 1 / 3))
    assert queue.embeddings.dtype == queue.dtype == torch.float64
    assert queue.embeddings.unique().numel() == 2
    assert "dtype=torch.float64" in repr(queue)
    assert InstanceBank(3, 2).half().dtype == PrototypeBank(3, [2], 2).half().dtype == torch.float16


def test_backward_after_enqueue():
    queue = FeatureQueue(4, 3, normalize=False)
    queue.enqueue(torch.ones(3, 3))
    query = torch.randn(2, 3, requires_grad=True)
    loss = (query @ queue.embeddings.T).sum()
    queue.enqueue(torch.zeros(4, 3))
    loss.backward()
    assert torch.equal(query.grad, torch.full((2, 3), 3.0))
    assert queue.embeddings.eq(0).all()
    stale = (query @ queue.embeddings.T).sum()
    queue.enqueue(torch.ones(4, 3))
    assert queue.filled == 4  # read again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("rows", [[3, 3], [1, 9, 2], [4, 1, 1, 1, 1, 1]])
def test_backward_after_more_rows_than_a_memory_holds(rows):
    generator = seeded(0)
    queue, bank = FeatureQueue(4, 3), InstanceBank(4, 3, generator=generator)
    queue.enqueue(torch.randn(3, 3, generator=generator), ids=torch.arange(3))
    often = copy.deepcopy(queue), copy.deepcopy(bank)
    query = torch.randn(2, 3, requires_grad=True)
    held = torch.cat([queue.embeddings, bank.embeddings]).clone()
    loss = (query @ queue.embeddings.T).sum() + (query @ bank.embeddings.T).sum()
    for count in rows:
        z, index = torch.randn(count, 3, generator=generator), torch.arange(count) % 4
        for one, other in ((queue, bank), often):
            one.enqueue(z, ids=index)
            other.update(index, z)
        assert (
            len(often[0].embeddings) == often[0].filled and len(often[1].embeddings) == 4
        )  # read every time
    loss.backward()
    torch.testing.assert_close(query.grad, held.sum(0).expand(2, 3))
    assert (queue.filled, queue.pointer) == (often[0].filled, often[0].pointer)
    assert torch.equal(queue.embeddings, often[0].embeddings)
    assert torch.equal(queue.ids, often[0].ids)
    assert torch.equal(bank.embeddings, often[1].embeddings)
    assert torch.equal(bank.seen, often[1].seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bank_rows_stay_where_there_is_no_direction(dtype):
    bank = InstanceBank(20, 5, dtype=dtype, generator=seeded(0))
    every, z = torch.arange(20), torch.randn(20, 5, generator=seeded(1))
    start = bank.lookup(every)
    bank.update(every, torch.zeros(20, 5))
    assert torch.equal(bank.embeddings, start)
    assert not bank.seen.any()
    bank.update(every, z)
    first = bank.lookup(every)
    torch.testing.assert_close(first, unit(z).to(dtype))
    for opposite in (-z, -first, torch.zeros(20, 5)):
        bank.update(every, opposite)
        torch.testing.assert_close(bank.embeddings, first)
    bank.update(every, z.roll(1, 1))
    torch.testing.assert_close(bank.embeddings.float().norm(dim=1), torch.ones(20), rtol=0.01, atol=0)
    assert not torch.allclose(bank.embeddings, first)


def test_bank_follows_its_samples():
    for seed in range(3):
        generator = seeded(seed)
        bank = InstanceBank(6, 4, momentum=0.3, generator=generator)
        torch.testing.assert_close(bank.embeddings.norm(dim=1), torch.ones(6))
        rows = {i: bank.embeddings[i].clone() for i in range(6)}
        seen = set()
        for step in range(12):
            index = torch.randint(6, (5,), generator=generator)  # with duplicates
            z = torch.randn(5, 4, generator=generator)
            bank.update(index, z)
            if step % 3 == 0:
                bank.lookup(index)
            last = {int(i): unit(z)[n] for n, i in enumerate(index)}
            for i, row in last.items():
                mixed = 0.3 * rows[i] + 0.7 * row if i in seen else row
                rows[i] = mixed / mixed.norm()
            seen |= last.keys()
        for i in range(6):
            torch.testing.assert_close(bank.embeddings[i], rows[i])
        assert bank.seen.nonzero()[:, 0].tolist() == sorted(seen)


def test_bank_goes_on_exactly_after_a_file_and_before_a_backward():
    bank = InstanceBank(5, 3, generator=seeded(0))
    query = torch.randn(2, 3, requires_grad=True)
    loss = (query @ bank.embeddings.T).sum()
    expected = bank.embeddings.sum(0).expand(2, 3).clone()
    bank.update(torch.tensor([1, 3]), torch.randn(2, 3))
    loss.backward()
    torch.testing.assert_close(query.grad, expected)
    other = InstanceBank(5, 3)
    other.load_state_dict(through_a_file(bank.state_dict()))
    z = torch.randn(2, 3)
    for one in (bank, other):
        one.update(torch.tensor([3, 4]), z)
    assert torch.equal(bank.embeddings, other.embeddings)
    assert bank.seen.tolist() == other.seen.tolist() == [False, True, False, True, True]
    copied = bank.lookup(torch.tensor([2, 2]))
    copied.zero_()
    assert bank.embeddings[2].norm() > 0.9


@pytest.mark.parametrize("index", [1, [1, 2]])
def test_bank_looks_up_tensors_only(index):
    with pytest.raises(TypeError, match=rf"index must be an integer tensor .*, got {type(index).__name__}\."):
        InstanceBank(5, 3).lookup(index)


def test_bank_first_directions_come_from_the_generator():
    first, second = (InstanceBank(5, 3, generator=seeded(4)) for _ in range(2))
    assert torch.equal(first.embeddings, second.embeddings)


def dense_and_loose(seed):
    """Three directions: a loose, a dense and a single-row cluster."""
    generator = seeded(seed)
    loose = torch.eye(4)[0] + 0.15 * torch.randn(20, 4, generator=generator)
    dense = torch.eye(4)[1] + 0.03 * torch.randn(30, 4, generator=generator)
    return torch.cat([loose, dense, -torch.eye(4)[2:3]])


@pytest.mark.parametrize("seed", range(3))
def test_prototypes_and_their_concentration(seed):
    z = dense_and_loose(seed)
    bank = PrototypeBank(51, [3, 1], 4, temperature=0.2, clip=0.0)
    assert bank.assignments.eq(-1).all()
    bank.refresh(z, restarts=5, generator=seeded(seed))
    groups = [
        bank.assignments[0, part].unique().tolist() for part in (slice(20), slice(20, 50), slice(50, 51))
    ]
    loose, dense, single = (only for (only,) in groups)
    assert sorted((loose, dense, single)) == [0, 1, 2]
    phi = {}
    for cluster in (loose, dense):
        rows = unit(z)[bank.assignments[0] == cluster]
        centre = rows.mean(0) / rows.mean(0).norm()
        torch.testing.assert_close(bank.prototypes[0][cluster], centre)
        phi[cluster] = (rows - centre).norm(dim=1).sum().item() / (len(rows) * math.log(len(rows) + 10))
    phi[single] = max(phi.values())
    mean = sum(phi.values()) / 3
    for cluster, value in phi.items():
        assert bank.concentrations[0][cluster].item() == pytest.approx(0.2 * value / mean, rel=1e-4)
    assert bank.concentrations[1].tolist() == pytest.approx([0.2])
    assert bank.assignments[1].eq(0).all()


def test_concentration_is_clipped_and_survives_equal_rows():
    z = torch.cat([dense_and_loose(0), torch.eye(4)[3:].expand(9, 4)])
    bank = PrototypeBank(60, [8], 4, clip=0.25)
    bank.refresh(z, generator=seeded(0))
    (phi,) = bank.concentrations
    assert phi.mean().item() == pytest.approx(0.2)
    assert phi.eq(phi.max()).sum() >= 2
    assert phi.eq(phi.min()).sum() >= 2
    assert phi.min() > 0
    bank.refresh(torch.ones(60, 4), generator=seeded(0))
    assert bank.concentrations[0].tolist() == pytest.approx([0.2] * 8)


@pytest.mark.parametrize("seed", range(12))  # rounding makes the distances positive in some
def test_equal_rows_have_no_concentration_of_their_own(seed):
    generator = seeded(seed)
    directions = torch.randn(2, 48, generator=generator)
    loose = directions[0] + 0.3 * torch.randn(40, 48, generator=generator)
    bank = PrototypeBank(80, [2], 48, clip=0.0)
    bank.refresh(torch.cat([directions[1].expand(40, 48), loose]), generator=generator)
    assert bank.assignments[0].tolist() in ([0] * 40 + [1] * 40, [1] * 40 + [0] * 40)
    assert bank.concentrations[0].tolist() == pytest.approx([0.2, 0.2])


def test_prototypes_start_warm_and_go_through_a_file():
    z = dense_and_loose(1)
    bank = PrototypeBank(51, [3], 4)
    bank.refresh(z, restarts=3, generator=seeded(0))
    other = PrototypeBank(51, [3], 4)
    other.load_state_dict(through_a_file(bank.state_dict()))
    before = bank.assignments.clone()
    moved = z + 0.01 * torch.randn(51, 4, generator=seeded(2))
    for one in (bank, other):
        one.refresh(moved, generator=seeded(3))
        assert torch.equal(one.assignments, before)  # the same numbers for the same clusters
    assert torch.equal(bank.prototypes[0], other.prototypes[0])
    part = torch.tensor([4, 30, 50, 31, 5])
    bank.refresh(moved[part], index=part)
    assert bank.assignments[0].ge(0).nonzero()[:, 0].tolist() == [4, 5, 30, 31, 50]


def test_a_failed_refresh_changes_nothing():
    bank = PrototypeBank(6, [2, 7], 3)
    state = copy.deepcopy(bank.state_dict())
    with pytest.raises(ValueError, match=r"num_clusters must be at most the number of rows, 6, got 7\."):
        bank.refresh(torch.randn(6, 3))
    assert all(torch.equal(tensor, bank.state_dict()[name]) for name, tensor in state.items())


def fill_shard(group, batches, index):
    queue = FeatureQueue(5, 3)
    bank = InstanceBank(12, 3, generator=seeded(0))
    prototypes = PrototypeBank(12, [3], 3)
    mine = index[group.rank()]
    for batch in batches:
        z = batch[group.rank()]
        queue.enqueue(z, labels=torch.full((len(z),), group.rank()), group=group)
    z = torch.cat([batch[group.rank()] for batch in batches])[: len(mine)]
    bank.update(mine, z, group=group)
    prototypes.refresh(z, index=mine, generator=seeded(group.rank()), group=group)
    states = [memory.state_dict() for memory in (queue, bank, prototypes)]
    return [queue.filled, queue.pointer], states


@pytest.mark.parametrize("world_size", [2, 3])
def test_memories_are_equal_on_all_ranks(world_size, ranks):
    generator = seeded(world_size)
    counts = [(2, 1, 0), (0, 3, 2), (0, 0, 0), (4, 4, 4)]
    batches = [[torch.randn(n, 3, generator=generator) for n in row[:world_size]] for row in counts]
    index = [torch.tensor([0, 1, 5, 2]), torch.tensor([6, 1, 7]), torch.tensor([6, 8])][:world_size]
    results = ranks.run(fill_shard, batches, index, world_size=world_size)
    queue = FeatureQueue(5, 3)
    for batch in batches:
        queue.enqueue(
            torch.cat(batch),
            labels=torch.cat([torch.full((len(z),), rank) for rank, z in enumerate(batch)]),
        )
    bank = InstanceBank(12, 3, generator=seeded(0))
    local = [torch.cat([batch[rank] for batch in batches])[: len(part)] for rank, part in enumerate(index)]
    bank.update(torch.cat(index), torch.cat(local))
    prototypes = PrototypeBank(12, [3], 3)
    prototypes.refresh(torch.cat(local), index=torch.cat(index), generator=seeded(0))
    for numbers, states in results:
        assert numbers == [queue.filled, queue.pointer]
        for state, memory in zip(states, (queue, bank, prototypes), strict=True):
            for name, tensor in memory.state_dict().items():
                torch.testing.assert_close(state[name], tensor)
        for state, first in zip(states, results[0][1], strict=True):
            assert all(torch.equal(state[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureQueue(0, 3), r"size must be at least 1, got 0\."),
        (lambda: FeatureQueue(4, 3).enqueue(torch.ones(2, 5)), r"z must have 3 columns, got 5\."),
        (lambda: FeatureQueue(4, 3).enqueue(torch.full((2, 3), math.inf)), r"z must be finite"),
        (
            lambda: FeatureQueue(4, 3).enqueue(torch.ones(2, 3), ids=torch.arange(3)),
            r"ids must have shape \(2,\), one entry for each row of z, got \(3,\)\.",
        ),
        (lambda: FeatureQueue(4, 3).enqueue(torch.ones(2, 3), group="world"), r"torch.distributed"),
        (lambda: InstanceBank(4, 3, momentum=1.5), r"momentum must lie in \[0, 1\], got 1\.5\."),
        (
            lambda: InstanceBank(4, 3).update(torch.tensor([4]), torch.ones(1, 3)),
            r"index must lie in 0 \.\. 3, got a value outside\.",
        ),
        (lambda: InstanceBank(4, 3).lookup(torch.tensor(1)), r"index must have shape \(N,\), got \(\)\."),
        (lambda: InstanceBank(4, 3).lookup(torch.ones(1, 1).long()), r"index must have shape \(N,\), got"),
        (lambda: PrototypeBank(4, [], 3), r"num_prototypes must name at least one granularity, got none\."),
        (lambda: PrototypeBank(4, [2], 3).refresh(torch.ones(3, 3)), r"z must hold all 4 samples"),
        (lambda: PrototypeBank(4, [2], 3, clip=0.7), r"clip must lie in \[0, 0\.5\], got 0\.7\."),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
