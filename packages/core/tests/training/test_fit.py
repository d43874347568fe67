from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from cl_core.losses import CACRLoss, ContrastiveLoss, DCLLoss, DCLWLoss, FeatureTransform, InfoNCELoss
from cl_core.training import artifacts, fitting
from cl_core.training.checkpoints import Checkpointing
from cl_core.training.evaluating import Evaluation, evaluate
from cl_core.training.fitting import fit, weights_of
from cl_core.training.optimization import Optimization
from cl_core.training.run import RunFolder
from cl_core.training.settings import Monitoring, TrainerOptions
from cl_core.transforms import PositiveExtrapolation

CPU = {"accelerator": "cpu", "progress_bar": False}
EVALUATION = Evaluation(neighbours=(5,), regularizations=(1e-2,))


class Killed(Exception):
    """Stands for a process that ends at once."""


def run(tiny, kind=None, *, kill_at=None, epochs=3, method=None, data=None, **arguments):
    """Fit the tiny method; ``kill_at`` ends it inside that optimiser step."""
    method = method or tiny.method(kind or tiny.TinyMethod)
    if kill_at is not None:
        after = method.after_step

        def after_step(progress):
            after(progress)
            if progress.step == kill_at:
                raise Killed

        method.after_step = after_step
    arguments.setdefault("trainer", TrainerOptions(max_epochs=epochs, **CPU))
    arguments.setdefault("evaluation", EVALUATION)
    return fit(method, data or tiny.TinyData(), **arguments)


def same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_writes_its_folder(tiny):
    drawn = []
    result = run(tiny, artist=drawn.append, name="a name/x", monitor=Monitoring(knn_every_epochs=2))
    folder = result.run.path
    assert folder == Path("runs/a-name-x-001")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "config.yaml",
        "settings.json",
        "versions.json",
        "metrics.csv",
        "metrics.json",
        "similarities.safetensors",
        "checkpoints/last.ckpt",
        "export/config.json",
        "export/model.safetensors",
    }
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["trained"] == evaluate(result.method, tiny.TinyData(), EVALUATION)
    assert metrics["untrained"] == evaluate(tiny.method(), tiny.TinyData(), EVALUATION)
    assert metrics["untrained"] != metrics["trained"]
    assert 0.5 < metrics["raw"]["linear"] <= 1
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4
    assert "train/loss" in lines[0]
    assert [row["step"] for row in result.table] == [5, 10, 15]
    assert ["validation/knn" in row for row in result.table] == [False, True, False]
    assert drawn[0].embeddings["test"][0].shape == (44, 5)
    assert run(tiny, name="a name/x").run.path == Path("runs/a-name-x-002")
    same(artifacts.load_export(folder / "export").state_dict(), result.method.state_dict())


def test_losses_with_a_temperature_report_their_coupling(tiny):
    from cl_core.diagnostics import npc_factor

    seen = []

    class Loss(tiny.TinyLoss):
        def forward(self, z1, z2):
            seen.append((z1.detach().clone(), z2.detach().clone()))
            return super().forward(z1, z2)

    Loss.__module__, Loss.__qualname__ = "tiny", "Loss"
    result = run(tiny, method=tiny.TinyMethod(tiny.TinyEncoder(), Loss(0.5)), epochs=1)
    assert result.table[-1]["train/npc_factor"] == pytest.approx(
        float(npc_factor(*seen[-1], temperature=0.5))
    )


@pytest.mark.parametrize(
    ("loss", "negatives"),
    [
        (InfoNCELoss(0.5), "keys"),
        (InfoNCELoss(0.5, symmetric=True), "cross"),
        (DCLLoss(0.5), "both"),
        (DCLWLoss(0.5, negatives="keys"), "keys"),
        (FeatureTransform(InfoNCELoss(0.5), positive=PositiveExtrapolation()), "keys"),
    ],
)
def test_the_coupling_is_over_the_negatives_of_the_loss(tiny, loss, negatives):
    from cl_core.diagnostics import npc_factor

    seen = []
    loss.register_forward_pre_hook(lambda _, given: seen.append([z.detach().clone() for z in given]))
    result = run(tiny, method=tiny.TinyMethod(tiny.TinyEncoder(), loss), epochs=1)
    wanted = float(npc_factor(*seen[-1], negatives=negatives, temperature=0.5))
    assert result.table[-1]["train/npc_factor"] == pytest.approx(wanted)


