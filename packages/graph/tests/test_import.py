import subprocess
import sys

import pytest

import cl_graph

LAZY = """
import sys
import cl_graph, cl_graph.data, cl_graph.methods
heavy = {"torch", "torch_geometric", "sklearn", "matplotlib", "lightning"} & set(sys.modules)
assert not heavy, heavy
"""
QUIET = """
import warnings
warnings.simplefilter("error")
from cl_graph.methods import GRACE
"""


@pytest.mark.parametrize("program", [LAZY, QUIET])
def test_imports_are_lazy_and_quiet(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_exists():
    from cl_graph import data, methods

    for module in (cl_graph, data, methods):
        assert all(getattr(module, name) is not None for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_version():
    assert cl_graph.__version__.count(".") == 2
