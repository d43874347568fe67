"""Batch samplers: what an epoch covers, who shares a batch, equal ranks, exact resume, errors, speed."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from itertools import chain

import pytest
import torch

from cl_core import samplers
from cl_core.samplers import (
    ClassBalancedBatchSampler,
    DistributedBatchSampler,
    EpochBatchSampler,
    GroupAwareBatchSampler,
    HardNegativeBatchSampler,
    SamplesPerClassBatchSampler,
    UniqueIdBatchSampler,
)

ROWS = 240


def skewed(rows: int = ROWS, classes: int = 40, seed: int = 0) -> torch.Tensor:
    """Labels of very unequal frequency."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, generator=generator) ** 2 * classes).long()


def neighbours(rows: int = ROWS, k: int = 5) -> torch.Tensor:
    """Nearest rows on a line: itself, then those next to it."""
    distance = (torch.arange(rows)[:, None] - torch.arange(rows)).abs()
    return distance.argsort(dim=1, stable=True)[:, :k]


MAKERS = {
    "epoch": lambda **k: EpochBatchSampler(ROWS, 8, **k),
    "epoch, ragged": lambda **k: EpochBatchSampler(ROWS + 13, 16, drop_last=False, **k),
    "samples per class": lambda **k: SamplesPerClassBatchSampler(skewed(), 8, samples_per_class=4, **k),
    "class balanced": lambda **k: ClassBalancedBatchSampler(skewed(), 8, **k),
    "class balanced, ragged": lambda **k: ClassBalancedBatchSampler(skewed(), 7, drop_last=False, **k),
    "unique id": lambda **k: UniqueIdBatchSampler(skewed(), 8, **k),
    "unique id, all": lambda **k: UniqueIdBatchSampler(skewed(), 8, drop_last=False, **k),
    "group pairs": lambda **k: GroupAwareBatchSampler(skewed(), 8, rows_per_group=2, **k),
    "group pairs, all": lambda **k: GroupAwareBatchSampler(
        skewed(), 8, rows_per_group=2, drop_last=False, **k
    ),
    "hard negatives": lambda **k: HardNegativeBatchSampler(neighbours(), 8, **k),
}
all_kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def global_batches(make, world_size: int, epoch: int = 0, **keywords) -> list[list[int]]:
    """Batches of all ranks joined; checks what every sampler owes its ranks on the way."""
    ranks = []
    for rank in range(world_size):
        sampler = make(rank=rank, world_size=world_size, **keywords)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(len(batch) <= sampler.batch_size for batch in batches)
        assert all(type(row) is int for batch in batches for row in batch)
        ranks.append(batches)
    for shares in zip(*ranks, strict=True):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= sampler._unit
    return [list(chain(*shares)) for shares in zip(*ranks, strict=True)]


@all_kinds
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_order_depends_on_seed_and_epoch_only(make, world_size):
    first = global_batches(make, world_size, epoch=1, seed=5)
    assert first == global_batches(make, world_size, epoch=1, seed=5)
    assert first != global_batches(make, world_size, epoch=2, seed=5)
    assert first != global_batches(make, world_size, epoch=1, seed=6)
    # seed + epoch is the same sum here, the order must not be
    assert first != global_batches(make, world_size, epoch=0, seed=6)


@all_kinds
def test_global_random_state_is_neither_read_nor_moved(make):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = list(make())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert list(make()) == one


@all_kinds
@pytest.mark.parametrize("rank", [0, 1])
def test_resume_in_mid_epoch_continues_exactly(make, rank):
    def fresh():
        return make(seed=3, rank=rank, world_size=2)

    uninterrupted = []
    sampler = fresh()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        uninterrupted.append(list(sampler))
    stop = len(sampler) // 2 + 1

    stopped = fresh()
    stopped.set_epoch(0)
    list(stopped)
    stopped.set_epoch(1)
    iterator = iter(stopped)
    seen = [next(iterator) for _ in range(stop)]
    state = stopped.state_dict()
    assert all(type(value) is int for value in state.values())

    resumed = make(seed=99, rank=rank, world_size=2)  # the state brings its own seed
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # as a training loop does before it asks for batches
    assert len(resumed) == len(sampler)
    assert seen + list(resumed) == uninterrupted[1]
    resumed.set_epoch(2)
    assert list(resumed) == uninterrupted[2]