def known_as_tiny(monkeypatch, tiny, *kinds):
    """Let classes of a test be found in the tiny module, as long as the test runs."""
    for kind in kinds:
        monkeypatch.setattr(kind, "__module__", "tiny")
        kind.__qualname__ = kind.__name__
        monkeypatch.setattr(tiny, kind.__name__, kind, raising=False)


def test_what_a_loss_measures_is_reported(tiny, monkeypatch):
    """Also of one that takes neither views nor labels, which has no other measures."""

    class Watched(ContrastiveLoss):
        def forward(self, one, *, other):
            return (one - other).square().mean()

        def measures(self, one, *, other):
            return {"gap": (one - other).detach().abs().mean()}

        def advice(self, measures):
            return "mind the gap." if measures["gap"] > 0 else None

    class Calling(tiny.TinyMethod):
        def loss(self, batch):
            return self.criterion(self.encoder(batch[0]), other=self.encoder(batch[1]))

    known_as_tiny(monkeypatch, tiny, Watched, Calling)
    with pytest.warns(UserWarning, match="epoch 1: mind the gap") as said:
        result = run(tiny, method=Calling(tiny.TinyEncoder(), Watched()), epochs=2)
    assert sum("mind the gap" in str(warning.message) for warning in said) == 1
    assert all(row["train/gap"] > 0 for row in result.table)
    assert "train/uniformity" not in result.table[-1]


def test_of_several_views_the_first_two_are_measured(tiny, monkeypatch):
    class Three(tiny.TinyMethod):
        def loss(self, batch):
            views = [self.encoder(batch[0]), self.encoder(batch[1]), self.encoder(batch[1])]
            return self.criterion(views)

    known_as_tiny(monkeypatch, tiny, Three)
    result = run(tiny, method=Three(tiny.TinyEncoder(), CACRLoss()), epochs=1)
    measured = result.table[-1]
    assert {
        "train/attraction",
        "train/positive_weight_entropy",
        "train/alignment",
        "train/similarity_overlap",
    } <= measured.keys()
    assert "train/npc_factor" not in measured


def test_a_method_may_hold_a_parameter_still(tiny, monkeypatch):
    class Frozen(tiny.TinyMethod):
        def before_step(self, progress):
            if progress.step < 5:
                self.encoder.layers[0].weight.grad = None

    known_as_tiny(monkeypatch, tiny, Frozen)
    weights = []
    for epochs in (1, 2):
        method = Frozen(tiny.TinyEncoder(), tiny.TinyLoss())
        weights.append(method.encoder.layers[0].weight.detach().clone())
        run(tiny, method=method, epochs=epochs, name=f"frozen {epochs}")
        moved = not torch.equal(weights[-1], method.encoder.layers[0].weight.detach())
        assert moved == (epochs == 2)


