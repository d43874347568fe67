"""The parts of torch_geometric that this package stands on, imported without its warnings of other people's concern."""

from __future__ import annotations

import warnings

# It compiles parts of itself in a way that newer versions of torch advise against.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.data import Data as Graph
    from torch_geometric.datasets import KarateClub as BuiltKarateClub
    from torch_geometric.nn import GCNConv
    from torch_geometric.utils import coalesce, to_undirected

__all__ = ["BuiltKarateClub", "GCNConv", "Graph", "coalesce", "to_undirected"]
