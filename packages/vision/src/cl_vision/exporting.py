"""Encoders for other programs: ONNX and torch.export, checked by running them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core.training.files import make_folder, write_atomically
from cl_vision.encoders import Encoder

if TYPE_CHECKING:
    from cl_core.training.cli import Domain

Format = Literal["onnx", "pt2"]
_TOLERANCE = 1e-4
"""Largest error of an output, as a share of the largest output: other kernels add up in another order."""


class _FromPixels(nn.Module):
    """Images in [0, 1] to features: the normalisation that the encoder was trained with goes along."""

    def __init__(self, encoder: Encoder, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)  # type: ignore[no-any-return]


def export_encoder(
    encoder: Encoder,
    path: str | Path,
    *,
    image_size: int,
    channels: int = 3,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    format: Format | None = None,
) -> Path:
    """Write an encoder for another program, then run what was written and compare.

    The program takes ``images``, float32 of shape (N, channels, image_size, image_size) in [0, 1] with any N >= 1, and
    gives ``features`` (N, dim).

    Args:
        encoder: is left as it is.
        path: file to write, whose ending tells the format: ``.onnx``, or ``.pt2`` for torch.export.
        image_size: height and width, in pixels, as in training.
        channels: of the images.
        mean: channel means of the normalisation, as in training.
        std: channel deviations, likewise.
        format: in place of the ending.

    Returns:
        The path written.

    Raises:
        ValueError: for another format, if a library is missing, if torch makes no program of the network, or if the
            written one computes something else; then nothing is written.
    """
    _checks.count("image_size", image_size)
    _checks.count("channels", channels)
    kind = Path(path).suffix.removeprefix(".") if format is None else format
    if kind not in get_args(Format):
        raise ValueError(f"format must be one of 'onnx', 'pt2' (or the ending of the path), got {kind!r}.")
    mode, parameter = encoder.training, next(encoder.parameters(), torch.empty(0))
    model = _FromPixels(encoder.eval(), mean, std).to(parameter.device)
    try:
        example = torch.rand(2, channels, image_size, image_size, device=parameter.device)
        with torch.no_grad():
            with _in_one_line(encoder):
                program = torch.export.export(
                    model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
                )
            judged = torch.rand(3, channels, image_size, image_size, device=parameter.device)
            expected = model(judged)

        @torch.no_grad()
        def write(temporary: Path) -> None:
            with _in_one_line(encoder):
                found = (
                    _write_onnx(program, temporary, judged)
                    if kind == "onnx"
                    else _write_pt2(program, temporary, judged)
                )
            error = float((found.to(expected.device) - expected).abs().max())
            if not error <= _TOLERANCE * float(expected.abs().max().clamp_min(1)):
                raise ValueError(
                    f"the exported encoder computes something else: its outputs are off by {error:.2g}."
                )

        make_folder(Path(path).parent)
        return write_atomically(path, write)
    finally:
        encoder.train(mode)


@contextmanager
def _in_one_line(encoder: Encoder) -> Iterator[None]:
    """What a network does that a program cannot, such as to branch on its images, is said at length by torch."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{type(encoder).__name__} cannot be written as a program for any number of images: "
            f"{type(error).__name__}: {said}."
        ) from error


def _write_pt2(program: torch.export.ExportedProgram, path: Path, judged: Tensor) -> Tensor:
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        return torch.export.load(file).module()(judged)  # type: ignore[no-any-return]


def _write_onnx(program: torch.export.ExportedProgram, path: Path, judged: Tensor) -> Tensor:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # type: ignore[import-untyped]  # noqa: F401 - torch needs it
    except ImportError as error:
        raise ValueError(f"onnx needs {error.name}: pip install 'cl-vision[onnx]'.") from None
    converted = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["features"], verbose=False
    )
    assert converted is not None
    converted.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": judged.cpu().numpy()})
    return torch.from_numpy(features)


def export_command(domain: Domain, args: list[str]) -> None:
    """``export --ckpt RUN --output encoder.onnx``."""
    from cl_core.training.commands import load_trained, trained_parser

    parser = trained_parser(domain, "export")
    parser.parser.add_argument("--output", type=str, required=True, help="file to write: .onnx, or .pt2")
    trained = load_trained(domain, parser, args)
    encoder = getattr(trained.method, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{type(trained.method).__name__} has no encoder of images to export.")
    data: Any = trained.data
    images = data.splits["train"][0]
    path = export_encoder(
        encoder,
        trained.config.output,
        image_size=data.image_size,
        channels=images[0].shape[0],
        mean=data.evaluation_transform.mean,
        std=data.evaluation_transform.std,
    )
    size = data.image_size
    print(
        f"images (N, {images[0].shape[0]}, {size}, {size}) in [0, 1] to features (N, {encoder.dim}), checked: {path}"
    )
