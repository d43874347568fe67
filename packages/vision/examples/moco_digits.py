"""MoCo v2 on handwritten digits, in a bare torch loop: a momentum encoder and a queue of keys.

    python moco_digits.py                     # one to two minutes on two cores
    python moco_digits.py --loss DCLLoss      # the decoupled loss in the same host

Prints how well nearest neighbours and a linear probe find the digit from the features of the untrained and of the
trained encoder. The command line's ``cl-vision fit --config moco/digits`` does the same with checkpoints, figures and
resume.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from cl_core import losses
from cl_core.method import Progress
from cl_core.projectors import MLPProjector
from cl_core.training import Evaluation, evaluate
from cl_vision import MoCo
from cl_vision.data import Digits
from cl_vision.encoders import SmallConvNet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--loss", choices=["InfoNCELoss", "DCLLoss"], default="InfoNCELoss")
parser.add_argument("--temperature", type=float, default=0.2)
parser.add_argument("--queue_size", type=int, default=1024)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
data = Digits(batch_size=128)
data.set_seed(options.seed)
views = data.train_dataset()
loader = DataLoader(views, data.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

method = MoCo(
    SmallConvNet(width=32, in_channels=1),
    getattr(losses, options.loss)(temperature=options.temperature),
    MLPProjector(out_dim=64, norm="none"),
    queue_size=options.queue_size,
    momentum=0.99,
    batch_splits=4,  # batch statistics of a part each, or a query would know its key by them
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
    for place, batch in enumerate(loader, 1):
        loss = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = epoch * len(loader) + place
        method.after_step(Progress(done, steps, epoch, options.epochs))  # the key network follows
    if (epoch + 1) % 10 == 0:
        print(f"epoch {epoch + 1:3}  loss {loss.item():6.3f}")
test("trained encoder")
