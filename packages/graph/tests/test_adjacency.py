import pytest
import torch
from torch.autograd import gradcheck

from cl_graph._geometric import GCNConv
from cl_graph.adjacency import Adjacency, with_self_loops


def some_edges(nodes=7, edges=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(nodes, (2, edges), generator=generator)  # with repeated edges and self loops


def dense(adjacency):
    matrix = torch.zeros(adjacency.num_nodes, adjacency.num_nodes, dtype=adjacency.weights.dtype)
    source, target = adjacency.edge_index
    return matrix.index_put((target, source), adjacency.weights, accumulate=True)


def test_products_are_those_of_the_dense_matrix():
    edges = some_edges()
    weights = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    adjacency = Adjacency(edges, weights, 7)
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(adjacency.gather(x), dense(adjacency) @ x)
    torch.testing.assert_close(adjacency.scatter(x), dense(adjacency).T @ x)
    leaf = x.requires_grad_()
    assert gradcheck(adjacency.gather, [leaf]) and gradcheck(adjacency.scatter, [leaf])


def test_normalised_as_a_graph_convolution():
    torch.manual_seed(0)
    conv, edges, x = GCNConv(5, 4), some_edges(), torch.randn(7, 5)
    edges = edges.unique(dim=1)
    ours = Adjacency.normalized(edges, 7).gather(x @ conv.lin.weight.T) + conv.bias
    torch.testing.assert_close(ours, conv(x, edges))


def test_a_node_without_edges_keeps_itself():
    adjacency = Adjacency.normalized(torch.tensor([[0, 1], [1, 0]]), 3)
    torch.testing.assert_close(dense(adjacency), torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))


def test_a_graph_without_edges():
    adjacency = Adjacency.normalized(torch.empty(2, 0, dtype=torch.int64), 3)
    torch.testing.assert_close(adjacency.gather(torch.eye(3)), torch.eye(3))


def test_one_self_loop_each():
    edges = with_self_loops(torch.tensor([[0, 1, 1], [1, 1, 0]]), 3)
    assert edges.T.tolist() == [[0, 1], [1, 0], [0, 0], [1, 1], [2, 2]]


def test_half_precision_is_computed_in_single():
    adjacency, x = (
        Adjacency.normalized(some_edges(), 7),
        torch.ones(7, 2, dtype=torch.bfloat16, requires_grad=True),
    )
    found = adjacency.gather(x)
    found.sum().backward()
    assert found.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("edges", "weights", "error", "message"),
    [
        (
            torch.zeros(3, 2, dtype=torch.int64),
            torch.ones(2),
            ValueError,
            r"edge_index must have shape \(2, m\)",
        ),
        (torch.zeros(2, 2), torch.ones(2), TypeError, "edge_index must be int64, got torch.float32"),
        (torch.tensor([[0], [5]]), torch.ones(1), ValueError, r"edge_index must lie in \[0, 5\)"),
        (torch.tensor([[-1], [0]]), torch.ones(1), ValueError, r"edge_index must lie in \[0, 5\)"),
        (torch.tensor([[0], [1]]), torch.ones(2), ValueError, r"weights must have shape \(1,\)"),
    ],
)
def test_refusals(edges, weights, error, message):
    with pytest.raises(error, match=message):
        Adjacency(edges, weights, 5)
