"""The battery every registered method passes; third parties run it on theirs.

    from cl_core.testing import check_method
    check_method(make_tiny_method, batches, inputs=images)   # AssertionError names the first check that fails

or, to see each check as a test of its own::

    checks = method_checks(make_tiny_method, batches, inputs=images)

    @pytest.mark.parametrize("name", checks)
    def test_battery(name):
        checks[name]()

Methods are trained by a bare loop that keeps the order of :mod:`cl_core.training`, so neither Lightning nor a data
set is needed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cl_core.method import Method
from cl_core.momentum import ExponentialMovingAverage
from cl_core.plugins import unknown
from cl_core.testing._bare import BareTraining, Case, made, named_losses, scalar_loss
from cl_core.testing._differences import assert_same

_ALIASES = {"loss": "criterion"}

CHECKS: dict[str, Callable[[Case], None]] = {}


def check_method(
    factory: Callable[[], Method],
    batches: list[Any],
    *,
    inputs: Any,
    rows: int | None = None,
    lr: float = 3e-3,
    stored_loss: float | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Run every check that applies to a method, on the CPU.

    Args:
        factory: makes a small instance, at random from torch's global state; called many times, under seeds set here.
        batches: training batches, as ``Method.loss`` takes them; used in turn. A few rows each are enough.
        inputs: what ``Method.embed`` takes; a tensor of one input a row is also embedded by halves.
        rows: rows that ``embed`` must return for them; None for ``len(inputs)``.
        lr: learning rate of Adam, with which the loss on one batch must fall within 30 steps.
        stored_loss: loss of the first batch after a step on the first and one on the next, as an earlier version
            gave it (shown when the check fails), to notice unintended changes; None for no such check.
        exclude: names of checks to leave out (say why where you call it).

    Raises:
        AssertionError: naming the first check that fails.
        ValueError: if ``exclude`` names a check that there is not.
    """
    checks = method_checks(factory, batches, inputs=inputs, rows=rows, lr=lr, stored_loss=stored_loss)
    for name in exclude:
        if name not in CHECKS:
            raise ValueError(unknown("check of methods", name, CHECKS))
    for name, check in checks.items():
        if name not in exclude:
            check()


def method_checks(
    factory: Callable[[], Method],
    batches: list[Any],
    *,
    inputs: Any,
    rows: int | None = None,
    lr: float = 3e-3,
    stored_loss: float | None = None,
) -> dict[str, Callable[[], None]]:
    """The checks that apply, by name, each ready to be called; nothing is built before.

    Takes the arguments of :func:`check_method`. A check raises AssertionError alone, whatever goes wrong in it, and
    leaves the global random state as it was.
    """
    if not isinstance(batches, list) or not batches:
        raise TypeError(
            f"batches must be a list of at least one training batch, got {type(batches).__name__}."
        )
    if rows is None and not hasattr(inputs, "__len__"):
        raise TypeError(
            f"rows must be given for inputs without a length, got inputs of {type(inputs).__name__}."
        )
    case = Case(factory, batches, inputs, len(inputs) if rows is None else rows, lr, stored_loss)
    left_out = {
        "embeds_each_row_alone": not isinstance(inputs, Tensor) or case.rows != len(inputs) or case.rows < 2,
        "exports_and_loads": find_spec("safetensors") is None,  # comes with cl-core[train]
        "loss_after_two_steps_is_as_stored": stored_loss is None,
    }
    return {name: functools.partial(_run, name, case) for name in CHECKS if not left_out.get(name, False)}


def _run(name: str, case: Case) -> None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            CHECKS[name](
                replace(case, batches=copy.deepcopy(case.batches), inputs=copy.deepcopy(case.inputs))
            )
        except Exception as error:
            ours = isinstance(error, AssertionError) and str(error)
            what = str(error) if ours else f"{type(error).__name__}: {str(error) or 'no message'}"
            raise AssertionError(f"{_name(case)} fails {name}: {what}") from error


def _name(case: Case) -> str:
    try:
        return type(case.factory()).__name__
    except Exception:
        return "the factory"


def _check(check: Callable[[Case], None]) -> Callable[[Case], None]:
    """Enter a check into the battery."""
    CHECKS[check.__name__.removeprefix("_")] = check
    return check


