import pytest
import torch

from cl_graph.encoders import GCN


def test_two_convolutions_with_an_activation_after_each(graph):
    torch.manual_seed(0)
    encoder = GCN(12, hidden_dim=7, dim=5, activation="prelu")
    x = graph.x
    for conv in encoder.convs:
        x = encoder.act(conv(x, graph.edge_index))
    torch.testing.assert_close(encoder(graph.x, graph.edge_index), x)


def test_sparse_features_give_the_same_values_and_gradients(graph):
    torch.manual_seed(0)
    encoder = GCN(12, dim=5)
    gradients = []
    for x in (graph.x, graph.x.to_sparse_coo()):
        z = encoder(x, graph.edge_index)
        gradients.append([z, *torch.autograd.grad(z.square().sum(), list(encoder.parameters()))])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(dense, sparse)


def test_hidden_layers_are_twice_as_wide_by_default():
    assert GCN(12, dim=5, layers=3).convs[1].lin.weight.shape == (10, 10)


def test_can_be_built_later(graph):
    encoder = GCN(dim=5)
    with pytest.raises(RuntimeError, match="no in_dim yet"):
        encoder(graph.x, graph.edge_index)
    encoder.build(12)
    assert encoder(graph.x, graph.edge_index).shape == (24, 5)
    with pytest.raises(RuntimeError, match="already built"):
        encoder.build(12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"activation": "tanh"}, "activation must be one of 'relu'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        GCN(12, **options)


def test_features_of_another_width_are_refused(graph):
    with pytest.raises(ValueError, match="x must have 3 features, got 12"):
        GCN(3)(graph.x, graph.edge_index)


def test_a_random_slope_is_random_in_training_and_its_mean_otherwise(graph):
    torch.manual_seed(0)
    encoder = GCN(12, dim=5, layers=1, activation="rrelu")
    draws = [encoder(graph.x, graph.edge_index) for _ in range(2)]
    assert not torch.equal(*draws)
    z = encoder.eval()(graph.x, graph.edge_index)
    before = encoder.convs[0](graph.x, graph.edge_index)
    torch.testing.assert_close(z, torch.nn.functional.leaky_relu(before, (1 / 8 + 1 / 3) / 2))
