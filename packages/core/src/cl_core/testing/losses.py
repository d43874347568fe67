"""The battery every registered loss passes; third parties run it on theirs.

    from cl_core.testing import check_loss
    check_loss(MyLoss)                       # all checks that apply; AssertionError names the first that fails

or, to see each check as a test of its own, parametrise over :func:`loss_checks`. They tell what every loss must be, not
which loss it is: compare values with a formula or stored results as well. What a loss is called with follows
from its base class (:class:`~cl_core.losses.TwoViewLoss`, ...); checks that need an option (``reduction``, ``impl``,
``group``, ``temperature``, ``normalize``) apply to losses that have it. A loss with ``dim`` is made for as many columns
as it is fed, one with ``heads`` is fed that many times the columns, side by side.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from cl_core.losses import (
    ClassPairLoss,
    ContrastiveLoss,
    EmbeddingLoss,
    LabelledLoss,
    PredictionLoss,
    PrototypeLoss,
    QueueLoss,
    ScoresLoss,
    TwoViewLoss,
)
from cl_core.testing.ranks import Ranks

LossClass: TypeAlias = type[ContrastiveLoss]
Inputs: TypeAlias = tuple[Tensor, ...]

CHECKS: dict[str, Callable[[LossClass], None]] = {}
_SPLITS = {2: (5, 3), 3: (4, 0, 4), 4: (3, 1, 0, 4)}


def check_loss(loss: LossClass, *, ranks: Ranks | None = None, exclude: tuple[str, ...] = ()) -> None:
    """Run every check that applies to a loss class constructible without arguments.

    Args:
        loss: the class.
        ranks: a pool of processes for the group contract; None leaves that out.
        exclude: names of checks to leave out (say why where you call it).

    Raises:
        AssertionError: naming the first check that fails.
    """
    for name in loss_checks(loss):
        if name not in exclude:
            try:
                CHECKS[name](loss)
            except Exception as error:
                raise AssertionError(f"{loss.__name__} fails {name}: {error}") from error
    if ranks is not None and "group" in options(loss):
        for world_size in _SPLITS:
            check_group(loss, ranks, world_size)


def loss_checks(loss: LossClass) -> list[str]:
    """Names of the checks that apply to a loss class."""
    return [name for name, check in CHECKS.items() if set(_needs(check)) <= options(loss)]


def options(loss: LossClass) -> set[str]:
    """Names of the constructor's arguments."""
    return set(inspect.signature(loss).parameters)


def heads(loss: LossClass) -> int:
    """How many embeddings lie side by side in what a loss is called with."""
    option = inspect.signature(loss).parameters.get("heads")
    return 1 if option is None else option.default


def made(loss: LossClass, given: Inputs, **hyperparameters: Any) -> ContrastiveLoss:
    """A loss for these inputs, alike every time whatever it draws; None stands for an option's default."""
    chosen = {name: value for name, value in hyperparameters.items() if value is not None}
    if "dim" in options(loss):
        chosen["dim"] = given[0].shape[1] // heads(loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loss(**chosen)


