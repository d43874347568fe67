"""POT: push up a lower bound of how much better each node agrees with itself than with the others.

The bound holds over all views that drop edges within a budget. It is worked out backwards through the layers of a graph
convolutional encoder, with every number an edge's or a node's: nothing is n x n, no matrix as wide as the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_core import _checks
from cl_graph._geometric import GCNConv, Graph
from cl_graph.adjacency import Adjacency, with_self_loops
from cl_graph.encoders import linear
from cl_graph.hosts import EncodedView, Regulariser

Variant = Literal["tight", "official"]
Neighbors = Literal["closed", "induced"]
_COLUMNS = 32  # worked out at a time: the fewer, the less memory, the more products with the adjacency


@dataclass(frozen=True)
class EdgeDropBounds:
    """How large and how small the entries of the normalised adjacency can be while edges are dropped.

    An entry (j, i) of a view lies between the diagonal ``lower``, zero elsewhere, and 1 / sqrt(k_j k_i), where k is the
    degree that a node keeps, its self loop counted. A node keeps all but as many edges as are dropped of it on average,
    rounded, and always one.

    Attributes:
        edge_index: edges of the graph with a self loop on every node, shape (2, m + n).
        kept: degree that each node keeps at least, shape (n,).
        degree: degree of each node, shape (n,), its self loop counted in both.
    """

    edge_index: Tensor
    kept: Tensor
    degree: Tensor

    @classmethod
    def of_drops(cls, edge_index: Tensor, num_nodes: int, probabilities: float | Tensor) -> EdgeDropBounds:
        """Bounds for edges that are dropped at random.

        Args:
            edge_index: edges of the graph, both directions of each, shape (2, m).
            num_nodes: n.
            probabilities: with which edges are dropped: a number, or one for each edge, shape (m,).

        Cost: O(m).
        """
        p = torch.as_tensor(probabilities, dtype=torch.float64, device=edge_index.device)
        if p.shape not in ((), edge_index.shape[1:]):
            raise ValueError(
                f"probabilities must be a number or one for each of the {edge_index.shape[1]} edges, got shape "
                f"{tuple(p.shape)}."
            )
        _checks.shares("probabilities", p)
        target = edge_index[1]
        degree = torch.bincount(target, minlength=num_nodes)
        if p.ndim == 0:
            dropped = degree * p
        else:
            dropped = torch.zeros(num_nodes, dtype=p.dtype, device=p.device).index_add(0, target, p)
        degree = degree + 1
        budget = torch.minimum((degree - 2).clamp_min(0), dropped.round().long())
        return cls(with_self_loops(edge_index, num_nodes), degree - budget, degree)

    def upper(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Largest entry for each of ``edge_index``, shape (m + n,)."""
        scale = self.kept.to(dtype).rsqrt()
        return scale[self.edge_index[0]] * scale[self.edge_index[1]]

    def lower(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Smallest entry of each self loop, shape (n,); all others may be zero."""
        return self.degree.to(dtype).reciprocal()


class Relaxation(NamedTuple):
    """Lines below and above an activation on an interval: slope v and slope v + lift.

    Attributes:
        slope: of both lines.
        lift: of the upper one.
    """

    slope: Tensor
    lift: Tensor


def relax(lower: Tensor, upper: Tensor, negative_slope: float) -> Relaxation:
    """Lines that enclose v for v >= 0 and a v below, on [lower, upper].

    With p the positive part of u and q that of -l, the slope is (p + a q) / (p + q) and the lift (1 - a) p q / (p + q):
    the chord where the interval holds both signs, and the activation itself where it does not.

    Args:
        lower: l, any shape.
        upper: u, of the same shape.
        negative_slope: a, in [0, 1].
    """
    p, q = F.relu(upper), F.relu(-lower)
    share = (1 - negative_slope) * q / (p + q + torch.finfo(q.dtype).tiny)  # nothing where both are zero
    return Relaxation(1 - share, share * p)


def contrast_vectors(z: Tensor) -> Tensor:
    """What an embedding is scored against: its own unit row of the other view less the mean of all other rows.

    Args:
        z: embeddings of the other view, shape (N, D), N >= 2.

    Returns:
        Shape (N, D).
    """
    _checks.embeddings("z", z, at_least=2)
    unit = F.normalize(z, dim=1)
    return unit - (unit.sum(0) - unit) / (len(unit) - 1)


def node_compactness(
    encoder: nn.Module,
    x: Tensor,
    edge_index: Tensor,
    view_edges: Tensor,
    other: Tensor,
    bounds: EdgeDropBounds,
    *,
    nodes: Tensor | None = None,
    variant: Variant = "tight",
    neighbors: Neighbors = "closed",
    certified: bool = False,
) -> Tensor:
    """How much closer each node is bound to stay to itself in the other view than to the mean of the others.

    With contrast vectors c_i = u_i - mean of u_j, j other than i, u the unit rows of ``other``, a lower bound of
    c_i . z_i over views with fewer edges, evaluated at one view.

    ``"tight"`` follows the bound to the nodes whose features it is about. With the layers' intervals worked out from
    the clean hidden states, as published, it is a close estimate that the truth rarely falls below; ``certified``
    passes the intervals on from layer to layer, so that it never does for any view within the budget, and is loose.
    ``"official"`` is what the published code computes: the last node's coefficients for the features of the first, and
    the transposed adjacency. It exceeds the truth for most nodes.

    Args:
        encoder: graph convolutions with one activation: has ``convs``, a list of ``GCNConv``, and ``act`` after each of
            them: identity, ReLU, leaky ReLU, RReLU (by its mean slope) or PReLU of one slope in [0, 1].
        x: features of the nodes, not masked, shape (n, F), dense or sparse COO.
        edge_index: edges of the graph, shape (2, m).
        view_edges: edges of the view at which the bound is evaluated, a part of them, shape (2, m').
        other: the encoder's embeddings of the nodes in the other view, shape (N, D), N >= 2.
        bounds: of the entries of the adjacency.
        nodes: the N nodes, shape (N,); None for all n in their order.
        variant: ``"tight"`` or ``"official"``.
        neighbors: ``"closed"`` also reads the nodes around ``nodes`` that their embeddings depend on; ``"induced"``
            leaves them out, as the published code does, and most edges with them.
        certified: pass intervals on from layer to layer; for ``"tight"`` only.

    Returns:
        Shape (N,).

    Raises:
        TypeError: if the encoder is none that can be bounded.
        ValueError: for shapes or options that do not fit.

    Cost: with n and m those of the graph, or of what ``nodes`` depend on: O(m H + n H D) time, O(n H) memory for hidden
    width H; the published code takes O(n^2 D) and O(n^2).

    Reference: Yu et al., "Provable Training for Graph Contrastive Learning", NeurIPS 2023, arXiv 2309.13944.
    """
    _checks.choice("variant", variant, ("tight", "official"))
    _checks.choice("neighbors", neighbors, ("closed", "induced"))
    if certified and variant != "tight":
        raise ValueError("certified needs the tight variant: the official one bounds nothing.")
    if variant == "official" and nodes is not None and neighbors != "induced":
        raise ValueError(
            'neighbors must be "induced" for some nodes of the official variant, which knows no others.'
        )
    clean = _Clean.of(encoder, x, edge_index, nodes, neighbors)
    return clean.scores(view_edges, other, bounds, variant=variant, certified=certified)


class POT(Regulariser):
    """Adds to the loss of a host how badly its nodes are bound to be trained.

    (1 - kappa) host + kappa / 2 (POT(1 | 2) + POT(2 | 1)), with POT(1 | 2) = mean_i softplus(-s_i), s the node
    compactness at view 1 against the embeddings of view 2.

        GRACE(encoder, NTXentLoss(0.4), UniformView(0.4, 0), UniformView(0.3, 0), regulariser=POT(kappa=0.4))

    Args:
        kappa: weight of the regulariser, in [0, 1).
        nodes: how many of the compared nodes it is worked out for, drawn anew each step; None for all.
        variant: ``"tight"``, or ``"official"`` for what the published code computes.
        neighbors: ``"closed"`` reads the nodes around those drawn, ``"induced"`` leaves them out as the published code
            does; None for closed with the tight variant, induced with the official one.

    Reference: Yu et al., "Provable Training for Graph Contrastive Learning", NeurIPS 2023, arXiv 2309.13944. The
    published code drops the nodes around those drawn, and its score is no bound; see :func:`node_compactness`.
    """

    def __init__(
        self,
        kappa: float = 0.5,
        nodes: int | None = None,
        variant: Variant = "tight",
        neighbors: Neighbors | None = None,
    ) -> None:
        super().__init__()
        _checks.number("kappa", kappa, at_least=0)
        if kappa >= 1:
            raise ValueError(f"kappa must be below 1, so that the host still learns, got {kappa}.")
        if nodes is not None:
            _checks.count("nodes", nodes, at_least=2)
        _checks.choice("variant", variant, ("tight", "official"))
        _checks.choice("neighbors", neighbors, ("closed", "induced", None))
        _check_neighbors(variant, neighbors)
        self.kappa, self.nodes, self.variant, self.neighbors = kappa, nodes, variant, neighbors

    def forward(
        self, host: Tensor, encoder: nn.Module, graph: Graph, views: Sequence[EncodedView]
    ) -> dict[str, Tensor]:
        """Loss of the host with the regulariser's.

        Args:
            host: the host's loss, a scalar.
            encoder: that embedded the views.
            graph: clean, of which they are views.
            views: both.

        Returns:
            ``loss``, and without gradient the ``host`` and ``pot`` it is made of.

        Raises:
            ValueError: if a view masks features, which the bound does not cover.
        """
        if any(bool(torch.as_tensor(view.feature_mask).any()) for view in views):
            raise ValueError("POT bounds dropped edges only: feature_mask must be 0 in both views.")
        chosen = views[0].nodes
        if self.nodes is not None:
            count = int(graph.num_nodes) if chosen is None else len(chosen)
            drawn = torch.randperm(count, device=host.device)[: self.nodes].sort().values
            chosen = drawn if chosen is None else chosen[drawn]
        neighbors = self.neighbors or ("closed" if self.variant == "tight" else "induced")
        clean = _Clean.of(encoder, graph.x, graph.edge_index, chosen, neighbors)
        total = host.new_zeros(())
        for view, other in (views, views[::-1]):
            rows = other.embeddings if chosen is None else other.embeddings[chosen]
            bounds = EdgeDropBounds.of_drops(graph.edge_index, int(graph.num_nodes), view.edge_drop)
            scores = clean.scores(view.edge_index, rows, bounds, variant=self.variant)
            total = total + F.softplus(-scores).mean() / 2
        loss = (1 - self.kappa) * host + self.kappa * total
        return {"loss": loss, "host": host.detach(), "pot": total.detach()}


class Layer(NamedTuple):
    """Weight (out, in) and bias (out,) of a graph convolution."""

    weight: Tensor
    bias: Tensor


def bounded_layers(encoder: nn.Module) -> tuple[list[Layer], float]:
    """The layers of an encoder that can be bounded, and the slope of its activation for negative numbers.

    Raises:
        TypeError: saying in one sentence which encoders can be bounded.
        ValueError: for a slope outside [0, 1], or layers that are not built yet.
    """
    convs, act = getattr(encoder, "convs", ()), getattr(encoder, "act", None)
    slope = _negative_slope(act)
    if slope is None or not all(isinstance(conv, GCNConv) for conv in convs):
        raise TypeError(
            "the encoder must be graph convolutions (convs, a list of GCNConv) with one activation after each (act: "
            f"identity, ReLU, leaky ReLU, RReLU or PReLU of one slope), got {type(encoder).__name__} with "
            f"{', '.join(sorted({type(conv).__name__ for conv in convs})) or 'no convs'} and {type(act).__name__}."
        )
    if not len(convs):
        raise ValueError("the encoder must have layers, got one that is not built yet.")
    if not 0 <= slope <= 1:
        raise ValueError(
            f"the activation's slope must lie in [0, 1], so that lines enclose it, got {slope:.4g}."
        )
    return [Layer(conv.lin.weight, conv.bias) for conv in convs], slope


def _negative_slope(act: Any) -> float | None:
    if isinstance(act, nn.ReLU):
        return 0.0
    if isinstance(act, nn.Identity):
        return 1.0
    if isinstance(act, nn.LeakyReLU):
        return act.negative_slope
    if isinstance(act, nn.RReLU):
        return (act.lower + act.upper) / 2
    if isinstance(act, nn.PReLU) and act.weight.numel() == 1:
        return act.weight.item()
    return None


@dataclass(frozen=True)
class _Clean:
    """What of a clean graph a bound needs, whatever the view: the part of it that some nodes depend on.

    Attributes:
        layers: of the encoder.
        slope: of its activation for negative numbers.
        inputs: what each layer's adjacency multiplies, the states before it times its weight, (n', D).
        num_nodes: of the whole graph.
        within: nodes that the bound is worked out on, shape (n',); None for all.
        rows: places among them of the nodes that it is about; None for all.
    """

    layers: list[Layer]
    slope: float
    inputs: list[Tensor]
    num_nodes: int
    within: Tensor | None
    rows: Tensor | None

    @classmethod
    def of(
        cls, encoder: nn.Module, x: Tensor, edge_index: Tensor, nodes: Tensor | None, neighbors: Neighbors
    ) -> _Clean:
        layers, slope = bounded_layers(encoder)
        n, within, rows = len(x), None, None
        adjacency = Adjacency.normalized(edge_index, n, x.dtype)
        if nodes is not None:
            _check_nodes(nodes, n)
            if neighbors == "closed":
                within = _around(nodes, adjacency.edge_index, n, hops=len(layers))
                x, adjacency, rows = (
                    x.index_select(0, within),
                    adjacency.within(within),
                    torch.searchsorted(within, nodes),
                )
        # A random slope is at its mean here as it is in the bounds, in training too.
        act = nn.LeakyReLU(slope) if isinstance(encoder.act, nn.RReLU) else encoder.act
        inputs: list[Tensor] = []
        for layer in layers:
            states = act(adjacency.gather(inputs[-1]) + layers[len(inputs) - 1].bias) if inputs else x
            inputs.append(linear(states, layer.weight))
        if nodes is not None and neighbors == "induced":
            inputs, within = [values[nodes] for values in inputs], nodes
        return cls(layers, slope, inputs, n, within, rows)

    def scores(
        self,
        view_edges: Tensor,
        other: Tensor,
        bounds: EdgeDropBounds,
        *,
        variant: Variant,
        certified: bool = False,
    ) -> Tensor:
        """As :func:`node_compactness`."""
        dtype, count = self.inputs[0].dtype, len(self.inputs[0]) if self.rows is None else len(self.rows)
        if len(other) != count:
            raise ValueError(f"other must have a row for each of the {count} nodes, got {len(other)}.")
        view = self._part(Adjacency.normalized(view_edges, self.num_nodes, dtype))
        upper, own = self.entries(bounds)
        limits = self.limits(upper, own) if certified else [(values, values) for values in self.inputs]
        bound = _Bound(self.layers, self.slope, self.inputs, limits, upper, own, view, self.rows)
        contrast = contrast_vectors(other)
        return bound.official(contrast) if variant == "official" else bound.tight(contrast)

    def entries(self, bounds: EdgeDropBounds) -> tuple[Adjacency, Tensor]:
        """Largest entries of the adjacency, and the smallest of its diagonal, shape (n', 1)."""
        dtype = self.inputs[0].dtype
        own = bounds.lower(dtype)[:, None]
        upper = self._part(Adjacency(bounds.edge_index, bounds.upper(dtype), self.num_nodes))
        return upper, own if self.within is None else own[self.within]

    def limits(self, upper: Adjacency, own: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Between what each layer's inputs may lie, whatever the states before it within their own bounds."""
        limits = [(self.inputs[0], self.inputs[0])]
        for before, layer in pairwise(self.layers):
            interval = _interval(*limits[-1], before.bias, upper, own)
            states = (F.leaky_relu(bound, self.slope) for bound in interval)
            limits.append(_through(layer.weight.T, *states))
        return limits

    def _part(self, adjacency: Adjacency) -> Adjacency:
        return adjacency if self.within is None else adjacency.within(self.within)


def _check_neighbors(variant: Variant, neighbors: Neighbors | None) -> None:
    if variant == "official" and neighbors == "closed":
        raise ValueError('neighbors must be "induced" for the official variant, which scores no other nodes.')


def _check_nodes(nodes: Tensor, num_nodes: int) -> None:
    _checks.labels("nodes", nodes, rows=len(nodes), of="nodes", device=nodes.device)
    if len(nodes) and not 0 <= int(nodes.min()) <= int(nodes.max()) < num_nodes:
        raise ValueError(f"nodes must lie in [0, {num_nodes}), got {int(nodes.min())} to {int(nodes.max())}.")
    if len(nodes.unique()) < len(nodes):
        raise ValueError("nodes must each be named once, got some twice.")


def _around(nodes: Tensor, edge_index: Tensor, num_nodes: int, *, hops: int) -> Tensor:
    """Nodes from which some nodes can be reached in a number of steps, themselves included, ascending."""
    reached = torch.zeros(num_nodes, dtype=torch.bool, device=nodes.device)
    reached[nodes] = True
    for _ in range(hops):
        reached[edge_index[0, reached[edge_index[1]]]] = True
    return reached.nonzero().squeeze(1)


def _through(weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of states times a weight (in, out), for states between ``low`` and ``high``."""
    positive, negative = _signed(weight)
    return low @ positive + high @ negative, high @ positive + low @ negative


def _interval(
    lowest: Tensor, highest: Tensor, bias: Tensor, upper: Adjacency, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds of A M + b for M between ``lowest`` and ``highest`` and A between the bounds of the adjacency."""
    (low_positive, low_negative), (high_positive, high_negative) = _signed(lowest), _signed(highest)
    below, above = upper.gather(torch.cat([low_negative, high_positive], dim=1)).chunk(2, dim=1)
    return below + own * low_positive + bias, above + own * high_negative + bias


def _signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative parts; ReLU's backward is one pass, that of a clamp three."""
    positive = F.relu(values)
    return positive, values - positive


def _blocks(function: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """Results of a function for some columns at a time, whose intermediate results the backward works out anew."""
    pieces = {id(tensor): tensor.split(_COLUMNS, dim=-1) for tensor in tensors}
    blocks = zip(*(pieces[id(tensor)] for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return [function(*block) for block in blocks]
    return [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]


@dataclass(frozen=True)
class _Bound:
    """The score of a view, from the end of the encoder to its beginning.

    Columns do not meet inside a layer, so that what is as large as its states is worked out for some of them at a time.

    Attributes:
        layers, slope, inputs, rows: as in :class:`_Clean`.
        limits: between what each layer's inputs may lie.
        upper: largest entries of the adjacency.
        own: smallest entries of its diagonal, shape (n', 1).
        view: adjacency of the view.
    """

    layers: list[Layer]
    slope: float
    inputs: list[Tensor]
    limits: list[tuple[Tensor, Tensor]]
    upper: Adjacency
    own: Tensor
    view: Adjacency
    rows: Tensor | None

    def tight(self, contrast: Tensor) -> Tensor:
        """Every path of the view with the lines of the node that it passes through, shape (N,)."""
        through, score = self._backwards(len(self.layers) - 1, contrast)
        if len(self.layers) == 1:
            return score + (through * self._chosen(self.view.gather(self.inputs[0]))).sum(1)
        states: tuple[Tensor, Tensor] | None = None
        for place in range(len(self.layers) - 2):
            blocks = _blocks(partial(self._states, states), *self._fed(place))
            low, gap = zip(*blocks, strict=True)
            states = torch.cat(low, dim=1), torch.cat(gap, dim=1)

        def part(coefficients: Tensor, *fed: Tensor) -> Tensor:
            both = self._chosen(self.view.gather(torch.cat(self._states(states, *fed), dim=1)))
            low, gap = both.chunk(2, dim=1)
            return (coefficients * low + _signed(coefficients)[1] * gap).sum(1)

        return score + sum(_blocks(part, through @ self.layers[-1].weight, *self._fed(len(self.layers) - 2)))

    def official(self, contrast: Tensor) -> Tensor:
        """What the published code computes: the coefficients of the last node for the features of the first, (N,).

        It multiplies these coefficients by the first layer's weight, and that by the features; the same number is had
        without a matrix as wide as the features.
        """
        given, constants = contrast, []
        for place in reversed(range(len(self.layers))):
            given, constant = self._backwards(place, given)
            constants.append(constant)
            if place:
                given = given @ self.layers[place].weight
        score = (given * self.inputs[0]).sum(1)
        for constant in reversed(constants):
            score = self.view.scatter(score[:, None]).squeeze(1) + constant
        return score

    def _backwards(self, place: int, given: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (N, D) on a layer's outputs as ones on its inputs' weighted sums, and a constant (N,)."""

        def part(given: Tensor, lowest: Tensor, highest: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            slope, lift = (self._chosen(line) for line in self._lines(lowest, highest, bias))
            through = slope * given
            return through, through @ bias + (lift * _signed(given)[1]).sum(1)

        blocks = _blocks(part, given, *self.limits[place], self.layers[place].bias)
        through, constants = zip(*blocks, strict=True)
        return torch.cat(through, dim=1), sum(constants)

    def _fed(self, place: int) -> tuple[Tensor, ...]:
        """What :meth:`_states` takes of a layer, columns last."""
        arriving = self.layers[place].weight.T if place else self.inputs[0]
        return arriving, *self.limits[place], self.layers[place].bias

    def _states(
        self,
        before: tuple[Tensor, Tensor] | None,
        arriving: Tensor,
        lowest: Tensor,
        highest: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Lower bounds of a layer's states in the view, and how far above them the upper ones lie, (n', D) each."""
        slope, lift = self._lines(lowest, highest, bias)
        if before is None:  # nothing is uncertain before the first layer
            return slope * (self.view.gather(arriving) + bias), lift
        low, gap = before
        below, above = (self.view.gather(bound) for bound in _through(arriving, low, low + gap))
        return slope * (below + bias), slope * (above - below) + lift

    def _lines(self, lowest: Tensor, highest: Tensor, bias: Tensor) -> Relaxation:
        return relax(*_interval(lowest, highest, bias, self.upper, self.own), self.slope)

    def _chosen(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]