def test_training_lowers_the_loss(tiny):
    result = run(tiny, epochs=12, optimization=Optimization(lr=0.01), method=tiny.method(dropout=0.0))
    assert result.table[-1]["train/loss"] < result.table[0]["train/loss"] - 0.1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["TinyMethod", "TwoOptimisers", "TakingTurns"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_hooks_are_called_once_a_step(tiny, kind, accumulate, precision):
    options = TrainerOptions(
        max_epochs=2, accumulate_grad_batches=accumulate, precision=precision, gradient_clip_val=1.0, **CPU
    )
    if kind == "TakingTurns" and accumulate > 1:
        with pytest.raises(ValueError, match="TakingTurns makes its own updates"):
            run(tiny, getattr(tiny, kind), trainer=options)
        return
    method = run(tiny, getattr(tiny, kind), trainer=options, monitor=Monitoring(None)).method
    steps = {1: 5, 2: 3}[accumulate]
    hooks = ["fit"] + (["epoch"] + ["step"] * steps) * 2
    assert [name for name, _ in method.calls] == hooks
    progress = [progress for name, progress in method.calls if name == "step"]
    assert [p.step for p in progress] == list(range(1, 2 * steps + 1))
    assert {(p.total_steps, p.total_epochs) for p in progress} == {(2 * steps, 2)}
    assert [p.epoch for p in progress] == [0] * steps + [1] * steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_optimisers_on_one_loss_equal_one(tiny, accumulate):
    class OneOptimiser(tiny.TwoOptimisers):
        def parameter_groups(self, weight_decay):
            return [
                {name: value for name, value in group.items() if name != "optimizer"}
                for group in super().parameter_groups(weight_decay)
            ]

    options = TrainerOptions(max_epochs=2, accumulate_grad_batches=accumulate, **CPU)
    runs = [
        run(tiny, kind, trainer=options, optimization=Optimization(weight_decay=0.0))
        for kind in (tiny.TwoOptimisers, OneOptimiser)
    ]
    for name, value in runs[0].method.state_dict().items():
        torch.testing.assert_close(value, runs[1].method.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_cache_changes_nothing(tiny, accumulate):
    class Plain(tiny.TinyMethod):
        def loss(self, batch):
            return super().loss(batch)["loss"]

    options = TrainerOptions(max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=0.1, **CPU)
    states = []
    for chunk in (None, 3):
        torch.manual_seed(0)
        method = Plain(tiny.TinyEncoder(dropout=0.0), tiny.TinyLoss())
        result = run(tiny, method=method, trainer=options, gradient_cache_chunk=chunk)
        states.append(result.method.state_dict())
        assert result.metrics["steps"] == {1: 10, 2: 6}[accumulate]
        assert "train/alignment" in result.table[-1]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="TakingTurns makes its own updates"):
        run(tiny, tiny.TakingTurns, gradient_cache_chunk=3)


@pytest.mark.parametrize("kind", ["TinyMethod", "TwoOptimisers", "TakingTurns"])
@pytest.mark.parametrize("steps", [3, 7])
def test_max_steps_counts_optimiser_steps(tiny, kind, steps):
    options = TrainerOptions(max_epochs=3, max_steps=steps, **CPU)
    result = run(tiny, getattr(tiny, kind), trainer=options)
    assert result.metrics["steps"] == steps
    assert result.table[-1]["step"] == steps
    progress = [progress for name, progress in result.method.calls if name == "step"]
    # 5 batches an epoch
    assert {(p.total_steps, p.total_epochs, p.steps_per_epoch) for p in progress} == {
        (steps, math.ceil(steps / 5), 5)
    }


# 5 batches an epoch: before the first save, in the middle, at the last batch of an epoch, after an epoch.
@pytest.mark.parametrize(
    ("kind", "accumulate", "kill_at"),
    [("TinyMethod", 1, step) for step in (1, 4, 5, 6, 8, 10, 14)]
    + [("TinyMethod", 2, 5), ("TwoOptimisers", 2, 5), ("TakingTurns", 1, 8)],
)
def test_resume_is_exact(tiny, kind, accumulate, kill_at):
    arguments = {
        "trainer": TrainerOptions(max_epochs=3, accumulate_grad_batches=accumulate, **CPU),
        "checkpoint": Checkpointing(every_steps=2),
        "monitor": Monitoring(knn_every_epochs=1, moving_average=0.9),
    }
    whole = run(tiny, getattr(tiny, kind), run_dir="whole", **arguments)
    with pytest.raises(Killed):
        run(tiny, getattr(tiny, kind), run_dir="cut", kill_at=kill_at, **arguments)
    torch.rand(3)  # whatever else draws
    cut = run(tiny, getattr(tiny, kind), resume="cut", **arguments)
    same(whole.method.state_dict(), cut.method.state_dict())
    for name in ("metrics.csv", "metrics.json", "similarities.safetensors"):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes(), name


def test_workers_do_not_change_a_run(tiny):
    plain = run(tiny, epochs=2)
    workers = run(tiny, epochs=2, data=tiny.TinyData(num_workers=1))
    same(plain.method.state_dict(), workers.method.state_dict())


def test_resume_refuses_other_data(tiny):
    class Fewer(tiny.TinyData):  # the same by name and settings, as when files have gone
        def points(self, split):
            return tuple(t[:20] for t in super().points(split))

    Fewer.__module__, Fewer.__qualname__ = tiny.TinyData.__module__, tiny.TinyData.__qualname__
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", kill_at=7)
    before = Path("cut/config.yaml").read_bytes()
    with pytest.raises(ValueError, match="counts 5 batches an epoch, this run 2"):
        run(tiny, resume="cut", data=Fewer())
    assert Path("cut/config.yaml").read_bytes() == before


def test_resume_after_sigkill_in_the_middle_of_an_epoch(tiny, monkeypatch):
    def after_step(self, progress):
        if progress.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of a fork beside threads, as a loader's workers are
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        monkeypatch.setattr(tiny.TinyMethod, "after_step", after_step)
        try:
            run(tiny, run_dir="cut", checkpoint=Checkpointing(every_steps=2))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    cut = run(tiny, resume="cut", checkpoint=Checkpointing(every_steps=2))
    whole = run(tiny)
    same(whole.method.state_dict(), cut.method.state_dict())
    assert whole.metrics == cut.metrics


def test_ctrl_c_saves_after_the_batch_and_can_be_resumed(tiny):
    whole = run(tiny, run_dir="whole")
    handler = signal.getsignal(signal.SIGINT)
    method = tiny.method()
    after = method.after_step

    def after_step(progress):
        after(progress)
        if progress.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    method.after_step = after_step
    with pytest.raises(KeyboardInterrupt):
        run(tiny, run_dir="cut", method=method)
    assert signal.getsignal(signal.SIGINT) is handler
    del method.after_step
    resumed = run(tiny, resume="cut")
    assert resumed.method.calls[1][1].step == 9  # after the hook of the start: step 8 was saved
    same(whole.method.state_dict(), resumed.method.state_dict())


def test_the_second_ctrl_c_interrupts_at_once_and_keeps_the_last_checkpoint(tiny):
    method = tiny.method()
    after = method.after_step

    def after_step(progress):
        after(progress)
        if progress.step == 8:
            for _ in range(2):  # each handled before the next: two that wait together are one
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)

    method.after_step = after_step
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tiny, run_dir="cut", method=method)
    finally:
        signal.signal(signal.SIGINT, inherited)
    resumed = run(tiny, resume="cut")
    assert resumed.method.calls[1][1].step == 5
    same(run(tiny).method.state_dict(), resumed.method.state_dict())


