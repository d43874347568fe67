"""Runs that go on elsewhere than where they began: another front end, folder or number of processes; damaged files."""

from __future__ import annotations

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

from cl_core.training import cli
from cl_core.training.checkpoints import Terminated
from cl_core.training.evaluating import Evaluation
from cl_core.training.fitting import fit
from cl_core.training.scoring import read_scores
from cl_core.training.settings import TrainerOptions, brief, setting, settings_of

CONFIG = """
model:
  class_path: TinyMethod
  init_args:
    encoder: {class_path: TinyEncoder}
    loss: {class_path: TinyLoss, init_args: {temperature: 0.3}}
data: {class_path: TinyData}
trainer: {max_epochs: 3, accelerator: cpu, progress_bar: false}
evaluation: {neighbours: [5], regularizations: [0.01]}
"""
RESULTS = ("export/model.safetensors", "metrics.json", "metrics.csv", "similarities.safetensors")


class Killed(Exception):
    """Stands for a process that ends at once."""


@pytest.fixture
def ends_at(tiny, monkeypatch):
    """Run something that ends inside an optimiser step."""

    def ends_at(step, run, error=Killed):
        def after_step(self, progress):
            if progress.step == step:
                raise error

        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(tiny.TinyMethod, "after_step", after_step)
            run()

    return ends_at


@pytest.fixture
def command(tiny, install, capsys):
    """Run the command of a domain with the tiny classes; what it says on standard error."""
    install("cl-tiny", files={}, methods={"TinyMethod": "tiny:TinyMethod"}, domains={"tiny": "cl_tiny"})
    domain = cli.Domain(
        "cl-tiny", "cl_tiny", "cl-tiny", data={"TinyData": "tiny:TinyData"}, modules=("tiny",)
    )
    Path("config.yaml").write_text(CONFIG)

    def command(*args):
        status = cli.main(domain, [str(arg) for arg in args])
        captured = capsys.readouterr()
        assert (status == 0) == (captured.err == ""), captured.err
        return captured.err or captured.out

    return command


@pytest.fixture
def python(tiny):
    """Fit as the configuration says, from Python."""

    def python(*, method=None, data=None, **arguments):
        arguments.setdefault("trainer", TrainerOptions(max_epochs=3, accelerator="cpu", progress_bar=False))
        evaluation = Evaluation(neighbours=(5,), regularizations=(0.01,))
        method = method or tiny.method(temperature=0.3)
        return fit(method, data or tiny.TinyData(), evaluation=evaluation, **arguments)

    return python


def assert_same_results(*folders):
    for name in RESULTS:
        assert len({Path(folder, name).read_bytes() for folder in folders}) == 1, name


def test_a_run_of_the_command_goes_on_in_python_and_back(command, python, ends_at):
    command("fit", "--config", "config.yaml", "--run_dir", "whole")
    ends_at(9, lambda: command("fit", "--config", "config.yaml", "--run_dir", "cut"))
    shutil.copytree("cut", "there")
    python(resume="there")
    ends_at(13, lambda: python(resume="cut"))
    command("fit", "--resume", "cut")
    assert_same_results("whole", "cut", "there")
    assert len({Path(run, "config.yaml").read_bytes() for run in ("whole", "cut", "there")}) == 1


def test_a_run_of_python_goes_on_at_the_command_and_is_judged_there(command, python, ends_at):
    whole = python(run_dir="whole")
    ends_at(9, lambda: python(run_dir="cut"))
    assert command("fit", "--resume", "cut").endswith("run folder: cut\n")
    assert_same_results("whole", "cut")
    assert f"{100 * whole.metrics['trained']['knn']:.2f}%" in command("test", "--ckpt", "whole")


def test_initial_weights_that_only_the_other_front_end_knows(command, python, ends_at):
    ends_at(3, lambda: python(run_dir="given"))
    said = command("fit", "--resume", "given")
    assert said.startswith(
        "cl-tiny: given was started from Python and has no checkpoint yet: resume it there"
    )
    ends_at(3, lambda: command("fit", "--config", "config.yaml", "--run_dir", "drawn"))
    with pytest.raises(ValueError, match="drawn was started on the command line and has no checkpoint yet"):
        python(resume="drawn")
    python(resume="given")
    command("fit", "--resume", "drawn")


