"""What an import brings along, each seen in an interpreter of its own."""

import json
import statistics
import subprocess
import sys

import pytest
from workspace import members

DOMAINS = [one.module for one in members() if one.name != "cl-core"]
HEAVY = ["lightning", "pytorch_lightning", "jsonargparse", "yaml", "tensorboard", "safetensors", "tqdm",
         "numpy", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "torchvision"]  # fmt: skip


def run(code):
    """Standard output of a fresh interpreter, isolated from the environment's Python settings."""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules_after(code):
    """Top-level modules loaded by some statements."""
    text = run(f"import sys\n{code}\nloaded = sorted(sys.modules)\nimport json\nprint(json.dumps(loaded))")
    return {name.split(".")[0] for name in json.loads(text.splitlines()[-1])}


@pytest.mark.parametrize("module", ["cl_core", *DOMAINS])
def test_a_package_imports_no_torch_until_touched(module):
    loaded = modules_after(f"import {module}; dir({module})")
    assert module in loaded
    assert loaded & {"torch", *HEAVY} == set()


def test_core_loads_nothing_beside_torch_and_the_standard_library():
    torch = modules_after("import torch")
    core = modules_after("import torch, cl_core.functional, cl_core.losses")
    assert core - torch - sys.stdlib_module_names == {"cl_core"}


def test_core_works_where_only_torch_is_installed():
    """Torch without numpy is a supported install: every module of core must import and a loss must run."""
    run(
        f"""
import sys, warnings
for name in {HEAVY}:
    sys.modules[name] = None  # an import of it now fails
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # what torch itself says at its import
import importlib, pkgutil, torch
warnings.simplefilter("error")
import cl_core
for info in pkgutil.walk_packages(cl_core.__path__, "cl_core."):
    if not info.name.startswith("cl_core.training."):
        importlib.import_module(info.name)
from cl_core.losses import NTXentLoss
z = torch.randn(8, 4, requires_grad=True)
NTXentLoss()(z, z.flip(0)).backward()
assert z.grad.isfinite().all()
"""
    )


def test_functional_costs_little_above_torch():
    """At most 0.3 s of CPU; the median of three, for the machine may be busy."""
    clock = "time.process_time()"
    code = f"import time, torch; start = {clock}; import cl_core.functional; print({clock} - start)"
    seconds = [float(run(code)) for _ in range(3)]
    assert statistics.median(seconds) <= 0.3, seconds