def test_one_process_of_many_trains_alone(tiny, monkeypatch):
    """It must not wait for the others of a program that has joined them for something else."""

    def broadcast(*_, **__):
        raise AssertionError("waits for other processes")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert RunFolder.create("alone").path == Path("runs/alone-001")
    with pytest.raises(AssertionError, match="waits for other"):
        RunFolder.create("together", processes=2)


def test_training_outside_the_main_thread(tiny):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tiny, epochs=1)))
    thread.start()
    thread.join()
    assert results[0].metrics["steps"] == 5


def test_kept_checkpoints(tiny):
    policy = Checkpointing(every_epochs=4, keep_every_epochs=2)
    folder = run(tiny, epochs=5, checkpoint=policy).run.checkpoints
    assert sorted(path.name for path in folder.iterdir()) == [
        "epoch-0002.ckpt",
        "epoch-0004.ckpt",
        "last.ckpt",
    ]


def test_init_from_a_run_an_export_or_a_checkpoint(tiny):
    first = run(tiny, run_dir="first")
    for source in ("first", "first/export", "first/checkpoints/last.ckpt"):
        method = tiny.method(seed=5)
        options = TrainerOptions(max_epochs=1, limit_train_batches=1, **CPU)
        result = run(
            tiny, method=method, init_from=source, trainer=options, optimization=Optimization(lr=1e-9)
        )
        for name, value in result.method.state_dict().items():
            torch.testing.assert_close(value, first.method.state_dict()[name])
        assert result.metrics["kept_initial"] == []
        assert result.metrics["untrained"] == evaluate(tiny.method(seed=5), tiny.TinyData(), EVALUATION)
    with pytest.raises(FileNotFoundError, match="nowhere is neither a run"):
        run(tiny, init_from="nowhere")


