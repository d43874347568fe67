import subprocess
import sys

import pytest

import cl_vision

LAZY = """
import sys
import cl_vision, cl_vision.data, cl_vision.methods
heavy = {"torch", "torchvision", "sklearn", "matplotlib", "lightning"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_is_lazy():
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=60)


def test_every_public_name_exists():
    from cl_vision import data, methods

    for module in (cl_vision, data, methods):
        assert all(getattr(module, name) is not None for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_version():
    assert cl_vision.__version__.count(".") == 2