def test_python_is_compared_with_what_the_command_was_asked(command, python, tiny, ends_at):
    ends_at(9, lambda: command("fit", "--config", "config.yaml", "--run_dir", "cut"))
    with pytest.raises(ValueError, match=r"model.loss.temperature was 0.3 when cut began and is 0.7 now"):
        python(resume="cut", method=tiny.method(temperature=0.7))
    with pytest.raises(ValueError, match=r"data.size was 44 when cut began and is 45 now"):
        python(resume="cut", data=tiny.TinyData(size=45))

    class Other(tiny.TinyMethod):
        __module__ = "tiny"

    with pytest.raises(ValueError, match=r"model.class_path was tiny.TinyMethod .* and is tiny.*Other now"):
        python(resume="cut", method=Other(tiny.TinyEncoder(), tiny.TinyLoss(0.3)))
    with pytest.raises(ValueError, match=r"it belongs to cl-tiny \(from Python, pass package='cl-tiny'\)"):
        python(resume="cut", package="cl-core")


def test_a_run_is_resumed_from_another_folder(command, tiny, ends_at, monkeypatch):
    class Rooted(tiny.TinyData):
        def __init__(self, root: str = "data") -> None:
            super().__init__()
            self.root = Path(root)

        def points(self, split):
            return torch.load(self.root / f"{split}.pt")

    Rooted.__module__, Rooted.__qualname__ = "tiny", "Rooted"
    monkeypatch.setattr(tiny, "Rooted", Rooted, raising=False)
    Path("data").mkdir()
    for split in ("train", "validation", "test"):
        torch.save(tiny.TinyData().points(split), f"data/{split}.pt")
    command("fit", "--config", "config.yaml", "--run_dir", "first")
    asked = ("--config", "config.yaml", "--data", "Rooted", "--data.root", "data", "--init_from", "first")
    command("fit", *asked, "--run_dir", "whole")
    ends_at(3, lambda: command("fit", *asked, "--run_dir", "cut"))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    command("fit", "--resume", "../cut")
    assert_same_results("../whole", "../cut")


def test_what_a_resume_does_not_take(command, python, ends_at):
    ends_at(9, lambda: command("fit", "--config", "config.yaml", "--run_dir", "cut"))
    said = command("fit", "--resume", "cut", "--run_dir", "other")
    assert said.startswith(
        "cl-tiny: run_dir must be None where a run is resumed, which stays in its folder, got"
    )
    said = command("fit", "--resume", "cut", "--trainer.limit_train_batches", "1")
    assert "trainer.limit_train_batches was 1.0 when cut began and is 1 now" in said
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("similarities.safetensors", b"xx", "similarities.safetensors is truncated or corrupt"),
        (
            "similarities.safetensors",
            "other",
            "similarities.safetensors holds other things than similarities",
        ),
        (
            "metrics.csv",
            b"epoch,step\n1,5\n",
            "metrics.csv is truncated: it has 1 rows where the checkpoint counts 2",
        ),
        ("metrics.csv", b"epoch,step\n1,5\n2,1", "metrics.csv is truncated or corrupt"),
        ("metrics.csv", b"epoch,step\n1,5\n2\n", "metrics.csv is truncated or corrupt"),
        ("metrics.csv", b"epoch,step\n1,5\n2,many\n", "metrics.csv is truncated or corrupt"),
        ("metrics.csv", b"\xff\xfe\n", "metrics.csv is truncated or corrupt"),
        ("metrics.csv", b"", "metrics.csv is truncated or corrupt"),
        ("metrics.json", b"[]", "metrics.json is damaged: it must hold a JSON object, not a list"),
        ("metrics.json", b"{", "metrics.json is not readable JSON"),
        ("settings.json", b"{}", "settings.json is truncated: it lacks model, data, evaluation, seed"),
        ("settings.json", b"[]", "settings.json is damaged: it must hold a JSON object"),
        ("settings.json", None, "cut cannot be resumed: there is no settings.json in it"),
        ("config.yaml", 200, "config.yaml is truncated: it lacks"),
        ("config.yaml", b"model: {", "config.yaml is not readable YAML"),
    ],
)
def test_damaged_files_of_a_run_are_named_in_one_sentence(python, ends_at, name, content, said):
    ends_at(12, lambda: python(run_dir="cut"))
    file = Path("cut", name)
    intact = file.read_bytes()
    if content is None:
        file.unlink()
    elif content == "other":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(intact[:content] if isinstance(content, int) else content)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        python(resume="cut")
    assert "\n" not in str(caught.value)
    file.write_bytes(intact)
    python(resume="cut")
    python(run_dir="whole")
    assert_same_results("cut", "whole")


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"{}"), lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_export_of_a_finished_run_is_written_anew(python, name, damage):
    python(run_dir="here")
    shutil.copytree("here", "intact")
    damage(Path("here/export", name))
    if name == "config.json" and not Path("here/export", name).exists():
        python(resume="here")  # what is not there at all needs no explanation
    else:
        with pytest.warns(UserWarning, match=r"export.* It is written anew from here.checkpoints.last.ckpt"):
            python(resume="here")
    for file in (*RESULTS, "export/config.json", "config.yaml", "settings.json"):
        assert Path("here", file).read_bytes() == Path("intact", file).read_bytes(), file