def test_start_batch_lasts_one_epoch():
    def fresh():
        return EpochBatchSampler(40, 4)

    whole = list(fresh())
    sampler = fresh()
    sampler.start_batch = 7
    assert list(sampler) == whole[7:]
    assert list(sampler) == whole  # reset by the end of the epoch

    sampler = fresh()
    sampler.start_batch = 7
    sampler.set_epoch(1)  # set before it was used: still wanted
    next(iter(sampler))
    assert len(list(sampler)) == 3  # asked for twice within the epoch: still the same batches
    sampler.start_batch = 7
    next(iter(sampler))
    sampler.set_epoch(2)  # the epoch was left in the middle
    assert len(list(sampler)) == 10

    sampler = fresh()
    list(sampler)
    finished = fresh()
    finished.load_state_dict(sampler.state_dict())
    assert list(finished) == []  # the epoch was complete
    finished.set_epoch(1)
    sampler.set_epoch(1)
    assert list(finished) == list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_epoch_sampler_covers_every_row_once(world_size, drop_last):
    for size in (48, 50, 97):
        batches = global_batches(partial(EpochBatchSampler, size, 8, drop_last=drop_last), world_size)
        rows = list(chain(*batches))
        assert len(set(rows)) == len(rows)
        expected = size // (8 * world_size) * 8 * world_size if drop_last else size
        assert len(rows) == expected


def test_epoch_sampler_may_leave_a_rank_without_rows():
    ranks = [list(EpochBatchSampler(9, 4, drop_last=False, rank=rank, world_size=2)) for rank in range(2)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[4, 1], [4, 0]]


