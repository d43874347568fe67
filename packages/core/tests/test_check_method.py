"""The battery of methods over a good method, and over bad ones that each must fail the check that is theirs."""

import copy
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cl_core.losses import DCLLoss, TwoViewLoss
from cl_core.memory import FeatureQueue
from cl_core.method import Method
from cl_core.momentum import ExponentialMovingAverage
from cl_core.testing import check_method, method_checks
from cl_core.testing._differences import differences
from cl_core.testing.methods import CHECKS, BareTraining, Case
from cl_core.training import LitMethod, Optimization

ROWS, WIDTH = 9, 5


class Encoder(nn.Module):
    """Draws (dropout) and keeps running statistics (batch norm), as real ones do."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 4)
        )

    def forward(self, inputs):
        return self.layers(inputs)


class Good(Method):
    """Two views and a momentum encoder, which gives the second its embeddings."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, momentum: float = 0.9) -> None:
        super().__init__()
        self.encoder, self.criterion, self.momentum = encoder, loss, momentum
        self.teacher = ExponentialMovingAverage(encoder)

    def loss(self, batch):
        value = self.criterion(self.encoder(batch["view1"]), self.teacher(batch["view2"]))
        return {"loss": value, "momentum": torch.tensor(self.momentum)}

    def embed(self, inputs):
        return self.encoder(inputs)

    def after_step(self, progress):
        self.teacher.update(self.encoder, self.momentum)


class PlainLoss(Good):
    """A scalar instead of a dict."""

    def loss(self, batch):
        return super().loss(batch)["loss"]


class TakingTurns(Good):
    """Two optimisers, each on a step of its own."""

    def parameter_groups(self, weight_decay):
        return [
            {"params": list(self.encoder.layers[:2].parameters()), "weight_decay": weight_decay},
            {"params": list(self.encoder.layers[2:].parameters()), "optimizer": "head", "lr_scale": 0.5},
        ]

    def update(self, batch, optimizers, backward):
        for name in ("main", "head"):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            losses = self.loss(batch)
            backward(losses["loss"])
            optimizers[name].step()
        return losses


class TwoOptimisers(TakingTurns):
    """Two optimisers on one loss."""

    update = Method.update


class EmbedsInDouble(Good):
    def embed(self, inputs):
        return super().embed(inputs).double()


class FollowsASchedule(Good):
    """What the progress says is no state: the hooks tell it again after a resume."""

    weight = 1.0

    def on_fit_start(self, progress):
        self.weight = 1 - 0.5 * progress.fraction

    def after_step(self, progress):
        super().after_step(progress)
        self.weight = 1 - 0.5 * progress.fraction

    def loss(self, batch):
        return self.weight * super().loss(batch)["loss"]


class TeachesEachEpoch(Good):
    after_step = Method.after_step

    def on_epoch_start(self, progress):
        self.teacher.update(self.encoder, self.momentum)


