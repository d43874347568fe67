from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

from cl_core.method import Progress
from cl_core.training.callbacks import MovingAverage
from cl_core.training.fitting import fit
from cl_core.training.optimization import Optimization
from cl_core.training.settings import Monitoring, TrainerOptions


def factors(steps=20, epochs=5, **settings):
    optimization = Optimization(**settings)
    return [optimization.factor(Progress(step, steps, step // 4, epochs)) for step in range(steps + 1)]


def test_schedules():
    assert factors(schedule="constant") == [1.0] * 21
    expected = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(21)]
    assert factors() == pytest.approx(expected)
    warm = factors(warmup_epochs=1)  # 4 of 20 steps
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warm[-1] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(warm[4:]))


def test_cosine_ends_where_it_is_told():
    found = factors(lr=0.5, final_lr=0.05)
    assert (found[0], found[10], found[-1]) == pytest.approx((1.0, 0.55, 0.1))


def test_warmup_from_a_rate_reaches_the_peak_with_its_last_step():
    warm = factors(lr=2.0, warmup_epochs=1, warmup_lr=0.5)
    assert warm[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_steps_fall_at_their_epochs():
    found = factors(schedule="step", milestones=(2, 4.5), decay=0.5)
    assert found == [1.0] * 8 + [0.5] * 10 + [0.25] * 3


def test_a_limit_of_steps_leaves_the_length_of_epochs_alone():
    """Six steps, of epochs of four."""
    warm = Optimization(warmup_epochs=1)
    assert [warm.factor(Progress(s, 6, s // 4, 2, 4)) for s in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    falling = Optimization(schedule="step", milestones=(1,))
    assert [falling.factor(Progress(s, 6, s // 4, 2, 4)) for s in range(6)] == [1.0] * 4 + [0.1] * 2


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("lars", "Lars")]
)
def test_optimisers_and_rates_of_groups(tiny, name, kind):
    optimization = Optimization(optimizer=name, lr=0.2, weight_decay=0.1)
    built = optimization.build(tiny.method(tiny.TwoOptimisers))
    assert {key: type(value).__name__ for key, value in built.items()} == {"main": kind, "head": kind}
    optimization.set_rates(built, Progress(10, 20, 2, 5))
    assert built["main"].param_groups[0]["lr"] == pytest.approx(0.1)
    assert built["head"].param_groups[0]["lr"] == pytest.approx(0.05)
    assert built["main"].param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"weight_decay": 0.0, "optimizer": "lars"},
        {"warmup_epochs": float("nan")},
        {"optimizer": "lamb"},
        {"trust_coefficient": 0.0},
        {"schedule": "x"},
        {"milestones": (3,)},
        {"milestones": (3, 2), "schedule": "step"},
        {"decay": 1.0},
        {"final_lr": -1.0},
        {"warmup_lr": float("inf")},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Optimization(**settings)


def test_lars_without_its_library_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim.lars", None)
    with pytest.raises(ValueError, match=r"optimizer 'lars' needs timm: pip install 'cl-core\[lars\]'"):
        Optimization(optimizer="lars").build(tiny.method())


def test_lars_scales_what_decays_and_nothing_else(tiny):
    method = tiny.method()
    (optimizer,) = Optimization(optimizer="lars", lr=1.0, momentum=0.0).build(method).values()
    before = [p.detach().clone() for p in method.parameters()]
    for parameter in method.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    optimizer.step()
    for old, new in zip(before, method.parameters(), strict=True):
        scale = 0.001 * old.norm() / (10 * old.numel() ** 0.5) if old.ndim > 1 else 1.0
        torch.testing.assert_close(
            old - new.detach(), torch.full_like(old, 10.0) * scale, rtol=1e-2, atol=1e-4
        )


def test_a_step_schedule_needs_milestones():
    with pytest.raises(ValueError, match="milestones must be rising epochs"):
        Optimization(schedule="step")


def test_nothing_to_train_is_refused(tiny):
    with pytest.raises(ValueError, match="TinyMethod has no trainable parameter"):
        Optimization().build(tiny.method().requires_grad_(False))


def test_the_moving_average_becomes_the_result(tiny, monkeypatch):
    seen = []
    after = tiny.TinyMethod.after_step

    def after_step(self, progress):
        after(self, progress)
        seen.append({name: value.detach().clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(tiny.TinyMethod, "after_step", after_step)
    method = tiny.method()
    average = {name: value.detach().clone() for name, value in method.state_dict().items()}
    options = TrainerOptions(max_epochs=2, accelerator="cpu", progress_bar=False)
    result = fit(method, tiny.TinyData(), trainer=options, monitor=Monitoring(moving_average=0.8))
    for state in seen:
        average = {name: 0.8 * average[name] + 0.2 * value for name, value in state.items()}
    for name, value in result.method.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, seen[-1][name])
    with pytest.raises(ValueError, match="decay must be in"):
        MovingAverage(1.0)
