"""The battery over every registered method on graphs."""

import json
from pathlib import Path

import pytest
import torch

from cl_core import plugins
from cl_core.losses import InfoNCELoss, NTXentLoss
from cl_core.testing import method_checks
from cl_core.testing.methods import CHECKS
from cl_graph.data import NodeBatch
from cl_graph.encoders import GCN
from cl_graph.graphs import Graph
from cl_graph.methods import COSTA, GCA, GRACE, ProGCL
from cl_graph.mixture import MixtureNCELoss

# {method: {check: reason}}: the one place where a method may be excused from a check.
EXCLUSIONS = json.loads(Path(__file__).with_name("exclusions.json").read_text())
METHODS = {
    plugin.name: plugins.load_method(plugin.name)
    for plugin in plugins.available_methods()
    if plugin.target.startswith("cl_graph.")
}


def grace():
    return GRACE(GCN(6, dim=8), NTXentLoss(temperature=0.4))


def gca():
    return GCA(GCN(6, dim=8), NTXentLoss(temperature=0.4))


def costa():
    return COSTA(GCN(6, dim=8), InfoNCELoss(temperature=0.4, symmetric=True), ratio=0.6)


def progcl():
    return ProGCL(GCN(6, dim=8), MixtureNCELoss(temperature=0.4), mixture_from=1)


# {method: (factory, loss after two steps)}
TINY = {
    "COSTA": (costa, 1.951048),
    "GCA": (gca, 3.206461),
    "GRACE": (grace, 3.314392),
    "ProGCL": (progcl, 3.214226),
}


def ring(nodes=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.arange(nodes)
    one_way = torch.cat([torch.stack([start, (start + step) % nodes]) for step in (1, 2)], dim=1)
    return Graph(
        x=torch.rand(nodes, 6, generator=generator), edge_index=torch.cat([one_way, one_way.flip(0)], 1)
    )


def batches():
    return [NodeBatch(ring(seed=0)), NodeBatch(ring(seed=1), torch.arange(8))]


def checks_of(name):
    factory, stored_loss = TINY[name]
    return method_checks(factory, batches(), inputs=batches()[0], rows=12, stored_loss=stored_loss)


def test_every_registered_method_is_here():
    assert set(TINY) == set(METHODS)
    for name, (factory, _) in TINY.items():
        assert type(factory()) is METHODS[name]


def test_exclusions_name_what_exists():
    for name, checks in EXCLUSIONS.items():
        assert name in TINY
        assert set(checks) <= set(CHECKS)
        assert all(isinstance(reason, str) and reason for reason in checks.values())


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in TINY for check in checks_of(name)])
def test_battery(name, check):
    if check in EXCLUSIONS.get(name, {}):
        with pytest.raises(AssertionError):  # an exclusion that is no longer needed fails
            checks_of(name)[check]()
    else:
        checks_of(name)[check]()