def test_settings_say_what_data_of_any_kind_was(tiny):
    class Anything(tiny.TinyData):
        def __init__(self, table, function, rows, held):
            super().__init__()
            self.table, self.function, self.rows, self.held = table, function, rows, held

    class Holder:
        def __init__(self, scale=2.0):
            self.scale = scale

    def stored(rows, scale=2.0):
        data = Anything(torch.zeros(3, 2), len, rows, Holder(scale))
        return brief(settings_of(tiny.method(), data, {}, processes=2))["data"]["init_args"]

    first, second = stored(list(range(1000))), stored([*range(999), -1])
    assert first["table"] == "tensor of shape (3, 2), torch.float32"
    assert first["function"] == "builtins.len"
    assert first["held"]["init_args"] == {"scale": 2.0}
    assert len(first["rows"]) < 1000
    assert first["rows"] != second["rows"]
    assert first["rows"] == stored(list(range(1000)))["rows"]
    assert stored([], scale=float("nan"))["held"] == stored([], scale=float("nan"))["held"]


def test_a_setting_goes_by_its_name_on_the_command_line(tiny):
    method, options = tiny.method(temperature=0.3), TrainerOptions(devices=[0, 1])
    settings = settings_of(method, tiny.TinyData(), {"trainer": options}, processes=2, seed=5)
    for name, value in {
        "seed": 5,
        "global_batch_size": 16,
        "model": "TinyMethod",
        "model.loss": "TinyLoss",
        "model.loss.temperature": 0.3,
        "data.size": 44,
        "trainer.devices": [0, 1],
        "trainer.gradient_clip_val": None,
    }.items():
        assert setting(settings, name) == value, name
    for name in ("model.loss.temprature", "trainer", "model.init_args"):
        with pytest.raises(ValueError, match=f"no setting '{name}'"):
            setting(settings, name)


@pytest.fixture
def listing(tiny, monkeypatch):
    """Data whose arguments are a long list and a table."""

    class Listing(tiny.TinyData):
        def __init__(self, rows: list[int], table: dict[str, int] | None = None) -> None:
            super().__init__()
            self.rows, self.table = rows, table

    Listing.__module__, Listing.__qualname__ = "tiny", "Listing"
    monkeypatch.setattr(tiny, "Listing", Listing, raising=False)
    return Listing