def test_an_existing_run_is_not_overwritten(tiny):
    run(tiny, run_dir="here")
    with pytest.raises(FileExistsError, match="here already holds a run: go on with --resume here"):
        run(tiny, run_dir="here")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run"):
        run(tiny, resume="nowhere")


def test_a_full_disk_is_said_in_one_sentence_and_loses_nothing(tiny, monkeypatch):
    written = torch.save
    saves = []

    def save(value, path, **arguments):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(value, path, **arguments)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"cannot write cut.checkpoints.last.ckpt: the disk is full"):
        run(tiny, run_dir="cut")
    assert [path.name for path in Path("cut/checkpoints").iterdir()] == ["last.ckpt"]
    resumed = run(tiny, resume="cut")
    assert resumed.method.calls[1][1].step == 5
    same(run(tiny).method.state_dict(), resumed.method.state_dict())


def test_a_folder_that_cannot_be_written(tiny):
    Path("file").write_text("")
    with pytest.raises(OSError, match=r"cannot write file.run: .*; what was written before is untouched"):
        run(tiny, run_dir="file/run")


def test_what_cannot_be_exported_is_refused_before_training(tiny):
    method = tiny.method()
    method.encoder.width = torch.nn.functional.relu
    with pytest.raises(TypeError, match=r"model.encoder.width"):
        run(tiny, method=method)
    assert not Path("runs").exists()


def test_data_that_are_not_there_leave_no_folder(tiny, monkeypatch):
    def points(self, split):
        raise FileNotFoundError("no such data")

    monkeypatch.setattr(tiny.TinyData, "points", points)
    with pytest.raises(FileNotFoundError, match="no such data"):
        run(tiny)
    assert not Path("runs").exists()


def test_data_without_labels_trains_and_is_not_evaluated(tiny):
    class Unlabelled(tiny.TinyData):
        num_classes = None

    result = run(tiny, data=Unlabelled())
    assert "trained" not in result.metrics
    assert result.metrics["steps"] == 15


def test_a_loss_must_be_named(tiny):
    class Nameless(tiny.TinyMethod):
        def loss(self, batch):
            return {"norm": self.encoder(batch[0]).norm()}

    with pytest.raises(ValueError, match=r"Nameless.loss must return .* got keys 'norm'"):
        run(tiny, Nameless)


AVERAGED = {"monitor": Monitoring(knn_every_epochs=1, moving_average=0.9)}


