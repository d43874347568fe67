"""Scores recorded beside the loss of any host: what they are, where they are kept, and that a resume loses none."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cl_core.losses import (
    BYOLLoss,
    CACRLoss,
    FeatureTransform,
    InfoNCELoss,
    QueryKeyLoss,
    ReSSLLoss,
    SupConLoss,
    UniformityLoss,
)
from cl_core.scores import CURVES, ScoreRecorder
from cl_core.training import read_scores
from cl_core.training.checkpoints import Checkpointing
from cl_core.training.fitting import fit
from cl_core.training.settings import Monitoring, TrainerOptions
from cl_core.transforms import NegativeInterpolation, PositiveExtrapolation

CPU = {"accelerator": "cpu", "progress_bar": False}


class Killed(Exception):
    """Stands for a process that ends at once."""


def run(tiny, method=None, *, end=None, epochs=3, accumulate=1, monitor=None, **arguments):
    """Fit with recorded scores, four steps a block; ``end`` is (step, what happens after it)."""
    method = method or tiny.method()
    if end is not None:
        after = method.after_step

        def after_step(progress):
            after(progress)
            if progress.step == end[0]:
                end[1]()

        method.after_step = after_step
    monitor = {"scores": True, "scores_every": 4, "knn_every_epochs": None} | (monitor or {})
    trainer = TrainerOptions(max_epochs=epochs, accumulate_grad_batches=accumulate, **CPU)
    data = tiny.TinyData()
    data.evaluation_dataset = lambda split: []  # nothing to judge, which takes its time
    try:
        return fit(method, data, monitor=Monitoring(**monitor), trainer=trainer, **arguments)
    finally:
        vars(method).pop("after_step", None)


def kill():
    raise Killed


@pytest.fixture
def hosted(tiny, monkeypatch):
    """A method that calls its criterion as told, and all that the criterion was called with."""

    def hosted(loss, call):
        class Hosted(tiny.TinyMethod):
            def loss(self, batch):
                return call(self, [self.encoder(view) for view in (*batch, batch[0] + 0.1)])

        Hosted.__qualname__ = "Hosted"
        monkeypatch.setattr(Hosted, "__module__", "tiny")
        monkeypatch.setattr(tiny, "Hosted", Hosted, raising=False)
        torch.manual_seed(0)
        method = Hosted(tiny.TinyEncoder(), loss)
        calls = []
        loss.register_forward_pre_hook(
            lambda _, inputs, options: calls.append((inputs, options)), with_kwargs=True
        )
        return method, calls

    return hosted


def naive(query, key, negatives, temperature=None):
    """The numbers of a step, from the whole matrix of scores."""
    query, key = (F.normalize(z.detach(), dim=1) for z in (query, key))
    positive = (query * key).sum(1)
    if negatives is None:
        negative = (query @ key.T)[~torch.eye(len(query), dtype=torch.bool)].view(len(query), -1)
    else:
        negative = query @ F.normalize(negatives, dim=1).T
    numbers = [positive.mean(), positive.var(correction=0), negative.mean(), negative.var(1).mean()]
    heat = math.nan if temperature is None else temperature
    numbers += [(scores / heat).exp().mean().log() for scores in (positive, negative)]
    return torch.stack(numbers).double(), [
        torch.histc(scores, 64, -1, 1).long() for scores in (positive, negative)
    ]


def compare(path, wanted):
    found = read_scores(path)
    assert found["step"].tolist() == [*range(len(wanted))]
    ends = [*range(4, len(wanted), 4), len(wanted)]
    assert found["block_end"].tolist() == ends
    for place, name in enumerate(CURVES):
        column = torch.stack([numbers[place] for numbers, _ in wanted])
        torch.testing.assert_close(found[name], column, rtol=1e-5, atol=1e-6, equal_nan=True)
    for place, name in enumerate(("positive_histogram", "negative_histogram")):
        counts = torch.stack([histograms[place] for _, histograms in wanted])
        blocks = torch.stack([block.sum(0) for block in counts.split(4)])
        # A score may lie as near to an edge as its rounding.
        assert (found[name].cumsum(1) - blocks.cumsum(1)).abs().max() <= 1
        assert torch.equal(found[name].sum(1), blocks.sum(1))


QUEUE = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
HOSTS = {
    "two views": (InfoNCELoss(0.3), lambda m, z: m.criterion(z[0], z[1]), lambda c: (*c[0], None, 0.3)),
    "queue": (InfoNCELoss(0.3), lambda m, z: m.criterion(z[0], z[1], QUEUE), lambda c: (*c[0], 0.3)),
    "named queue": (
        InfoNCELoss(0.3),
        lambda m, z: m.criterion(z[0], z[1], negatives=QUEUE),
        lambda c: (*c[0], c[1]["negatives"], 0.3),
    ),
    "queue loss": (
        ReSSLLoss(0.3),
        lambda m, z: m.criterion(z[0], z[1], queue=QUEUE),
        lambda c: (*c[0], QUEUE, 0.3),
    ),
    "predictions": (BYOLLoss(), lambda m, z: m.criterion(z[0], z[1]), lambda c: (*c[0], None)),
    "several views": (CACRLoss(), lambda m, z: m.criterion(z), lambda c: (c[0][0][0], c[0][0][1], None)),
    "several queries": (
        CACRLoss(),
        lambda m, z: m.criterion(z, [view.detach() for view in z], QUEUE),
        lambda c: (c[0][0][0], c[0][1][1], QUEUE),
    ),
    "both ways": (
        InfoNCELoss(0.3),
        lambda m, z: m.criterion(z[0], z[1]) + m.criterion(z[1], z[0]),
        lambda c: (*c[0], None, 0.3),
    ),
}


@pytest.mark.parametrize(
    ("host", "accumulate"), [*((host, 1) for host in HOSTS), ("queue", 2), ("both ways", 2)]
)
def test_what_is_recorded_is_what_the_loss_compares(tiny, hosted, host, accumulate):
    loss, call, seen = HOSTS[host]
    method, calls = hosted(loss, call)
    result = run(tiny, method, epochs=2, accumulate=accumulate, monitor={"scores_rows": None})
    a_batch = 2 if host == "both ways" else 1
    # 5 batches an epoch: accumulated over two, steps begin with the batches 0, 2, 4 of each epoch.
    first = [batch * a_batch for batch in range(10) if (batch % 5) % accumulate == 0]
    assert len(calls) == 10 * a_batch
    compare(result.run.scores, [naive(*seen(calls[place])) for place in first])
    assert not loss._forward_hooks


def test_some_queries_and_a_temperature_that_is_learnt(tiny, hosted):
    class Learnt(QueryKeyLoss):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, query, key, negatives=None):
            return InfoNCELoss(self.temperature)(query, key, negatives)

    loss, heats = Learnt(), []
    method, calls = hosted(loss, lambda m, z: m.criterion(z[0], z[1], QUEUE))
    loss.register_forward_pre_hook(lambda module, _: heats.append(module.temperature.item()))
    found = read_scores(run(tiny, method, epochs=1, monitor={"scores_rows": 3}).run.scores)
    some = torch.arange(3) * 8 // 3
    wanted = [
        naive(c[0][0][some], c[0][1][some], QUEUE, heat)[0] for c, heat in zip(calls, heats, strict=True)
    ]
    for place in (2, 3, 5):
        column = torch.stack([numbers[place] for numbers in wanted])
        torch.testing.assert_close(found[CURVES[place]], column, rtol=1e-5, atol=1e-6)
    assert len(set(heats)) == 5


def test_a_loss_that_says_itself_what_it_scores(tiny, hosted):
    """Of some anchors the pairs of equal and of different labels, whether they are named or not."""
    labels = torch.arange(8) % 3
    for call in (lambda m, z: m.criterion(z[0], labels), lambda m, z: m.criterion(z=z[0], labels=labels)):
        method, calls = hosted(SupConLoss(0.3), call)
        found = read_scores(run(tiny, method, epochs=1, monitor={"scores_rows": 3}).run.scores)
        some = torch.arange(3) * 8 // 3
        same = labels[some, None] == labels
        itself = some[:, None] == torch.arange(8)
        for place, (inputs, options) in enumerate(calls):
            z = F.normalize((inputs or (options["z"],))[0].detach().double(), dim=1)
            scores = z[some] @ z.T
            positive = scores[same & ~itself]
            torch.testing.assert_close(found["positive_mean"][place], positive.mean(), rtol=1e-5, atol=1e-6)
            mean = (positive / 0.3).exp().mean().log()
            torch.testing.assert_close(found["positive_log_mean_exp"][place], mean, rtol=1e-5, atol=1e-6)
            negative = torch.stack([row[~of].mean() for row, of in zip(scores, same, strict=True)]).mean()
            torch.testing.assert_close(found["negative_mean"][place], negative, rtol=1e-5, atol=1e-6)
        assert found["negative_histogram"].sum() == 5 * (~same).sum()


def test_own_updates_and_a_gradient_cache(tiny):
    """One record a step, although the criterion is called once an optimiser, or on behalf of chunks."""

    class Plain(tiny.TinyMethod):
        def loss(self, batch):
            return super().loss(batch)["loss"]

    torch.manual_seed(0)
    for method, options in (
        (tiny.method(tiny.TakingTurns), {}),
        (Plain(tiny.TinyEncoder(), tiny.TinyLoss()), {"gradient_cache_chunk": 3}),
    ):
        found = read_scores(run(tiny, method, epochs=2, **options).run.scores)
        assert found["step"].tolist() == [*range(10)]
        assert found["positive_histogram"].sum() == found["positive_histogram"][:2].sum() + 16 == 80


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("queue", [QUEUE, None])
def test_transformed_scores_are_those_that_the_loss_compares(tiny, hosted, queue, calls):
    parts = {"positive": PositiveExtrapolation(), "negative": NegativeInterpolation()}
    method, _ = hosted(
        FeatureTransform(InfoNCELoss(0.3), **parts),
        lambda m, z: sum(m.criterion(z[0], z[1], queue) for _ in range(calls)),
    )
    wanted, wrapped = ScoreRecorder(4), method.criterion.forward

    def forward(*inputs):
        """The same draws, before the monitor's."""
        lent, state = method.criterion.recorder, torch.get_rng_state()
        if lent is not None:
            assert lent.steps == wanted.steps
            method.criterion.recorder = wanted
            wrapped(*inputs)
            method.criterion.recorder = lent
            torch.set_rng_state(state)
        return wrapped(*inputs)

    method.criterion.forward = forward
    result = run(tiny, method, epochs=2, monitor={"scores_rows": None})
    found = read_scores(result.run.scores)
    for name, values in wanted.flush().items():
        assert torch.equal(found[name], values), name
    assert len(found["step"]) == 10 and not found["positive_log_mean_exp"].isnan().any()
    assert method.criterion.recorder is None and len(method.criterion._forward_pre_hooks) == 1  # of this test


