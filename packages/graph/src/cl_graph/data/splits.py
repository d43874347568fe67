"""Which nodes choose and which judge: nodes for training a probe, for validation and for testing."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.training.data import Split
from cl_graph._geometric import Graph

Splits = dict[Split, Tensor]


class NodeSplit:
    """Base of every split of the labelled nodes; nodes without a label (-1) belong to none.

    A method is trained on the whole graph, without labels; the split says whose labels a probe may see.
    """

    def split(self, graph: Graph, labels: Tensor, *, seed: int) -> Splits:
        """Rows of each split, ascending.

        Args:
            graph: whose nodes.
            labels: class of each, shape (n,); -1 where unknown.
            seed: of the run.
        """
        raise NotImplementedError(f"{type(self).__name__} must define split(graph, labels, seed).")


class PublicSplit(NodeSplit):
    """The split that the data come with: ``train_mask``, ``val_mask`` and ``test_mask``.

    Args:
        number: which, where the data come with several (WikiCS has 20).
    """

    def __init__(self, number: int = 0) -> None:
        _checks.count("number", number, at_least=0)
        self.number = number

    def split(self, graph: Graph, labels: Tensor, *, seed: int) -> Splits:
        """Rows of each split, ascending."""
        found: Splits = {}
        for split, name in (("train", "train_mask"), ("validation", "val_mask"), ("test", "test_mask")):
            mask = graph.get(name)
            if mask is None:
                raise ValueError(f"these data come without a split ({name} is missing): choose RandomSplit.")
            if mask.ndim == 2:
                if self.number >= mask.shape[1]:
                    raise ValueError(f"number must be below the {mask.shape[1]} splits, got {self.number}.")
                mask = mask[:, self.number]
            found[split] = (mask & (labels >= 0)).nonzero().squeeze(1)  # type: ignore[index]
        return found


class RandomSplit(NodeSplit):
    """Shares of all labelled nodes, drawn whatever their class, as most papers on node contrast do; the rest judges.

    Args:
        train: share of the labelled nodes that a probe is trained on.
        validation: share that chooses.
        seed: of the draw; None takes that of the run, so that runs over seeds also average over splits.
    """

    def __init__(self, train: float = 0.1, validation: float = 0.1, seed: int | None = None) -> None:
        _checks.positive("train", train)
        _checks.positive("validation", validation)
        if train + validation >= 1:
            raise ValueError(
                f"train and validation must leave nodes for testing, got {train} and {validation}."
            )
        if seed is not None:
            _checks.count("seed", seed, at_least=0)
        self.train, self.validation, self.seed = train, validation, seed

    def split(self, graph: Graph, labels: Tensor, *, seed: int) -> Splits:
        """Rows of each split, ascending."""
        known = (labels >= 0).nonzero().squeeze(1)
        known = known[torch.randperm(len(known), generator=_generator(self.seed, seed))]
        sizes = [int(self.train * len(known)), int(self.validation * len(known))]
        train, validation, test = known.split([*sizes, len(known) - sum(sizes)])
        return {
            "train": train.sort().values,
            "validation": validation.sort().values,
            "test": test.sort().values,
        }


class PerClassSplit(NodeSplit):
    """As many nodes of every class for training, some for validation and testing from the rest.

    Args:
        train: nodes of each class that a probe is trained on.
        validation: nodes that choose, whatever their class.
        test: nodes that judge; None for all that are left.
        seed: of the draw; None takes that of the run.
    """

    def __init__(
        self, train: int = 20, validation: int = 500, test: int | None = None, seed: int | None = None
    ) -> None:
        _checks.count("train", train)
        _checks.count("validation", validation)
        if test is not None:
            _checks.count("test", test)
        if seed is not None:
            _checks.count("seed", seed, at_least=0)
        self.train, self.validation, self.test, self.seed = train, validation, test, seed

    def split(self, graph: Graph, labels: Tensor, *, seed: int) -> Splits:
        """Rows of each split, ascending."""
        generator = _generator(self.seed, seed)
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels[labels >= 0].unique().tolist():
            rows = (labels == label).nonzero().squeeze(1)
            if len(rows) <= self.train:
                raise ValueError(
                    f"train must be below the {len(rows)} nodes of class {label}, so that some are left, got "
                    f"{self.train}."
                )
            chosen[rows[torch.randperm(len(rows), generator=generator)[: self.train]]] = True
        rest = (~chosen & (labels >= 0)).nonzero().squeeze(1)
        rest = rest[torch.randperm(len(rest), generator=generator)]
        judged = rest[self.validation :][: self.test]
        if len(judged) == 0 or (self.test is not None and len(judged) < self.test):
            raise ValueError(
                f"validation and test must fit into the {len(rest)} nodes that are left, got {self.validation} and "
                f"{'the rest' if self.test is None else self.test}."
            )
        return {
            "train": chosen.nonzero().squeeze(1),
            "validation": rest[: self.validation].sort().values,
            "test": judged.sort().values,
        }


def _generator(own: int | None, of_run: int) -> torch.Generator:
    return torch.Generator().manual_seed(of_run if own is None else own)