def inputs(
    loss: LossClass, rows: int = 12, width: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Random inputs of the kind a loss is called with, of ``width`` columns a head.

    Embeddings require a gradient; with a queue the query alone.
    """
    return _inputs(loss, rows, width * heads(loss), seed, dtype)


def _inputs(loss: LossClass, rows: int, width: int, seed: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def embeddings(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    if issubclass(loss, TwoViewLoss | QueueLoss | PredictionLoss | ClassPairLoss):
        first, noise = embeddings(rows), embeddings(rows)
        query, key = first.to(dtype), (first + 0.7 * noise).to(dtype)
        query.requires_grad_()
        if issubclass(loss, QueueLoss):
            return query, key, embeddings(rows).to(dtype)
        if issubclass(loss, ClassPairLoss):
            labels = torch.arange(rows) % max(3, rows // 3)  # a third class for the negatives
            partners = labels[torch.randperm(rows, generator=generator)]
            gates = embeddings(rows).sigmoid().to(dtype).requires_grad_()
            return query, key.requires_grad_(), labels, partners, gates
        return query, key.requires_grad_(not issubclass(loss, PredictionLoss))
    if issubclass(loss, ScoresLoss):
        return tuple(embeddings(rows).to(dtype).requires_grad_() for _ in range(3))
    z, labels = embeddings(rows).to(dtype).requires_grad_(), torch.arange(rows) % max(1, rows // 3)
    if issubclass(loss, EmbeddingLoss):
        return (z,)
    if issubclass(loss, LabelledLoss):
        return z, labels
    if issubclass(loss, PrototypeLoss):
        return z, embeddings(rows).to(dtype).requires_grad_(), labels
    raise TypeError(
        f"{loss.__name__} must derive from one of the bases in cl_core.losses, such as TwoViewLoss."
    )


def _has_rows_of_samples(loss: LossClass, position: int) -> bool:
    """Whether an argument has one row a sample; otherwise it is the same for all samples and on all ranks."""
    return not (
        (issubclass(loss, QueueLoss) and position == 2) or (issubclass(loss, PrototypeLoss) and position == 1)
    )


def _check(*needs: str) -> Callable[[Callable[[LossClass], None]], Callable[[LossClass], None]]:
    """Enter a check into the battery; it applies to losses with these options."""

    def enter(check: Callable[[LossClass], None]) -> Callable[[LossClass], None]:
        check.needs = needs  # type: ignore[attr-defined]
        CHECKS[check.__name__.removeprefix("_")] = check
        return check

    return enter


def _needs(check: Callable[[LossClass], None]) -> tuple[str, ...]:
    return check.needs  # type: ignore[attr-defined, no-any-return]


def _value_and_gradients(loss: Callable[..., Tensor], given: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Scalar loss and its gradients for fresh leaves of the same values."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in given]
    value = loss(*leaves)
    value = value.sum() if value.ndim else value
    value.backward()
    return value.detach(), [t.grad for t in leaves if t.grad is not None]


def _assert_close(one: Any, other: Any, why: str, *, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text: f"{why}: {text}")


def _gradcheck(check: Callable[..., bool], function: Callable[..., Tensor], given: Inputs) -> None:
    try:
        check(function, given)
    except GradcheckError as error:
        raise AssertionError(str(error)) from error


def _with_embeddings(given: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return tuple(change(t.detach()) if t.is_floating_point() else t for t in given)


@_check()
def _gives_a_differentiable_scalar(loss: LossClass) -> None:
    given = inputs(loss, dtype=torch.float32)
    value = made(loss, given)(*given)
    assert value.ndim == 0, f"shape {tuple(value.shape)}"
    assert value.dtype == torch.float32, f"{value.dtype}"
    value.backward()
    for tensor in given:
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().max() > 0


@_check()
def _leaves_its_inputs_alone_and_repeats_itself(loss: LossClass) -> None:
    given = inputs(loss)
    before = [t.detach().clone() for t in given]
    first, second = (_value_and_gradients(made(loss, given), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@_check("reduction")
def _reductions_agree(loss: LossClass) -> None:
    given = inputs(loss)
    each, total, mean = (made(loss, given, reduction=r)(*given) for r in ("none", "sum", "mean"))
    assert each.ndim == 1
    _assert_close(each.sum(), total, "none against sum")
    ratio = (total / mean).item()
    assert abs(ratio - round(ratio)) < 1e-6, f"sum / mean is {ratio}, not a number of terms"
    assert round(ratio) > 1


@_check()
def _permuting_the_batch_changes_nothing(loss: LossClass) -> None:
    given = inputs(loss)
    order = torch.randperm(len(given[0]), generator=torch.Generator().manual_seed(1))
    permuted = (t[order] if _has_rows_of_samples(loss, i) else t for i, t in enumerate(given))
    module = made(loss, given)
    _assert_close(module(*given), module(*permuted), "permuted batch")


@_check()
def _swapping_the_views_changes_nothing(loss: LossClass) -> None:
    if issubclass(loss, TwoViewLoss):
        z1, z2 = given = inputs(loss)
        module = made(loss, given, symmetric=True if "symmetric" in options(loss) else None)
        _assert_close(module(z1, z2), module(z2, z1), "swapped views")


@_check("normalize")
def _length_of_rows_does_not_matter(loss: LossClass) -> None:
    given = inputs(loss)
    reference = made(loss, given)(*given)
    lengths = torch.linspace(0.1, 30, len(given[0]), dtype=torch.float64)[:, None]
    rescaled = made(loss, given)(*_with_embeddings(given, lambda z: z * lengths))
    _assert_close(rescaled, reference, "rescaled rows")
    unit = _with_embeddings(given, lambda z: _unit_heads(z, heads(loss)))
    _assert_close(made(loss, given, normalize=False)(*unit), reference, "normalize=False on unit rows")


def _unit_heads(z: Tensor, count: int) -> Tensor:
    return torch.nn.functional.normalize(z.unflatten(1, (count, -1)), dim=2).flatten(1)


@_check()
def _gradient_is_the_derivative(loss: LossClass) -> None:
    given = inputs(loss, rows=6, width=3)
    for options_ in [{"impl": "dense"}, {"impl": "tiled"}] if "impl" in options(loss) else [{}]:
        _gradcheck(torch.autograd.gradcheck, made(loss, given, **options_), given)


@_check("impl")
def _dense_and_tiled_agree(loss: LossClass) -> None:
    for rows in (7, 300):  # within one tile and across several
        given = inputs(loss, rows=rows)
        dense = _value_and_gradients(made(loss, given, impl="dense"), given)
        _assert_close(_value_and_gradients(made(loss, given, impl="tiled"), given), dense, f"{rows} rows")
        half = _with_embeddings(given, lambda z: z.float())
        tiled = _value_and_gradients(made(loss, half, impl="tiled"), half)
        _assert_close(tiled[0].double(), dense[0], "float32", rtol=1e-5, atol=1e-5)


@_check("temperature")
def _temperature_gets_its_gradient(loss: LossClass) -> None:
    given = _with_embeddings(inputs(loss, rows=6, width=3), lambda z: z)

    def of(temperature: Tensor, impl: str | None) -> Tensor:
        module = made(loss, given, impl=impl)
        module.temperature = temperature
        return module(*given)  # type: ignore[no-any-return]

    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for impl in ("dense", "tiled") if "impl" in options(loss) else (None,):
        _gradcheck(torch.autograd.gradcheck, lambda t, impl=impl: of(t, impl), (temperature,))


@_check("impl")
def _second_derivative_is_right_or_refused(loss: LossClass) -> None:
    given = inputs(loss, rows=5, width=3)
    _gradcheck(torch.autograd.gradgradcheck, made(loss, given, impl="dense"), given)
    embeddings = [t for t in given if t.requires_grad]
    gradients = torch.autograd.grad(made(loss, given, impl="tiled")(*given), embeddings, create_graph=True)
    try:
        torch.autograd.grad(sum(g.square().sum() for g in gradients), embeddings)  # type: ignore[arg-type]
    except RuntimeError as error:
        assert "impl='dense'" in str(error), str(error)
    else:
        raise AssertionError("the tiled form returned a second derivative")


@_check()
def _half_inputs_accumulate_in_float32(loss: LossClass) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = tuple(
            t.detach().to(dtype) if t.is_floating_point() else t for t in inputs(loss, dtype=torch.float32)
        )
        wide = _value_and_gradients(made(loss, given), _with_embeddings(given, lambda z: z.float()))
        for forms in [("dense", "tiled")] if "impl" in options(loss) else [(None,)]:
            for impl in forms:
                module = made(loss, given, impl=impl)
                for enabled in (False, True):
                    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                        value, gradients = _value_and_gradients(module, given)
                    assert value.dtype == torch.float32, f"{dtype} gives {value.dtype}"
                    assert all(g.dtype == dtype for g in gradients)
                    _assert_close(value, wide[0], f"{dtype}, autocast {enabled}", rtol=2e-6, atol=3e-6)
                    for one, other in zip(gradients, wide[1], strict=True):
                        _assert_close(one.float(), other, f"gradient in {dtype}", rtol=1e-2, atol=1e-3)


@_check()
def _autocast_changes_nothing(loss: LossClass) -> None:
    given = inputs(loss, dtype=torch.float32)
    for impl in ("dense", "tiled") if "impl" in options(loss) else (None,):
        module = made(loss, given, impl=impl)
        plain = _value_and_gradients(module, given)
        with torch.autocast("cpu", torch.bfloat16):
            assert _equal(_value_and_gradients(module, given), plain), f"impl={impl}"


def _equal(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


def _extremes(loss: LossClass) -> Iterator[tuple[str, Inputs]]:
    given = _with_embeddings(inputs(loss, rows=8, width=8, dtype=torch.float32), lambda z: z)
    yield "zero rows", _with_embeddings(given, lambda z: z * (torch.arange(8) > 1)[:, None])
    yield "all rows zero", _with_embeddings(given, torch.zeros_like)
    yield "identical rows", _with_embeddings(given, lambda z: z[:1].expand_as(z).contiguous())
    yield "duplicate rows", _with_embeddings(given, lambda z: z[torch.arange(8) // 2])
    yield "orthogonal rows", _with_embeddings(given, lambda z: torch.eye(8).repeat(1, heads(loss)))
    if issubclass(loss, TwoViewLoss | PredictionLoss):
        yield "identical views", (given[0], given[0].clone())
        yield "antipodal views", (given[0], -given[0])
    if issubclass(loss, ClassPairLoss):
        query, _, labels, partners, gates = given
        yield "queries as keys", (query, query, labels, partners, gates)
        yield "no positive", (query, query, labels, partners + 8, gates)
        yield "no negative", (query, query, labels % 2, 1 - labels % 2, gates)
        yield "one class", (query, query, labels * 0, labels * 0, gates)
        yield "closed gates", (query, query, labels, partners, gates * 0)
    if issubclass(loss, LabelledLoss):
        yield "no positive", (given[0], torch.arange(8))
        yield "one class", (given[0], torch.zeros(8, dtype=torch.int64))
    if "normalize" in options(loss):
        yield "rows of norm 1e20", _with_embeddings(given, lambda z: z * 1e20)
        yield "rows of norm 1e-20", _with_embeddings(given, lambda z: z * 1e-20)


@_check()
def _extreme_inputs_stay_finite(loss: LossClass) -> None:
    settings: list[dict[str, Any]] = [{}]
    if "temperature" in options(loss):
        settings += [{"temperature": 0.01}, {"temperature": 0.004}]
    if "impl" in options(loss):
        settings = [s | {"impl": impl} for s in settings for impl in ("dense", "tiled")]
    for name, given in _extremes(loss):
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        if "zero" in name:  # the gradient of a zero row, up to 2^14 / T, is beyond what float16 can hold
            dtypes.pop()
        if "norm" in name:  # as is the row itself
            dtypes = dtypes[:1]
        for dtype, setting in itertools.product(dtypes, settings):
            of_dtype = _with_embeddings(given, lambda z, dtype=dtype: z.to(dtype))  # type: ignore[misc]
            value, gradients = _value_and_gradients(made(loss, given, **setting), of_dtype)
            what = f"{name}, {dtype}, {setting}"
            assert value.isfinite(), f"{what}: loss {value}"
            assert all(g.isfinite().all() for g in gradients), f"{what}: gradient not finite"


@_check()
def _batch_of_one_is_zero_or_refused(loss: LossClass) -> None:
    given = inputs(loss, rows=1)
    for impl in ("dense", "tiled") if "impl" in options(loss) else (None,):
        try:
            module = made(loss, given, impl=impl)
            value, gradients = _value_and_gradients(module, given)
        except ValueError as error:
            assert _is_one_sentence(error)
            continue
        assert value.isfinite(), f"{value}"
        assert all(g.isfinite().all() for g in gradients)


@_check()
def _compiles_to_one_graph(loss: LossClass) -> None:
    """With numbers of rows, and the module's own numbers, as symbols; traced ahead of time too where there is an op."""
    for impl in ("dense", "tiled") if "impl" in options(loss) else (None,):
        module = made(loss, inputs(loss), impl=impl)
        torch.compiler.reset()
        backend = "eager" if impl == "dense" else "aot_eager"
        compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
        for rows in (7, 12):
            given = inputs(loss, rows=rows)
            found, wanted = _value_and_gradients(compiled, given), _value_and_gradients(module, given)
            _assert_close(found, wanted, f"impl={impl}, {rows} rows")


@_check()
def _measures_what_it_is_called_with(loss: LossClass) -> None:
    for rows in (12, 1, 0):  # one rank measures its own rows, which may be few
        given = inputs(loss, rows=rows)
        for name, value in made(loss, given).measures(*given).items():
            assert value.ndim == 0, f"{name} of {rows} rows has shape {tuple(value.shape)}"
            assert value.isfinite(), f"{name} of {rows} rows is {value}"
            assert not value.requires_grad, f"{name} has a gradient"
    module = made(loss, inputs(loss))
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is not parameter.VAR_POSITIONAL:
            try:
                inspect.signature(module.measures).bind_partial(**{name: None})
            except TypeError as error:
                raise AssertionError(f"forward takes {name} by its name, measures does not") from error


@_check()
def _copies_pickles_and_shows_itself(loss: LossClass) -> None:
    given = inputs(loss)
    module = made(loss, given)
    reference = module(*given)
    assert torch.equal(copy.deepcopy(module)(*given), reference)
    assert pickle.dumps(module)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer, weights_only=True))
    shown = repr(module)
    assert shown.startswith(loss.__name__)
    for name, value in module.hyperparameters().items():
        assert f"{name}={value!r}" in shown, f"{name} is missing in {shown}"