class KeepsAQueue(Good):
    """Rows written while the loss is computed, and a measurement that there is not yet."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        self.queue = FeatureQueue(16, 4)
        self.register_buffer("accuracy", torch.tensor(float("nan")))

    def loss(self, batch):
        query, key = self.encoder(batch["view1"]), self.teacher(batch["view2"])
        value = self.criterion(query, key, self.queue.embeddings if self.queue.filled else None)
        self.queue.enqueue(key)
        return value


class DrawsFromNumPy(Good):
    def loss(self, batch):
        noise = torch.from_numpy(np.random.randn(ROWS, WIDTH)).float()  # noqa: NPY002
        return super().loss({**batch, "view1": batch["view1"] + noise})


class DrawsFromPython(Good):
    def on_epoch_start(self, progress):
        random.random()


class SeedsEachLoss(Good):
    def loss(self, batch):
        torch.manual_seed(1)
        return super().loss(batch)


class SeedsEachEpoch(Good):
    def on_epoch_start(self, progress):
        torch.manual_seed(progress.epoch)


class CentresTheBatch(Good):
    def embed(self, inputs):
        embeddings = self.encoder(inputs)
        return embeddings - embeddings.mean(0)


class Classifies(Good):
    def __init__(self, encoder: Encoder, loss: TwoViewLoss, momentum: float = 0.9) -> None:
        super().__init__(encoder, loss, momentum)
        self.head = nn.Linear(4, 3)

    def loss(self, batch):
        losses = super().loss(batch)
        return losses | {"loss": losses["loss"] + self.classify(batch["view1"]).square().mean()}

    def classify(self, inputs):
        return self.head(self.encoder(inputs))


class ClassifiesAsNoise(Classifies):
    def classify(self, inputs):
        return super().classify(inputs) + torch.rand(3)


class ClassifiesFlat(Classifies):
    def classify(self, inputs):
        return super().classify(inputs).flatten()


class ForgetsItsTeacher(Good):
    after_step = Method.after_step


class TeachesWithTheLoss(Good):
    after_step = Method.after_step

    def loss(self, batch):
        self.teacher.update(self.encoder, self.momentum)
        return super().loss(batch)


class SkipsTheScaler(TakingTurns):
    def update(self, batch, optimizers, backward):
        return super().update(batch, optimizers, lambda loss: loss.backward())


class UpdatesInSilence(TakingTurns):
    def update(self, batch, optimizers, backward):
        super().update(batch, optimizers, backward)


class AssertsInSilence(Good):
    def loss(self, batch):
        raise AssertionError


class Detached(Good):
    def loss(self, batch):
        return super().loss(batch)["loss"].detach()


class InDouble(Good):
    def loss(self, batch):
        return super().loss(batch)["loss"].double()


class PerRow(Good):
    def loss(self, batch):
        return super().loss(batch)["loss"].expand(3)


class LogsNaN(Good):
    def loss(self, batch):
        return super().loss(batch) | {"ratio": torch.tensor(float("nan"))}


class Unnamed(Good):
    def loss(self, batch):
        return {"total": super().loss(batch)["loss"]}


class ForgetsAParameter(Good):
    def parameter_groups(self, weight_decay):
        return [{"params": list(self.encoder.parameters())[1:]}]


class RepeatsAParameter(Good):
    def parameter_groups(self, weight_decay):
        parameters = list(self.encoder.parameters())
        return [{"params": parameters}, {"params": parameters[:1]}]


class TrainsAStranger(Good):
    def parameter_groups(self, weight_decay):
        return [*super().parameter_groups(weight_decay), {"params": [nn.Parameter(torch.ones(2))]}]


class HasAnIdleParameter(Good):
    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        self.idle = nn.Parameter(torch.ones(2, 2))


class ClimbsTheLoss(Good):
    def loss(self, batch):
        losses = super().loss(batch)
        return losses | {"loss": 2 * losses["loss"].detach() - losses["loss"]}


class HidesACentre(Good):
    """A running mean as a plain attribute."""

    centre = 0.0

    def loss(self, batch):
        self.centre = 0.5 * self.centre + 0.5 * self.encoder(batch["view1"]).mean(0).detach()
        return self.criterion(
            self.encoder(batch["view1"]) - self.centre, self.encoder(batch["view2"]) - self.centre
        )


class HidesACount(Good):
    """The next loss does not depend on it, the step after does."""

    count = 0

    def after_step(self, progress):
        self.count += 1
        self.teacher.update(self.encoder, 0.5 if self.count > 2 else 0.99)


class HidesAConstant(Good):
    """Drawn by the constructor and never saved."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        self.register_buffer("noise", torch.randn(4), persistent=False)

    def embed(self, inputs):
        return self.encoder(inputs) + self.noise


class StoresUnderAnotherName(Good):
    def __init__(self, encoder: Encoder, loss: TwoViewLoss, width: int = 3) -> None:
        super().__init__(encoder, loss)
        self.columns = width


class TakesAnything(Good):
    def __init__(self, encoder: Encoder, **rest: object) -> None:
        super().__init__(encoder, DCLLoss())


class SetsTheSeed(Good):
    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        torch.manual_seed(0)
        super().__init__(encoder, loss)


class CountsItsInstances(Good):
    instances = 0

    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        type(self).instances += 1
        self.register_buffer("number", torch.tensor(self.instances))


