"""The examples run from top to bottom, for one epoch."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LINE = re.compile(r"^(.+?) +kNN +([\d.]+) % +linear probe +([\d.]+) %$", re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_and_prints_accuracies(example, tmp_path, monkeypatch, capsys):
    """In this process, because a new one spends most of its time on imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--epochs", "1"])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(example), run_name="__main__")
    found = {name: (float(knn), float(linear)) for name, knn, linear in LINE.findall(capsys.readouterr().out)}
    assert {"untrained encoder", "trained encoder"} <= found.keys()
    assert all(90 < accuracy <= 100 for accuracies in found.values() for accuracy in accuracies)
    assert found["trained encoder"] != found["untrained encoder"]
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_short_example_of_each_kind_of_host():
    kinds = {"simclr", "moco", "simsiam", "swav", "barlow_twins", "supcon"}
    assert {example.stem.removesuffix("_digits") for example in EXAMPLES} == kinds
    assert all(len(example.read_text().splitlines()) < 80 for example in EXAMPLES)
