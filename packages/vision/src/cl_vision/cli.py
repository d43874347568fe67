"""The ``cl-vision`` command."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
    modules=("cl_vision.encoders", "cl_core.projectors", "cl_vision.transforms", "cl_vision.data.subsets"),
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

_MOST_CLASSES = 200  # whose 20,100 pairs are still looked at
_BASELINES = {"untrained": "untrained encoder", "raw": "raw pixels"}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; ``args`` are those of the process by default. Returns the exit status."""
    return cli.main(DOMAIN, args)


def draw(drawing: Drawing) -> None:
    """Figures of a finished run: curves, a map of the test embeddings, similarities over training, class pairs.

    What a figure needs and the run does not have leaves it out. One that fails is said to be missing: the result
    of the training does not hang on it.
    """
    for plot in (_draw_curves, _draw_embeddings, _draw_similarities, _draw_gates):
        try:
            plot(drawing)
        except (
            Exception
        ) as error:  # class names and numbers are anybody's, and so are the errors of drawing them
            _LOG.warning("a figure is missing in %s: %s", drawing.run.figures, error or type(error).__name__)


def draw_comparison(compared: Sequence[Compared], folder: Path) -> Path:
    """The figure of ``compare``: test accuracies with their intervals, and neighbours over training."""
    from cl_core.training.comparing import interval
    from cl_core.training.evaluating import shown
    from cl_vision import figures

    titles = shown(each.accuracies for each in compared)
    accuracies = {
        each.label: {titles[key]: (values, interval(values)) for key, values in each.accuracies.items()}
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


def _draw_gates(drawing: Drawing) -> None:
    """What a method with a gate has learnt of its classes: a heat map, and a table of all pairs."""
    import csv

    import torch

    from cl_core.gates import PairGate, open_dimensions
    from cl_core.training.files import text_of, write_atomically
    from cl_vision import figures

    gate = getattr(drawing.method, "gate", None)
    if not isinstance(gate, PairGate) or gate.num_classes > _MOST_CLASSES:
        return
    first, second, gates = (part.cpu() for part in gate.gates_of_all_pairs())
    count = open_dimensions(gates)
    matrix = torch.zeros(gate.num_classes, gate.num_classes, dtype=count.dtype)
    matrix[first, second] = matrix[second, first] = count
    names = [str(name) for name in drawing.class_names or range(gate.num_classes)]
    title = f"Dimensions of {gate.dim} that a pair of classes shares"
    figures.plot_class_pairs(
        drawing.run.figures / "class_pairs.png", matrix.numpy(), class_names=names, title=title
    )

    def write(file: Any) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["first", "second", "open_dimensions", "mean_gate", "dimensions"])
        order = count.argsort(descending=True, stable=True).tolist()
        for pair in order:
            dimensions = " ".join(map(str, (gates[pair] > 0.5).nonzero().flatten().tolist()))
            line = [names[first[pair]], names[second[pair]], int(count[pair])]
            writer.writerow([*line, f"{gates[pair].mean():.4f}", dimensions])

    write_atomically(drawing.run.path / "class_pairs.csv", text_of(write))