class AnotherForward(Good):
    def forward(self, batch):
        return {name: 2 * value for name, value in self.loss(batch).items()}


class EmbedsInTrainingMode(Good):
    def embed(self, inputs):
        self.encoder.train()
        embeddings = self.encoder(inputs)
        self.encoder.eval()
        return embeddings


class SwitchesToEvaluation(Good):
    def embed(self, inputs):
        return self.eval().encoder(inputs)


class SwitchesGradientsOff(Good):
    def embed(self, inputs):
        torch.set_grad_enabled(False)
        return self.encoder(inputs)


class EmbedsTheBatch(Good):
    def embed(self, inputs):
        return self.encoder(inputs).mean(0, keepdim=True)


class EmbedsFlat(Good):
    def embed(self, inputs):
        return self.encoder(inputs)[:, 0]


class RemembersWhatItEmbedded(Good):
    shift = 0.0

    def loss(self, batch):
        return self.criterion(self.encoder(batch["view1"]) + self.shift, self.encoder(batch["view2"]))

    def embed(self, inputs):
        embeddings = self.encoder(inputs)
        self.shift = embeddings.detach().mean(0)
        return embeddings


class DividesByZeroAtTheEnd(Good):
    def after_step(self, progress):
        self.teacher.update(self.encoder, 0.5 / (progress.total_steps - progress.step))


class StaysInEvaluation(Good):
    def on_epoch_start(self, progress):
        self.encoder.eval()


class SpoilsItsBatch(Good):
    def loss(self, batch):
        batch["view1"] += 0.1
        return super().loss(batch)


class SpoilsItsInputs(Good):
    def embed(self, inputs):
        return self.encoder(inputs.clamp_(min=0))


class CannotBeCopied(Good):
    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        self.augment = (inputs for inputs in ())


class SharesItsCopies(Good):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class Nameless(Good):
    def __repr__(self):
        return "a method"


class ChangesAnArgument(Good):
    """Exported under a value that it does not embed with."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, scale: float = 1.0) -> None:
        super().__init__(encoder, loss)
        self.scale, self.factor = scale + 1.0, scale + 1.0

    def embed(self, inputs):
        return self.factor * self.encoder(inputs)


class ChangesItsClassifier(Classifies):
    """Exported under a value that it does not classify with."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss, scale: float = 1.0) -> None:
        super().__init__(encoder, loss)
        self.scale, self.factor = scale + 1.0, scale + 1.0

    def classify(self, inputs):
        return self.factor * super().classify(inputs)


BAD = {
    StoresUnderAnotherName: "constructor_stores_its_arguments",
    TakesAnything: "constructor_stores_its_arguments",
    SetsTheSeed: "construction_repeats_under_a_seed",
    CountsItsInstances: "construction_repeats_under_a_seed",
    Detached: "gives_an_attached_scalar_loss",
    InDouble: "gives_an_attached_scalar_loss",
    PerRow: "gives_an_attached_scalar_loss",
    LogsNaN: "gives_an_attached_scalar_loss",
    Unnamed: "gives_an_attached_scalar_loss",
    DrawsFromNumPy: "draws_from_torch_and_sets_no_seed",
    DrawsFromPython: "draws_from_torch_and_sets_no_seed",
    SeedsEachLoss: "draws_from_torch_and_sets_no_seed",
    SeedsEachEpoch: "draws_from_torch_and_sets_no_seed",
    AnotherForward: "calling_it_gives_the_loss",
    EmbedsInTrainingMode: "embeds_without_a_trace",
    SwitchesToEvaluation: "embeds_without_a_trace",
    SwitchesGradientsOff: "embeds_without_a_trace",
    EmbedsTheBatch: "embeds_without_a_trace",
    EmbedsFlat: "embeds_without_a_trace",
    RemembersWhatItEmbedded: "embeds_without_a_trace",
    ClassifiesAsNoise: "classifies_without_a_trace",
    ClassifiesFlat: "classifies_without_a_trace",
    CentresTheBatch: "embeds_each_row_alone",
    ForgetsAParameter: "parameter_groups_hold_every_parameter_once",
    RepeatsAParameter: "parameter_groups_hold_every_parameter_once",
    TrainsAStranger: "parameter_groups_hold_every_parameter_once",
    HasAnIdleParameter: "two_steps_move_every_parameter",
    SkipsTheScaler: "two_steps_move_every_parameter",
    ForgetsItsTeacher: "momentum_encoders_follow_the_steps",
    TeachesWithTheLoss: "momentum_encoders_follow_the_steps",
    ClimbsTheLoss: "loss_falls_on_one_batch",
    HidesACentre: "state_dict_holds_all_state",
    HidesAConstant: "state_dict_holds_all_state",
    HidesACount: "resumes_exactly",
    DividesByZeroAtTheEnd: "hooks_reach_the_last_step",
    StaysInEvaluation: "hooks_reach_the_last_step",
    SpoilsItsBatch: "leaves_its_inputs_alone",
    SpoilsItsInputs: "leaves_its_inputs_alone",
    CannotBeCopied: "copies_and_shows_itself",
    SharesItsCopies: "copies_and_shows_itself",
    Nameless: "copies_and_shows_itself",
    ChangesAnArgument: "exports_and_loads",
    ChangesItsClassifier: "exports_and_loads",
}


