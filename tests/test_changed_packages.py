"""A change is tested where it can break something."""

import pytest
from changed_packages import affected
from workspace import members

EVERYTHING = ["cl-core", "cl-graph", "cl-vision"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], []),
        (["packages/vision/src/cl_vision/cli.py"], ["cl-vision"]),
        (["packages/vision/README.md", "CONTRIBUTING.md"], ["cl-vision"]),
        (["packages/core/tests/test_x.py"], EVERYTHING),  # all require core
        (["README.md", "RESULTS.md"], []),
        (["pyproject.toml"], EVERYTHING),
        (["constraints.txt"], EVERYTHING),
        (["scripts/workspace.py"], EVERYTHING),
        ([".ci/run"], EVERYTHING),
        (["packages/gone/src/cl_gone/x.py"], EVERYTHING),  # a removed package
    ],
)
def test_affected(files, expected):
    found = [one for one in members() if one.name in EVERYTHING]
    assert affected(files, found) == expected
