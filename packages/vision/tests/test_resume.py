"""Killed inside an epoch and resumed, hosts that remember something end as those that were never stopped."""

import pytest
import torch
from safetensors.torch import load_file

from cl_core.method import Method
from cl_vision.cli import main
from cl_vision.methods import MoCo, SimCLR, SwAV

SHARED = (
    "--data.image_size 8 --data.test 0.05 --data.batch_size 16 --model.encoder.width 4 --trainer.max_epochs 3 "
    "--trainer.limit_train_batches 4 --trainer.accelerator cpu --trainer.progress_bar false "
    "--checkpoint.every_steps 2 --monitor.knn_every_epochs null --evaluation.baselines false "
    "--evaluation.neighbours [5] --evaluation.regularizations [0.1]"
)
# After the checkpoint at step 6, in the second of three epochs of 4 steps, the queues are filled in part: MoCo's has
# gone round once and stands inside, SwAV's holds 32 of 40 rows and acts from the step after the next on.
HOSTS = {
    "moco/digits": (MoCo, "--model.queue_size 40"),
    "swav/digits": (
        SwAV,
        "--model.num_prototypes 20 --model.queue_size 40 --model.queue_from_epoch 1 --model.freeze_epochs 1.6",
    ),
    "amcl/digits": (SimCLR, ""),
    "amcl/moco-digits": (MoCo, "--model.queue_size 40"),
}


class Killed(Exception):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("config", HOSTS)
def test_resumed_equals_uninterrupted(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cl_vision.cli.draw", lambda drawing: None)  # figures take most of the time
    kind, options = HOSTS[config]
    arguments = ["fit", "--config", config, *f"{SHARED} {options}".split()]
    assert main([*arguments, "--run_dir", "whole"]) == 0, capsys.readouterr().err
    before, after = kind.after_step, kind.after_step

    def killed(method: Method, progress):
        after(method, progress)
        if progress.step == 7:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kind, "after_step", killed)
        with pytest.raises(Killed):
            main([*arguments, "--run_dir", "cut", "--debug"])
    assert kind.after_step is before
    saved = torch.load("cut/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert main(["fit", "--resume", "cut"]) == 0, capsys.readouterr().err
    whole, cut = (load_file(f"{run}/export/model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, cut[name])] == []
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "cut/metrics.csv").read_text()
    remembered = [name for name in whole if "queue" in name]
    assert bool(remembered) == ("amcl/digits" not in config)