def killed_before_the_export(tiny, monkeypatch, **arguments):
    def export_method(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(artifacts, "export_method", export_method)
        run(tiny, run_dir="cut", **arguments)


def test_resume_after_the_last_step_is_exact(tiny, monkeypatch):
    whole = run(tiny, run_dir="whole", **AVERAGED)
    killed_before_the_export(tiny, monkeypatch, **AVERAGED)
    cut = run(tiny, resume="cut", **AVERAGED)
    same(whole.method.state_dict(), cut.method.state_dict())
    assert cut.metrics["train"]
    for name in ("metrics.csv", "metrics.json", "similarities.safetensors", "config.yaml"):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes(), name


def test_a_finished_run_comes_back_as_it_is(tiny, monkeypatch):
    whole = run(tiny, run_dir="whole", **AVERAGED)
    files = {path: path.stat().st_mtime_ns for path in Path("whole").rglob("*") if path.name != ".lock"}
    again = run(tiny, resume="whole", method=tiny.method(), **AVERAGED)
    same(whole.method.state_dict(), again.method.state_dict())
    assert (again.metrics, again.table) == (whole.metrics, whole.table)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_more_epochs_go_on_where_a_run_ended(tiny):
    constant = {"optimization": Optimization(schedule="constant"), "monitor": Monitoring(moving_average=0.9)}
    whole = run(tiny, run_dir="whole", epochs=4, **constant)
    run(tiny, run_dir="cut", epochs=2, **constant)
    with pytest.raises(Killed):
        run(tiny, resume="cut", epochs=4, kill_at=17, **constant)
    assert {"finished", "trained", "steps"}.isdisjoint(json.loads(Path("cut/metrics.json").read_text()))
    Path("cut/checkpoints/.last.ckpt.abc.part").write_text("left by a kill")
    cut = run(tiny, resume="cut", epochs=4, **constant)
    same(whole.method.state_dict(), cut.method.state_dict())
    assert (cut.metrics, cut.table) == (whole.metrics, whole.table)
    assert not list(Path("cut").rglob("*.part"))
    assert Path("cut/config.yaml").read_text() == Path("whole/config.yaml").read_text()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed was 0 when cut began and is 1 now"),
        ({"optimization": Optimization(lr=0.1)}, r"optimization.lr was 0.001 when cut began and is 0.1 now"),
        ({"data": "batch"}, "data.batch_size was 8 when cut began and is 9 now"),
        ({"data": "size"}, "data.size was 44 when cut began and is 45 now"),
        ({"method": "loss"}, r"model.loss.temperature was 0.5 .* is 0.7 now"),
        ({"evaluation": Evaluation(neighbours=(1,))}, r"evaluation.neighbours was \[5\] .* is \[1\] now"),
        ({"monitor": Monitoring(moving_average=0.5)}, "monitor.moving_average was None .* is 0.5 now"),
        ({"gradient_cache_chunk": 4}, "gradient_cache_chunk was None .* is 4 now"),
    ],
)
def test_resume_refuses_what_makes_another_run(tiny, changed, said):
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", kill_at=7)
    made = {
        "size": lambda: tiny.TinyData(size=45),
        "batch": lambda: tiny.TinyData(batch_size=9),
        "loss": lambda: tiny.method(temperature=0.7),
    }
    changed = {name: made[value]() if isinstance(value, str) else value for name, value in changed.items()}
    before = Path("cut/config.yaml").read_bytes()
    with pytest.raises(ValueError, match=f"{said}: resume it as it began, or start another run") as caught:
        run(tiny, resume="cut", **changed)
    assert "\n" not in str(caught.value)
    assert Path("cut/config.yaml").read_bytes() == before
    same(run(tiny).method.state_dict(), run(tiny, resume="cut").method.state_dict())


def edited(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["state_dict"].popitem(),
            "cut.checkpoints.last.ckpt cannot be continued: RuntimeError: Err",
        ),
        (lambda c: c["optimizer_states"][0].update(state=3), "last.ckpt cannot be continued"),
        (lambda c: c["loops"].clear(), "last.ckpt cannot be continued"),
        (lambda c: c["callbacks"]["Recorder"].pop("sums"), "last.ckpt cannot be continued: KeyError: 'sums'"),
        (lambda c: c["cl_core"].clear(), "last.ckpt is damaged: its entries are not what"),
        (lambda c: c["cl_core"].update(steps_done="many"), "last.ckpt is damaged"),
        (lambda c: c.update(cl_core=None), "last.ckpt is damaged"),
        (lambda c: c.pop("state_dict"), "last.ckpt is damaged"),
    ],
)
def test_a_checkpoint_damaged_inside_is_said_in_one_sentence(tiny, change, said):
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", kill_at=7)
    edited("cut/checkpoints/last.ckpt", change)
    with pytest.raises(ValueError, match=said) as caught:
        run(tiny, resume="cut")
    assert "\n" not in str(caught.value)


