"""Fixtures that several test files share: a small graph of communities, and raw files of data sets."""

from __future__ import annotations

import os

import pytest
import torch

from cl_graph.data import GraphData
from cl_graph.graphs import Graph


def communities(nodes=24, classes=3, features=12, seed=0):
    """A graph whose nodes meet mostly those of their class and have features of their class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    likely = torch.where(y[:, None] == y, 0.5, 0.05)
    linked = torch.rand(nodes, nodes, generator=generator).triu(1) > 1 - likely.triu(1)
    edge_index = (linked | linked.T).nonzero().T.contiguous()
    centres = torch.rand(classes, features, generator=generator)
    x = (torch.rand(nodes, features, generator=generator) < centres[y]).float()
    x[:, 0] = 1  # nobody is without features
    return Graph(x=x, edge_index=edge_index, y=y)


class Communities(GraphData):
    """Data of :func:`communities`."""

    def read(self):
        return communities()


@pytest.fixture
def graph():
    return communities()


@pytest.fixture
def make_data():
    return Communities


@pytest.fixture
def real_data():
    root = os.environ.get("CL_DATA")
    if not root:
        pytest.skip("CL_DATA names no folder of real graphs")
    return root
