"""The examples run from top to bottom, for one epoch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_and_prints_accuracies(example, tmp_path):
    command = [sys.executable, str(example), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracies = [float(found) for found in re.findall(r"kNN +([\d.]+) %", done.stdout)]
    assert len(accuracies) >= 2
    assert all(90 < accuracy <= 100 for accuracy in accuracies)
    assert list(tmp_path.iterdir()) == []


def test_examples_are_short():
    assert all(len(example.read_text().splitlines()) <= 90 for example in EXAMPLES)
