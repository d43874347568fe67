from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cl_core.training import cli
from cl_core.training.artifacts import load_export
from cl_core.training.evaluating import few_of_each_class
from cl_core.training.reproduce import Grid, markdown
from cl_core.training.run import RunFolder

QUICK = """
model:
  class_path: TinyMethod
  init_args:
    encoder: {class_path: TinyEncoder, init_args: {width: 8}}
    loss: {class_path: TinyLoss, init_args: {temperature: 0.5}}
data: {class_path: TinyData}
optimization: {lr: 0.01}
trainer: {max_epochs: 2, accelerator: cpu, progress_bar: false}
evaluation: {neighbours: [5], regularizations: [0.01]}
"""
GRID = """
title: A grid
seeds: [0, 1]
numbers: [train/loss]
cells:
  - {method: A, setting: wide, config: tiny/quick, published: {knn: 0.5, source: "Someone, Somewhere"}}
  - {method: B, setting: narrow, config: tiny/quick, overrides: {model.encoder.width: 4}}
"""


@pytest.fixture
def domain(tiny, install):
    install(
        "cl-tiny",
        files={"configs/tiny/quick.yaml": QUICK, "configs/reproduce/grid.yaml": GRID},
        methods={"TinyMethod": "tiny:TinyMethod"},
        losses={"TinyLoss": "tiny:TinyLoss"},
        domains={"tiny": "cl_tiny"},
    )
    return cli.Domain(
        command="cl-tiny",
        package="cl_tiny",
        distribution="cl-tiny",
        summary="Tiny things.",
        data={"TinyData": "tiny:TinyData"},
        modules=("tiny",),
        artist="tiny:draw",
        inputs="raw points",
    )


