import pytest
import torch

from cl_core.testing._differences import assert_same, differences


class Graph:
    """Holds itself, and can be called."""

    def __init__(self, weight):
        self.weight, self.itself = weight, self

    def __call__(self):
        return self.weight


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ({"a": 1, "b": 1}, {"a": 1, "b": 2}, ["it['b'] is 1 and 2"]),
        ({"a": 1}, {"b": 1}, ["it has keys ['a'] and ['b']"]),
        ((1, "x"), (1, "x"), []),
        ([1, 2], [1], ["it has 2 and 1 entries"]),
        ([1], (1,), ["it is list and tuple"]),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), []),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), ["it differs in 1 of 2 entries"]),
        (torch.ones(2), torch.ones(2).double(), ["it is (2,) torch.float32 and (2,) torch.float64"]),
        (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse(), ["it differs in 2 of 4 entries"]),
        (Graph(torch.ones(1)), Graph(torch.ones(1)), []),
        (
            Graph(torch.ones(1)),
            Graph(torch.zeros(1)),
            ["the attributes of it['weight'] differs in 1 of 1 entries"],
        ),
    ],
)
def test_differences_are_found_in_all_that_a_batch_may_be(one, other, difference):
    assert list(differences(one, other)) == difference


def test_the_first_difference_is_raised():
    assert_same([1, 2], [1, 2], "numbers")
    with pytest.raises(AssertionError, match=r"^numbers: it\[0\] is 1 and 3$"):
        assert_same([1, 2], [3, 4], "numbers")
