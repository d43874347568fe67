"""The command on two processes trains as on one with twice the batch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cl_vision.cli import main

# Batch statistics are of one process's rows, so group normalisation, and heads without any; SGD, because Adam makes
# steps of what rounding leaves of a gradient of zero; an epoch is one step, so that the table has every step's loss.
SHARED = (
    "--model.encoder.norm group --model.encoder.width 4 --model.projector.norm none --data.image_size 8 "
    "--optimization.optimizer sgd --optimization.lr 0.01 --optimization.schedule constant "
    "--optimization.warmup_epochs 0 --trainer.max_epochs 3 --trainer.limit_train_batches 1 "
    "--trainer.accelerator cpu --trainer.progress_bar false "
    "--monitor.knn_every_epochs null --monitor.diagnostics_every_epochs null "
    "--evaluation.baselines false --evaluation.neighbours [5] --evaluation.regularizations [0.1]"
)
TWO = "--data.batch_size 16 --trainer.devices 2 --trainer.strategy ddp"
GROUP = "--model.loss.group world"
PLAIN = "--model.predictor.norm none"
# Partners are drawn and gates normalised by each process for itself; these two leave both out.
ALONE = (
    "--model.partners cl_core.samplers.IdenticalPartners --model.gate cl_core.gates.OpenGate "
    "--model.gate.num_classes 10 --model.gate.dim 64"
)
HOSTS = {
    "simclr": ("simclr/digits", "", GROUP),
    "moco": ("moco/digits", "--model.queue_size 40", GROUP),
    "mocov3": ("mocov3/digits", PLAIN, GROUP),
    "nnclr": ("nnclr/digits", f"{PLAIN} --model.support_size 40", GROUP),
    "simsiam": ("simsiam/digits", f"{PLAIN} --model.projector.final_norm none", ""),
    "byol": ("byol/digits", PLAIN, ""),
    "barlow": ("barlow/digits", "--optimization.lr 1e-6", GROUP),
    "vicreg": ("vicreg/digits", "--optimization.lr 1e-3", GROUP),
    "supcon": ("supcon/digits", "", GROUP),
    "swav": ("swav/digits", "--model.queue_size 40 --model.queue_from_epoch 0", GROUP),
    "deepcluster": ("deepcluster-v2/digits", "--model.num_prototypes [8,6]", GROUP),
    "simlap": ("hydra/digits", ALONE, GROUP),
    "hydra": ("hydra/moco-digits", f"{PLAIN} {ALONE}", GROUP),
}
FEW = ["simclr", "moco"]
# Which of two neighbours is nearer; test_moco.py shows in double precision that the weights are the same.
ROUNDING_DECIDES = {"nnclr"}

# All hosts in one program, which Lightning starts once more for the second process: loading it takes most of the time.
PROGRAM = """
import json, sys
from cl_vision.cli import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def arguments(host, processes):
    config, options, group = HOSTS[host]
    rest = f"{TWO} {group}" if processes == 2 else "--data.batch_size 32"
    return ["fit", "--config", config, *f"{SHARED} {options} {rest} --run_dir {host}-{processes}".split()]


def losses(folder):
    table = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return [float(row["train/loss"]) for row in table]


@pytest.mark.parametrize(
    "hosts",
    [FEW, pytest.param([host for host in HOSTS if host not in FEW], marks=pytest.mark.slow)],
    ids=["few", "others"],
)
def test_two_processes_train_as_one(hosts, tmp_path, monkeypatch):
    """The same losses, weights and queues from half the batch each, within float32's rounding."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", json.dumps([arguments(host, 2) for host in hosts])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for host in hosts:
        assert main(arguments(host, 1)) == 0
        one, two = (tmp_path / f"{host}-{processes}" for processes in (1, 2))
        assert len(losses(one)) == 3
        assert losses(two) == pytest.approx(losses(one), rel=1e-3 if host in ROUNDING_DECIDES else 1e-5), host
        expected, found = (load_file(run / "export/model.safetensors") for run in (one, two))
        assert expected.keys() == found.keys()
        if host not in ROUNDING_DECIDES:
            close = {name: torch.allclose(found[name], value, 1e-4, 1e-4) for name, value in expected.items()}
            assert [name for name in close if not close[name]] == [], host
        content = torch.load(two / "checkpoints/last.ckpt", weights_only=True)
        assert len(content["cl_core"]["random_states"]) == 2
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"{host}-{processes}" for host in hosts for processes in (1, 2)
    }