@pytest.fixture
def command(domain, capsys):
    """Run the command: exit status, standard output, standard error."""

    def command(*args):
        status = cli.main(domain, [str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_help_version_and_lists(command):
    status, out, _ = command("--help")
    assert status == 0
    assert all(verb in out for verb in cli.VERBS)
    assert command()[1] == out
    assert command("--version")[1].startswith("cl-tiny 1.2 (cl-core ")
    assert "TinyMethod  cl-tiny 1.2" in command("list", "methods")[1]
    assert "TinyLoss" in command("list", "losses")[1]
    assert command("list", "data")[1] == "TinyData\n"
    assert command("list", "configs")[1] == "tiny/quick\nreproduce grid\n"
    assert "losses:\n  " in command("list")[1]


def test_what_answers_at_once_imports_nothing_heavy():
    code = (
        "import sys; from cl_core.training import cli;"
        "domain = cli.Domain('cl-core', 'cl_core', 'cl-core');"
        "assert all(cli.main(domain, args.split()) == 0 for args in ('--help', '--version', 'list', 'list losses'));"
        "print([name for name in ('torch', 'numpy', 'lightning', 'jsonargparse', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_fit_test_validate_and_embed(command):
    status, out, _ = command("fit", "--config", "tiny/quick", "--seed", 3)
    run = Path("runs/tiny-quick-001")
    assert status == 0
    metrics = json.loads((run / "metrics.json").read_text())
    for name, row in (
        ("trained encoder", metrics["trained"]),
        ("untrained encoder", metrics["untrained"]),
        ("raw points", metrics["raw"]),
    ):
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert line.split()[-2:] == [f"{100 * row['knn']:.2f}%", f"{100 * row['linear']:.2f}%"]
    assert f"run folder: {run}" in out
    assert f"figure:     {run}/figures/picture.png" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3

    for source in (run, run / "export", run / "checkpoints" / "last.ckpt"):
        status, out, _ = command("test", "--ckpt", source)
        assert status == 0
        assert f"kNN {100 * metrics['trained']['knn']:.2f}%" in out
    status, out, _ = command("validate", "--ckpt", run)
    assert f"linear probe {100 * metrics['trained']['linear_validation']:.2f}%" in out
    written = json.loads((run / "metrics.json").read_text())
    assert written["test"] == metrics["trained"]
    assert written["validate"]["knn"] == metrics["trained"]["knn_validation"]

    status, out, _ = command("embed", "--ckpt", run, "--output", "z.safetensors", "--split", "validation")
    assert "44 embeddings of width 5 (validation)" in out
    tensors = load_file("z.safetensors")
    inputs, labels = sys.modules["tiny"].TinyData().points("validation")
    torch.testing.assert_close(tensors["embeddings"], load_export(run / "export").embed(inputs))
    assert torch.equal(tensors["labels"], labels)

    assert "(test)" in command("embed", "--ckpt", run, "--output", "z.safetensors")[1]
    for config in ("tiny/quick", run / "config.yaml"):
        status, out, err = command("test", "--ckpt", run / "export", "--config", config)
        assert (status, err) == (0, "")
        assert f"kNN {100 * metrics['trained']['knn']:.2f}%" in out
    status, _, err = command("embed", "--ckpt", run, "--output", "z.safetensors", "--split", "all")
    assert status == 2
    assert "--split must be one that has rows: train (44), validation (44), test (44), got 'all'." in err


def test_a_probe_on_few_labels(command):
    few = ("--evaluation.few_labels",)
    _, table, _ = command("fit", "--config", "tiny/quick", "--run_dir", "run", *few, "[0.1, 0.5]")
    trained = json.loads(Path("run/metrics.json").read_text())["trained"]
    half, tenth = (f"{100 * trained[name]:.2f}%" for name in ("few_0.5", "few_0.1"))
    titles, numbers = (line for line in table.splitlines()[:2])
    assert titles.endswith("     probe on 10% of labels     probe on 50% of labels")
    assert numbers.split()[-2:] == [tenth, half]
    status, out, _ = command("test", "--ckpt", "run")
    assert status == 0
    assert f", probe on 10% of labels {tenth}, probe on 50% of labels {half}\n" in out
    status, _, err = command("test", "--ckpt", "run", "--evaluation.few_labels", "[1.5]")
    assert (status, "few_labels must be shares in (0, 1), got 1.5." in err) == (2, True)


def test_few_rows_are_of_every_class():
    labels = torch.arange(90) % 3
    labels[:60] = 0
    few = few_of_each_class(labels, 0.1)
    assert torch.bincount(labels[few]).tolist() == [7, 1, 1]
    assert torch.equal(few, few_of_each_class(labels, 0.1))


def test_embed_takes_the_training_rows_where_nothing_is_held_out(command, tiny, monkeypatch):
    command("fit", "--config", "tiny/quick", "--run_dir", "here")
    points = tiny.TinyData.points
    none = lambda self, split: tuple(t[: 44 * (split == "train")] for t in points(self, split))  # noqa: E731
    monkeypatch.setattr(tiny.TinyData, "points", none)
    assert "44 embeddings of width 5 (train)" in command("embed", "--ckpt", "here", "--output", "z")[1]
    err = command("embed", "--ckpt", "here", "--output", "z", "--split", "test")[2]
    assert "--split must be one that has rows: train (44), got 'test'." in err


def test_the_command_and_python_give_the_same(command, tiny):
    from cl_core.training import Evaluation, Optimization, TrainerOptions, fit

    command("fit", "--config", "tiny/quick")
    result = fit(
        tiny.method(),
        tiny.TinyData(),
        optimization=Optimization(lr=0.01),
        trainer=TrainerOptions(max_epochs=2, accelerator="cpu", progress_bar=False),
        evaluation=Evaluation(neighbours=(5,), regularizations=(0.01,)),
    )
    state = load_file("runs/tiny-quick-001/export/model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in result.method.state_dict().items())


def test_config_files_and_overrides(command):
    Path("mine.yaml").write_text(QUICK)
    status, out, _ = command(
        "fit", "--config", "mine.yaml", "--model.loss.temperature", 0.3, "--print_config"
    )
    assert status == 0
    assert yaml.safe_load(out)["model"]["init_args"]["loss"]["init_args"] == {"temperature": 0.3}
    assert not Path("runs").exists()


def test_a_plugin_loss_on_the_command_line(command, install):
    source = """
from cl_core.losses._base import TwoViewLoss

class TheirLoss(TwoViewLoss):
    def __init__(self, margin: float = 0.5):
        super().__init__()
        self.margin = margin

    def forward(self, z1, z2):
        return ((z1 - z2).norm(dim=1) - self.margin).relu().mean()
"""
    install(
        "plugged-losses", files={"loss.py": source}, losses={"TheirLoss": "plugged_losses.loss:TheirLoss"}
    )
    install("plugged-broken", files={}, losses={"BrokenLoss": "plugged_broken.nothing:BrokenLoss"})
    assert "TheirLoss" in command("list", "losses")[1]
    status, _, err = command(
        "fit", "--config", "tiny/quick", "--model.loss", "TheirLoss", "--model.loss.margin", 0.1
    )
    assert (status, err) == (0, "")
    loss = load_export("runs/tiny-quick-001/export").criterion
    assert type(loss).__name__ == "TheirLoss"
    assert loss.margin == 0.1
    status, _, err = command("fit", "--config", "tiny/quick", "--model.loss", "BrokenLoss")
    assert status == 2
    assert "BrokenLoss, which plugged-broken registers" in err
    assert "No module named" in err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("fitt", "no command of cl-tiny 'fitt'; did you mean 'fit'"),
        ("--config tiny/quick fit", "options come after the command, as in: cl-tiny fit --config tiny/quick"),
        ("list datas", "no topic of list 'datas'; did you mean 'data'"),
        ("fit", "no data: pass --config NAME"),
        ("fit --data TinyData", "no model: pass --config NAME"),
        ("fit --model TinyMethod --data TinyData", "TinyMethod needs --model.encoder and --model.loss."),
        ("fit --config tiny/quik", "no file or config of cl-tiny 'tiny/quik'; did you mean 'tiny/quick'?"),
        ("Q --model.loss.temprature 3", "no parameter of TinyLoss 'temprature'; did you mean 'temperature'?"),
        ("Q --model.loss TinyLos", "no TwoViewLoss for --model.loss 'TinyLos'; did you mean 'TinyLoss'"),
        ("Q --model.loss TinyMethod", "--model.loss takes a TwoViewLoss, which TinyMethod is not: AMCLBa"),
        ("Q --seed -1", "seed must be at least 0, got -1."),
        ("Q --model tinymethod", "no Method for --model 'tinymethod'; did you mean 'TinyMethod'"),
        ("Q --data TinyDat", "no Data for --data 'TinyDat'; did you mean 'TinyData'"),
        ("Q --data.batch 3", "no parameter of TinyData 'batch'; did you mean 'batch_size'?"),
        ("Q --data.batch_size 0", "batch_size must be at least 1, got 0."),
        ("Q --model.loss.temperature x", "--model.loss.temperature must be of type float, got 'x'."),
        ("Q --trainer.max_epoch 3", "no option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'"),
        ("Q --optimization.lr -1", "lr must be finite and > 0, got -1.0."),
        (
            "Q --model.loss NTXentLoss --model.loss.group foo",
            "--model.loss.group must be 'world' or null, got 'foo'.",
        ),
        ("Q --optimization.betas [0.9,2]", "betas must be in [0, 1), got (0.9, 2.0)."),
        ("Q --trainer.gradient_clip_val -1", "gradient_clip_val must be finite and > 0, got -1.0."),
        (
            "Q --trainer.limit_train_batches 1.5",
            "limit_train_batches must be an integer >= 1 or a share in (0, 1]",
        ),
        (
            "Q --trainer.accelerator warp",
            "trainer.accelerator='warp', trainer.devices=1, trainer.strategy='auto'",
        ),
        ("fit --resume=", "--resume must name a run folder, got an empty text."),
        ("Q --run_dir=", "run_dir must name a folder, got an empty text."),
        ("fit tiny/quick", "'tiny/quick' is no option; a configuration is named by --config tiny/quick."),
        (
            "fit --config /proc/self/status",
            "/proc/self/status is not a configuration: it is not readable YAML.",
        ),
        ("fit --init_from nowhere --data TinyData", "nowhere is neither a run nor an export: name a --model"),
        ("reproduce grid --seeds a", "--seeds must be a list of integers such as [0,1,2]."),
        ("reproduce grid --seeds []", "seeds must hold at least one number, got none."),
        ("Q --init_from nowhere", "nowhere is neither a run, nor an export, nor a checkpoint."),
        ("fit --resume nowhere", "nowhere is not a run"),
        ("test", "--ckpt is missing"),
        ("test --ckpt nowhere", "nowhere is neither a run, nor an export, nor a checkpoint."),
        ("embed --ckpt nowhere", "nowhere is neither a run"),
        ("reproduce grud", "no grid or file 'grud'; did you mean 'grid'?"),
    ],
)
def test_errors_are_one_sentence(command, args, sentence):
    status, out, err = command(*args.replace("Q", "fit --config tiny/quick").split())
    assert (status, out) == (2, "")
    assert err.startswith(f"cl-tiny: {sentence}")
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_options_stand_on_top_of_a_configuration_wherever_they_stand(command):
    arguments = (
        "--optimization.lr",
        0.5,
        "--model.loss.temperature=0.2",
        "--config",
        "tiny/quick",
        "--print_config",
    )
    config = yaml.safe_load(command("fit", *arguments)[1])
    assert config["optimization"]["lr"] == 0.5
    assert config["model"]["init_args"]["loss"]["init_args"]["temperature"] == 0.2
    arguments = ("--data.batch_size", 3, "--data.size=9", "--data", "TinyData", "--print_config")
    config = yaml.safe_load(command("fit", *arguments)[1])
    assert (config["data"]["init_args"]["batch_size"], config["data"]["init_args"]["size"]) == (3, 9)


class Killed(Exception):
    """Stands for a process that ends at once."""


def test_a_run_that_goes_on_is_judged_by_its_checkpoint(command, tiny, monkeypatch):
    """Not by the export of its earlier end."""
    from cl_core.training.fitting import weights_of

    def after_step(self, progress):
        if progress.step == 18:
            raise Killed

    command("fit", "--config", "tiny/quick", "--run_dir", "here")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tiny.TinyMethod, "after_step", after_step)
        command("fit", "--resume", "here", "--trainer.max_epochs", 4)
    checkpoint = weights_of("here/checkpoints/last.ckpt", package="cl-tiny")
    found = weights_of("here", package="cl-tiny")
    assert all(torch.equal(value, found[name]) for name, value in checkpoint.items())
    out = command("test", "--ckpt", "here")[1].splitlines()
    assert out[-1] == "written: here/metrics.json"
    assert out[0] == command("test", "--ckpt", "here/checkpoints/last.ckpt")[1].splitlines()[0]
    out = command("test", "--ckpt", "here/export")[1]
    assert "not written to a run: here/export is not what here has come to" in out


def test_only_the_result_on_its_own_data_is_written_to_the_run(command, tiny):
    command("fit", "--config", "tiny/quick", "--run_dir", "here", "--checkpoint.keep_every_epochs", 1)
    assert "written: here/metrics.json" in command("test", "--ckpt", "here", "--data.num_workers", 1)[1]
    written = Path("here/metrics.json").read_bytes()
    for arguments, why in (
        (
            ("here/checkpoints/epoch-0001.ckpt",),
            "here/checkpoints/epoch-0001.ckpt is not what here has come to",
        ),
        (("here", "--data.size", 40), "data.size was 44 when here began and is 40 now"),
        (
            ("here", "--evaluation.neighbours", "[1]"),
            "evaluation.neighbours was [5] when here began and is [1] now",
        ),
    ):
        status, out, _ = command("test", "--ckpt", *arguments)
        assert (status, out.splitlines()[-1]) == (0, f"not written to a run: {why}")
    assert Path("here/metrics.json").read_bytes() == written
    settings = json.loads(Path("here/settings.json").read_text())
    settings["data"]["init_args"]["size"] = {"rows": 44}  # a colon ends no clause
    Path("here/settings.json").write_text(json.dumps(settings))
    out = command("test", "--ckpt", "here")[1]
    assert "not written to a run: data.size was {'rows': 44} when here began and is 44 now\n" in out


def test_somebody_elses_files_above_an_export_are_left_alone(command):
    command("fit", "--config", "tiny/quick", "--run_dir", "here")
    Path("project/models").mkdir(parents=True)
    Path("here/export").rename("project/models/mine")
    for folder in (Path("project"), Path("project/models")):
        (folder / "config.yaml").write_text("data: {path: x}\n")
        (folder / "metrics.json").write_text("{}")
    status, out, err = command("test", "--ckpt", "project/models/mine", "--data", "TinyData")
    assert (status, err) == (0, "")
    assert "not written to a run: it belongs to none" in out
    assert Path("project/metrics.json").read_text() == Path("project/models/metrics.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("test --ckpt runs", "runs is neither a run, nor an export, nor a checkpoint."),
        ("test --ckpt=", "--ckpt is missing"),
        ("validate --ckpt /etc/hostname", "/etc/hostname is neither a run, nor an export, nor a checkpoint."),
        ("test --ckpt young", "young is a run without a checkpoint so far."),
        ("fit --config tiny/quick --init_from young", "young is a run without a checkpoint so far."),
    ],
)
def test_what_is_no_trained_method(command, tiny, monkeypatch, arguments, said):
    def after_step(self, progress):
        raise Killed

    Path("runs").mkdir()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tiny.TinyMethod, "after_step", after_step)
        command("fit", "--config", "tiny/quick", "--run_dir", "young")
    status, _, err = command(*arguments.split())
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"cl-tiny: {said}")


