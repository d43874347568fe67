"""The ``cl-vision`` command."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_core.training import cli

if TYPE_CHECKING:
    from pathlib import Path

    from cl_core.training.comparing import Compared
    from cl_core.training.fitting import Drawing

_LOG = logging.getLogger(__name__)

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
    modules=("cl_vision.encoders", "cl_vision.projectors", "cl_vision.transforms", "cl_vision.data.subsets"),
    artist="cl_vision.cli:draw",
    comparer="cl_vision.cli:draw_comparison",
    inputs="raw pixels",
    verbs={
        "export": (
            "write the encoder for other programs, as ONNX or torch.export",
            "cl_vision.exporting:export_command",
        ),
        "scores": (
            "draw the scores that runs recorded: curves, histograms, a waterfall over a setting",
            "cl_vision.scoring:scores_command",
        ),
    },
)

_BASELINES = {"untrained": "untrained encoder", "raw": "raw pixels"}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; ``args`` are those of the process by default. Returns the exit status."""
    return cli.main(DOMAIN, args)


def draw(drawing: Drawing) -> None:
    """Figures of a finished run: curves, a map of the test embeddings, similarities over training.

    What a figure needs and the run does not have leaves it out. One that fails is said to be missing: the result
    of the training does not hang on it.
    """
    for plot in (_draw_curves, _draw_embeddings, _draw_similarities):
        try:
            plot(drawing)
        except (
            Exception
        ) as error:  # class names and numbers are anybody's, and so are the errors of drawing them
            _LOG.warning("a figure is missing in %s: %s", drawing.run.figures, error or type(error).__name__)


def draw_comparison(compared: Sequence[Compared], folder: Path) -> Path:
    """The figure of ``compare``: test accuracies with their intervals, and neighbours over training."""
    from cl_core.training.comparing import METRICS, interval
    from cl_vision import figures

    accuracies = {
        each.label: {METRICS[key]: (values, interval(values)) for key, values in each.accuracies.items()}
        for each in compared
    }
    curves = {each.label: each.curves for each in compared}
    return figures.plot_comparison(folder / "comparison.png", accuracies=accuracies, curves=curves)


def _draw_curves(drawing: Drawing) -> None:
    from cl_vision import figures

    losses = drawing.table.column("train/loss")
    if not losses[0]:
        return
    accuracy = drawing.table.column("validation/knn")
    baselines = {
        f"{name}, kNN": drawing.metrics[key]["knn_validation"]
        for key, name in _BASELINES.items()
        if drawing.metrics.get(key)
    }
    figures.plot_curves(
        drawing.run.figures / "curves.png",
        loss={"training loss": losses},
        accuracy={"kNN on validation": accuracy} if accuracy[0] else None,
        baselines=baselines if accuracy[0] else None,
    )


def _draw_embeddings(drawing: Drawing) -> None:
    from cl_vision import figures

    if "test" not in drawing.embeddings:
        return
    embeddings, labels = drawing.embeddings["test"]
    if len(embeddings) < 3 or embeddings.shape[1] < 2:  # no plane to draw
        return
    figures.plot_embedding_map(
        drawing.run.figures / "embeddings.png",
        embeddings.numpy(),
        labels.numpy(),
        class_names=drawing.class_names or None,
        title="Test embeddings",
    )


def _draw_similarities(drawing: Drawing) -> None:
    from cl_core.training.callbacks import read_similarities
    from cl_vision import figures

    stored = drawing.run.path / "similarities.safetensors"
    if not stored.is_file():
        return
    steps, positive, negative = zip(*read_similarities(stored), strict=True)
    figures.plot_similarities(
        drawing.run.figures / "similarities.png",
        steps=steps,
        positive=[values.numpy() for values in positive],
        negative=[values.numpy() for values in negative],
        step_name="optimiser step",
    )
