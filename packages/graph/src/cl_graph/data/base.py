"""What every data set of one graph is: the graph made ready, its nodes as items, splits of the labelled ones."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_core import _checks
from cl_core.evaluation import LinearProbe
from cl_core.training.data import SPLITS, Data, Split
from cl_graph._geometric import Graph, coalesce, to_undirected
from cl_graph.data.splits import NodeSplit, RandomSplit, Splits
from cl_graph.graphs import NodeBatch, check_edges, check_features
from cl_graph.scores import cluster_scores, probe_scores

_SPARSE_BELOW = 0.1  # share of entries from which on a dense product is the faster one


def data_root(root: str | Path | None) -> Path:
    """The folder asked for, else ``$CL_DATA``, else ``data`` in the working directory."""
    if root == "":
        raise ValueError("root must name a folder, or be None for $CL_DATA, got an empty text.")
    return Path(root if root is not None else os.environ.get("CL_DATA") or "data").expanduser()


class NodeDataset(Dataset[tuple[int, int]]):
    """Node numbers with their labels; a loader that asks for many at once gets them at once.

    Args:
        nodes: row numbers, shape (N,).
        labels: class of each node of the graph, shape (n,).
    """

    def __init__(self, nodes: Tensor, labels: Tensor) -> None:
        self.nodes, self.labels = nodes, labels[nodes]

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, place: int) -> tuple[int, int]:
        return int(self.nodes[place]), int(self.labels[place])

    def __getitems__(self, places: list[int]) -> list[tuple[int, int]]:
        chosen = torch.tensor(places)
        return list(zip(self.nodes[chosen].tolist(), self.labels[chosen].tolist(), strict=True))


class GraphData(Data):
    """Base of every data set of one graph, whose items are its nodes.

    A subclass reads. Repeated edges and self loops are taken out here, features scaled to rows of sum one. Training
    goes over all nodes, whatever the split, which says whose labels evaluation may see.

    Args:
        batch_size: nodes compared in a step, on each process; None for all at once.
        num_workers: loader processes; 0, as a step needs no reading.
        root: folder of the data; None for ``$CL_DATA``, else ``data`` in the working directory.
        split: of the labelled nodes; None for the default of the data set.
        undirected: also take each edge in the other direction.
        normalize_features: divide each node's features by their sum, where it is not zero.
        sparse_features: keep features sparse; None where less than a tenth of them is not zero.
        passes_per_epoch: times that an epoch goes over the nodes; with all nodes at once a pass is a step.
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        root: str | Path | None = None,
        split: NodeSplit | None = None,
        undirected: bool = True,
        normalize_features: bool = True,
        sparse_features: bool | None = None,
        passes_per_epoch: int = 20,
    ) -> None:
        super().__init__(batch_size=1 if batch_size is None else batch_size, num_workers=num_workers)
        self._batch_size = batch_size
        _checks.flag("undirected", undirected)
        _checks.flag("normalize_features", normalize_features)
        if sparse_features is not None:
            _checks.flag("sparse_features", sparse_features)
        _checks.count("passes_per_epoch", passes_per_epoch)
        self.root = data_root(root)
        self.split = self.default_split() if split is None else split
        self.undirected, self.normalize_features = undirected, normalize_features
        self.sparse_features, self.passes_per_epoch = sparse_features, passes_per_epoch
        self._moved: dict[torch.device, Graph] = {}

    @property
    def batch_size(self) -> int:
        """Nodes compared in a step, on each process."""
        return len(self.labels) if self._batch_size is None else self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._batch_size: int | None = size

    @abstractmethod
    def read(self) -> Graph:
        """The graph as the source has it: ``x``, ``edge_index`` and, where there are labels, ``y``."""

    def default_split(self) -> NodeSplit:
        """The split used when none is given."""
        return RandomSplit()

    @cached_property
    def graph(self) -> Graph:
        """The graph, checked and made ready."""
        graph = self.read()
        check_features(graph.x)
        n = len(graph.x)
        check_edges(graph.edge_index, n)
        if n < 2:
            raise ValueError(
                f"{type(self).__name__} has {n} node, but nodes are learnt from by comparing them."
            )
        edges = graph.edge_index
        edges = edges[:, edges[0] != edges[1]]
        graph.edge_index = (
            to_undirected(edges, num_nodes=n) if self.undirected else coalesce(edges, num_nodes=n)
        )
        x = graph.x.to_dense() if graph.x.is_sparse else graph.x
        if self.normalize_features:
            x = x / x.sum(dim=1, keepdim=True).clamp_min(1)
        share = float((x != 0).double().mean())
        sparse = share < _SPARSE_BELOW if self.sparse_features is None else self.sparse_features
        graph.x = x.to_sparse_coo().coalesce() if sparse else x.contiguous()
        return graph

    @cached_property
    def labels(self) -> Tensor:
        """Class of each node, shape (n,); -1 where unknown."""
        y = self.graph.get("y")
        return torch.full((self.graph.num_nodes,), -1) if y is None else y.long()

    @cached_property
    def splits(self) -> Splits:
        """Rows of each split of the labelled nodes; where no node has a label, all are to be embedded."""
        if not bool((self.labels >= 0).any()):
            nothing = torch.empty(0, dtype=torch.int64)
            return {"train": torch.arange(len(self.labels)), "validation": nothing, "test": nothing}
        return self.split.split(self.graph, self.labels, seed=self.seed)

    @property
    def num_features(self) -> int:
        """Features of a node."""
        return int(self.graph.x.shape[1])

    def train_dataset(self) -> NodeDataset:
        """All nodes of the graph."""
        return NodeDataset(torch.arange(len(self.labels)), self.labels)

    def evaluation_dataset(self, split: Split) -> NodeDataset:
        """Nodes and labels of one split."""
        _checks.choice("split", split, SPLITS)
        return NodeDataset(self.splits[split], self.labels)

    def collate(self, items: Sequence[tuple[int, int]]) -> NodeBatch:
        """The graph and the nodes to compare; None for all of them, whose order makes no difference."""
        if len(items) == len(self.labels):
            return NodeBatch(self.graph, None, self._moved)
        return NodeBatch(self.graph, torch.tensor([node for node, _ in items]), self._moved)

    def collate_evaluation(self, items: Sequence[tuple[int, int]]) -> tuple[NodeBatch, Tensor]:
        """The graph with the nodes to embed, and their labels."""
        nodes, labels = torch.tensor(items).reshape(-1, 2).unbind(1)
        return NodeBatch(self.graph, nodes, self._moved), labels

    def evaluation_batch_size(self, asked: int) -> int:
        """All at once: embedding one node takes as long as embedding the graph."""
        return max(asked, len(self.labels))

    def raw(self, inputs: NodeBatch) -> Tensor:
        """Features of the nodes."""
        return inputs.graph.x.index_select(0, inputs.nodes).to_dense()

    def scores(
        self,
        probe: LinearProbe,
        *,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
    ) -> dict[str, float]:
        """Macro-F1 and AUC of the probe on test; how well k-means of all labelled nodes finds their classes."""
        together = (torch.cat(parts) for parts in zip(train, validation, test, strict=True))
        return probe_scores(probe, *test) | cluster_scores(*together)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, which are numbers where the source gives no names; None without labels."""
        return None if self.num_classes is None else [str(label) for label in range(self.num_classes)]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None where nodes have no labels."""
        highest = int(self.labels.max())
        return highest + 1 if highest >= 0 else None