def test_long_arguments_are_kept_whole_for_the_command(command, python, ends_at, listing):
    ends_at(9, lambda: python(run_dir="cut", data=listing(list(range(300)))))
    assert len(Path("cut/settings.json").read_text()) < 5000
    with pytest.raises(ValueError, match=r"data.rows was \[0, 1, .* \(SHA-256 .* and is \[0, 1, .* now"):
        python(resume="cut", data=listing([*range(299), -1]))
    command("fit", "--resume", "cut")


@pytest.mark.parametrize("table", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {}, None, {"a": 1, "b": 3}])
def test_a_table_that_gained_or_lost_an_entry_is_another_one(python, ends_at, listing, table):
    ends_at(9, lambda: python(run_dir="cut", data=listing([], {"a": 1, "b": 2})))
    with pytest.raises(ValueError, match=r"data.table was {'a': 1, 'b': 2} when cut began"):
        python(resume="cut", data=listing([], table))


def test_what_is_judged_is_found_from_inside_its_run(command, monkeypatch):
    command("fit", "--config", "config.yaml", "--run_dir", "here")
    for folder, ckpt in (("here/checkpoints", "last.ckpt"), ("../export", "."), ("..", ".")):
        monkeypatch.chdir(folder)
        assert command("test", "--ckpt", ckpt).startswith("test accuracy: kNN")


def test_a_place_may_be_written_in_other_ways(python, ends_at):
    python(run_dir="first")
    Path("sub").mkdir()
    ends_at(9, lambda: python(run_dir="cut", init_from="sub/../first"))
    assert python(resume="cut", init_from="first").metrics["finished"]


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_gradient_cache_that_cannot_be_is_refused_before_there_is_a_folder(python, tiny, chunk):
    method = tiny.method()
    method.encoder.layers[1] = torch.nn.BatchNorm1d(8)
    said = (
        "gradient_cache_chunk must be at least 1, got 0"
        if chunk == 0
        else "got BatchNorm1d 'encoder.layers.1'"
    )
    with pytest.raises(ValueError, match=said):
        python(method=method, run_dir="here", gradient_cache_chunk=chunk)
    assert not Path("here").exists()


def test_sigterm_after_the_last_step_is_heeded(python, monkeypatch):
    from cl_core.training.recording import ProgressBar

    def on_train_end(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)

    python(run_dir="whole")
    with monkeypatch.context() as patched, pytest.raises(Terminated, match="go on with fit --resume cut"):
        patched.setattr(ProgressBar, "on_train_end", on_train_end)
        python(run_dir="cut", trainer=TrainerOptions(max_epochs=3, accelerator="cpu", progress_bar=True))
    assert not Path("cut/export").exists()
    python(resume="cut")
    assert_same_results("whole", "cut")


TWICE = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny"] = tiny
spec.loader.exec_module(tiny)
from cl_core.training.fitting import fit
from cl_core.training.settings import TrainerOptions

for seed, where in enumerate(({"run_dir": "first"}, {"run_dir": "second"}, {"name": "third"}, {"name": "third"})):
    torch.manual_seed(seed)
    options = TrainerOptions(max_epochs=1, accelerator="cpu", progress_bar=False, devices=2, strategy="ddp")
    method = tiny.TinyMethod(tiny.TinyEncoder(), tiny.TinyLoss())
    fit(method, tiny.TinyData(batch_size=4), trainer=options, seed=seed, **where)
"""


@pytest.mark.slow
def test_one_program_trains_on_two_processes_again_and_again(tiny):
    Path("twice.py").write_text(TWICE)
    command = [sys.executable, str(Path("twice.py").absolute()), str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for seed, folder in enumerate(("first", "second", "runs/third-001", "runs/third-002")):
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        assert (metrics["seed"], metrics["finished"]) == (seed, True)


CHILD = """
import importlib.util, os, signal, sys, time
import torch
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny"] = tiny
spec.loader.exec_module(tiny)
from cl_core.training.checkpoints import Checkpointing
from cl_core.training.evaluating import Evaluation
from cl_core.training.fitting import fit
from cl_core.training.settings import Monitoring, TrainerOptions

number, at, processes, batch_size = (int(word) for word in sys.argv[4:8])