def test_epoch_sampler_in_order():
    assert list(EpochBatchSampler(7, 3, shuffle=False, drop_last=False)) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_samples_per_class(world_size, seed):
    labels = skewed(seed=seed)
    sizes = Counter(labels.tolist())
    batches = global_batches(
        partial(SamplesPerClassBatchSampler, labels, 12, samples_per_class=4, seed=seed), world_size
    )
    assert len(batches) == ROWS // (12 * world_size)
    of_class: Counter[int] = Counter()
    for batch in batches:
        sets = torch.tensor(batch).view(-1, 4)
        classes = labels[sets]
        assert (classes == classes[:, :1]).all()  # four of one class side by side
        assert classes[:, 0].unique().numel() == len(sets) == 3 * world_size  # a class once
        for rows, label in zip(sets.tolist(), classes[:, 0].tolist(), strict=True):
            times = Counter(rows).values()
            assert max(times) == -(-4 // min(4, sizes[label]))  # repeated only as far as needed
        of_class.update(classes[:, 0].tolist())
    assert set(of_class) <= set(sizes)
    counts = [of_class[label] for label in sizes]
    assert max(counts) - min(counts) <= 1


def test_samples_per_class_uses_up_a_class_before_it_repeats():
    labels = torch.arange(96) % 4  # 24 rows a class, six sets of four
    rows = list(chain(*SamplesPerClassBatchSampler(labels, 16, samples_per_class=4)))
    assert sorted(rows) == list(range(96))


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_class_comes_before_any_comes_again(samples, seed):
    # Classes of 1 to 9 rows, many passes an epoch, and a large one that sets the length of the epoch.
    labels = torch.cat([torch.arange(1, 10).repeat_interleave(torch.arange(1, 10)), torch.zeros(900).long()])
    sizes = Counter(labels.tolist())
    sampler = SamplesPerClassBatchSampler(labels, 2 * samples, samples_per_class=samples, seed=seed)
    used: dict[int, list[int]] = {}
    for batch in sampler:
        for rows in zip(*[iter(batch)] * samples, strict=True):
            label = int(labels[rows[0]])
            used.setdefault(label, []).extend(rows)
            times = [rows.count(row) for row in (labels == label).nonzero().flatten().tolist()]
            assert max(times) - min(times) <= 1, f"a set of {samples} of {sizes[label]} rows is uneven"
    for label, rows in used.items():
        size = sizes[label]
        passes = [rows[start : start + size] for start in range(0, len(rows), size)]
        assert all(len(set(whole)) == len(whole) for whole in passes), f"class of {size} rows"
        assert len(passes) > 2 or label == 0


@pytest.mark.parametrize("seed", range(3))
def test_class_balanced(seed):
    labels = skewed(seed=seed)
    sizes = Counter(labels.tolist())
    rows = list(chain(*ClassBalancedBatchSampler(labels, 7, drop_last=False, seed=seed)))
    assert len(rows) == ROWS
    of_class = Counter(labels[rows].tolist())
    assert max(of_class.values()) - min(of_class.values()) <= 1
    assert len(of_class) == len(sizes)
    of_row = Counter(rows)
    for label, size in sizes.items():
        times = [of_row[row] for row in (labels == label).nonzero().flatten().tolist()]
        assert max(times) - min(times) <= 1, f"class of {size} rows is not used evenly"
        of_label = [row for row in rows if labels[row] == label]
        assert len(set(of_label[:size])) == min(size, len(of_label)), "a row came again before all had come"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_unique_ids(world_size, drop_last, seed):
    for classes in (20, 60, 400):
        ids = skewed(classes=classes, seed=seed) * 1000 - 7
        distinct = ids.unique().numel()
        if drop_last and distinct < 4 * world_size:
            continue
        batches = global_batches(
            partial(UniqueIdBatchSampler, ids, 4, drop_last=drop_last, seed=seed), world_size
        )
        for batch in batches:
            assert ids[batch].unique().numel() == len(batch)
        rows = list(chain(*batches))
        assert len(set(rows)) == len(rows)
        if drop_last:
            assert {len(batch) for batch in batches} == {4 * world_size}
            assert len(batches) == most_full_batches(ids, 4 * world_size)
        else:
            assert len(rows) == ROWS
            sizes = [len(batch) for batch in batches]
            assert max(sizes) - min(sizes) <= 1
            assert len(batches) == max(-(-ROWS // (4 * world_size)), max(Counter(ids.tolist()).values()))


def most_full_batches(ids: torch.Tensor, places: int) -> int:
    """By trying every number: b batches are possible if ids, each at most b times, fill them."""
    counts = Counter(ids.tolist()).values()
    return max(b for b in range(ROWS + 1) if sum(min(count, b) for count in counts) >= b * places)


def test_unique_ids_meet_evenly():
    # Five rows an id, as captions of an image: over epochs an id meets all others, not one set of companions.
    ids = torch.arange(200) // 5
    sampler = UniqueIdBatchSampler(ids, 8)
    met = torch.zeros(40, 40)
    for epoch in range(40):
        sampler.set_epoch(epoch)
        for batch in sampler:
            inside = torch.zeros(40)
            inside[ids[batch]] = 1
            met += inside[:, None] * inside
    met = met[~torch.eye(40, dtype=torch.bool)]
    expected = 40 * 5 * 7 / 39  # epochs x rows of the id x others in the batch / other ids
    assert met.mean().item() == pytest.approx(expected)
    assert met.std().item() < 2 * expected**0.5
    assert met.min() > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_groups_come_as_one_pair(world_size, drop_last, seed):
    groups = skewed(classes=70, seed=seed)
    batches = global_batches(
        partial(GroupAwareBatchSampler, groups, 6, rows_per_group=2, drop_last=drop_last, seed=seed),
        world_size,
    )
    for batch in batches:
        pairs = torch.tensor(batch).view(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert (groups[pairs[:, 0]] == groups[pairs[:, 1]]).all()
        assert groups[pairs[:, 0]].unique().numel() == len(pairs)
    rows = list(chain(*batches))
    assert len(set(rows)) == len(rows)
    if not drop_last:
        assert len(rows) == sum(count // 2 * 2 for count in Counter(groups.tolist()).values())


def test_groups_pair_up_anew_every_epoch():
    sampler = GroupAwareBatchSampler(torch.arange(40) // 4, 8, rows_per_group=2)
    partners = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in sampler:
            partners.update((min(pair), max(pair)) for pair in zip(batch[::2], batch[1::2], strict=True))
    assert len(partners) == 10 * 6  # every pair of four rows, in ten groups


@pytest.mark.parametrize("seed", range(3))
def test_hard_negatives_stand_with_their_neighbours(seed):
    sampler = HardNegativeBatchSampler(neighbours(), 24, seed=seed, drop_last=False)
    batches = list(sampler)
    assert sorted(chain(*batches)) == list(range(ROWS))
    near = [sum(row + 1 in batch or row - 1 in batch for row in batch) for batch in batches]
    by_chance = list(EpochBatchSampler(ROWS, 24, seed=seed))
    chance = [sum(row + 1 in batch or row - 1 in batch for row in batch) for batch in by_chance]
    assert sum(near) > 0.75 * ROWS > 2 * sum(chance)


def test_hard_negatives_pass_over_equal_labels_and_missing_neighbours():
    table = neighbours(k=3)  # itself and one row on either side
    labels = torch.arange(ROWS) // 2  # rows 2i and 2i + 1 are the same item
    batches = list(HardNegativeBatchSampler(table, 4, labels=labels))
    same = sum((row ^ 1) in batch for batch in batches for row in batch)
    other = sum((row ^ 1) in batch for batch in HardNegativeBatchSampler(table, 4) for row in batch)
    assert same < 0.1 * ROWS < 0.3 * ROWS < other
    nobody = torch.full((ROWS, 3), -1)
    assert sorted(chain(*HardNegativeBatchSampler(nobody, 4))) == list(range(ROWS))


def test_hard_negatives_follow_a_fresh_index():
    sampler = HardNegativeBatchSampler(neighbours(), 8)
    far = (neighbours() + ROWS // 2) % ROWS
    sampler.set_neighbours(far)
    assert (
        list(sampler)
        == list(HardNegativeBatchSampler(far, 8))
        != list(HardNegativeBatchSampler(neighbours(), 8))
    )
    with pytest.raises(ValueError, match="must have 240 rows as before, got 239"):
        sampler.set_neighbours((far % 239)[:239])


def test_ranks_come_from_torch_distributed(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        sampler = EpochBatchSampler(10, 2)
        assert (sampler.rank, sampler.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_feeds_a_data_loader():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(ROWS)), batch_sampler=EpochBatchSampler(ROWS, 16)
    )
    assert len(loader) == 15
    assert sorted(torch.cat([batch for (batch,) in loader]).tolist()) == list(range(ROWS))


def test_own_sampler_on_the_same_base():
    class Reversed(DistributedBatchSampler):
        def plan(self, generator):
            return torch.arange(8).flip(0).split(4)

    assert list(Reversed(batch_size=2, batches=2, rank=1, world_size=2)) == [[5, 4], [1, 0]]
    assert set(samplers.__all__) <= set(dir(samplers))


IDS = torch.zeros(12, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpochBatchSampler(5, 8), "5 rows make no full batch of batch_size 8 on each of 1 ranks"),
        (lambda: EpochBatchSampler(0, 8), "size must be at least 1, got 0"),
        (lambda: EpochBatchSampler(5, 0), "batch_size must be at least 1, got 0"),
        (lambda: EpochBatchSampler(5, 1, seed=-1), "seed must be at least 0, got -1"),
        (lambda: EpochBatchSampler(5, 1, rank=1), "must be given together, got 1 and None"),
        (lambda: EpochBatchSampler(5, 1, rank=2, world_size=2), "rank must be less than world_size, got 2"),
        (lambda: UniqueIdBatchSampler(IDS, 4), "ids must have 4 different values .* got 1; lower batch_size"),
        (lambda: UniqueIdBatchSampler(IDS[:0], 4), r"with at least one entry, got shape \(0,\)"),
        (lambda: UniqueIdBatchSampler(IDS.float(), 4), "ids must hold integers, got torch.float32"),
        (lambda: UniqueIdBatchSampler(["a"], 4), "ids must be a vector of integers, got list"),
        (lambda: GroupAwareBatchSampler(IDS, 3, rows_per_group=2), "multiple of rows_per_group 2, got 3"),
        (
            lambda: GroupAwareBatchSampler(torch.arange(9), 2, rows_per_group=2),
            "groups must have at least 2 rows of some value, got at most 1",
        ),
        (lambda: SamplesPerClassBatchSampler(IDS, 6, samples_per_class=4), "of samples_per_class 4, got 6"),
        (lambda: SamplesPerClassBatchSampler(IDS, 8, samples_per_class=4), "must hold 2 classes .* got 1"),
        (lambda: ClassBalancedBatchSampler(IDS, 16), "12 rows make no full batch of batch_size 16"),
        (lambda: HardNegativeBatchSampler(IDS, 4), r"neighbours must have shape \(N, k\)"),
        (lambda: HardNegativeBatchSampler([[1]], 4), "neighbours must be a tensor"),
        (lambda: HardNegativeBatchSampler(IDS[:, None].double(), 4), "neighbours must hold integers"),
        (lambda: HardNegativeBatchSampler(IDS[:, None] + 12, 4), "from 0 to 11 or -1, got 12 to 12"),
        (lambda: HardNegativeBatchSampler(IDS[:, None], 4, labels=IDS[1:]), r"must have shape \(12,\)"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_state_of_another_sampler_is_refused():
    sampler = EpochBatchSampler(40, 4)
    with pytest.raises(ValueError, match="with 10 batches an epoch, got one with 5"):
        sampler.load_state_dict(EpochBatchSampler(40, 8).state_dict())
    with pytest.raises(ValueError, match="start_batch must be at most the 10 batches of an epoch, got 11"):
        sampler.start_batch = 11
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"state must hold seed, epoch, start_batch, batches, got NoneType\."),
        ({}, r"state must hold seed, epoch, start_batch, batches, got nothing\."),
        ({"start_batch": 3}, r"state must hold seed, epoch, start_batch, batches, got start_batch\."),
        ({"surplus": 3}, r"got seed, epoch, start_batch, batches, surplus\."),
        ({"seed": -1}, r"integers >= 0, got -1 for seed\."),
        ({"epoch": 1.0}, r"integers >= 0, got 1\.0 for epoch\."),
        ({"epoch": True}, r"integers >= 0, got True for epoch\."),
        ({"start_batch": "2"}, r"integers >= 0, got '2' for start_batch\."),
        ({"start_batch": -2}, r"integers >= 0, got -2 for start_batch\."),
        ({"start_batch": 11}, r"start_batch must be at most the 10 batches of an epoch, got 11\."),
        ({"batches": 9}, r"with 10 batches an epoch, got one with 9\."),
    ],
)
def test_a_refused_state_changes_nothing(change, message):
    sampler = EpochBatchSampler(40, 4, seed=3)
    sampler.set_epoch(2)
    sampler.start_batch = 4
    before = sampler.state_dict()
    whole = {"seed": 7, "epoch": 5, "start_batch": 1, "batches": 10}
    partial_state = change is None or change in ({}, {"start_batch": 3})
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(change if partial_state else whole | change)
    assert sampler.state_dict() == before
    sampler.load_state_dict(whole)
    assert sampler.state_dict() == whole


@pytest.mark.parametrize("kind", ["ids", "pairs", "samples", "balanced", "hard"])
def test_a_million_rows_take_no_quadratic_time(kind):
    rows = 1_000_000
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(rows, generator=generator) ** 4 * 50_000).long()
    make = {
        "ids": lambda: UniqueIdBatchSampler(labels, 256),
        "pairs": lambda: GroupAwareBatchSampler(labels, 256, rows_per_group=2),
        "samples": lambda: SamplesPerClassBatchSampler(labels, 256, samples_per_class=4),
        "balanced": lambda: ClassBalancedBatchSampler(labels, 256),
        "hard": lambda: HardNegativeBatchSampler(torch.randint(0, rows, (rows, 4), generator=generator), 256),
    }[kind]
    sampler = make()
    started = time.process_time()
    sum(len(batch) for batch in sampler)
    assert time.process_time() - started < 6  # takes 0.2 to 0.8 s; a quadratic step would take hours


def test_an_epoch_of_several_passes_sees_every_row_in_each():
    sampler = EpochBatchSampler(10, 4, drop_last=False, passes=3, seed=1)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 9
    passes = [list(chain(*batches[first : first + 3])) for first in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    stopped = EpochBatchSampler(10, 4, drop_last=False, passes=3, seed=1)
    stopped.start_batch = 5
    assert list(stopped) == batches[5:]
    assert len(EpochBatchSampler(10, 4, passes=3)) == 6
    with pytest.raises(ValueError, match="passes must be at least 1"):
        EpochBatchSampler(10, 4, passes=0)