def test_init_from_says_what_kept_its_initial_values(command, caplog):
    command("fit", "--config", "tiny/quick", "--run_dir", "first")
    command("fit", "--config", "tiny/quick", "--init_from", "first", "--model", "TinyClassifier")
    (said,) = caplog.messages
    assert said == "2 of 6 weights were not in first and keep their initial values: head.weight, head.bias."
    status, _, err = command(
        "fit", "--config", "tiny/quick", "--init_from", "first", "--model.encoder.width", 4
    )
    assert (status, err.count("\n")) == (2, 1)
    assert (
        "the encoder of first does not fit that of TinyMethod: encoder.layers.0.weight has shape (8, 6)"
        in err
    )
    assert not Path("runs/tiny-quick-002").exists()


def test_a_classifier_of_the_methods_own_is_judged(command, tiny):
    status, out, _ = command("fit", "--config", "tiny/quick", "--model", "TinyClassifier", "--run_dir", "own")
    assert status == 0
    metrics = json.loads(Path("own/metrics.json").read_text())
    head, trained, untrained, raw = out.splitlines()[:4]
    assert head.split() == ["test", "accuracy", "kNN", "linear", "probe", "classifier"]
    assert trained.endswith(f"{100 * metrics['trained']['classifier']:.2f}%")
    assert untrained.endswith(f"{100 * metrics['untrained']['classifier']:.2f}%")
    assert raw.split()[-1] == "none"
    assert len({len(line) for line in (head, trained, untrained, raw)}) == 1
    assert metrics["class_names"] == ["a", "b", "c", "d"]

    method, right = load_export("own/export"), {}
    for split in ("validation", "test"):
        inputs, labels = tiny.TinyData().points(split)
        right[split] = (method.classify(inputs).argmax(1) == labels).float().mean()
    assert metrics["trained"]["classifier"] == pytest.approx(float(right["test"]))
    assert metrics["trained"]["classifier_validation"] == pytest.approx(float(right["validation"]))

    status, out, _ = command("test", "--ckpt", "own")
    assert out.splitlines()[0].endswith(f", classifier {100 * right['test']:.2f}%")
    status, out, _ = command("validate", "--ckpt", "own")
    assert out.splitlines()[0].endswith(f", classifier {100 * right['validation']:.2f}%")
    written = json.loads(Path("own/metrics.json").read_text())
    assert (written["test"], written["validate"]["classifier"]) == (
        metrics["trained"],
        metrics["trained"]["classifier_validation"],
    )


