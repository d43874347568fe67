from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cl_vision.cli import DOMAIN, main


@pytest.mark.parametrize("args", ["--help", "--version", "list", "list losses", "list configs"])
def test_light_verbs_import_nothing_heavy(args):
    code = (
        f"import sys; from cl_vision.cli import main; status = main({args.split()!r});"
        "print([n for n in ('torch', 'numpy', 'lightning', 'jsonargparse', 'matplotlib') if n in sys.modules]);"
        "sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # seconds of CPU


def test_lists(capsys):
    assert main(["list", "methods"]) == 0
    assert "SimCLR" in capsys.readouterr().out
    main(["list", "configs"])
    assert {"dcl/digits", "simclr/digits", "simclr/cifar10"} <= set(capsys.readouterr().out.split("\n"))


def test_data_names_lead_to_classes():
    from importlib import import_module

    for name, target in DOMAIN.data.items():
        module, _, attribute = target.partition(":")
        assert getattr(import_module(module), attribute).__name__ == name


@pytest.mark.parametrize("name", sorted(DOMAIN.configs()))
def test_every_config_parses_and_says_its_command(name, capsys):
    assert DOMAIN.configs()[name].read_text().startswith(f"# cl-vision fit --config {name}\n")
    assert main(["fit", "--config", name, "--print_config"]) == 0
    assert "model:\n  class_path: cl_vision." in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(DOMAIN.grids()))
