"""Fixtures that several test files share: tiny images and a loss."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from cl_core.losses import TwoViewLoss


class SmallDCL(TwoViewLoss):
    """Decoupled loss in a few plain lines, so that these tests do not lean on the core's."""

    several_views = True

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, z1, z2=None):
        views = list(z1) if z2 is None else [z1, z2]
        z = functional.normalize(torch.cat(views))
        rows = torch.arange(len(z)) % len(views[0])
        scores = z @ z.T / self.temperature
        same = rows[:, None] == rows
        negatives = scores.masked_fill(same, -math.inf).logsumexp(1)
        others = same & ~torch.eye(len(z), dtype=torch.bool)
        return (negatives - (scores * others).sum(1) / others.sum(1)).mean()


@pytest.fixture
def two_view_loss():
    return SmallDCL()


@pytest.fixture
def photograph():
    """A smooth colour image (3, 40, 48), so that crops and blurs differ visibly."""
    rows, columns = torch.linspace(0, 1, 40)[:, None], torch.linspace(0, 1, 48)[None]
    planes = [rows.expand(40, 48), columns.expand(40, 48), (rows - columns).abs()]
    return (255 * torch.stack(planes)).to(torch.uint8)


@pytest.fixture
def write_image():
    """Function (path, colour, size, mode) that writes a plain image."""

    def write(path, colour, size=(20, 16), mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
        return path

    return write


def jpeg(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=95)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


@pytest.fixture
def packed():
    """Arrays of a packed set of 40 and 20 plain images, with the colour telling the class."""
    arrays = {"class_names": np.array([f"class {label}" for label in range(10)])}
    for split, number in (("train", 40), ("test", 20)):
        labels = (np.arange(number) % 10).astype(np.uint8)
        streams = [jpeg(np.full((32, 32, 3), 20 * label, dtype=np.uint8)) for label in labels]
        arrays[f"{split}_jpeg"] = np.concatenate(streams)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, streams)])
        arrays[f"{split}_labels"] = labels
    return arrays