def test_a_classifier_of_other_classes_is_left_out(command):
    command("fit", "--config", "tiny/quick", "--model", "TinyClassifier", "--run_dir", "own")
    before = Path("own/metrics.json").read_text()

    status, out, err = command("test", "--ckpt", "own", "--data", "OtherData")
    assert (status, err) == (0, "")
    assert out.startswith("test accuracy on OtherData: kNN ") and ", classifier" not in out
    assert (
        "its own classifier is left out: it tells a, b, c, ... (4 classes) apart, these data have a, b, x, ..."
        in out
    )
    assert Path("own/metrics.json").read_text() == before


def test_its_classes_are_known_before_a_run_ends_and_to_an_export_alone(command, tiny, monkeypatch):
    def after_step(self, progress):
        if progress.step == 7:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tiny.TinyClassifier, "after_step", after_step)
        command("fit", "--config", "tiny/quick", "--model", "TinyClassifier", "--run_dir", "cut")
    shutil.copytree("cut", "apart")
    assert command("fit", "--resume", "apart")[0] == 0
    shutil.move("apart/export", "export")
    for place in ("cut", "export"):
        for data, shown in (("TinyData", True), ("OtherData", False)):
            options = ("--evaluation.neighbours=[5]", "--evaluation.regularizations=[0.01]")
            status, out, err = command("test", "--ckpt", place, "--data", data, *options)
            assert (status, err, ", classifier" in out) == (0, "", shown)
            assert ("it tells a, b, c, ... (4 classes) apart" in out) != shown


def test_reproduce_and_compare_show_the_classifier_where_there_is_one(command):
    grid = GRID.replace("seeds: [0, 1]", "seeds: [0]\nmetrics: [classifier, knn]")
    Path("grid.yaml").write_text(grid.replace("{model.encoder.width: 4}", "{model: TinyClassifier}"))
    status, out, err = command("reproduce", "grid.yaml", "--output", "out")
    assert (status, err) == (0, "")
    own = json.loads(Path("out/b-narrow-seed0/metrics.json").read_text())["trained"]
    assert "| method | setting | seeds | classifier | classifier, untrained | knn |" in out
    assert "| A | wide | 1 | none |" in out
    assert f"| B | narrow | 1 | {100 * own['classifier']:.1f} |" in out
    status, out, err = command("compare", "out")
    assert (status, err) == (0, "")
    assert "| linear probe | against the first | classifier | against the first |" in out
    rows = [line for line in out.splitlines() if line.startswith("| model Tiny")]
    assert rows[0].endswith("| none |  |")
    assert rows[1].endswith(f"| {100 * own['classifier']:.1f} |  |")
    written = json.loads(Path("comparison/comparison.json").read_text())
    assert ["classifier" in row["accuracies"] for row in written] == [False, True]


def test_a_distribution_with_a_domain_of_its_own_lends_its_losses(command, install):
    loss = """
from cl_core.losses import TwoViewLoss

class LentLoss(TwoViewLoss):
    def forward(self, z1, z2):
        return (z1 - z2).square().mean()
"""
    method = "from cl_core.method import Method\n\nclass LentMethod(Method):\n    pass\n"
    install(
        "lending",
        files={"loss.py": loss, "method.py": method},
        losses={"LentLoss": "lending.loss:LentLoss"},
        methods={"LentMethod": "lending.method:LentMethod"},
        domains={"lending": "lending"},
    )
    assert "LentLoss" in command("list", "losses")[1]
    assert "LentMethod" not in command("list", "methods")[1]
    assert command("fit", "--config", "tiny/quick", "--model.loss", "LentLoss")[0] == 0
    err = command("fit", "--config", "tiny/quick", "--model", "LentMethod")[2]
    assert err == "cl-tiny: LentMethod is a method of lending, which has a command of its own.\n"


def test_debug_shows_where_an_error_came_from(command):
    with pytest.raises(FileNotFoundError):
        command("fit", "--resume", "nowhere", "--debug")