@_check()
def _bad_inputs_get_one_sentence(loss: LossClass) -> None:
    good = inputs(loss)

    def refused(why: str, *given: Any, **hyperparameters: Any) -> None:
        try:
            made(loss, good, **hyperparameters)(*given)
        except (ValueError, TypeError) as error:
            assert _is_one_sentence(error), f"{why}: {error}"
        else:
            raise AssertionError(f"{why} was accepted")

    bad = good[0].detach().clone()
    bad[1, 1] = torch.nan
    rest = good[1:]
    refused("nan", bad, *rest)
    refused("infinity", bad.nan_to_num(torch.inf), *rest)
    refused("one dimension", good[0][:, 0], *rest)
    refused("integers", good[0].long(), *rest)
    refused("no rows", *(t[:0] for t in good))
    refused("a list", good[0].tolist(), *rest)
    if rest:
        refused("unequal rows", good[0], *(t[:-1] for t in rest))
    if any(t.is_floating_point() for t in rest):
        refused("unequal widths", good[0], *_with_embeddings(rest, lambda z: z[:, :-1]))
        if not issubclass(loss, PrototypeLoss):  # prototypes may be kept in another precision
            refused("unequal dtypes", good[0], *_with_embeddings(rest, lambda z: z.float()))
    for i, tensor in enumerate(good):
        if not tensor.is_floating_point():
            refused("floating labels", *good[:i], tensor.double(), *good[i + 1 :])
    if "temperature" in options(loss):
        for value in (0.0, -1.0, float("nan"), "warm"):
            refused(f"temperature {value}", *good, temperature=value)
    for name in {"reduction", "impl"} & options(loss):
        refused(f"unknown {name}", *good, **{name: "other"})
    if "group" in options(loss):
        refused("group without init", *good, group="world")


