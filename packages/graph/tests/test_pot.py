import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cl_core.losses import NTXentLoss
from cl_graph.data import NodeBatch
from cl_graph.encoders import GCN, Encoder
from cl_graph.graphs import Graph
from cl_graph.methods import GRACE
from cl_graph.pot import POT, EdgeDropBounds, contrast_vectors, node_compactness, relax
from cl_graph.views import UniformView


def double(graph):
    graph = copy.copy(graph)
    graph.x = graph.x.double()
    return graph


def encoder_of(activation="relu", layers=2, seed=0):
    torch.manual_seed(seed)
    encoder = GCN(12, hidden_dim=7, dim=5, layers=layers, activation=activation).double()
    for conv in encoder.convs:
        conv.bias.data.normal_(0, 0.1)
    return encoder


def dropped(edge_index, rate, generator):
    return edge_index[:, torch.rand(edge_index.shape[1], generator=generator) >= rate]


def within_budget(graph, bounds, view):
    """Whether every node keeps at least the degree that the bounds count on."""
    degree = torch.bincount(view[1], minlength=graph.num_nodes) + 1
    return bool((degree >= bounds.kept).all())


def dense(edges, weights, size):
    """Row j, column i: what goes from j to i."""
    return torch.zeros(size, size, dtype=weights.dtype).index_put(tuple(edges), weights, accumulate=True)


def tight_by_hand(encoder, graph, view, other, bounds, nodes, slope):
    """The derivation for two layers, with dense matrices."""
    n, (first, second) = graph.num_nodes, encoder.convs
    upper, lower = (
        dense(bounds.edge_index, bounds.upper(torch.float64), n).T,
        bounds.lower(torch.float64).diag(),
    )
    looped = torch.cat([view, torch.arange(n).expand(2, -1)], 1)
    scale = torch.bincount(looped[1], minlength=n).double().rsqrt()
    q = dense(looped, scale[looped[0]] * scale[looped[1]], n).T
    inputs = graph.x @ first.lin.weight.T
    hidden = encoder.act(first(graph.x, graph.edge_index)) @ second.lin.weight.T
    lines = []
    for values, conv in ((inputs, first), (hidden, second)):
        centre, reach = (upper + lower) / 2, (upper - lower) / 2
        middle, width = centre @ values + conv.bias, reach @ values.abs()
        lines.append(relax(middle - width, middle + width, slope))
    contrast = contrast_vectors(other)
    on_pre = lines[1].slope[nodes] * contrast
    constant = (torch.where(contrast < 0, contrast * lines[1].lift[nodes], 0) + on_pre * second.bias).sum(1)
    on_hidden = on_pre @ second.lin.weight
    pre = q @ inputs + first.bias
    scores = []
    for place, node in enumerate(nodes.tolist()):
        total = constant[place]
        for j in range(n):
            low = lines[0].slope[j] * pre[j]
            high = low + lines[0].lift[j]
            chosen = torch.where(on_hidden[place] >= 0, low, high)
            total = total + q[node, j] * (on_hidden[place] * chosen).sum()
        scores.append(total)
    return torch.stack(scores)


@pytest.mark.parametrize("activation", ["relu", "prelu"])
@pytest.mark.parametrize("nodes", [None, [3, 7, 1, 20]])
def test_the_tight_score_is_the_derived_one(graph, activation, nodes):
    graph, encoder = double(graph), encoder_of(activation)
    view = dropped(graph.edge_index, 0.3, torch.Generator().manual_seed(1))
    rows = torch.arange(24) if nodes is None else torch.tensor(nodes)
    other = torch.randn(len(rows), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.3)
    found = node_compactness(
        encoder, graph.x, graph.edge_index, view, other, bounds, nodes=None if nodes is None else rows
    )
    slope = 0.0 if activation == "relu" else encoder.act.weight.item()
    torch.testing.assert_close(found, tight_by_hand(encoder, graph, view, other, bounds, rows, slope))


