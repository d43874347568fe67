"""Partner classes: what can be drawn, how often, and that a generator decides it."""

import pytest
import torch
from torch import nn

from cl_core.samplers import (
    ArbitraryPartners,
    DistinctPartners,
    IdenticalPartners,
    PartnerClasses,
    WeightedPartners,
)

CLASSES = 7
DISTANCES = (torch.arange(CLASSES)[:, None] - torch.arange(CLASSES)).abs()
KINDS = [
    ArbitraryPartners(),
    IdenticalPartners(),
    DistinctPartners(CLASSES),
    WeightedPartners(DISTANCES, 1.0, max_level=3),
]


def labels(rows=50, seed=0):
    return torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", KINDS, ids=repr)
def test_a_generator_decides(draw):
    given = labels()
    found = draw(given, seeded())
    assert isinstance(draw, PartnerClasses)
    assert torch.equal(found, draw(given, seeded()))
    assert torch.equal(given, labels())
    generator = seeded()
    again = [draw(given, generator) for _ in range(2)]
    if not isinstance(draw, IdenticalPartners):
        assert not torch.equal(found, draw(given, seeded(1)))
        assert not torch.equal(*again)
        torch.manual_seed(3)
        without = draw(given)
        torch.manual_seed(3)
        assert torch.equal(without, draw(given))


@pytest.mark.parametrize("draw", KINDS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_one_partner_a_label_of_its_type(draw, dtype, rows):
    given = labels(rows).to(dtype)
    found = draw(given, seeded())
    assert found.shape == given.shape
    assert found.dtype == dtype
    assert ((found >= 0) & (found < CLASSES)).all()


def test_arbitrary_partners_are_the_batch_in_another_order():
    given = labels()
    found = ArbitraryPartners()(given, seeded())
    assert torch.equal(found.sort().values, given.sort().values)
    assert (found == given).any()
    assert (found != given).any()


def test_identical_partners():
    given = labels()
    assert torch.equal(IdenticalPartners()(given), given)


def test_distinct_partners_are_all_other_classes_equally_often():
    given = torch.full((60_000,), 3)
    counts = DistinctPartners(CLASSES)(given, seeded()).bincount(minlength=CLASSES)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4, 5, 6]] - 10_000).abs().max() < 400  # 4 standard deviations


@pytest.mark.parametrize(("exponent", "max_level"), [(0.0, None), (1.0, 3), (2.0, 2.5), (10.0, None)])
def test_weighted_partners_come_as_often_as_said(exponent, max_level):
    draw = WeightedPartners(DISTANCES, exponent, max_level=max_level)
    weights = (1.0 + DISTANCES.double()) ** -exponent
    if max_level is not None:
        weights[max_level <= DISTANCES] = 0
    wanted = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(draw.probabilities, wanted)
    given = torch.arange(CLASSES).repeat(20_000)
    found = draw(given, seeded())
    shares = torch.zeros(CLASSES, CLASSES).index_put((given, found), torch.ones(()), accumulate=True) / 20_000
    assert (shares - wanted).abs().max() < 4 * 0.5 / 20_000**0.5
    assert (shares[wanted == 0] == 0).all()


def test_distances_may_be_rows_of_numbers():
    draw = WeightedPartners(DISTANCES.tolist(), 1.0, max_level=3)
    assert torch.equal(draw.probabilities, KINDS[3].probabilities)
    assert draw.distances == KINDS[3].distances == DISTANCES.tolist()


def test_half_precision_leaves_no_class_out():
    """A method may be turned to half precision as a whole, in which many cumulated weights are one number."""
    draw = nn.Sequential(WeightedPartners(torch.ones(600, 600), 0.0)).bfloat16()[0]
    found = draw(torch.zeros(20_000, dtype=torch.int64), seeded())
    assert len(found.unique()) == 600


def test_the_first_level_alone_gives_identical_pairs():
    given = labels()
    assert torch.equal(WeightedPartners(DISTANCES, 2.0, max_level=1)(given, seeded()), given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ArbitraryPartners()([0, 1]), "labels must be an integer tensor"),
        (lambda: ArbitraryPartners()(torch.tensor([0.0, 1.0])), "labels must hold integers"),
        (lambda: ArbitraryPartners()(torch.tensor([[0, 1]])), "labels must have shape"),
        (lambda: DistinctPartners(1), "num_classes must be at least 2"),
        (
            lambda: DistinctPartners(300)(torch.tensor([7], dtype=torch.uint8)),
            "labels must be of a type that holds 300 classes, got torch.uint8",
        ),
        (
            lambda: WeightedPartners(torch.ones(129, 129), 0.0)(torch.tensor([7], dtype=torch.int8)),
            "labels must be of a type that holds 129 classes, got torch.int8",
        ),
        (lambda: DistinctPartners(3)(torch.tensor([0, 3])), r"labels must lie in \[0, 3\)"),
        (lambda: WeightedPartners(DISTANCES, 1.0)(torch.tensor([-1])), r"labels must lie in \[0, 7\)"),
        (lambda: WeightedPartners(DISTANCES[:3], 1.0), r"distances must be of shape \(C, C\), got \(3, 7\)"),
        (lambda: WeightedPartners([[0, 1], [1]], 1.0), r"distances must be of shape \(C, C\), .* got list"),
        (lambda: WeightedPartners([0.0, 1.0], 1.0), r"distances must be of shape \(C, C\), got \(2,\)"),
        (lambda: WeightedPartners(-DISTANCES, 1.0), "distances must be finite and >= 0"),
        (lambda: WeightedPartners(DISTANCES, -1.0), "exponent must be at least 0"),
        (lambda: WeightedPartners(DISTANCES + 5, 1.0, max_level=5), "one below max_level 5 for every class"),
        (lambda: WeightedPartners(DISTANCES, 1.0, max_level=0), "max_level must be finite and > 0"),
    ],
)
def test_refused_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert str(error.value).endswith(".")


def test_settings_are_shown():
    assert repr(KINDS[3]) == "WeightedPartners(num_classes=7, exponent=1.0, max_level=3)"