def _loss(method: Method, batch: Any) -> Any:
    """Loss in training mode, under one seed."""
    torch.manual_seed(7)
    return method.train().loss(batch)


def _embedding(method: Method, inputs: Any) -> Tensor:
    method.eval()
    with torch.no_grad():
        return method.embed(inputs)


def _scores(method: Method, inputs: Any) -> Tensor:
    method.eval()
    with torch.no_grad():
        return method.classify(inputs)


def _state(method: Method) -> dict[str, Any]:
    return copy.deepcopy(method.state_dict())


def _modes(method: Method) -> dict[str, bool]:
    return {name or "the method": module.training for name, module in method.named_modules()}


@_check
def _constructor_stores_its_arguments(case: Case) -> None:
    method = made(case)
    assert isinstance(method, Method), f"{type(method).__name__} is no cl_core.method.Method"
    constructor = type(method).__init__
    if constructor is nn.Module.__init__:
        return
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        name = parameter.name
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), (
            f"*{name} takes arguments without names of their own"
        )
        assert any(_is_stored(method, n) for n in (name, _ALIASES.get(name, name))), (
            f"argument {name!r} is not stored as self.{_ALIASES.get(name, name)}"
        )


def _is_stored(method: Method, name: str) -> bool:
    return hasattr(method, name) and not inspect.ismethod(getattr(method, name))


@_check
def _construction_repeats_under_a_seed(case: Case) -> None:
    first = made(case, seed=3)
    assert torch.initial_seed() == 3, "the factory, or the constructor, sets torch's global seed"
    torch.rand(5)
    assert_same(_state(first), _state(made(case, seed=3)), "two instances made under one seed")


@_check
def _gives_an_attached_scalar_loss(case: Case) -> None:
    named = named_losses(_loss(made(case), case.batches[0]), "loss")
    for name, value in named.items():
        assert value.ndim == 0, f"{name} has shape {tuple(value.shape)}, not that of a scalar"
        assert value.isfinite(), f"{name} is {value.item()}"
    assert named["loss"].dtype == torch.float32, f"loss is {named['loss'].dtype}, not torch.float32"
    assert named["loss"].requires_grad, "loss is detached from the parameters"


@_check
def _draws_from_torch_and_sets_no_seed(case: Case) -> None:
    before = _other_random_states()
    training = BareTraining(case, seed=5)
    training.run(4)  # into a second epoch
    _embedding(training.method, case.inputs)
    for source, state in _other_random_states().items():
        assert state == before[source], f"it draws from the global random state of {source}, not of torch"
    assert torch.initial_seed() == 5, "it sets torch's global seed: all that is drawn after repeats"


def _other_random_states() -> dict[str, tuple[Any, ...]]:
    states = {"Python": random.getstate()}
    if find_spec("numpy") is not None:
        import numpy as np

        _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        states["NumPy"] = (np.asarray(keys).tobytes(), *rest)
    return states


@_check
def _calling_it_gives_the_loss(case: Case) -> None:
    called = made(case).train()
    torch.manual_seed(7)
    assert_same(
        called(case.batches[0]), _loss(made(case), case.batches[0]), "method(batch) and method.loss(batch)"
    )


@_check
def _embeds_without_a_trace(case: Case) -> None:
    training = BareTraining(case)
    training.run(2)
    method, twin = training.method.eval(), copy.deepcopy(training.method)
    state, random = _state(method), torch.get_rng_state()
    embeddings = _embedding(method, case.inputs)
    assert isinstance(embeddings, Tensor), f"embed returns {type(embeddings).__name__}"
    assert embeddings.ndim == 2, f"embeddings have shape {tuple(embeddings.shape)}, not (N, D)"
    assert len(embeddings) == case.rows, f"{len(embeddings)} embeddings of {case.rows} inputs"
    assert embeddings.is_floating_point(), f"embeddings are {embeddings.dtype}"
    assert embeddings.isfinite().all(), "embeddings are not finite"
    assert not embeddings.requires_grad, "embeddings carry a gradient under torch.no_grad()"
    assert torch.equal(torch.get_rng_state(), random), "embed draws random numbers in evaluation mode"
    assert_same(_embedding(method, case.inputs), embeddings, "embeddings of the same inputs")
    assert_same(_state(method), state, "state before and after embed in evaluation mode")
    for mode in (True, False):
        modes = _modes(method.train(mode))
        method.embed(case.inputs)
        assert_same(_modes(method), modes, "training mode of the submodules before and after embed")
        assert torch.is_grad_enabled(), "embed leaves gradients switched off"
    method.load_state_dict(state)  # embed in training mode may have moved running statistics
    assert_same(
        _loss(method, case.batches[0]), _loss(twin, case.batches[0]), "loss with and without embed before"
    )