def _is_one_sentence(error: Exception) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 300


def check_group(
    loss: LossClass, ranks: Ranks, world_size: int, *, memory: Sequence[Tensor] = (), **hyperparameters: Any
) -> None:
    """The contract of ``group``: mean of rank losses and averaged gradient equal those of one process.

    Checked for an uneven split with a rank that may hold no row, through a linear encoder shared by all ranks, with a
    learnable temperature where there is one.

    Args:
        loss: class to check.
        ranks: pool of processes.
        world_size: number of ranks, 2 to 4.
        memory: further arguments of a call, the same on all ranks, embeddings with 5 columns.
        hyperparameters: of the constructor.
    """
    given = tuple(t.detach() for t in _inputs(loss, sum(_SPLITS[world_size]), 5, 0, torch.float64))
    samples = [_has_rows_of_samples(loss, i) for i in range(len(given))] + [False] * len(memory)
    given = (*given, *memory)
    single_loss, single_gradients = encoded_loss(None, loss, given, hyperparameters)
    parts = [
        t.split(list(_SPLITS[world_size])) if of_samples else (t,) * world_size
        for t, of_samples in zip(given, samples, strict=True)
    ]
    results = ranks.run(_rank_loss, loss, parts, hyperparameters, world_size=world_size)
    losses, gradients = zip(*results, strict=True)
    _assert_close(torch.stack(losses).mean(), single_loss, f"loss on {world_size} ranks", rtol=1e-6)
    for one, *others in zip(single_gradients, *gradients, strict=True):
        _assert_close(
            torch.stack(others).mean(0), one, f"gradient on {world_size} ranks", rtol=1e-6, atol=1e-9
        )


def encoded_loss(
    group: Any, loss: LossClass, given: Inputs, hyperparameters: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """Loss behind a fixed linear encoder, and the gradients of encoder, parameters and temperature."""
    shape = given[0].shape[1], 4 * heads(loss)
    weight = (
        torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).sin().view(shape).requires_grad_()
    )
    encoded = [t @ weight if t.is_floating_point() else t for t in given]
    if issubclass(loss, ClassPairLoss):
        encoded[4] = encoded[4].sigmoid()
    module = made(loss, tuple(encoded), group=group, **hyperparameters)
    parameters = [weight, *module.double().parameters()]
    if "temperature" in options(loss):
        module.temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        parameters.append(module.temperature)
    value = module(*encoded)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))
    return value.detach(), list(filled)


def _rank_loss(
    group: Any, loss: LossClass, parts: list[tuple[Tensor, ...]], hyperparameters: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    rank = torch.distributed.get_rank(group)
    return encoded_loss(group, loss, tuple(part[rank] for part in parts), hyperparameters)