def sparse_graph(nodes=60, seed=0):
    """A long graph of few edges, in which most nodes are far from each other."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.arange(nodes - 1)
    one_way = torch.cat(
        [torch.stack([start, start + 1]), torch.randint(nodes, (2, 12), generator=generator)], 1
    )
    one_way = one_way[:, one_way[0] != one_way[1]]
    edges = torch.cat([one_way, one_way.flip(0)], 1).unique(dim=1)
    return Graph(x=torch.randn(nodes, 12, dtype=torch.float64, generator=generator), edge_index=edges)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_nodes_around_those_asked_for_are_enough(layers, sparse):
    """The same scores and gradients as from the whole graph, and nothing read of what lies farther away."""
    graph, encoder = sparse_graph(), encoder_of(layers=layers)
    view = dropped(graph.edge_index, 0.3, torch.Generator().manual_seed(1))
    nodes = torch.tensor([5, 9, 2])
    other = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 60, 0.3)
    x = graph.x.to_sparse_coo() if sparse else graph.x
    found = node_compactness(encoder, x, graph.edge_index, view, other, bounds, nodes=nodes)
    near = torch.zeros(60, dtype=torch.bool)
    near[nodes] = True
    for _ in range(layers):
        near[graph.edge_index[0, near[graph.edge_index[1]]]] = True
    far = graph.x.clone()
    far[~near] = 1e6
    assert not near.all()
    again = node_compactness(encoder, far, graph.edge_index, view, other, bounds, nodes=nodes)
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
def test_a_certified_score_is_never_above_the_truth(graph, layers, activation):
    graph, encoder = double(graph), encoder_of(activation, layers)
    generator = torch.Generator().manual_seed(3)
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.5)
    other = torch.randn(24, 5, dtype=torch.float64, generator=generator)
    contrast, checked = contrast_vectors(other), 0
    while checked < 60:
        view = dropped(graph.edge_index, 0.2, generator)
        if not within_budget(graph, bounds, view):
            continue
        truth = (contrast * encoder(graph.x, view)).sum(1)
        score = node_compactness(encoder, graph.x, graph.edge_index, view, other, bounds, certified=True)
        assert (score <= truth + 1e-9).all()
        checked += 1


def test_the_tight_score_is_rarely_above_the_truth_and_close_to_it(graph):
    graph, encoder = double(graph), encoder_of()
    generator, above, pairs = torch.Generator().manual_seed(3), [], []
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.3)
    for _ in range(20):
        view, other_view = (dropped(graph.edge_index, 0.3, generator) for _ in range(2))
        other = encoder(graph.x, other_view)
        truth = (contrast_vectors(other) * encoder(graph.x, view)).sum(1)
        rows = []
        for variant in ("tight", "official"):
            score = node_compactness(encoder, graph.x, graph.edge_index, view, other, bounds, variant=variant)
            rows.append((score > truth + 1e-9).double().mean())
            pairs.append(torch.corrcoef(torch.stack([score, truth]))[0, 1])
        above.append(torch.stack(rows))
    tight, official = torch.stack(above).mean(0).tolist()
    assert tight < 0.2 and official > 0.4
    assert torch.stack(pairs[::2]).mean() > 0.9


@pytest.mark.parametrize("a", [0.0, 0.25, 1.0])
def test_lines_enclose_the_activation(a):
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(200, 2, dtype=torch.float64, generator=generator).sort(1).values
    lower, upper = ends.unbind(1)
    lines = relax(lower, upper, a)
    for share in torch.linspace(0, 1, 11, dtype=torch.float64):
        v = lower + share * (upper - lower)
        value = functional.leaky_relu(v, a)
        assert (lines.slope * v <= value + 1e-12).all()
        assert (value <= lines.slope * v + lines.lift + 1e-12).all()


def test_an_interval_of_zero_width_has_finite_gradients():
    ends = torch.zeros(3, requires_grad=True)
    lines = relax(ends, ends * 1, 0.0)
    (lines.slope.sum() + lines.lift.sum()).backward()
    assert ends.grad.isfinite().all() and lines.slope.tolist() == [1, 1, 1]


def test_budgets():
    """A star: the centre has four neighbours, the leaves one each, the last node none."""
    edges = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 0, 0, 0, 0]])
    bounds = EdgeDropBounds.of_drops(edges, 6, 0.6)  # 2.4 of the centre's, 0.6 of a leaf's, which keeps it
    assert bounds.degree.tolist() == [5, 2, 2, 2, 2, 1] and bounds.kept.tolist() == [3, 2, 2, 2, 2, 1]
    assert EdgeDropBounds.of_drops(edges, 6, 0.0).kept.tolist() == bounds.degree.tolist()
    unlike = torch.tensor([0.0, 0, 0, 0, 0.9, 0.9, 0.9, 0.9])
    assert EdgeDropBounds.of_drops(edges, 6, unlike).kept.tolist() == [2, 2, 2, 2, 2, 1]


def test_half_a_budget_is_rounded_to_even():
    edges = torch.cat(
        [
            torch.stack([torch.zeros(5), torch.arange(1, 6)]),
            torch.stack([torch.arange(1, 6), torch.zeros(5)]),
        ],
        1,
    )
    assert EdgeDropBounds.of_drops(edges.long(), 6, 0.3).kept[0] == 4  # 1.5 of 5
    assert EdgeDropBounds.of_drops(edges.long(), 6, 0.1).kept[0] == 6  # 0.5 of 5


def grace(**options):
    torch.manual_seed(0)
    views = {"first_view": UniformView(0.4, 0), "second_view": UniformView(0.3, 0)}
    return GRACE(GCN(12, dim=8), NTXentLoss(0.4), **views | options)


def test_without_weight_the_host_is_as_it_was(graph):
    found = []
    for regulariser in (None, POT(kappa=0)):
        method = grace(regulariser=regulariser)
        torch.manual_seed(1)
        out = method(graph)
        loss = out if regulariser is None else out["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in method.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("variant", ["tight", "official"])
def test_the_loss_is_weighted_and_mean_of_both_directions(graph, variant):
    method = grace(regulariser=POT(0.3, variant=variant))
    torch.manual_seed(1)
    out = method(graph)
    torch.manual_seed(1)
    views = [method.encoded(view, graph, None) for view in (method.first_view, method.second_view)]
    bounds = [EdgeDropBounds.of_drops(graph.edge_index, 24, rate) for rate in (0.4, 0.3)]
    pot = sum(
        functional.softplus(
            -node_compactness(
                method.encoder, graph.x, graph.edge_index, views[i].edge_index, views[1 - i].embeddings, bounds[i],
                variant=variant,
            )
        ).mean()
        for i in (0, 1)
    )  # fmt: skip
    torch.testing.assert_close(out["loss"], 0.7 * method.contrast(views) + 0.3 * pot / 2)
    torch.testing.assert_close(out["pot"], pot.detach() / 2)


def test_it_raises_the_compactness(graph):
    method = grace(regulariser=POT(0.5))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        out = method(graph)
        out["loss"].backward()
        optimizer.step()
        values.append(out["pot"].item())
    assert sum(values[-5:]) < sum(values[:5]) - 0.1


@pytest.mark.parametrize("variant", ["tight", "official"])
@pytest.mark.parametrize("batch", [None, torch.arange(4, 16)])
def test_nodes_are_drawn_among_those_compared(graph, monkeypatch, variant, batch):
    from cl_graph import pot

    seen = []

    def listen(encoder, x, edge_index, nodes, neighbors):
        seen.append(nodes)
        return made(encoder, x, edge_index, nodes, neighbors)

    made = pot._Clean.of
    monkeypatch.setattr(pot._Clean, "of", listen)
    grace(regulariser=POT(0.5, nodes=6, variant=variant))(NodeBatch(graph, batch))["loss"].backward()
    assert len(seen) == 1 and len(seen[0].unique()) == 6
    assert batch is None or set(seen[0].tolist()) <= set(batch.tolist())


def test_masked_features_are_refused(graph):
    method = grace(second_view=UniformView(0.3, 0.1), regulariser=POT())
    with pytest.raises(ValueError, match="POT bounds dropped edges only: feature_mask must be 0"):
        method(graph)


class Other(Encoder):
    def __init__(self):
        super().__init__()
        self.in_dim, self.dim, self.weight = 12, 8, nn.Linear(12, 8)

    def forward(self, x, edge_index):
        return self.weight(x)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (Other(), TypeError, "the encoder must be graph convolutions .* got Other with no convs"),
        (
            GCN(12, dim=8, activation="elu"),
            TypeError,
            "identity, ReLU, leaky ReLU, RReLU or PReLU .* and ELU",
        ),
    ],
)
def test_encoders_that_cannot_be_bounded_are_refused(graph, encoder, error, message):
    method = GRACE(encoder, NTXentLoss(), UniformView(0.3, 0), UniformView(0.3, 0), regulariser=POT())
    with pytest.raises(error, match=message):
        method(graph)


def test_a_slope_outside_is_refused(graph):
    method = GRACE(
        GCN(12, dim=8, activation="prelu"),
        NTXentLoss(),
        UniformView(0.3, 0),
        UniformView(0.3, 0),
        regulariser=POT(),
    )
    method.encoder.act.weight.data.fill_(-0.2)
    with pytest.raises(ValueError, match=r"slope must lie in \[0, 1\].* got -0.2"):
        method(graph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 1.0}, "kappa must be below 1"),
        ({"kappa": -0.1}, "kappa must be at least 0"),
        ({"nodes": 1}, "nodes must be at least 2"),
        ({"variant": "loose"}, "variant must be one of 'tight', 'official'"),
        ({"neighbors": "open"}, "neighbors must be one of"),
        (
            {"variant": "official", "neighbors": "closed"},
            'neighbors must be "induced" for the official variant',
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        POT(**options)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, 3, "other must have a row for each of the 24 nodes, got 3"),
        ({"nodes": torch.tensor([1])}, 1, "z must have at least 2 rows"),
        ({"variant": "official", "certified": True}, 24, "certified needs the tight variant"),
        ({"variant": "official", "nodes": torch.tensor([1, 2])}, 2, 'neighbors must be "induced"'),
        ({"nodes": torch.tensor([1, 24])}, 2, r"nodes must lie in \[0, 24\), got 1 to 24"),
        ({"nodes": torch.tensor([1, 1])}, 2, "nodes must each be named once"),
    ],
)
def test_bad_calls_are_refused(graph, options, rows, message):
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.3)
    with pytest.raises(ValueError, match=message):
        node_compactness(
            GCN(12, dim=8),
            graph.x,
            graph.edge_index,
            graph.edge_index,
            torch.randn(rows, 8),
            bounds,
            **options,
        )


def test_two_nodes_are_enough(graph):
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.3)
    nodes = torch.tensor([1, 2])
    scores = node_compactness(
        GCN(12, dim=8), graph.x, graph.edge_index, graph.edge_index, torch.randn(2, 8), bounds, nodes=nodes
    )
    assert scores.shape == (2,) and scores.isfinite().all()


@pytest.mark.parametrize("probabilities", [1.2, -0.1, torch.ones(3)])
def test_bad_probabilities_are_refused(graph, probabilities):
    with pytest.raises(ValueError, match="probabilities must"):
        EdgeDropBounds.of_drops(graph.edge_index, 24, probabilities)


def test_random_slopes_are_bounded_by_their_mean(graph):
    encoder, view, x = encoder_of("rrelu"), graph.edge_index[:, ::2], graph.x.double()
    bounds = EdgeDropBounds.of_drops(graph.edge_index, 24, 0.5)
    other = torch.randn(24, 5, dtype=torch.float64)
    training, evaluating = (
        node_compactness(encoder.train(mode), x, graph.edge_index, view, other, bounds)
        for mode in (True, False)
    )
    assert torch.equal(training, evaluating)
    leaky = encoder_of("leaky_relu")
    leaky.load_state_dict(encoder.state_dict())
    leaky.act.negative_slope = (1 / 8 + 1 / 3) / 2
    expected = node_compactness(leaky, x, graph.edge_index, view, other, bounds)
    torch.testing.assert_close(training, expected)


def test_a_host_of_random_slopes_trains_under_it(graph):
    method = GRACE(
        GCN(12, dim=8, activation="rrelu"),
        NTXentLoss(0.4),
        UniformView(0.3, 0),
        UniformView(0.2, 0),
        regulariser=POT(kappa=0.3),
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    totals = []
    for _ in range(60):
        optimizer.zero_grad()
        losses = method(graph)
        losses["loss"].backward()
        optimizer.step()
        totals.append({name: value.item() for name, value in losses.items()})
    for name in ("loss", "host", "pot"):
        assert sum(t[name] for t in totals[-10:]) < sum(t[name] for t in totals[:10])