@_check
def _classifies_without_a_trace(case: Case) -> None:
    training = BareTraining(case)
    training.run(2)
    method = training.method.eval()
    if type(method).classify is Method.classify:
        return
    state, random = _state(method), torch.get_rng_state()
    scores = _scores(method, case.inputs)
    assert isinstance(scores, Tensor), f"classify returns {type(scores).__name__}"
    assert scores.ndim == 2, f"scores have shape {tuple(scores.shape)}, not (N, C)"
    assert len(scores) == case.rows, f"scores for {len(scores)} of {case.rows} inputs"
    assert scores.is_floating_point(), f"scores are {scores.dtype}"
    assert scores.isfinite().all(), "scores are not finite"
    assert torch.equal(torch.get_rng_state(), random), "classify draws random numbers in evaluation mode"
    assert_same(_scores(method, case.inputs), scores, "scores of the same inputs")
    assert_same(_state(method), state, "state before and after classify in evaluation mode")


@_check
def _embeds_each_row_alone(case: Case) -> None:
    training = BareTraining(case)
    training.run(2)
    embeddings = _embedding(training.method, case.inputs)
    half = _embedding(training.method, case.inputs[: case.rows // 2])
    # Wide enough for half precision: statistics of the batch move embeddings by much more.
    off = (half - embeddings[: len(half)]).abs().max() / embeddings.abs().max().clamp_min(1e-30)
    assert off <= 0.02, (
        f"embeddings of the first half of the inputs move by {off:.2g} of the largest entry without the second half"
    )


@_check
def _parameter_groups_hold_every_parameter_once(case: Case) -> None:
    method = made(case)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    grouped = [id(parameter) for group in method.parameter_groups(1e-4) for parameter in group["params"]]
    for key in grouped:
        assert key in names, "a group holds a parameter that is not the method's"
        assert grouped.count(key) == 1, f"{names[key]} is in {grouped.count(key)} places"
    for name, parameter in method.named_parameters():
        assert not parameter.requires_grad or id(parameter) in grouped, f"{name} is in no group"


@_check
def _two_steps_move_every_parameter(case: Case) -> None:
    training = BareTraining(case, weight_decay=0.0)  # or decay alone would move them
    trained = {name: p for name, p in training.method.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    training.run(2)
    own = type(training.method).update is not Method.update
    assert training.backwards or not own, (
        "update never calls the backward that it is given, which also scales for mixed precision"
    )
    for name, parameter in trained.items():
        assert parameter.isfinite().all(), f"{name} is not finite"
        assert not torch.equal(parameter, before[name]), f"{name} has not moved"


@_check
def _momentum_encoders_follow_the_steps(case: Case) -> None:
    training = BareTraining(case)
    averages = {
        name: module
        for name, module in training.method.named_modules()
        if isinstance(module, ExponentialMovingAverage)
    }
    before = copy.deepcopy(averages)
    training.run(4)  # into a second epoch
    after = copy.deepcopy(averages)
    for name in averages:
        assert _parameters_moved(before[name], after[name]), (
            f"{name} does not follow its module: after_step must call {name}.update"
        )
    _loss(training.method, case.batches[0])
    for name, average in averages.items():
        assert not _parameters_moved(after[name], average), (
            f"{name} moves when the loss is computed: call {name}.update in after_step, once an optimiser step"
        )


def _parameters_moved(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return not all(torch.equal(mine, theirs) for mine, theirs in pairs)


@_check
def _loss_falls_on_one_batch(case: Case) -> None:
    training = BareTraining(replace(case, batches=case.batches[:1]), total_steps=30)
    losses = []
    for _ in range(30):
        torch.manual_seed(7)  # the same dropout and augmentation each step: only learning changes the loss
        losses += training.run(1)
    assert max(losses[-5:]) < losses[0], (
        f"it does not fall: {losses[0]:.6g} at first, up to {max(losses[-5:]):.6g} in the last five of 30 steps"
    )


@_check
def _loss_after_two_steps_is_as_stored(case: Case) -> None:
    training = BareTraining(case, eps=1e-4)  # or gradients that are mere rounding would take whole steps
    training.run(2)
    loss = scalar_loss(_loss(training.method, case.batches[0])).item()
    assert case.stored_loss is not None
    assert math.isclose(loss, case.stored_loss, rel_tol=1e-4, abs_tol=1e-4), (
        f"{loss:.7g}, not {case.stored_loss:.7g}"
    )


@_check
def _state_dict_holds_all_state(case: Case) -> None:
    training = BareTraining(case)
    training.run(2)
    loaded = BareTraining(case, seed=1, saved=training.save()).method
    why = "of an instance that loaded the state_dict and was told its progress"
    one, other = _embedding(training.method, case.inputs), _embedding(loaded, case.inputs)
    assert_same(other, one, f"embeddings {why}")
    one, other = _loss(training.method, case.batches[-1]), _loss(loaded, case.batches[-1])
    assert_same(other, one, f"next loss {why}")


@_check
def _resumes_exactly(case: Case) -> None:
    whole = BareTraining(case)
    losses = whole.run(4)
    interrupted = BareTraining(case)
    interrupted.run(2)
    resumed = BareTraining(case, seed=1, saved=interrupted.save())
    assert_same(resumed.run(2), losses[2:], "losses after a resume and without")
    assert_same(_state(resumed.method), _state(whole.method), "state after a resume and without")


@_check
def _hooks_reach_the_last_step(case: Case) -> None:
    training = BareTraining(case, total_steps=2)
    modes, before = _modes(training.method.train()), _state(training.method)
    training.run(2)  # after_step is told step 2 of 2
    assert_same(_modes(training.method), modes, "training mode before and after the hooks")
    for name, value in training.method.state_dict().items():
        if isinstance(value, Tensor) and not (name in before and before[name].isnan().any()):
            assert not value.isnan().any(), f"{name} holds NaN after the last step"
    assert scalar_loss(_loss(training.method, case.batches[0])).isfinite(), (
        "loss is not finite after the last step"
    )


@_check
def _leaves_its_inputs_alone(case: Case) -> None:
    batches, inputs = copy.deepcopy((case.batches, case.inputs))
    training = BareTraining(case)
    training.run(max(2, len(batches)))
    assert_same(case.batches, batches, "the batches after and before")
    _embedding(training.method, case.inputs)
    assert_same(case.inputs, inputs, "the inputs after and before")


@_check
def _copies_and_shows_itself(case: Case) -> None:
    training = BareTraining(case)
    training.run(1)
    copied, state = copy.deepcopy(training.method), _state(training.method)
    twin = copy.deepcopy(copied)
    training.run(2)
    assert_same(_state(copied), state, "state of a copy after the original was trained, and before")
    assert_same(_loss(copied, case.batches[0]), _loss(twin, case.batches[0]), "losses of two copies")
    shown, name = repr(training.method), type(training.method).__name__
    assert shown.startswith(name), f"repr starts with {shown[:40]!r}, not with {name}"


@_check
def _exports_and_loads(case: Case) -> None:
    from cl_core.training import export_method, load_export

    training = BareTraining(case)
    training.run(2)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        loaded = load_export(export_method(training.method, folder))
    made, expected = type(loaded).__name__, type(training.method).__name__
    assert type(loaded) is type(training.method), f"the export loads as {made}, not as {expected}"
    one, other = _embedding(training.method, case.inputs), _embedding(loaded, case.inputs)
    assert_same(other, one, "embeddings of the export")
    if type(loaded).classify is not Method.classify:
        one, other = _scores(training.method, case.inputs), _scores(loaded, case.inputs)
        assert_same(other, one, "scores of the export")