def test_one_process_trains_in_a_folder(tiny):
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", kill_at=7)
    code = (
        "import time; from filelock import FileLock\n"
        "with FileLock('cut/.lock'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process trains in cut"):
            run(tiny, resume="cut")
        other.kill()
    same(run(tiny).method.state_dict(), run(tiny, resume="cut").method.state_dict())


def test_a_checkpoint_gives_the_moving_average(tiny, monkeypatch):
    whole = run(tiny, run_dir="whole", **AVERAGED)
    weights = weights_of("whole/checkpoints/last.ckpt", package="cl-core")
    same(weights, whole.method.state_dict())


def test_a_picture_that_cannot_be_drawn_costs_no_result(tiny):
    def artist(drawing):
        raise ZeroDivisionError("no\nroom")

    with pytest.warns(UserWarning, match="figures of here could not be drawn: ZeroDivisionError: no room"):
        result = run(tiny, run_dir="here", artist=artist)
    assert result.metrics["finished"]
    assert result.metrics["trained"]


def test_ctrl_c_before_and_after_training_says_how_to_go_on(tiny, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fitting, "evaluate_raw", interrupt)
        with pytest.raises(KeyboardInterrupt, match="no checkpoint was due yet; go on with fit --resume cut"):
            run(tiny, run_dir="cut")
        patched.undo()
        patched.setattr(fitting, "accuracies", interrupt)
        with pytest.raises(
            KeyboardInterrupt, match="the last checkpoint is kept; go on with fit --resume cut"
        ):
            run(tiny, resume="cut")
    assert run(tiny, resume="cut").metrics == run(tiny).metrics


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_no_generator_takes(tiny, seed):
    with pytest.raises(ValueError, match=f"seed must be at .*, got {seed}"):
        run(tiny, seed=seed)
    assert not Path("runs").exists()


def test_a_device_that_is_not_there_leaves_no_folder(tiny):
    with pytest.raises(ValueError, match="warp"):
        run(tiny, trainer=TrainerOptions(accelerator="warp"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", ["TinyMethod", "TwoOptimisers"])
def test_a_run_cannot_end_before_where_it_stands(tiny, kind):
    def options(epochs, steps=-1):
        return TrainerOptions(max_epochs=epochs, max_steps=steps, **CPU)

    with pytest.raises(Killed):
        run(tiny, getattr(tiny, kind), run_dir="cut", kill_at=9, checkpoint=Checkpointing(every_steps=2))
    before = Path("cut/config.yaml").read_bytes()
    for less, said in (
        (options(1), "max_epochs must be at least 2, begun so far, got 1"),
        (options(3, 4), "max_steps must be at least 8, done so far, got 4"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tiny, getattr(tiny, kind), resume="cut", trainer=less)
        assert Path("cut/config.yaml").read_bytes() == before
    run(tiny, getattr(tiny, kind), run_dir="short", trainer=options(3, 7))
    files = {
        path: path.read_bytes() for path in Path("short").rglob("*") if path.suffix in (".json", ".yaml")
    }
    with pytest.raises(ValueError, match="max_steps was 7 and ended the run inside an epoch"):
        run(tiny, getattr(tiny, kind), resume="short", trainer=options(3))
    assert {path: path.read_bytes() for path in files} == files  # a refusal loses nothing
    run(tiny, getattr(tiny, kind), run_dir="even", trainer=options(3, 10))
    longer = run(tiny, getattr(tiny, kind), resume="even", trainer=options(3))
    assert longer.metrics["steps"] == 15
