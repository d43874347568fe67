"""AMCL against naive loops over its printed equations; no published code of it runs."""

import pytest
import torch
import torch.nn.functional as F

from cl_core import similarity
from cl_core.functional import amcl_barlow_loss, amcl_loss, amcl_simsiam_loss
from cl_core.temperatures import PairTemperature
from cl_core.testing import parity

TOLERANCE = {
    torch.float64: parity.Tolerance(1e-8, 1e-12, 1e-8, 1e-12),
    torch.float32: parity.Tolerance(1e-4, 1e-6, 1e-4, 1e-6),
}


def columns(stacks):
    """Stored stacks (C, N, d) as embeddings, heads side by side."""
    return stacks.transpose(0, 1).flatten(1)


def network(arrays, heads=slice(None)):
    """The stored network, or that of some heads."""
    weight1, bias1, weight2, bias2 = (arrays.tensor(name)[heads] for name in ("w1", "b1", "w2", "b2"))
    count, hidden, width = weight1.shape
    ends = {"minimum": arrays.parameter("tau_min"), "maximum": arrays.parameter("tau_max")}
    found = PairTemperature(width // 2, heads=count, hidden_dim=hidden, **ends).to(weight1.dtype)
    values = {"weight1": weight1, "bias1": bias1.flatten(), "weight2": weight2, "bias2": bias2.flatten()}
    found.load_state_dict(values)
    return found


def options(arrays):
    """The temperature sees the heads' raw outputs."""
    heads, beta = arrays.parameter("n_heads"), arrays.parameter("beta")
    return {"heads": heads, "beta": beta, "temperature": network(arrays), "raw_input": True}


def both(z1, z2):
    """Anchors in the stored order, view 1 first; the partner of each; and which sample each is of."""
    anchors, partners = torch.cat([z1, z2], 1).detach(), torch.cat([z2, z1], 1).detach()
    return anchors, partners, torch.arange(z1.shape[1]).repeat(2)


def hardest(rows, others, **keys):
    return torch.stack(
        [
            similarity.nearest(F.normalize(x), F.normalize(y), **keys)
            for x, y in zip(rows, others, strict=True)
        ]
    )


def run_temperature(arrays):
    z1, z2 = arrays.tensor("z1"), arrays.tensor("z2")
    tau = network(arrays)(z1, z2)
    arrays.compare("tau_pos", tau)
    for name in ("n_heads", "beta"):
        arrays.parameter(name)
    # What beta = 1/2 adds to the loss of predictions is the regulariser once.
    found = []
    for head, (u, v) in enumerate(zip(z1, z2, strict=True)):
        given = {"heads": 1, "temperature": network(arrays, slice(head, head + 1)), "raw_input": True}
        values = [amcl_simsiam_loss(u, v, beta=beta, reduction="none", **given) for beta in (0, 0.5)]
        found.append(values[1] - values[0])
    arrays.compare("omega_tau_pos", torch.stack(found))


def run_simclr(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    given = options(arrays)
    loss = amcl_loss(columns(z1), columns(z2), **given)
    arrays.compare("loss", loss)
    net = given.pop("temperature")
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2, grad_w1=net.weight1, grad_w2=net.weight2)
    anchors, partners, samples = both(z1, z2)
    index = hardest(anchors, anchors, row_keys=samples, column_keys=samples, over="different")
    arrays.compare("hardest_negative", index)
    arrays.compare("tau_pos", net(anchors, partners))
    chosen = torch.stack([head[i] for head, i in zip(anchors, index, strict=True)])
    arrays.compare("tau_neg", net(anchors, chosen))
    each = [
        amcl_loss(
            z1[c],
            z2[c],
            reduction="none",
            **given | {"heads": 1, "temperature": network(arrays, slice(c, c + 1))},
        )
        for c in range(len(z1))
    ]
    arrays.compare("per_anchor", torch.stack(each))


def run_infonce(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    loss = amcl_loss(columns(z1), columns(z2), include_positive=True, **options(arrays))
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2)
    anchors, _, samples = both(z1, z2)
    own = torch.arange(len(samples))
    arrays.compare(
        "hardest_candidate", hardest(anchors, anchors, row_keys=own, column_keys=own, over="different")
    )


def run_moco(arrays):
    (z1,) = arrays.leaves("z1")
    z2, queue = arrays.tensor("z2"), arrays.tensor("queue")
    loss = amcl_loss(columns(z1), columns(z2), columns(queue), **options(arrays))
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z1=z1)
    arrays.compare("hardest_negative", hardest(z1.detach(), queue))


def run_simsiam(arrays):
    z1, z2 = arrays.leaves("z1", "z2")
    h1, h2 = arrays.tensor("h1"), arrays.tensor("h2")
    given = options(arrays)
    both_ways = [amcl_simsiam_loss(columns(z), columns(h), **given) for z, h in ((z1, h2), (z2, h1))]
    loss = sum(both_ways) / 2
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2)


def run_barlow(arrays):
    z1, z2, tau = arrays.leaves("z1", "z2", "tau")
    for name in ("tau_min", "tau_max"):
        arrays.parameter(name)
    loss = amcl_barlow_loss(
        columns(z1),
        columns(z2),
        heads=arrays.parameter("n_heads"),
        temperature=tau,
        lambd=arrays.parameter("lambda_offdiag"),
        beta=arrays.parameter("beta"),
        eps=1e-12,  # stored without any
    )
    arrays.compare("loss", loss)
    arrays.compare_gradients(loss, grad_z1=z1, grad_z2=z2, grad_tau=tau)


KINDS = {name.removeprefix("run_"): run for name, run in list(globals().items()) if name.startswith("run_")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", parity.cases("amcl", beside=__file__), ids=str)
def test_matches_the_equations(case, dtype):
    run = case.claim(KINDS)
    with case.open(dtype, TOLERANCE[dtype]) as arrays:
        run(arrays)
