"""Several processes under Lightning: what is broadcast at every step, and what they have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from cl_core.memory import FeatureQueue
from cl_core.training.evaluating import Evaluation
from cl_core.training.fitting import fit
from cl_core.training.settings import Monitoring, TrainerOptions


@pytest.fixture
def alone():
    """Leave nothing behind of a process group of one."""
    with mock.patch.dict(os.environ):
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_statistics_are_broadcast_and_memories_are_not(tiny, alone, monkeypatch):
    """Also with one process the wrapper sends what it would send to more."""

    class Remembering(tiny.TinyMethod):
        def __init__(self, encoder, loss):
            super().__init__(encoder, loss)
            self.norm, self.queue = nn.BatchNorm1d(5), FeatureQueue(16, 5)

        def loss(self, batch):
            z1, z2 = (self.norm(self.encoder(view)) for view in batch)
            self.queue.enqueue(z2)
            forwards.append([*sent])
            sent.clear()
            return self.criterion(z1, z2)

    forwards, sent = [], []
    broadcast = torch.distributed._broadcast_coalesced

    def listening(group, tensors, *rest):
        sent.extend(tuple(tensor.shape) for tensor in tensors)
        broadcast(group, tensors, *rest)

    monkeypatch.setattr(torch.distributed, "_broadcast_coalesced", listening)
    tiny.Remembering, Remembering.__module__, Remembering.__qualname__ = Remembering, "tiny", "Remembering"
    options = TrainerOptions(max_epochs=1, accelerator="cpu", devices=1, strategy="ddp", progress_bar=False)
    fit(
        Remembering(tiny.TinyEncoder(), tiny.TinyLoss()),
        tiny.TinyData(),
        trainer=options,
        monitor=Monitoring(knn_every_epochs=None),
        evaluation=Evaluation(neighbours=(1,), regularizations=(0.1,)),
    )
    assert len(forwards) == 5
    assert all(shapes == [(5,), (5,), ()] for shapes in forwards[1:])
    assert (16, 5) not in forwards[0]  # which also has what the wrapper sent in the beginning


APART = """
import importlib.util, os, sys
import torch
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny"] = tiny
spec.loader.exec_module(tiny)
from cl_core.memory import FeatureQueue
from cl_core.training.fitting import fit
from cl_core.training.settings import TrainerOptions

class Remembering(tiny.TinyMethod):
    def __init__(self, encoder, loss):
        super().__init__(encoder, loss)
        self.queue = FeatureQueue(3, 5)
        self.queue.enqueue(torch.randn(3, 5))

    def on_fit_start(self, progress):
        torch.save(self.queue.embeddings, f"begun-{os.environ.get('LOCAL_RANK', '0')}")

tiny.Remembering = Remembering
Remembering.__module__ = "tiny"
torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
method = Remembering(tiny.TinyEncoder(), tiny.TinyLoss())
options = TrainerOptions(max_epochs=1, accelerator="cpu", progress_bar=False, devices=2, strategy="ddp")
fit(method, tiny.TinyData(batch_size=4), trainer=options, run_dir="run")
"""


@pytest.mark.slow
def test_processes_that_draw_other_memories_begin_with_those_of_the_first(tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    command = [sys.executable, "apart.py", str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"begun-{rank}", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    assert first.norm(dim=1).sum() > 0
