"""Runs in an environment that holds cl-core's wheel and what it requires: torch, and nothing for training."""

import importlib.metadata
import importlib.util
import warnings

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # what torch itself says at its import

import torch  # noqa: E402

import cl_core  # noqa: E402
from cl_core import functional, losses  # noqa: E402

for absent in ("numpy", "lightning", "jsonargparse", "torchvision", "cl_vision"):
    assert importlib.util.find_spec(absent) is None, (
        f"{absent} is installed; this environment proves nothing."
    )

generator = torch.Generator().manual_seed(0)
z1, z2 = (torch.randn(1024, 32, generator=generator, requires_grad=True) for _ in range(2))
for loss in (losses.NTXentLoss(temperature=0.1)(z1, z2), functional.dcl_loss(z1, z2, temperature=0.1)):
    gradients = torch.autograd.grad(loss, (z1, z2))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)

installed = sorted(one.metadata["Name"] for one in importlib.metadata.distributions())
print(f"cl-core {cl_core.__version__} on torch {torch.__version__}; installed: {', '.join(installed)}")
