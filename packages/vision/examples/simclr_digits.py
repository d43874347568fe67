"""SimCLR with the decoupled loss on handwritten digits, in a bare torch loop.

    python simclr_digits.py                     # one to two minutes on two cores
    python simclr_digits.py --loss NTXentLoss --temperature 0.2

Prints how well nearest neighbours and a linear probe find the digit, from raw pixels, from the features of the
untrained encoder and from those of the trained one. The command line's ``cl-vision fit --config dcl/digits`` does
the same with checkpoints, figures and resume.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_core import losses
from cl_core.evaluation import knn_accuracy, linear_probe
from cl_core.method import Method
from cl_core.training.evaluating import embed_split
from cl_vision.data import Digits
from cl_vision.encoders import SmallConvNet
from cl_vision.methods.simclr import SimCLR

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--loss", choices=["DCLLoss", "NTXentLoss"], default="DCLLoss")
parser.add_argument("--temperature", type=float, default=0.5)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--batch_size", type=int, default=128)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
data = Digits(batch_size=options.batch_size)
data.set_seed(options.seed)
views = data.train_dataset()
loader = DataLoader(views, options.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

loss = getattr(losses, options.loss)(temperature=options.temperature)
method = SimCLR(SmallConvNet(width=32, in_channels=1), loss)
optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=1e-4), lr=options.learning_rate)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, options.learning_rate, total_steps=options.epochs * len(loader), pct_start=0.05
)


class Pixels(Method):
    """The images themselves as features: what every encoder has to beat."""

    def embed(self, inputs: Tensor) -> Tensor:
        """Pixels, shape (N, C * H * W)."""
        return inputs.flatten(start_dim=1)


def train(epoch: int) -> float:
    """One pass over the images, with this epoch's views; returns the mean loss."""
    views.set_epoch(epoch)
    total = 0.0
    for batch in loader:
        value = method(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        total += value.item()
    return total / len(loader)


def test(name: str, features: Method) -> None:
    """Probe frozen features: the penalty is chosen on validation, the accuracies are those on test."""
    training, validation, testing = (
        embed_split(features, data, split) for split in ("train", "validation", "test")
    )
    neighbours = knn_accuracy(*training, *testing, k=5)
    linear = linear_probe(*training, *validation).accuracy(*testing)
    print(f"{name:18}  kNN {100 * neighbours:5.1f} %   linear probe {100 * linear:5.1f} %")


test("raw pixels", Pixels())
test("untrained encoder", method)
for epoch in range(options.epochs):
    mean = train(epoch)
    if (epoch + 1) % 10 == 0:
        print(f"epoch {epoch + 1:3}  loss {mean:6.3f}")
test("trained encoder", method)
