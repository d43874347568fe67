"""SimCLR's two views of images: ours in batches and one by one, torchvision's v2 one by one, lightly's from PIL.

    uv run --all-packages python packages/vision/benchmarks/augmentation.py [--write]

Every contender makes two views each of the same images, without normalisation, as two stacked tensors. Ours are asked
of the data set, seeds and all. A repetition times all contenders one after the other; speeds are medians over
repetitions, and so are the ratios of a contender's time to that of ours in batches in the same repetition. Process time
on one thread (the machine may be shared), wall time on more; ours use one whatever the number (see ``_one_thread``).

The floor: a view of size S reads C S^2 bytes and writes 4 C S^2. Per number written, the two axes of the crop take 4
products, the jitter's three adjustments about 5 operations each, the shift of the hue about 8 and a blur of K pixels
2 K, all of them cheaper than memory. The row "floor" is one pass: bytes to float32 of all views in a new tensor.

lightly takes part where it can be imported, and is no dependency. In an environment of its own:

    uv venv lightly
    uv pip install --python lightly -e packages/core[train] -e packages/vision lightly torch==V torchvision==V
    lightly/bin/python packages/vision/benchmarks/augmentation.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from cl_vision.data.views import ImageArray, ViewDataset, collate_views
from cl_vision.transforms import SimCLRTransform

RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"
BEGIN, END = "<!-- augmentation: begin -->", "<!-- augmentation: end -->"
OURS = "ours, batches"


@dataclass(frozen=True)
class Case:
    """Images and settings of the views.

    Attributes:
        size: height and width of the images and of the views.
        jitter: strength of the colour jitter.
        blur: probability of a blur.
    """

    size: int
    jitter: float
    blur: float


CASES = [Case(32, 0.5, 0.0), Case(96, 1.0, 0.5)]


@dataclass(frozen=True)
class Contender:
    """Something that makes two views.

    Attributes:
        rows: images a measurement.
        make: views of so many images.
    """

    rows: int
    make: Callable[[], object]


def smooth_images(count: int, size: int) -> Tensor:
    """Colours that vary over the image as those of photographs do, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (255 * images.clamp(0, 1)).to(torch.uint8)


def torchvision_pipeline(case: Case, *, first: bool) -> v2.Compose:
    """The same views with v2; conversion to float32 first, as ours, or last."""
    s = case.jitter
    convert = [v2.ToDtype(torch.float32, scale=True)]
    steps = [
        v2.RandomResizedCrop(case.size, scale=(0.08, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if case.blur:
        blur = v2.GaussianBlur(max(3, case.size // 10 // 2 * 2 + 1), sigma=(0.1, 2.0))
        steps.append(v2.RandomApply([blur], p=case.blur))
    return v2.Compose(convert + steps if first else steps + convert)


def stacked(transform: Callable[[object], Tensor], images: Sequence[object]) -> list[Tensor]:
    return [torch.stack([transform(image) for image in images]) for _ in range(2)]


def contenders(case: Case, batch: int, single: int) -> dict[str, Contender]:
    images = smooth_images(batch, case.size)
    data = ViewDataset(
        ImageArray(images, torch.zeros(batch)), SimCLRTransform(case.size, jitter=case.jitter, blur=case.blur)
    )
    everything, some = list(range(batch)), list(range(single))
    first, last = torchvision_pipeline(case, first=True), torchvision_pipeline(case, first=False)
    found = {
        OURS: Contender(batch, lambda: collate_views(data.__getitems__(everything))),
        "ours, one by one": Contender(single, lambda: collate_views([data[row] for row in some])),
        "torchvision v2, float32": Contender(single, lambda: stacked(first, images[:single])),
        "torchvision v2, uint8": Contender(single, lambda: stacked(last, images[:single])),
        "floor": Contender(batch, lambda: images.repeat(2, 1, 1, 1).float()),
    }
    try:
        from lightly.transforms import SimCLRTransform as LightlyTransform
    except ImportError:
        return found
    theirs = LightlyTransform(
        input_size=case.size, cj_strength=case.jitter, gaussian_blur=case.blur, normalize=None
    )
    pictures = [v2.functional.to_pil_image(image) for image in images[:single]]

    def from_pictures() -> list[Tensor]:
        pairs = [theirs(picture) for picture in pictures]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return found | {"lightly, PIL": Contender(single, from_pictures)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(make: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    kept = make()
    end = clock()
    del kept
    return end - start


def measure(case: Case, count: int, batch: int, single: int, repetitions: int) -> dict[str, str]:
    """Images a second, and the time beside that of ours in batches, by contender."""
    found = contenders(case, batch, single)
    times: dict[str, list[float]] = {name: [] for name in found}
    with threads(count):
        for contender in found.values():
            contender.make()
        for _ in range(repetitions):
            for name, contender in found.items():
                times[name].append(seconds(contender.make) / contender.rows)
    cells = {}
    for name, each in times.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(each, times[OURS], strict=True))
        cells[name] = f"{1 / statistics.median(each):,.0f} ({ratio:.3g})"
        print(f"{case.size} pixels, {count} threads, {name}: {cells[name]}", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256, help="images a batch of ours")
    parser.add_argument("--single", type=int, default=32, help="images a measurement of what goes one by one")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    given = parser.parse_args()
    # A process that trains has long taught the allocator to keep blocks of this size; a new one would be measured
    # asking the system for pages.
    torch.empty(31 * 2**18).fill_(0)
    columns = {
        f"{case.size} px, {count} thread{'s' * (count > 1)}": measure(
            case, count, given.batch, given.single, given.repetitions
        )
        for case in CASES
        for count in given.threads
    }
    names = list(next(iter(columns.values())))
    if not any("lightly" in name for name in names):
        print("lightly cannot be imported here and was left out; the head of this file says how to have it.")
    lines = [f"| | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    lines += [f"| {name} | {' | '.join(cells[name] for cells in columns.values())} |" for name in names]
    if given.write:
        text = RESULTS.read_text()
        before, rest = text.split(BEGIN)
        machine = platform.processor() or platform.machine()
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        body = "\n".join([BEGIN, "", *lines, "", f"Hardware: {machine}, {versions}.", ""])
        RESULTS.write_text(before + body + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
