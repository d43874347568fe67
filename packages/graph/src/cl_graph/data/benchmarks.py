"""Graphs in the folders of torch_geometric's own data sets, read without unpacking or executing anything.

The classes of torch_geometric write what they read beside it, and read pickles. These read the same raw files.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_core import _checks, plugins
from cl_graph._geometric import BuiltKarateClub, Graph
from cl_graph.data.base import GraphData
from cl_graph.data.splits import NodeSplit, PerClassSplit


def found_folder(root: Path, below: str, *, among: tuple[str, ...], what: str) -> Path:
    """The folder ``below`` in the root, or in one of its subfolders ``among``.

    Raises:
        FileNotFoundError: naming where it was looked for.
    """
    places = [root / below, *(root / folder / below for folder in among)]
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"no {what} in {root}: expected {looked}; pass --data.root FOLDER.")


class Planetoid(GraphData):
    """Cora, CiteSeer or PubMed, from the ``ind.*`` files that torch_geometric's ``Planetoid`` downloads.

    Nodes of CiteSeer that the files leave out (15 of the test range) have no features, no edges and no label; others
    give them label 0.

    Args:
        name: ``"Cora"``, ``"CiteSeer"`` or ``"PubMed"``.
        split: of the labelled nodes; None for random tenths, ``PublicSplit`` for 20 a class.
        options: as :class:`~cl_graph.data.base.GraphData` takes them.

    Reference: Yang et al., "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML 2016, arXiv 1603.08861.
    """

    def __init__(self, name: str = "Cora", split: NodeSplit | None = None, **options: Any) -> None:
        super().__init__(split=split, **options)
        _checks.choice("name", name, ("Cora", "CiteSeer", "PubMed"))
        self.name = name

    def read(self) -> Graph:
        """The graph, with the public split as masks."""
        folder = found_folder(self.root, f"{self.name}/raw", among=("planetoid", "Planetoid"), what=self.name)
        parts = {
            part: _read_planetoid(folder / f"ind.{self.name.lower()}.{part}")
            for part in ("x", "y", "allx", "ally", "tx", "ty", "graph")
        }
        test = _test_rows(folder / f"ind.{self.name.lower()}.test.index")
        try:
            return _planetoid_graph(parts, test)
        except (ValueError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the files of {folder} do not fit each other: {error}.") from error


def _planetoid_graph(parts: dict[str, Any], test: Tensor) -> Graph:
    rest = len(parts["ally"])
    n = max(rest, int(test.max()) + 1)
    x = torch.zeros(n, parts["allx"].shape[1])
    y = torch.full((n,), -1)
    for rows, features, labels in (
        (torch.arange(rest), parts["allx"], parts["ally"]),
        (test, parts["tx"], parts["ty"]),
    ):
        x[rows] = torch.from_numpy(features.dense())
        y[rows] = torch.from_numpy(labels.argmax(axis=1)).long()
    pairs = [(source, target) for source, targets in parts["graph"].items() for target in targets]
    train = len(parts["y"])
    masks = {}
    for name, rows in (
        ("train_mask", torch.arange(train)),
        ("val_mask", torch.arange(train, min(train + 500, rest))),
        ("test_mask", test),
    ):
        masks[name] = torch.zeros(n, dtype=torch.bool)
        masks[name][rows] = True
    return Graph(x=x, edge_index=torch.tensor(pairs).t().contiguous(), y=y, **masks)


class _Rows:
    """Stands for SciPy's compressed matrix in a pickle: keeps what it is made of, runs nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(vars(self)["_shape"])

    def dense(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return dense_rows(vars(self)["data"], vars(self)["indices"], vars(self)["indptr"], self.shape)


class _PlanetoidUnpickler(pickle.Unpickler):
    """Reads arrays, lists and compressed matrices, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("scipy.sparse.csr", "csr_matrix"):
            return _Rows
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # wherever this version of NumPy keeps it
        known = {
            ("_codecs", "encode"): _bytes,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("__builtin__", "list"): list,
            ("collections", "defaultdict"): _OfLists,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")
        return known[module, name]


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocol of Python 2."""
    return text.encode("latin1")


class _OfLists(dict[int, list[int]]):
    """Stands for ``defaultdict(list)``."""

    def __init__(self, factory: Any = None) -> None:
        super().__init__()


def _read_planetoid(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        return _PlanetoidUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # whatever a damaged pickle does
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}.") from error


def _test_rows(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    lines = path.read_text("utf-8", errors="replace").split()
    if not lines or not all(line.isascii() and line.isdecimal() for line in lines):
        raise ValueError(f"{path} must hold a row number a line.")
    return torch.tensor([int(line) for line in lines])


class _Compressed(GraphData):
    """Base of the graphs of ``gnn-benchmark``: an ``.npz`` file of compressed adjacency and features."""

    files: ClassVar[dict[str, str]]
    places: ClassVar[tuple[str, ...]]
    binary: ClassVar[bool] = False

    def __init__(self, name: str, split: NodeSplit | None = None, **options: Any) -> None:
        super().__init__(split=split, **options)
        if name not in self.files:
            raise ValueError(plugins.unknown(f"graph of {type(self).__name__}", name, self.files))
        self.name = name

    def read(self) -> Graph:
        """The graph."""
        below, _, file = self.files[self.name].rpartition("/")
        path = found_folder(self.root, below, among=self.places, what=self.name) / file
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                x = dense_rows(*(arrays[f"attr_{part}"] for part in ("data", "indices", "indptr", "shape")))
                starts, targets = (
                    arrays["adj_indptr"].astype(np.int64),
                    arrays["adj_indices"].astype(np.int64),
                )
                labels = arrays["labels"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing.") from None
        except (ValueError, KeyError, OSError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole graph ({str(error).splitlines()[0]}).") from error
        if self.binary:
            x = (x > 0).astype(np.float32)
        sources = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        edges = torch.from_numpy(np.stack([sources, targets]))
        return Graph(x=torch.from_numpy(x), edge_index=edges, y=torch.from_numpy(labels).long())


class Amazon(_Compressed):
    """Products bought together, described by words of their reviews; made undirected, words present or not.

    Args:
        name: ``"Photo"`` or ``"Computers"``.
        split: of the labelled nodes; None for random tenths.
        options: as :class:`~cl_graph.data.base.GraphData` takes them.

    Reference: Shchur et al., "Pitfalls of Graph Neural Network Evaluation", arXiv 1811.05868.
    """

    files: ClassVar = {
        "Photo": "Photo/raw/amazon_electronics_photo.npz",
        "Computers": "Computers/raw/amazon_electronics_computers.npz",
    }
    places = ("amazon", "gnn-benchmark/amazon")
    binary = True


class Coauthor(_Compressed):
    """Authors who wrote together, described by words of their papers, present or not.

    Args:
        name: ``"CS"`` or ``"Physics"``.
        split: of the labelled nodes; None for random tenths.
        options: as :class:`~cl_graph.data.base.GraphData` takes them.

    Reference: Shchur et al., "Pitfalls of Graph Neural Network Evaluation", arXiv 1811.05868.
    """

    files: ClassVar = {"CS": "CS/raw/ms_academic_cs.npz", "Physics": "Physics/raw/ms_academic_phy.npz"}
    places = ("coauthor", "gnn-benchmark/coauthor")
    binary = True


class CitationFull(_Compressed):
    """Papers that cite each other, described by words of their abstracts.

    Args:
        name: ``"Cora"``, ``"Cora_ML"``, ``"CiteSeer"``, ``"DBLP"`` or ``"PubMed"``.
        split: of the labelled nodes; None for random tenths.
        options: as :class:`~cl_graph.data.base.GraphData` takes them.

    Reference: Bojchevski and Günnemann, "Deep Gaussian Embedding of Graphs", ICLR 2018, arXiv 1707.03815.
    """

    files: ClassVar = {
        name: f"{name.lower()}/raw/{name.lower()}.npz"
        for name in ("Cora", "Cora_ML", "CiteSeer", "DBLP", "PubMed")
    }
    places = ("citation-full", "gnn-benchmark/citation-full")


class KarateClub(GraphData):
    """The 34 members of a karate club and who met whom outside it, in its four communities; comes with the package.

    Members have no features, each is told by its number.

    Args:
        split: of the members; None for two of each community to train a probe, four to choose.
        options: as :class:`~cl_graph.data.base.GraphData` takes them.

    Reference: Zachary, "An Information Flow Model for Conflict and Fission in Small Groups", Journal of Anthropological
    Research, 1977.
    """

    def __init__(self, split: NodeSplit | None = None, **options: Any) -> None:
        super().__init__(split=split, **options)

    def default_split(self) -> NodeSplit:
        """Two members of each community, so that something is left of the smallest."""
        return PerClassSplit(train=2, validation=8)

    def read(self) -> Graph:
        """The graph."""
        built = BuiltKarateClub()[0]
        return Graph(x=built.x, edge_index=built.edge_index, y=built.y)


def dense_rows(data: Any, indices: Any, indptr: Any, shape: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The float32 matrix that compressed rows stand for.

    Raises:
        ValueError: if they do not fit each other.
    """
    rows, columns = (int(size) for size in shape)
    indptr, indices = np.asarray(indptr, dtype=np.int64), np.asarray(indices, dtype=np.int64)
    fits = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == len(data) == len(indices)
    if (
        not fits
        or (np.diff(indptr) < 0).any()
        or (len(indices) and not 0 <= indices.min() <= indices.max() < columns)
    ):
        raise ValueError(f"compressed rows do not make a matrix of {rows} x {columns}")
    dense = np.zeros((rows, columns), dtype=np.float32)
    dense[np.repeat(np.arange(rows), np.diff(indptr)), indices] = data
    return dense