def test_every_grid_names_shipped_configs_and_options(name, capsys):
    from cl_core.training.reproduce import Grid

    for cell in Grid.read(DOMAIN.grids()[name]).cells:
        assert main(["fit", *cell.arguments(0), "--print_config"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("name", [name for name in DOMAIN.configs() if name.endswith("digits")])
def test_two_steps_on_digits(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    options += ["--data.image_size=8", "--model.encoder.width=4"]
    options += ["--data.test=0.05", "--evaluation.regularizations=[0.1]"]  # a quick map and quick probes
    status = main(["fit", "--config", name, *options])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    run = Path("runs", name.replace("/", "-") + "-001")
    figures = {path.name for path in (run / "figures").iterdir()}
    pairs = (
        {"similarities.png"}
        if not any(kind in name for kind in ("deepcluster", "finetune", "swav"))
        else set()
    )
    gates = {"class_pairs.png"} if name.startswith("hydra") else set()
    assert figures == {"curves.png", "embeddings.png"} | pairs | gates
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert 0.5 < metrics["raw"]["knn"] <= 1
    assert "raw pixels" in captured.out
    assert main(["test", "--ckpt", str(run)]) == 0
    assert f"kNN {100 * metrics['trained']['knn']:.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in DOMAIN.configs() if not name.endswith("digits")])
def test_two_steps_on_stand_ins_for_larger_sets(name, packed, tmp_path, monkeypatch, capsys):
    """What a configuration says of its data stays, except that the set is a small packed one."""
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "cifar10_jpeg.npz", **packed)
    options = [
        "--data=PackedCIFAR10",
        f"--data.root={tmp_path}",
        "--data.batch_size=8",
        "--data.num_workers=0",
    ]
    options += [
        "--data.train_size=40",
        "--data.test_size=20",
        "--trainer.max_steps=2",
        "--trainer.precision=32-true",
    ]
    options += ["--trainer.progress_bar=false", "--trainer.accelerator=cpu", "--evaluation.neighbours=[1]"]
    if name.startswith("deepcluster"):
        options += ["--model.num_prototypes=[8, 6]"]  # there are 36 images
    assert main(["fit", "--config", name, *options, "--run_dir=run"]) == 0, capsys.readouterr().err
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 2


def test_a_run_of_python_goes_on_at_the_command(tmp_path, monkeypatch, capsys):
    from cl_core.losses import DCLLoss
    from cl_core.training import TrainerOptions, fit
    from cl_vision.data import Digits
    from cl_vision.encoders import SmallConvNet
    from cl_vision.methods import SimCLR
    from cl_vision.transforms import SmallGrayTransform

    monkeypatch.chdir(tmp_path)
    trainer = TrainerOptions(max_epochs=1, limit_train_batches=2, accelerator="cpu", progress_bar=False)
    method = SimCLR(SmallConvNet(width=4, in_channels=1), DCLLoss(temperature=0.5))
    data = Digits(batch_size=64, image_size=8, transform=SmallGrayTransform(8, rotation=10))
    result = fit(method, data, trainer=trainer, run_dir="run")
    assert main(["test", "--ckpt", "run"]) == 0
    assert f"kNN {100 * result.metrics['trained']['knn']:.2f}%" in capsys.readouterr().out
    assert main(["fit", "--resume", "run", "--data.transform.rotation=20"]) == 2
    assert "data.transform.rotation was 10 when run began and is 20.0 now" in capsys.readouterr().err
    assert main(["fit", "--resume", "run", "--trainer.max_epochs=2"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["steps"] == 4


@pytest.fixture
def photographs(tmp_path, write_image):
    """Function (classes, images a class) that writes a labelled folder."""

    def write(*names, images):
        for name in names:
            for place in range(images):
                write_image(tmp_path / "photos" / name / f"{place}.png", (20 * place, 90, 9 * len(name)))
        return tmp_path / "photos"

    return write


def fit_folder(root, run, *options):
    trainer = ["--trainer.max_epochs=1", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    model = [
        "--model=SimCLR",
        "--model.encoder=SmallConvNet",
        "--model.encoder.width=4",
        "--model.loss=DCLLoss",
    ]
    data = ["--data=ImageFolder", f"--data.root={root}", "--data.image_size=8"]
    return main(["fit", *data, *model, *trainer, f"--run_dir={run}", *options])


def test_too_few_test_images_for_a_map_still_give_the_table(photographs, tmp_path, capsys):
    assert fit_folder(photographs("cat", "dog", images=3), tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "trained encoder" in captured.out
    assert {path.name for path in (tmp_path / "run/figures").iterdir()} == {"curves.png", "similarities.png"}


@pytest.mark.parametrize(
    ("size", "warned"), [(8, []), (16, ["views are of 16 pixels, but images are evaluated at 8:"])]
)
def test_views_of_another_size_than_at_evaluation_are_warned_of_once(
    photographs, tmp_path, caplog, size, warned
):
    """A configuration's views stay when its data are replaced."""
    options = ["--data.transform=SimCLRTransform", f"--data.transform.size={size}"]
    assert fit_folder(photographs("cat", "dog", images=3), tmp_path / "run", *options) == 0
    assert [message[: len(text)] for message, text in zip(caplog.messages, warned, strict=True)] == warned


def test_what_another_folder_gives_is_not_written_to_a_run(photographs, tmp_path, capsys):
    own = photographs("cat", "dog", images=5)
    assert fit_folder(own, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    shutil.copytree(own, tmp_path / "others")
    capsys.readouterr()
    assert main(["test", "--ckpt", str(tmp_path / "run"), f"--data.root={tmp_path / 'others'}"]) == 0
    assert f"not written to a run: data.root was {own} when" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.json").read_bytes() == before
    assert main(["test", "--ckpt", str(tmp_path / "run")]) == 0
    assert "written: " in capsys.readouterr().out.splitlines()[-1]


def test_a_figure_that_fails_costs_neither_the_result_nor_the_others(
    photographs, tmp_path, monkeypatch, capsys, caplog
):
    def fail(*args, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr("cl_vision.figures.plot_curves", fail)
    assert fit_folder(photographs("cat", "dog", images=8), tmp_path / "run") == 0
    assert "trained encoder" in capsys.readouterr().out
    assert caplog.messages == [f"a figure is missing in {tmp_path / 'run/figures'}: no ink"]
    assert {path.name for path in (tmp_path / "run/figures").iterdir()} == {
        "embeddings.png",
        "similarities.png",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.num_views=3"], "DCLLoss compares 2 views, got 3"),
        (["--data.num_views=0"], "num_views must be at least 1, got 0"),
        (["--data.channels=1"], "--model.encoder.in_channels 1"),
        (["--data.image_size=4"], "--data.image_size 8 or more"),
        (["--data.batch_size=1"], "--data.batch_size 2 or more"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(photographs, tmp_path, options, message, capsys):
    assert fit_folder(photographs("cat", "dog", images=4), tmp_path / "run", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