def batches(count=2):
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        points = torch.randn(ROWS, WIDTH, generator=generator)
        noise = 0.1 * torch.randn(2, ROWS, WIDTH, generator=generator)
        made.append({"view1": points + noise[0], "view2": points + noise[1]})
    return made


def factory(kind):
    if kind is TakesAnything:
        return lambda: kind(Encoder())
    return lambda: kind(Encoder(), DCLLoss(temperature=0.5))


def checks_of(kind, **arguments):
    return method_checks(factory(kind), batches(), inputs=batches()[0]["view1"], **arguments)


@pytest.mark.parametrize("name", checks_of(Good))
@pytest.mark.parametrize("kind", [Good, PlainLoss, TwoOptimisers, TakingTurns])
def test_a_good_method_passes(kind, name):
    checks_of(kind)[name]()


@pytest.mark.parametrize(("kind", "name"), BAD.items(), ids=[kind.__name__ for kind in BAD])
def test_a_bad_method_fails(kind, name):
    with pytest.raises(AssertionError, match=f"^{kind.__name__} fails {name}: "):
        checks_of(kind)[name]()


@pytest.mark.parametrize(
    "kind", [Classifies, EmbedsInDouble, FollowsASchedule, TeachesEachEpoch, KeepsAQueue]
)
def test_an_unusual_method_passes(kind):
    check_method(factory(kind), batches(), inputs=batches()[0]["view1"])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (DrawsFromNumPy, "it draws from the global random state of NumPy, not of torch"),
        (SeedsEachEpoch, "it sets torch's global seed"),
        (CentresTheBatch, "embeddings of the first half of the inputs move by"),
        (SkipsTheScaler, "update never calls the backward that it is given"),
        (UpdatesInSilence, "update returns NoneType, not a scalar or a dict of scalars"),
        (ForgetsItsTeacher, "teacher does not follow its module: after_step must call teacher.update"),
        (TeachesWithTheLoss, "teacher moves when the loss is computed"),
        (HidesACentre, "an instance that loaded the state_dict"),
        (AssertsInSilence, "AssertionError: no message"),
    ],
)
def test_the_first_failure_tells_what_is_wrong(kind, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_method(factory(kind), batches(), inputs=batches()[0]["view1"])


def test_rows_are_embedded_alone_where_inputs_can_be_cut():
    checks = method_checks(factory(Good), batches(), inputs=[1, 2])
    assert "embeds_each_row_alone" in checks_of(Good)
    assert "embeds_each_row_alone" not in checks


def test_every_check_can_fail():
    assert set(BAD.values()) == set(CHECKS) - {"loss_after_two_steps_is_as_stored"}


def test_the_stored_loss_is_compared():
    def stored(loss):
        checks = checks_of(Good, stored_loss=loss)
        checks["loss_after_two_steps_is_as_stored"]()

    with pytest.raises(
        AssertionError, match=r"fails loss_after_two_steps_is_as_stored: .* not 99"
    ) as failure:
        stored(99.0)
    shown = float(str(failure.value).split(": ")[1].split(",")[0])
    stored(shown)
    with pytest.raises(AssertionError):
        stored(shown + 3e-4)


def test_all_at_once_stops_at_the_first_failure():
    arguments = {"inputs": batches()[0]["view1"]}
    check_method(factory(Good), batches(), **arguments)
    with pytest.raises(
        AssertionError, match="Detached fails gives_an_attached_scalar_loss: loss is detached"
    ):
        check_method(factory(Detached), batches(), **arguments)
    check_method(factory(Nameless), batches(), exclude=["copies_and_shows_itself"], **arguments)


def test_an_exception_of_the_method_is_a_failure():
    def broken():
        raise KeyError("weights")

    checks = method_checks(broken, batches(), inputs=torch.ones(2, 2))
    with pytest.raises(
        AssertionError, match=r"^the factory fails resumes_exactly: KeyError: 'weights'"
    ) as failure:
        checks["resumes_exactly"]()
    assert isinstance(failure.value.__cause__, KeyError)


def test_the_random_state_and_the_batches_are_left_alone():
    given, same, state = batches(), batches(), torch.get_rng_state()
    with pytest.raises(AssertionError):
        check_method(factory(SpoilsItsBatch), given, inputs=given[0]["view1"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one["view1"], other["view1"]) for one, other in zip(given, same, strict=True))


def test_other_rows_than_the_inputs_length():
    checks = checks_of(EmbedsTheBatch, rows=1)
    checks["embeds_without_a_trace"]()


@pytest.mark.parametrize("given", [(torch.ones(2),), [], None])
def test_batches_must_be_a_list(given):
    with pytest.raises(TypeError, match="batches must be a list of at least one training batch, got"):
        method_checks(factory(Good), given, inputs=torch.ones(1, WIDTH))


def test_inputs_without_a_length_need_rows():
    with pytest.raises(
        TypeError, match="rows must be given for inputs without a length, got inputs of object"
    ):
        method_checks(factory(Good), batches(), inputs=object())


def test_excluding_what_there_is_not():
    with pytest.raises(
        ValueError, match="no check of methods 'resume_exactly'; did you mean 'resumes_exactly'"
    ):
        check_method(factory(Good), batches(), inputs=torch.ones(1, WIDTH), exclude=["resume_exactly"])


def test_without_the_training_extra_there_is_no_export_to_check(monkeypatch):
    monkeypatch.setattr("cl_core.testing.methods.find_spec", lambda name: None)
    assert set(checks_of(Good)) == set(BAD.values()) - {"exports_and_loads"}


class KeepsADiary(Good):
    """Writes down when its hooks are called, and with what."""

    def __init__(self, encoder: Encoder, loss: TwoViewLoss) -> None:
        super().__init__(encoder, loss)
        self.diary = []

    def on_fit_start(self, progress):
        self.diary.append(("fit", progress))

    def on_epoch_start(self, progress):
        self.diary.append(("epoch", progress))

    def after_step(self, progress):
        super().after_step(progress)
        self.diary.append(("step", progress))


class KeepsADiaryOfTurns(KeepsADiary, TakingTurns):
    pass


class KeepsADiaryOfTwo(KeepsADiary, TwoOptimisers):
    pass


@pytest.mark.parametrize("kind", [KeepsADiary, KeepsADiaryOfTurns, KeepsADiaryOfTwo])
def test_the_bare_loop_does_what_the_engine_does(kind):
    case = Case(factory(kind), batches(3), inputs=None, rows=0, lr=0.01, stored_loss=None)
    bare = BareTraining(case, total_steps=6)
    bare.run(6)
    torch.manual_seed(0)
    adaptor = LitMethod(case.factory(), Optimization(lr=0.01, schedule="constant"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")  # its advice on workers and intervals
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            adaptor, train_dataloaders=DataLoader(case.batches, batch_size=None, generator=torch.Generator())
        )
    assert bare.method.diary == adaptor.method.diary
    assert len(bare.method.diary) == 1 + 2 + 6
    assert list(differences(bare.method.state_dict(), adaptor.method.state_dict())) == []
