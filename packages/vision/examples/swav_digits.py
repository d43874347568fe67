"""SwAV on handwritten digits, in a bare torch loop: views predict each other's cluster.

    python swav_digits.py # one to two minutes on two cores

Prints how well nearest neighbours and a linear probe find the digit from the features of the untrained and of the
trained encoder. The command line's ``cl-vision fit --config swav/digits`` does the same with checkpoints, figures and
resume.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from cl_core.losses import SwAVLoss
from cl_core.method import Progress
from cl_core.projectors import MLPProjector
from cl_core.training import Evaluation, evaluate
from cl_vision import SwAV
from cl_vision.data import Digits
from cl_vision.encoders import SmallConvNet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
data = Digits(batch_size=128)
data.set_seed(options.seed)
views = data.train_dataset()
loader = DataLoader(views, data.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

method = SwAV(
    SmallConvNet(width=32, in_channels=1),
    SwAVLoss(),
    MLPProjector(hidden_dim=256, out_dim=64),
    num_prototypes=64,
    queue_size=512,  # a batch of 128 alone is few rows to spread over 64 clusters
    queue_from_epoch=5,
)
optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=1e-4), lr=1e-3)
steps = options.epochs * len(loader)


def test(name: str) -> None:
    """Accuracies on test of the frozen features; what they leave open is chosen on validation."""
    found = evaluate(method, data, Evaluation(neighbours=(5,), regularizations=(1.0, 0.1, 0.01, 0.001)))
    print(f"{name:18}  kNN {100 * found['knn']:5.1f} %   linear probe {100 * found['linear']:5.1f} %")


test("untrained encoder")
for epoch in range(options.epochs):
    views.set_epoch(epoch)  # other random views of the same images
    method.on_epoch_start(Progress(epoch * len(loader), steps, epoch, options.epochs))
    for place, batch in enumerate(loader, epoch * len(loader)):
        loss = method(batch)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(
            Progress(place, steps, epoch, options.epochs)
        )  # prototypes rest in the first epoch
        optimizer.step()
        method.after_step(Progress(place + 1, steps, epoch, options.epochs))  # and keep unit length
    if (epoch + 1) % 10 == 0:
        print(f"epoch {epoch + 1:3}  loss {loss.item():6.3f}")
test("trained encoder")