def test_resume_goes_on_and_says_how_after_ctrl_c(command, tiny, monkeypatch):
    def after_step(self, progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    command("fit", "--config", "tiny/quick", "--run_dir", "whole")
    with monkeypatch.context() as patched:
        patched.setattr(tiny.TinyMethod, "after_step", after_step)
        status, _, err = command("fit", "--config", "tiny/quick", "--run_dir", "cut")
    assert status == 130
    assert "interrupted; the last checkpoint is kept; go on with fit --resume cut" in err
    status, out, _ = command("fit", "--resume", "cut")
    assert status == 0
    assert "run folder: cut" in out
    for name in ("export/model.safetensors", "metrics.json", "config.yaml"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def test_what_was_asked_is_kept_for_the_resume(command, tiny, monkeypatch):
    def after_step(self, progress):
        if progress.step == 3:
            raise Killed

    options = ("--config", "tiny/quick", "--init_from", "first", "--monitor.knn_every_epochs", "null")
    command("fit", "--config", "tiny/quick", "--run_dir", "first")
    command("fit", *options, "--seed", 1, "--run_dir", "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tiny.TinyMethod, "after_step", after_step)
        command("fit", *options, "--seed", 1, "--run_dir", "cut")  # dies before the first checkpoint
    config = yaml.safe_load(Path("cut/config.yaml").read_text())
    assert (config["init_from"], config["monitor"]["knn_every_epochs"]) == (
        str(Path("first").absolute()),
        None,
    )
    assert {"run_dir", "resume", "config", "debug", "print_config"}.isdisjoint(config)
    assert command("fit", "--resume", "cut")[0] == 0
    for name in ("export/model.safetensors", "metrics.json", "metrics.csv", "config.yaml"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


def test_resume_takes_more_epochs_and_refuses_another_rate(command):
    command("fit", "--config", "tiny/quick", "--run_dir", "here")
    status, _, err = command("fit", "--resume", "here", "--optimization.lr", 0.5)
    assert status == 2
    assert err.startswith(
        "cl-tiny: optimization.lr was 0.01 when here began and is 0.5 now: resume it as it began"
    )
    assert command("fit", "--resume", "here", "--trainer.max_epochs", 3)[0] == 0
    assert json.loads(Path("here/metrics.json").read_text())["steps"] == 15
    assert yaml.safe_load(Path("here/config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert command("fit", "--resume", "here")[0] == 0


def test_init_from_an_export_brings_the_model(command):
    command("fit", "--config", "tiny/quick", "--model.encoder.width", 4)
    status, _, err = command(
        "fit",
        "--init_from=runs/tiny-quick-001",
        "--data=TinyData",
        "--trainer.max_epochs=1",
        "--trainer.progress_bar=false",
        "--run_dir=second",
        "--trainer.accelerator=cpu",
    )
    assert (status, err) == (0, "")
    config = yaml.safe_load(Path("second/config.yaml").read_text())
    assert config["model"]["init_args"]["encoder"]["init_args"]["width"] == 4
    metrics = json.loads(Path("second/metrics.json").read_text())
    assert metrics["kept_initial"] == []


def test_reproduce_writes_a_table_and_goes_on_where_it_was_cut(command, tiny, monkeypatch):
    calls = []

    def after_step(self, progress):
        calls.append(progress.step)
        if len(calls) == 27:  # in the second epoch of the third of four runs of ten steps
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tiny.TinyMethod, "after_step", after_step)
        assert command("reproduce", "grid", "--output", "out")[0] == 130
    results = json.loads(Path("out/results.json").read_text())
    assert [(row["method"], row["seeds"]) for row in results] == [("A", [0]), ("B", [0])]

    def count(self, progress):
        calls.append(progress.step)

    calls.clear()
    monkeypatch.setattr(tiny.TinyMethod, "after_step", count)
    status, out, _ = command("reproduce", "grid", "--output", "out")
    assert status == 0
    assert calls == [*range(6, 11), *range(1, 11)]  # the cut run goes on after its first epoch
    results = json.loads(Path("out/results.json").read_text())
    assert [row["seeds"] for row in results] == [[0, 1], [0, 1]]
    knn = torch.tensor(results[0]["trained"]["knn"], dtype=torch.float64)
    assert f"| A | wide | 2 | {100 * knn.mean():.1f} +- {100 * knn.std():.1f} |" in out
    assert "| 50.0 |" in out
    losses = torch.tensor(results[0]["numbers"]["train/loss"], dtype=torch.float64)
    assert f"| {losses.mean():.3f} +- {losses.std():.3f} |" in out
    assert "Published, A: Someone, Somewhere." in Path("out/results.md").read_text()
    config = yaml.safe_load(Path("out/b-narrow-seed1/config.yaml").read_text())
    assert config["model"]["init_args"]["encoder"]["init_args"]["width"] == 4
    calls.clear()
    assert command("reproduce", "grid", "--output", "out")[0] == 0
    assert calls == []


def test_options_of_fit_reach_every_run_of_a_grid_below_its_own(command):
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    options = ["--model.encoder.width", "6", "--optimization.lr=0.02"]
    assert command("reproduce", "grid.yaml", *options, "--output", "out", "--seeds=[3]")[0] == 0
    for run, width in (("a-wide", 6), ("b-narrow", 4)):
        config = yaml.safe_load(Path(f"out/{run}-seed3/config.yaml").read_text())
        assert config["model"]["init_args"]["encoder"]["init_args"]["width"] == width
        assert config["optimization"]["lr"] == 0.02
    table = Path("out/results.md").read_text()
    assert "All with --model.encoder.width 6 --optimization.lr=0.02.\n" in table
    status, _, err = command("reproduce", "grid.yaml", "--output", "out", "--seeds=[3]")
    assert (status, "holds a run of other settings" in err) == (2, True)
    status, _, err = command("reproduce", "grid.yaml", "--outptu", "other", "--output", "third")
    assert (status, err.count("\n")) == (2, 1)
    assert "outptu" in err


def test_a_table_has_no_columns_without_numbers():
    row = {
        "method": "A",
        "setting": "s",
        "seeds": [0],
        "trained": {"knn": [0.5]},
        "untrained": {},
        "raw": {},
        "published": {},
        "numbers": {},
    }
    grid = Grid("A grid", (0,), ("knn", "linear"), ())
    assert "| method | setting | seeds | knn |\n" in markdown(grid, [row])
    published = {**row, "published": {"linear": 0.7}}
    assert "| method | setting | seeds | knn | linear, published |\n" in markdown(grid, [row, published])
    assert "| A | s | 1 | 50.0 | none |\n" in markdown(grid, [row, published])
    assert "published" not in markdown(grid, [row, published], ["--data", "Other"])  # another experiment


def test_several_processes_share_a_grid(command):
    """What another process trains is left to it, and the rest goes on."""
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    Path("out/a-wide-seed0").mkdir(parents=True)
    with RunFolder(Path("out/a-wide-seed0")).locked():
        status, out, _ = command("reproduce", "grid.yaml", "--output", "out")
    assert status == 0
    assert "another process trains in out/a-wide-seed0: left to it" in out
    assert [row["method"] for row in json.loads(Path("out/results.json").read_text())] == ["B"]
    assert command("reproduce", "grid.yaml", "--output", "out")[0] == 0
    assert [row["method"] for row in json.loads(Path("out/results.json").read_text())] == ["A", "B"]


def test_a_run_that_another_process_begins_meanwhile_is_left_to_it(command, tiny, monkeypatch):
    """Both find the first run missing; one begins it while the other still loads."""
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    held = contextlib.ExitStack()
    plain = tiny.TinyData.set_seed

    def set_seed(self, seed):
        run = RunFolder(Path("out/a-wide-seed0"))
        if not run.config.is_file():
            held.enter_context(run.locked())
            run.write_settings(began["config"], began["settings"])
        plain(self, seed)

    assert command("reproduce", "grid.yaml", "--output", "other")[0] == 0
    other = RunFolder(Path("other/a-wide-seed0"))
    began = {"config": other.read_config(), "settings": other.read_settings()}
    monkeypatch.setattr(tiny.TinyData, "set_seed", set_seed)
    with held:
        status, out, err = command("reproduce", "grid.yaml", "--output", "out")
    assert (status, err) == (0, "")
    assert "another process trains in out/a-wide-seed0: left to it" in out
    assert [row["method"] for row in json.loads(Path("out/results.json").read_text())] == ["B"]


def test_reproduce_refuses_a_folder_of_other_settings(command):
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    assert command("reproduce", "grid.yaml", "--output", "out")[0] == 0
    Path("grid.yaml").write_text(GRID.replace("width: 4", "width: 5"))
    status, _, err = command("reproduce", "grid.yaml", "--output", "out")
    assert status == 2
    assert "out/b-narrow-seed0 holds a run of other settings" in err


def test_reproduce_refuses_before_it_trains_and_mixes_nothing(command, tiny, monkeypatch):
    """A configuration that has changed on the disk is another one, as are options; workers are no part of it."""
    Path("own.yaml").write_text(QUICK)
    Path("grid.yaml").write_text(GRID.replace("config: tiny/quick, over", "config: own.yaml, over"))
    assert command("reproduce", "grid.yaml", "--output", "out", "--seeds=[0]")[0] == 0
    table = Path("out/results.json").read_text()
    shutil.rmtree("out/a-wide-seed0")  # the run that would come first
    trained = []
    monkeypatch.setattr(tiny.TinyMethod, "after_step", lambda self, progress: trained.append(progress))
    for options, words in (
        (["--optimization.lr=0.5"], "optimization.lr was 0.01 and is 0.5 now"),
        (["--trainer.max_epochs=3"], "trainer.max_epochs was 2 and is 3 now"),
        (["--data.size=40"], "data.size was 44 and is 40 now"),
    ):
        status, _, err = command("reproduce", "grid.yaml", *options, "--output", "out")
        assert (status, err.count("\n")) == (2, 1)
        assert f"out/b-narrow-seed0 holds a run of other settings, {words}: choose another --output" in err
    Path("own.yaml").write_text(QUICK.replace("lr: 0.01", "lr: 0.02"))
    status, _, err = command("reproduce", "grid.yaml", "--output", "out")
    assert (status, "optimization.lr was 0.01 and is 0.02 now" in err) == (2, True)
    assert not trained and not Path("out/a-wide-seed0").exists()
    assert Path("out/results.json").read_text() == table
    Path("own.yaml").write_text(QUICK)
    options = ["--data.num_workers=1", "--trainer.tensorboard=false"]
    assert command("reproduce", "grid.yaml", *options, "--output", "out", "--seeds=[0]")[0] == 0
    assert len(trained) == 10


def test_reproduce_leaves_no_run_to_a_grid_of_other_options(command, tiny, monkeypatch):
    """Another process, of other options, begins the first run while this one loads, and dies."""
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    assert command("reproduce", "grid.yaml", "--output", "other", "--optimization.lr=0.5")[0] == 0
    plain = tiny.TinyData.set_seed

    def set_seed(self, seed):
        if not Path("out/a-wide-seed0/config.yaml").is_file():
            shutil.copytree("other/a-wide-seed0", "out/a-wide-seed0", dirs_exist_ok=True)
        plain(self, seed)

    monkeypatch.setattr(tiny.TinyData, "set_seed", set_seed)
    status, _, err = command("reproduce", "grid.yaml", "--output", "out")
    assert (status, "optimization.lr was 0.5 and is 0.01 now" in err) == (2, True)
    assert not Path("out/results.json").exists()


@pytest.mark.parametrize("option", ["--seed=1", "--run_dir=run", "--resume=run"])
def test_options_of_one_run_are_refused_for_a_grid(command, option):
    status, _, err = command("reproduce", "grid", option)
    assert (status, err.count("\n")) == (2, 1)
    assert (
        f"{option.partition('=')[0]} belongs to one run, not to all of a grid: pass --seeds or --output"
        in err
    )


def test_a_run_begun_before_the_lock_was_had_is_left_alone(command, monkeypatch):
    plain = RunFolder.create.__func__

    def create(cls, *args, **options):
        run = plain(cls, *args, **options)
        shutil.copytree("other", run.path, dirs_exist_ok=True)
        return run

    assert command("fit", "--config", "tiny/quick", "--run_dir", "other")[0] == 0
    monkeypatch.setattr(RunFolder, "create", classmethod(create))
    status, _, err = command("fit", "--config", "tiny/quick", "--optimization.lr=0.5", "--run_dir", "run")
    assert (status, "run already holds a run" in err) == (2, True)
    for file in ("config.yaml", "metrics.json", "export/model.safetensors"):
        assert Path("run", file).read_bytes() == Path("other", file).read_bytes()


def test_a_grid_put_right_runs_in_the_same_folder(command):
    Path("grid.yaml").write_text(
        GRID.replace("seeds: [0, 1]", "seeds: [0]").replace("tiny/quick", "tiny/quik")
    )
    assert command("reproduce", "grid.yaml", "--output", "out")[0] == 2
    Path("grid.yaml").write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]"))
    assert command("reproduce", "grid.yaml", "--output", "out")[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: [1",
            "seeds: [a]",
            "[]",
            "title: x",
            GRID.replace("[0, 1]", "[]"),
            GRID + "metrics: [knn, foo]",
        ),
        "{title: x, seeds: [0], cells: []}",
        GRID.replace("B, setting: narrow", "a, setting: Wide!"),
    ],
)
def test_a_file_that_is_no_grid(command, text):
    Path("grid.yaml").write_text(text)
    status, _, err = command("reproduce", "grid.yaml", "--output", "out")
    assert status == 2
    assert err.startswith("cl-tiny: grid.yaml is not a grid of cells: ")
    assert err.count("\n") == 1


def test_a_stored_configuration_imports_nothing(command, tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {class_path: planted_module.Planted}\n")
    status, out, err = command("fit", "--resume", str(run))
    assert (status, out) == (2, "")
    assert "planted_module.Planted" in err
    assert "planted_module" not in sys.modules


@pytest.mark.parametrize(
    "encoder", ["planted_path.Planted", '{"class_path": "planted\\u005fpath.Planted"}', "other.yaml"]
)
@pytest.mark.parametrize("verb", ["fit --resume run", "test --ckpt run/checkpoints/last.ckpt"])
def test_a_stored_text_in_place_of_a_class_imports_nothing(
    command, tiny, tmp_path, monkeypatch, encoder, verb
):
    """The parser takes a path, a configuration as text, or a file of one for the class itself."""
    command("fit", "--config", "tiny/quick", "--run_dir", "run")
    (tmp_path / "planted_path.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    Path("other.yaml").write_text("class_path: planted_path.Planted\n")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["model"]["init_args"]["encoder"] = encoder
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    status, _, err = command(*verb.split())
    assert (status, err.count("\n"), "planted_path" in sys.modules) == (2, 1, False)
    assert err.endswith("if you trust it, pass --import planted_path.\n")


def test_a_stored_configuration_that_names_another_is_refused(command):
    command("fit", "--config", "tiny/quick", "--run_dir", "run")
    with Path("run/config.yaml").open("a") as file:
        file.write("config: other.yaml\n")
    Path("other.yaml").write_text("model: {class_path: planted_module.Planted}\n")
    status, _, err = command("fit", "--resume", "run")
    assert (status, "the stored configuration names another one" in err) == (2, True)


def test_a_configuration_of_other_things_is_named(command):
    Path("run").mkdir()
    for text, words in (("model: 3", "model is 3"), ("data: [1, 2]", "data is [1, 2]")):
        Path("run/config.yaml").write_text(text)
        status, _, err = command("fit", "--resume", "run")
        assert (status, err) == (2, f"cl-tiny: run/config.yaml is damaged: {words}.\n")


def test_a_refused_run_leaves_its_folder_free(command, tiny, monkeypatch):
    """The command put right may be typed again; what has learnt something stays."""

    def refuse(self, batch):
        raise ValueError("images must have 3 channels.")

    again = ("fit", "--config", "tiny/quick", "--run_dir", "run")
    with monkeypatch.context() as patched:
        patched.setattr(tiny.TinyMethod, "loss", refuse)
        assert command(*again)[0] == 2
    assert not any(Path("run", name).exists() for name in ("config.yaml", "settings.json", "metrics.json"))
    assert command(*again)[0] == 0
    status, _, err = command(*again)
    assert status == 2 and "already holds a run" in err


def test_what_a_loader_worker_says_is_one_sentence(command, tiny, monkeypatch):
    def item(self, index):
        raise ValueError("item 3 is broken: see there")

    monkeypatch.setattr(tiny.TinyViews, "__getitem__", item)
    status, _, err = command("fit", "--config", "tiny/quick", "--data.num_workers", 1)
    assert (status, err) == (2, "cl-tiny: item 3 is broken: see there\n")


def run_of(path, *, width=8, seed=0, accuracy=0.5, finished=True):
    """A run folder as far as ``compare`` reads it."""
    path.mkdir(parents=True)
    model = {"class_path": "tiny.TinyEncoder", "init_args": {"width": width, "dropout": 0.2}}
    settings = {"model": model, "data": {"class_path": "tiny.TinyData", "init_args": {"root": str(path)}}}
    settings |= {"evaluation": {}, "seed": seed, "processes": 1, "global_batch_size": 8, "weights": {}}
    (path / "settings.json").write_text(json.dumps(settings))
    (path / "config.yaml").write_text("{}")
    (path / "metrics.csv").write_text("epoch,step,validation/knn\n1,5,0.25\n2,10,0.5\n")
    (path / "export").mkdir()
    (path / "export" / "config.json").write_text("{}")
    (path / "export" / "model.safetensors").write_bytes(b"")
    trained = {"knn": accuracy, "linear": accuracy + 0.1}
    (path / "metrics.json").write_text(json.dumps({"trained": trained, "finished": finished}))
    return path


def test_compare_tells_a_moving_average_from_the_weights_themselves(command):
    for seed in (0, 1):
        for name, monitor in (
            ("plain", {"moving_average": None, "scores": True}),
            ("mean", {"moving_average": 0.9}),
        ):
            settings = run_of(Path(f"runs/{name}-{seed}"), seed=seed) / "settings.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"monitor": monitor}))
    status, out, err = command("compare", "runs")
    assert (status, err) == (0, "")
    assert "| moving_average 0.9 | 0, 1 |" in out and "| moving_average None | 0, 1 |" in out


def test_compare_has_intervals_over_seeds_and_paired_differences(command, domain, monkeypatch):
    for seed, (wide, narrow) in enumerate([(0.5, 0.4), (0.6, 0.55), (0.55, 0.4)]):
        run_of(Path(f"runs/wide-{seed}"), seed=seed, accuracy=wide)
        run_of(Path(f"runs/narrow-{seed}"), width=4, seed=seed, accuracy=narrow)
    status, out, _ = command("compare", "runs/wide-0", "runs/wide-1", "runs/wide-2", "runs")
    assert status == 2  # some are given twice
    status, out, err = command("compare", "runs")
    assert (status, err) == (0, "")
    assert out.startswith("| setting | seeds | kNN | against the first | linear probe | against the first |")
    # t is 4.3027: narrow 45 +- 4.3027 * 8.660 / sqrt(3), difference 10 +- 4.3027 * 5 / sqrt(3)
    assert "| width 4 | 0, 1, 2 | 45.0 [23.5, 66.5] |  | 55.0 [33.5, 76.5] |  |" in out
    assert "| width 8 | 0, 1, 2 | 55.0 [42.6, 67.4] | +10.0 [-2.4, +22.4] |" in out
    written = json.loads(Path("comparison/comparison.json").read_text())
    assert [(row["label"], row["seeds"]) for row in written] == [
        ("width 4", [0, 1, 2]),
        ("width 8", [0, 1, 2]),
    ]
    assert Path("comparison/comparison.md").read_text() in out


def test_compare_shows_probes_on_few_labels_in_the_order_of_their_shares(command):
    for name, width, few in (
        ("one", 2, {"few_0.1": 0.25, "few_0.01": 0.125}),
        ("two", 4, {"few_0.1": 0.5, "few_none": 0.5}),
    ):
        metrics = run_of(Path(f"runs/{name}"), width=width) / "metrics.json"
        content = json.loads(metrics.read_text())
        content["trained"] |= few
        metrics.write_text(json.dumps(content))
    status, out, err = command("compare", "runs")
    assert (status, err) == (0, "")
    head, _, one, two, *_ = out.splitlines()
    assert head.endswith(
        "| probe on 1% of labels | against the first | probe on 10% of labels | against the first |"
    )
    assert one.endswith("| 12.5 |  | 25.0 |  |")
    assert two.endswith("| none |  | 50.0 | +25.0 |")


def test_compare_tells_settings_of_one_class_apart_beside_another_class(command):
    for width in (4, 8, 9):
        run_of(Path(f"runs/{width}"), width=width)
    settings = json.loads(Path("runs/9/settings.json").read_text())
    settings["model"] = {"class_path": "tiny.Other", "init_args": {}}
    Path("runs/9/settings.json").write_text(json.dumps(settings))
    assert command("compare", "runs")[0] == 0
    written = json.loads(Path("comparison/comparison.json").read_text())
    assert [row["label"] for row in written] == [
        "model TinyEncoder, width 4",
        "model TinyEncoder, width 8",
        "model Other",
    ]


def test_compare_never_gives_two_settings_one_name(command):
    """A setting that only a later version has tells two runs apart, but not in words."""
    for name in ("a", "b"):
        run_of(Path(f"runs/{name}"))
    settings = json.loads(Path("runs/b/settings.json").read_text())
    settings["model"]["init_args"]["new"] = None
    Path("runs/b/settings.json").write_text(json.dumps(settings))
    assert command("compare", "runs")[0] == 0
    written = json.loads(Path("comparison/comparison.json").read_text())
    assert [row["label"] for row in written] == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("metrics.json", {"trained": {"knn": 0.5}}, "is damaged: what was trained lacks linear."),
        ("metrics.json", {"trained": "x"}, "is damaged: trained is 'x'."),
        ("settings.json", {"seed": "x"}, "is damaged: seed is 'x'."),
        ("settings.json", {"model": 1}, "is damaged: model is 1."),
    ],
)
def test_a_damaged_run_is_named(command, file, change, words):
    run_of(Path("runs/one"))
    path = Path("runs/one", file)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert command("compare", "runs") == (2, "", f"cl-tiny: {path} {words}\n")


def test_compare_hands_its_figure_what_it_found(tiny, domain, capsys):
    from dataclasses import replace

    run_of(Path("runs/one"))
    seen = []
    tiny.draw_comparison = lambda compared, folder: seen.append(compared) or folder / "figure.png"
    assert (
        cli.main(replace(domain, comparer="tiny:draw_comparison"), ["compare", "runs", "--output", "new"])
        == 0
    )
    assert "figure: new/figure.png" in capsys.readouterr().out
    ((only,),) = seen
    assert (only.label, only.seeds, only.accuracies["knn"]) == ("TinyEncoder, TinyData", (0,), (0.5,))
    assert only.curves == (([5, 10], [0.25, 0.5]),)


def test_labels_say_what_tells_runs_apart(tmp_path):
    from cl_core.training.comparing import labels_of
    from cl_core.training.run import RunFolder

    numbers = itertools.count()

    def runs(*settings):
        return [RunFolder(run_of(tmp_path / str(next(numbers)), **each)) for each in settings]

    assert labels_of(runs({})) == ["TinyEncoder, TinyData"]
    assert labels_of(runs({}, {"seed": 1})) == ["seed 0", "seed 1"]
    assert labels_of(runs({}, {"width": 4}, {"width": 4, "seed": 1})) == [
        "width 8",
        "width 4, seed 0",
        "width 4, seed 1",
    ]
    twice = runs({"seed": 3}, {"seed": 3}, {"seed": 4})
    assert labels_of(twice) == [*(f"seed 3, {run.path}" for run in twice[:2]), "seed 4"]
    with pytest.raises(ValueError, match="every run must be given once"):
        labels_of([*twice, RunFolder(tmp_path / "." / twice[0].path.name)])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([], "compare needs at least one run folder, got none."),
        (["none"], "none is not a run and holds none: there is no config.yaml in it."),
        (["runs/cut"], "runs/cut is not finished: go on with it first (fit --resume runs/cut)."),
        (["runs/one", "runs/one"], "runs/one is given twice, or two runs of seed 0 are the same."),
    ],
)
def test_compare_refuses_in_one_sentence(command, places, words):
    run_of(Path("runs/one"))
    run_of(Path("runs/cut"), width=2, finished=False)
    status, _, err = command("compare", *places)
    assert (status, err) == (2, f"cl-tiny: {words}\n")
