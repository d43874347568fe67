"""The ``cl-vision`` command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_core.training import cli

if TYPE_CHECKING:
    from cl_core.training.fitting import Drawing

DOMAIN = cli.Domain(
    command="cl-vision",
    package="cl_vision",
    distribution="cl-vision",
    summary="Self-supervised and contrastive learning on images.",
    data={
        "CIFAR10": "cl_vision.data.benchmarks:CIFAR10",
        "CIFAR100": "cl_vision.data.benchmarks:CIFAR100",
        "Digits": "cl_vision.data.digits:Digits",
        "FashionMNIST": "cl_vision.data.benchmarks:FashionMNIST",
        "ImageFolder": "cl_vision.data.folder:ImageFolder",
        "PackedCIFAR10": "cl_vision.data.packed:PackedCIFAR10",
        "STL10": "cl_vision.data.benchmarks:STL10",
    },
    modules=("cl_vision.encoders", "cl_vision.projectors", "cl_vision.transforms"),
    artist="cl_vision.cli:draw",
    inputs="raw pixels",
)

_BASELINES = {"untrained": "untrained encoder", "raw": "raw pixels"}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; ``args`` are those of the process by default. Returns the exit status."""
    return cli.main(DOMAIN, args)


def draw(drawing: Drawing) -> None:
    """Figures of a finished run: curves, a map of the test embeddings, similarities over training."""
    from cl_core.training.callbacks import read_similarities
    from cl_vision import figures

    folder, table = drawing.run.figures, drawing.table
    folder.mkdir(parents=True, exist_ok=True)
    losses = table.column("train/loss")
    if losses[0]:
        accuracy = table.column("validation/knn")
        baselines = {
            f"{name}, kNN": drawing.metrics[key]["knn_validation"]
            for key, name in _BASELINES.items()
            if drawing.metrics.get(key)
        }
        figures.plot_curves(
            folder / "curves.png",
            loss={"training loss": losses},
            accuracy={"kNN on validation": accuracy} if accuracy[0] else None,
            baselines=baselines if accuracy[0] else None,
        )
    if "test" in drawing.embeddings:
        embeddings, labels = drawing.embeddings["test"]
        figures.plot_embedding_map(
            folder / "embeddings.png",
            embeddings.numpy(),
            labels.numpy(),
            class_names=drawing.class_names or None,
            title="Test embeddings",
        )
    stored = drawing.run.path / "similarities.safetensors"
    if stored.is_file():
        steps, positive, negative = zip(*read_similarities(stored), strict=True)
        figures.plot_similarities(
            folder / "similarities.png",
            steps=steps,
            positive=[values.numpy() for values in positive],
            negative=[values.numpy() for values in negative],
            step_name="optimiser step",
        )
