from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from cl_core.losses._base import TwoViewLoss
from cl_core.method import Method
from cl_core.training.data import Data

CLASSES = 4


class TinyEncoder(nn.Module):
    """What the tiny method trains; ``dropout`` draws from the global state."""

    def __init__(self, width: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.layers = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 5))

    def forward(self, inputs):
        return self.layers(inputs)


class TinyLoss(TwoViewLoss):
    """InfoNCE, written out."""

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z1, z2):
        z1, z2 = nn.functional.normalize(z1, dim=1), nn.functional.normalize(z2, dim=1)
        return nn.functional.cross_entropy(z1 @ z2.T / self.temperature, torch.arange(len(z1)))


class TinyMethod(Method):
    """Two views of a batch, an encoder, a loss; counts its hooks."""

    def __init__(self, encoder: TinyEncoder, loss: TwoViewLoss) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder, loss
        self.calls: list[tuple[str, object]] = []

    def loss(self, batch):
        z1, z2 = self.encoder(batch[0]), self.encoder(batch[1])
        value = self.criterion(z1, z2)
        return {"loss": value, "norm": z1.norm(dim=1).mean()}

    def embed(self, inputs):
        return self.encoder(inputs)

    def on_fit_start(self, progress):
        self.calls.append(("fit", progress))

    def on_epoch_start(self, progress):
        self.calls.append(("epoch", progress))

    def after_step(self, progress):
        self.calls.append(("step", progress))


class TwoOptimisers(TinyMethod):
    """The encoder's last layer has an optimiser of its own."""

    def parameter_groups(self, weight_decay):
        return [
            {"params": list(self.encoder.layers[0].parameters()), "weight_decay": weight_decay},
            {"params": list(self.encoder.layers[3].parameters()), "optimizer": "head", "lr_scale": 0.5},
        ]


class TakingTurns(TwoOptimisers):
    """Both optimisers step one after the other, each on a loss of its own."""

    def update(self, batch, optimizers, backward):
        for name in ("main", "head"):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            losses = self.loss(batch)
            backward(losses["loss"])
            optimizers[name].step()
        return losses


class TinyClassifier(TinyMethod):
    """It also tells the classes apart, as well as it can without their labels."""

    def __init__(self, encoder: TinyEncoder, loss: TwoViewLoss, classes: int = CLASSES) -> None:
        super().__init__(encoder, loss)
        self.classes = classes
        self.head = nn.Linear(5, classes)

    def loss(self, batch):
        return {"loss": super().loss(batch)["loss"] + self.classify(batch[0]).square().mean()}

    def classify(self, inputs):
        return self.head(self.encoder(inputs))


class TinyViews(Dataset):
    """Noisy views, a function of (seed, epoch, index)."""

    def __init__(self, inputs, seed):
        self.inputs, self.seed, self.epoch = inputs, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed * 10**6 + self.epoch * 10**3 + index)
        noise = 0.3 * torch.randn(2, 6, generator=generator)
        return self.inputs[index] + noise[0], self.inputs[index] + noise[1]


class TinyData(Data):
    """Four noisy clusters in six dimensions."""

    def __init__(self, *, batch_size: int = 8, num_workers: int = 0, size: int = 44) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.size = size

    def points(self, split):
        generator = torch.Generator().manual_seed({"train": 1, "validation": 2, "test": 3}[split])
        labels = torch.arange(self.size) % CLASSES
        centres = torch.eye(CLASSES, 6)
        return centres[labels] + 0.2 * torch.randn(self.size, 6, generator=generator), labels

    def train_dataset(self):
        return TinyViews(self.points("train")[0], self.seed)

    def evaluation_dataset(self, split):
        return torch.utils.data.TensorDataset(*self.points(split))

    @property
    def num_classes(self):
        return CLASSES

    @property
    def class_names(self):
        return ["a", "b", "c", "d"]


class OtherData(TinyData):
    """The same points, of which two clusters go by other names."""

    @property
    def class_names(self):
        return ["a", "b", "x", "y"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tiny classes, findable as a module; the working directory is a fresh one.

    What a test derives from them and calls a class of that module is one no longer when the test ends, or commands of
    later tests would look for it there among the subclasses of ours, until it is collected.
    """
    module = types.ModuleType("tiny")
    things = (
        *(TinyEncoder, TinyLoss, TinyMethod, TwoOptimisers, TakingTurns, TinyClassifier),
        *(TinyViews, TinyData, OtherData),
    )
    for thing in things:
        monkeypatch.setattr(thing, "__module__", "tiny")
        setattr(module, thing.__name__, thing)

    def method(kind=TinyMethod, *, seed=0, dropout=0.2, **loss):
        torch.manual_seed(seed)
        return kind(TinyEncoder(dropout=dropout), TinyLoss(**loss))

    def draw(drawing):
        drawing.run.figures.mkdir(exist_ok=True)
        (drawing.run.figures / "picture.png").write_bytes(b"")

    module.method, module.draw = method, draw
    monkeypatch.setitem(sys.modules, "tiny", module)
    monkeypatch.chdir(tmp_path)
    yield module
    for thing in things:
        for kind in thing.__subclasses__():
            if kind.__module__ == "tiny" and kind not in things:
                kind.__module__, kind.__qualname__ = __name__, f"tiny.<locals>.{kind.__name__}"


@pytest.fixture
def install(monkeypatch, tmp_path_factory):
    """Install a distribution, as an installer leaves it: a package and its metadata on the path.

    What was imported stays imported, as its classes stay among the subclasses of ours.
    """
    site = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(site))

    def install(name, *, files, **groups):
        package = site / name.replace("-", "_")
        for path, content in {"__init__.py": "", **files}.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(content)
        metadata = site / f"{package.name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        entries = [
            f"[contrastive.{group}]\n" + "\n".join(f"{key} = {value}" for key, value in registered.items())
            for group, registered in groups.items()
        ]
        (metadata / "entry_points.txt").write_text("\n\n".join(entries))

    return install