def after_step(self, progress):
    if progress.step == at and os.environ.get("LOCAL_RANK", "0") == "0":
        os.kill(os.getpid(), number)
        time.sleep(0.2)

tiny.TinyMethod.after_step = after_step
torch.manual_seed(0)
options = dict(devices=processes, strategy="ddp") if processes > 1 else {}
fit(
    tiny.TinyMethod(tiny.TinyEncoder(), tiny.TinyLoss(0.3)),
    tiny.TinyData(batch_size=batch_size),
    trainer=TrainerOptions(max_epochs=3, accelerator="cpu", progress_bar=False, **options),
    checkpoint=Checkpointing(every_steps=2),
    monitor=Monitoring(scores=True, scores_every=4),
    evaluation=Evaluation(neighbours=(5,), regularizations=(0.01,)),
    **{sys.argv[2]: sys.argv[3]},
)
"""


def child(how, folder, *, number=0, at=-1, processes=1, batch_size=8):
    conftest = str(Path(__file__).with_name("conftest.py"))
    words = [how, folder, *map(str, (int(number), at, processes, batch_size))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CL_RUN_DIR")}
    script = Path("child.py")  # which Lightning starts again for the second process
    script.write_text(CHILD)
    command = [sys.executable, str(script.absolute()), conftest, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_sigterm_saves_after_the_batch_and_can_be_resumed(tiny, python):
    """Also at the last batch of an epoch, where Lightning would stop before the epoch's end is saved."""
    whole = python(run_dir="whole")
    default = signal.getsignal(signal.SIGTERM)
    for step in (8, 10):
        method = tiny.method(temperature=0.3)

        def after_step(progress, step=step):
            if progress.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        method.after_step = after_step
        with pytest.raises(
            Terminated, match=f"the last checkpoint is kept; go on with fit --resume cut-{step}"
        ):
            python(run_dir=f"cut-{step}", method=method)
        assert signal.getsignal(signal.SIGTERM) is default
        saved = torch.load(f"cut-{step}/checkpoints/last.ckpt", weights_only=True)
        assert saved["cl_core"]["steps_done"] == step
        resumed = python(resume=f"cut-{step}")
        for name, value in whole.method.state_dict().items():
            assert torch.equal(value, resumed.method.state_dict()[name])
        assert_same_results("whole", f"cut-{step}")


def test_sigterm_ends_the_command_with_143(command, tiny, monkeypatch):
    def after_step(self, progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tiny.TinyMethod, "after_step", after_step)
    said = command("fit", "--config", "config.yaml", "--run_dir", "cut")
    assert "interrupted; the last checkpoint is kept; go on with fit --resume cut" in said


@pytest.mark.slow
def test_two_processes_resume_exactly_and_a_run_moves_to_two(tiny, python):
    done = child("run_dir", "whole", processes=2, batch_size=4)
    assert done.returncode == 0, done.stderr
    done = child("run_dir", "cut", number=signal.SIGKILL, at=8, processes=2, batch_size=4)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = child("resume", "cut", processes=2, batch_size=4)
    assert done.returncode == 0, done.stderr
    assert_same_results("whole", "cut")
    assert Path("whole/scores.safetensors").read_bytes() == Path("cut/scores.safetensors").read_bytes()
    scores = read_scores("whole/scores.safetensors")
    assert scores["step"].tolist() == [*range(15)]
    assert scores["positive_histogram"].sum() == 4 * 15  # the first process's rows

    done = child("run_dir", "moved", number=signal.SIGKILL, at=8, processes=1, batch_size=8)
    assert done.returncode == -signal.SIGKILL, done.stderr
    refused = child("resume", "moved", processes=2, batch_size=8)
    assert "data.batch_size was 8 when moved began and is 8 on each of 2 processes now" in refused.stderr
    done = child("resume", "moved", processes=2, batch_size=4)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("moved/metrics.json").read_text())["steps"] == 15
    assert yaml.safe_load(Path("moved/config.yaml").read_text())["data"]["init_args"]["batch_size"] == 4
    assert json.loads(Path("moved/settings.json").read_text())["processes"] == 2
