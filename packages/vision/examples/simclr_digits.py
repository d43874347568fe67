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
from torch.utils.data import DataLoader

from cl_core import losses
from cl_core.training import Evaluation, evaluate
from cl_core.training.evaluating import evaluate_raw
from cl_vision import SimCLR
from cl_vision.data import Digits
from cl_vision.encoders import SmallConvNet

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
loader = DataLoader(views, data.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

loss = getattr(losses, options.loss)(temperature=options.temperature)
method = SimCLR(SmallConvNet(width=32, in_channels=1), loss)
optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=1e-4), lr=options.learning_rate)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, options.learning_rate, total_steps=options.epochs * len(loader), pct_start=0.05
)
evaluation = Evaluation(neighbours=(5,), regularizations=(1.0, 0.1, 0.01, 0.001))


def show(name: str, found: dict[str, float]) -> None:
    """Accuracies on test of the frozen features; what they leave open is chosen on validation."""
    print(f"{name:18}  kNN {100 * found['knn']:5.1f} %   linear probe {100 * found['linear']:5.1f} %")


show("raw pixels", evaluate_raw(data, evaluation))
show("untrained encoder", evaluate(method, data, evaluation))
for epoch in range(options.epochs):
    views.set_epoch(epoch)  # other random views of the same images
    for batch in loader:
        value = method(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    if (epoch + 1) % 10 == 0:
        print(f"epoch {epoch + 1:3}  loss {value.item():6.3f}")
show("trained encoder", evaluate(method, data, evaluation))