def test_a_step_without_a_call_is_left_out(tiny, hosted):
    turn = iter(range(100))
    method, _ = hosted(
        InfoNCELoss(), lambda m, z: m.criterion(z[0], z[1]) if next(turn) % 3 else z[0].square().mean()
    )
    found = read_scores(run(tiny, method).run.scores)
    assert found["step"].tolist() == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]
    assert found["block_end"].tolist() == [6, 12, 15]


def test_a_step_without_a_row_is_left_out(tiny, hosted, monkeypatch):
    """As on a rank that holds none of a batch; losses with a group take it."""

    class Lenient(InfoNCELoss):
        def forward(self, query, key, negatives=None):
            return super().forward(query, key, negatives) if len(query) else 0 * query.sum()

    monkeypatch.setattr(Lenient, "__module__", "tiny")
    Lenient.__qualname__ = "Lenient"
    monkeypatch.setattr(tiny, "Lenient", Lenient, raising=False)
    turn = iter(range(100))
    method, _ = hosted(Lenient(), lambda m, z: m.criterion(*(v[: 99 * (next(turn) % 4 < 2)] for v in z[:2])))
    found = read_scores(run(tiny, method).run.scores)
    assert found["step"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_nothing_is_recorded_unless_asked_for_and_nothing_else_changes(tiny):
    watched, plain = run(tiny, run_dir="watched"), run(tiny, run_dir="plain", monitor={"scores": False})
    assert watched.run.scores.is_file() and not plain.run.scores.exists()
    for name in ("export/model.safetensors", "metrics.csv", "metrics.json", "similarities.safetensors"):
        assert Path("watched", name).read_bytes() == Path("plain", name).read_bytes(), name


# 5 batches an epoch and 4 steps a block: before the first save, inside a block and an epoch, at the end of either.
@pytest.mark.parametrize(
    ("every_steps", "accumulate", "step"),
    [(2, 1, 1), (2, 1, 5), (2, 1, 8), (2, 1, 14), (None, 1, 9), (3, 1, 13), (2, 2, 5)],
)
def test_a_resumed_run_writes_the_same_file(tiny, every_steps, accumulate, step):
    arguments = {"checkpoint": Checkpointing(every_steps=every_steps), "accumulate": accumulate}
    run(tiny, run_dir="whole", **arguments)
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", end=(step, kill), **arguments)
    run(tiny, resume="cut", **arguments)
    assert Path("whole/scores.safetensors").read_bytes() == Path("cut/scores.safetensors").read_bytes()


def test_a_run_killed_between_the_file_and_its_checkpoint(tiny, monkeypatch):
    """And twice, the second time before anything new was saved."""
    arguments = {"checkpoint": Checkpointing(every_epochs=2), "epochs": 4}
    run(tiny, run_dir="whole", **arguments)
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", end=(18, kill), **arguments)
    assert len(read_scores("cut/scores.safetensors")["step"]) == 15  # the checkpoint is of 10
    with pytest.raises(Killed):
        run(tiny, resume="cut", end=(12, kill), **arguments)
    run(tiny, resume="cut", **arguments)
    assert Path("whole/scores.safetensors").read_bytes() == Path("cut/scores.safetensors").read_bytes()


def test_an_interrupted_run_keeps_what_it_has_recorded(tiny):
    run(tiny, run_dir="whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny, run_dir="cut", end=(7, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert read_scores("cut/scores.safetensors")["step"].tolist() == [*range(7)]
    run(tiny, resume="cut")
    assert Path("whole/scores.safetensors").read_bytes() == Path("cut/scores.safetensors").read_bytes()


def test_recording_may_begin_and_end_with_a_resume(tiny):
    run(tiny, run_dir="whole", epochs=4)
    run(tiny, run_dir="cut", epochs=1, monitor={"scores": False})
    with pytest.raises(Killed):
        run(tiny, resume="cut", epochs=2, end=(8, kill))
    assert not Path("cut/scores.safetensors").exists()
    run(tiny, resume="cut", epochs=2)
    assert read_scores("cut/scores.safetensors")["step"].tolist() == [5, 6, 7, 8, 9]
    run(tiny, resume="cut", epochs=3, monitor={"scores": False})
    run(tiny, resume="cut", epochs=4, monitor={"scores_rows": 3})
    found = read_scores("cut/scores.safetensors")
    assert found["step"].tolist() == [*range(5, 10), *range(15, 20)]
    assert found["block_end"].tolist() == [9, 10, 19, 20]
    with pytest.raises(ValueError, match=r"monitor.scores_every was 4 when cut began and is 5 now"):
        run(tiny, resume="cut", epochs=5, monitor={"scores_every": 5})


def test_what_compares_no_pairs_is_refused_before_there_is_a_folder(tiny):
    method = tiny.TinyMethod(tiny.TinyEncoder(), UniformityLoss())
    with pytest.raises(ValueError, match=r"compares something with positives.*got UniformityLoss in TinyM"):
        run(tiny, method)
    method = tiny.TinyMethod(
        tiny.TinyEncoder(), FeatureTransform(InfoNCELoss(), positive=PositiveExtrapolation())
    )
    method.criterion.recorder = ScoreRecorder()
    with pytest.raises(ValueError, match=r"criterion.recorder must be None with monitor.scores"):
        run(tiny, method)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("edges"),
        lambda found: found.update(more=torch.zeros(2)),
        lambda found: found.update(step=found["step"][1:].clone()),
        lambda found: found.update(edges=found["edges"][1:].clone()),
        lambda found: found.update(step=found["step"].double()),
    ],
)
def test_other_things_are_no_scores(tmp_path, damage):
    recorder, path = ScoreRecorder(), tmp_path / "scores.safetensors"
    recorder.update(QUEUE, QUEUE)
    found = recorder.flush()
    save_file(found, path)
    assert read_scores(path).keys() == found.keys()
    damage(found)
    save_file(found, path)
    with pytest.raises(
        ValueError, match=r"scores.safetensors holds other things than scores; without it, a run"
    ):
        read_scores(path)


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_truncated_file_is_said_in_one_sentence(tiny, cut):
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", end=(12, kill))
    file = Path("cut/scores.safetensors")
    intact = file.read_bytes()
    file.write_bytes(intact[:cut])
    for call in (lambda: read_scores(file), lambda: run(tiny, resume="cut")):
        with pytest.raises(
            ValueError, match=f"{file} is truncated or corrupt .*; without it, a run goes on.$"
        ) as error:
            call()
        assert "\n" not in str(error.value)
    file.write_bytes(intact)
    run(tiny, run_dir="whole")
    run(tiny, resume="cut")
    assert file.read_bytes() == Path("whole/scores.safetensors").read_bytes()


def test_without_its_file_a_run_goes_on(tiny):
    with pytest.raises(Killed):
        run(tiny, run_dir="cut", end=(12, kill))
    Path("cut/scores.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"there is no cut.scores.safetensors: scores are recorded by fit"
    ):
        read_scores("cut/scores.safetensors")
    run(tiny, resume="cut")
    assert read_scores("cut/scores.safetensors")["step"].tolist() == [
        *range(8, 15)
    ]  # the block that had begun


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"scores_every": 0}, "scores_every must be at least 1"),
        ({"scores_rows": 0}, "scores_rows must be at least 1"),
        ({"scores": 1}, "scores must be True or False"),
    ],
)
def test_settings_are_checked(setting, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Monitoring(**setting)
