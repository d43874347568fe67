"""The ``cl-graph`` command."""

from __future__ import annotations

from collections.abc import Sequence

from cl_core.training import cli

DOMAIN = cli.Domain(
    command="cl-graph",
    package="cl_graph",
    distribution="cl-graph",
    summary="Contrastive learning on graphs.",
    data={
        "Amazon": "cl_graph.data.benchmarks:Amazon",
        "CitationFull": "cl_graph.data.benchmarks:CitationFull",
        "Coauthor": "cl_graph.data.benchmarks:Coauthor",
        "KarateClub": "cl_graph.data.benchmarks:KarateClub",
        "Planetoid": "cl_graph.data.benchmarks:Planetoid",
    },
    modules=(
        "cl_graph.encoders",
        "cl_core.projectors",
        "cl_graph.views",
        "cl_graph.mixture",
        "cl_graph.pot",
        "cl_graph.data.splits",
    ),
    inputs="raw features",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; ``args`` are those of the process by default. Returns the exit status."""
    return cli.main(DOMAIN, args)
