import io
import pickle

import numpy as np
import pytest
import torch

from cl_graph.data import (
    Amazon,
    CitationFull,
    Coauthor,
    KarateClub,
    PerClassSplit,
    Planetoid,
    PublicSplit,
    RandomSplit,
)
from cl_graph.graphs import Graph

N = 40


def rows_of(matrix):
    """Compressed rows of a matrix, as SciPy has them."""
    rows, columns = np.nonzero(matrix)
    indptr = np.searchsorted(rows, np.arange(len(matrix) + 1)).astype(np.int32)
    return {"data": matrix[rows, columns], "indices": columns.astype(np.int32), "indptr": indptr}


class csr_matrix:
    def __init__(self, matrix):
        self.__dict__.update(rows_of(matrix), _shape=matrix.shape, maxprint=50)


def planetoid_files(folder, name="cora", missing=None):
    """Files of 40 nodes, of which 4 train and 10 test; node ``missing`` of the test range is in no file."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    x = (generator.random((N, 30)) < 0.05).astype(np.float32)
    x[:, 0] = 1
    y = np.eye(3, dtype=np.int32)[np.arange(N) % 3]
    test = np.array([row for row in generator.permutation(np.arange(30, N)) if row != missing])
    edges = {row: [(row + 1) % 30, (row + 1) % 30, row] for row in range(30)} | {
        int(row): [0] for row in test
    }
    parts = {
        "x": csr_matrix(x[:4]), "y": y[:4], "allx": csr_matrix(x[:30]), "ally": y[:30],
        "tx": csr_matrix(x[test]), "ty": y[test], "graph": edges,
    }  # fmt: skip
    for part, content in parts.items():
        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, protocol=2)
        pickler.dispatch_table = {}
        pickler.dump(content)
        text = stream.getvalue()
        for module in (csr_matrix.__module__.encode(),):
            text = text.replace(b"c" + module + b"\ncsr_matrix\n", b"cscipy.sparse.csr\ncsr_matrix\n")
        text = text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / f"ind.{name}.{part}").write_bytes(text)
    (folder / f"ind.{name}.test.index").write_text("".join(f"{row}\n" for row in test))
    return x, y


def test_planetoid(tmp_path, monkeypatch):
    x, y = planetoid_files(tmp_path / "planetoid/Cora/raw")
    monkeypatch.setenv("CL_DATA", str(tmp_path))
    data = Planetoid("Cora", split=PublicSplit(), normalize_features=False)
    graph = data.graph
    np.testing.assert_array_equal(graph.x.to_dense().numpy(), x)
    np.testing.assert_array_equal(data.labels.numpy(), y.argmax(1))
    pairs = set(map(tuple, graph.edge_index.T.tolist()))
    assert (
        len(pairs) == graph.edge_index.shape[1] == 2 * (30 + 10)
    )  # repeated edges once, both ways, no self loops
    assert {(0, 1), (1, 0), (0, 35)} <= pairs and (0, 0) not in pairs
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 4,
        "validation": 26,
        "test": 10,
    }
    assert data.num_classes == 3 and data.num_features == 30
    assert [path.name for path in (tmp_path / "planetoid/Cora").iterdir()] == [
        "raw"
    ]  # nothing is written there


def test_a_node_that_the_files_leave_out_has_nothing(tmp_path):
    planetoid_files(tmp_path / "CiteSeer/raw", "citeseer", missing=33)
    data = Planetoid("CiteSeer", root=tmp_path)
    assert data.labels[33] == -1 and (data.labels[torch.arange(N) != 33] >= 0).all()
    assert not data.graph.x.to_dense()[33].any() and not (data.graph.edge_index == 33).any()
    assert not any((rows == 33).any() for rows in data.splits.values())


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_execute_nothing(tmp_path, capsys):
    planetoid_files(tmp_path / "Cora/raw")
    (tmp_path / "Cora/raw/ind.cora.graph").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(
        ValueError, match=r"ind.cora.graph cannot be read: it names .*print, which no such file needs"
    ):
        Planetoid("Cora", root=tmp_path).graph  # noqa: B018
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("part", ["allx", "graph", "test.index", "tx"])
def test_damaged_and_missing_files_are_named(tmp_path, part):
    planetoid_files(tmp_path / "Cora/raw")
    file = tmp_path / f"Cora/raw/ind.cora.{part}"
    file.write_bytes(file.read_bytes()[:20] + b"x")
    with pytest.raises(ValueError, match=rf"ind.cora.{part} (cannot be read|must hold)"):
        Planetoid("Cora", root=tmp_path).graph  # noqa: B018
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"ind.cora.{part} is missing"):
        Planetoid("Cora", root=tmp_path).graph  # noqa: B018


def test_files_of_different_sets_are_refused(tmp_path):
    planetoid_files(tmp_path / "Cora/raw")
    (tmp_path / "Cora/raw/ind.cora.test.index").write_text("30\n31\n")
    with pytest.raises(ValueError, match="do not fit each other"):
        Planetoid("Cora", root=tmp_path).graph  # noqa: B018


def compressed_file(path, **changes):
    path.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    x = (generator.random((N, 20)) * (generator.random((N, 20)) < 0.3)).astype(np.float32)
    adjacency = np.triu(generator.random((N, N)) < 0.1, 1).astype(np.float32)
    arrays = {f"attr_{name}": value for name, value in rows_of(x).items()} | {"attr_shape": np.array(x.shape)}
    arrays |= {f"adj_{name}": value for name, value in rows_of(adjacency).items()}
    arrays |= {"adj_shape": np.array(adjacency.shape), "labels": np.arange(N) % 4}
    np.savez(path, **arrays | changes)
    return x, adjacency


@pytest.mark.parametrize(
    ("kind", "name", "file", "binary"),
    [
        (Amazon, "Photo", "amazon/Photo/raw/amazon_electronics_photo.npz", True),
        (Coauthor, "CS", "gnn-benchmark/coauthor/CS/raw/ms_academic_cs.npz", True),
        (CitationFull, "DBLP", "dblp/raw/dblp.npz", False),
    ],
)
def test_compressed_graphs(tmp_path, kind, name, file, binary):
    x, adjacency = compressed_file(tmp_path / file)
    data = kind(name, root=tmp_path, normalize_features=False)
    np.testing.assert_array_equal(data.graph.x.to_dense().numpy(), x > 0 if binary else x)
    linked = np.zeros((N, N))
    linked[tuple(data.graph.edge_index.numpy())] = 1
    np.testing.assert_array_equal(linked, np.maximum(adjacency, adjacency.T))
    assert data.labels.tolist() == [row % 4 for row in range(N)]


@pytest.mark.parametrize(
    "changes",
    [
        {"attr_indices": np.array([999])},
        {"attr_indptr": np.array([0, 3])},
        {"labels": np.array([{"a": 1}], dtype=object)},
    ],
)
def test_damaged_compressed_graphs_are_refused(tmp_path, changes):
    compressed_file(tmp_path / "Photo/raw/amazon_electronics_photo.npz", **changes)
    with pytest.raises(ValueError, match=r"amazon_electronics_photo\.npz is not a whole graph"):
        Amazon("Photo", root=tmp_path).graph  # noqa: B018


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Cora in .*: expected .*Cora/raw or .*--data.root"):
        Planetoid("Cora", root=tmp_path).graph  # noqa: B018
    with pytest.raises(ValueError, match=r"name must be one of 'Cora'"):
        Planetoid("cora")
    with pytest.raises(ValueError, match="Photo"):
        Amazon("Foto")


def test_features_are_scaled_and_sparse_where_that_pays(make_data):
    dense = make_data()
    assert not dense.graph.x.is_sparse
    torch.testing.assert_close(dense.graph.x.sum(1), torch.ones(24))
    sparse = make_data(sparse_features=True, normalize_features=False)
    assert sparse.graph.x.is_sparse and set(sparse.graph.x.values().tolist()) == {1.0}
    assert torch.equal(dense.raw(dense.collate_evaluation([(3, 0), (5, 2)])[0]), dense.graph.x[[3, 5]])


def test_directed_edges_stay_so_if_asked(make_data):
    class OneWay(make_data):
        def read(self):
            return Graph(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 0, 1], [1, 1, 1]]))

    assert OneWay(undirected=False).graph.edge_index.T.tolist() == [[0, 1]]
    assert OneWay().graph.edge_index.T.tolist() == [[0, 1], [1, 0]]
    assert (
        OneWay().num_classes is None and len(OneWay().splits["train"]) == 3
    )  # nodes without labels are embedded


def test_a_batch_of_all_nodes_names_none(make_data):
    data = make_data(batch_size=5)
    dataset = data.train_dataset()
    batch = data.collate(dataset.__getitems__([4, 2, 9]))
    assert batch.nodes.tolist() == [4, 2, 9] and len(batch) == 3
    assert data.collate(dataset.__getitems__(list(range(24)))).nodes is None
    assert dataset[4] == (4, 1) and len(dataset) == 24
    assert make_data().batch_size == 24 and data.batch_size == 5


def test_random_splits(make_data):
    first = make_data(split=RandomSplit(0.25, 0.25))
    rows = torch.cat(list(first.splits.values()))
    assert rows.sort().values.tolist() == list(range(24)) and [len(r) for r in first.splits.values()] == [
        6,
        6,
        12,
    ]
    other, fixed = make_data(split=RandomSplit(0.25, 0.25)), make_data(split=RandomSplit(0.25, 0.25, seed=0))
    other.set_seed(1)
    fixed.set_seed(1)
    assert not torch.equal(other.splits["train"], first.splits["train"])
    assert torch.equal(fixed.splits["train"], first.splits["train"])


def test_splits_by_class(make_data):
    splits = make_data(split=PerClassSplit(2, 6)).splits
    assert [len(rows) for rows in splits.values()] == [6, 6, 12]
    assert (splits["train"] % 3).bincount().tolist() == [2, 2, 2]
    assert len(torch.cat(list(splits.values())).unique()) == 24
    with pytest.raises(ValueError, match="train must be below the 8 nodes of class 0"):
        make_data(split=PerClassSplit(8)).splits  # noqa: B018
    with pytest.raises(
        ValueError, match="validation and test must fit into the 18 nodes that are left, got 18"
    ):
        make_data(split=PerClassSplit(2, 18)).splits  # noqa: B018


def test_several_public_splits(make_data):
    class Several(make_data):
        def read(self):
            graph = super().read()
            for place, name in enumerate(("train_mask", "val_mask", "test_mask")):
                graph[name] = torch.stack([torch.arange(24) % 3 == place, torch.arange(24) // 8 == place], 1)
            return graph

    assert Several(split=PublicSplit(1)).splits["validation"].tolist() == list(range(8, 16))
    with pytest.raises(ValueError, match="number must be below the 2 splits, got 2"):
        Several(split=PublicSplit(2)).splits  # noqa: B018
    with pytest.raises(ValueError, match="come without a split"):
        make_data(split=PublicSplit()).splits  # noqa: B018


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomSplit(0.5, 0.5), "must leave nodes for testing"),
        (lambda: RandomSplit(0, 0.1), "train must be finite and > 0"),
        (lambda: PublicSplit(-1), "number must be at least 0"),
        (lambda: KarateClub(root=""), "root must name a folder"),
        (lambda: KarateClub(passes_per_epoch=0), "passes_per_epoch must be at least 1"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_karate_club():
    data = KarateClub()
    assert (data.graph.num_nodes, data.graph.edge_index.shape[1], data.num_classes) == (34, 156, 4)
    assert [len(rows) for rows in data.splits.values()] == [8, 8, 18]


@pytest.mark.parametrize(
    ("kind", "name", "nodes", "edges", "features"),
    [
        (Planetoid, "Cora", 2708, 10556, 1433),
        (Planetoid, "CiteSeer", 3327, 9104, 3703),
        (Amazon, "Photo", 7650, 238162, 745),
        (Amazon, "Computers", 13752, 491722, 767),
        (CitationFull, "DBLP", 17716, 105734, 1639),
    ],
)
def test_real_graphs(real_data, kind, name, nodes, edges, features):
    data = kind(name, root=real_data)
    assert (data.graph.num_nodes, data.graph.edge_index.shape[1], data.num_features) == (
        nodes,
        edges,
        features,
    )


def test_the_public_split_of_cora(real_data):
    splits = Planetoid("Cora", root=real_data, split=PublicSplit()).splits
    assert [len(rows) for rows in splits.values()] == [140, 500, 1000]
