"""Parity tests driven by stored arrays: the file says what to run, the test says how.

A slug is a folder of ``.npz`` files, one a case, made by the official implementation. A test module
``packages/X/tests/parity/test_<slug>.py`` runs every file in ``<slug>/`` under ``$CL_PARITY`` if that is
set, else beside the module, so that any further set of the same form runs through the same test::

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("case", parity.cases("dcl", beside=__file__), ids=str)
    def test_matches_official(case, dtype):
        run = case.claim(RUNS)              # {"dcl": run_dcl, "moco_host": ...}: an unknown kind fails
        with case.open(dtype, TOLERANCE[dtype], waived=WAIVED) as arrays:
            run(arrays)                     # on leaving, an array that nobody accounted for fails

    def run_dcl(arrays):
        z1, z2 = arrays.leaves("z1", "z2")
        loss = dcl_loss(z1, z2, temperature=arrays.parameter("temperature"), reduction="sum")
        arrays.compare("loss_sum", loss)
        arrays.compare_gradients(loss, gradsum_z1=z1, gradsum_z2=z2)

Files that follow the naming ``in_X``, ``param_P``, ``loss_f64``, ``grad_X`` need less:
``arrays.check(loss_function(**arrays.inputs(), **arrays.parameters()))``.

Numpy reads the files (without pickle) and is imported when the first one is opened.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

VARIABLE = "CL_PARITY"
_NUMBER = re.compile(r"-?\d+([.p]\d+)?(e-?\d+)?")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Tolerance:
    """How far a result may lie from the stored one.

    A value passes if ``|error| <= relative * |stored| + absolute``, where ``|.|`` is the largest entry; a
    gradient likewise with its own pair.
    """

    relative: float = 0.0
    absolute: float = 0.0
    gradient_relative: float = 0.0
    gradient_absolute: float = 0.0


def similarity_tolerance(dtype: torch.dtype, *, temperature: float = 1.0, anchors: int = 1) -> Tolerance:
    """Tolerance of a loss made of log-sum-exps of similarities / temperature.

    Its rounding is that of logits of size 1 / temperature, whatever the size of the loss. The float64 bound
    of gradients is that of arrays stored in float32.

    Args:
        dtype: float64 or float32, the type the loss was computed in (float32 for half inputs).
        temperature: T, which divides the similarities.
        anchors: number of rows the loss is a mean over.
    """
    if dtype == torch.float64:
        return Tolerance(1e-10, 1e-15 / temperature, 2e-6, 1e-15 / temperature)
    if dtype == torch.float32:
        return Tolerance(2e-6, 3e-7 / temperature, 5e-6, 3e-7 / (temperature * anchors))
    raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}.")


def folder(slug: str, *, beside: str | Path) -> Path:
    """Where the arrays of a slug lie: under ``$CL_PARITY`` if set, else in the folder of the test module."""
    root = os.environ.get(VARIABLE)
    return (Path(root) if root else Path(beside).resolve().parent) / slug


def cases(slug: str, *, beside: str | Path) -> list[Case]:
    """All cases of a slug, by name.

    Args:
        slug: name of the folder that holds the arrays.
        beside: ``__file__`` of the test module.

    Raises:
        FileNotFoundError: if no ``.npz`` is there, for an empty list would test nothing.
    """
    where = folder(slug, beside=beside)
    files = sorted(where.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"no parity arrays of {slug!r}: {where} holds no .npz file.")
    return [Case(slug, path) for path in files]


def kinds(slug: str, *, beside: str | Path) -> dict[str, Any]:
    """The ``KINDS`` of all modules in the slug's folder beside the test module, merged.

    For a slug of so many kinds that one file would be too long: test files cannot import each other, so what
    runs the kinds lies in ``<slug>/*.py`` and the one test module, which claims every file, stays short.

    Raises:
        ValueError: if there is no module, or two claim the same kind.
    """
    merged: dict[str, Any] = {}
    where = Path(beside).resolve().parent / slug
    for file in sorted(where.glob("[!_]*.py")):
        name = f"_parity_{slug}_{file.stem}".replace("-", "_")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # listed, so that ranks find it
        spec.loader.exec_module(module)
        if twice := sorted(merged.keys() & module.KINDS.keys()):
            raise ValueError(
                f"{', '.join(twice)} of {slug!r} are claimed twice, the second time by {file.name}."
            )
        merged |= module.KINDS
    if not merged:
        raise ValueError(f"no kinds of {slug!r}: {where} holds no module with KINDS.")
    return merged


@dataclass(frozen=True)
class Case:
    """One file of stored arrays."""

    slug: str
    path: Path

    @property
    def name(self) -> str:
        """Name of the file without its ending."""
        return self.path.name.removesuffix(".npz")

    @property
    def kind(self) -> str:
        """The name without its numbers: ``edge_small_tau_0.01_dcl`` is of kind ``edge_small_tau_dcl``."""
        return "_".join(word for word in self.name.split("_") if not _NUMBER.fullmatch(word))

    def __str__(self) -> str:
        return self.name

    def claim(self, kinds: Mapping[str, _T]) -> _T:
        """The entry of ``kinds`` whose key is the longest run of leading words of this case's kind.

        Raises:
            AssertionError: if there is none.
        """
        words = self.kind.split("_")
        for length in range(len(words), 0, -1):
            key = "_".join(words[:length])
            if key in kinds:
                return kinds[key]
        known = ", ".join(sorted(kinds))
        raise AssertionError(f"no test claims {self.slug}/{self.path.name}; the kinds claimed are {known}.")

    @contextmanager
    def open(
        self,
        dtype: torch.dtype,
        tolerance: Tolerance | None = None,
        *,
        waived: Mapping[str, str] | None = None,
    ) -> Iterator[Arrays]:
        """Read the file; on leaving without an error, require that every array was accounted for.

        Args:
            dtype: floating arrays are handed out in this type.
            tolerance: for the comparisons that name none.
            waived: pattern of array names -> why they are not compared, for every file of the slug.
        """
        import numpy

        with numpy.load(self.path, allow_pickle=False) as stored:
            contents = {name: stored[name] for name in stored.files}
        arrays = Arrays(self, contents, dtype, tolerance)
        for pattern, reason in (waived or {}).items():
            arrays.waive(pattern, reason=reason)
        yield arrays
        arrays.close()


class Arrays:
    """The arrays of one case, with a record of each: an input, compared, or waived with a reason."""

    def __init__(
        self, case: Case, contents: Mapping[str, Any], dtype: torch.dtype, tolerance: Tolerance | None
    ) -> None:
        self.case = case
        self.dtype = dtype
        self.tolerance = tolerance
        self.leaves_by_name: dict[str, Tensor] = {}
        self._contents = dict(contents)
        self._accounted: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._contents

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents)

    # Inputs

    def parameter(self, name: str) -> Any:
        """A stored number, truth value or text as a Python object; a list for an array of more than one."""
        return self._take(name).tolist()

    def tensor(self, name: str) -> Tensor:
        """An input as a tensor: floating arrays in the dtype of this run, others in their own."""
        return self._tensor(self._take(name))

    def leaves(self, *names: str) -> tuple[Tensor, ...]:
        """Floating inputs that require a gradient."""
        for name in names:
            self.leaves_by_name[name] = self.tensor(name).requires_grad_()
        return tuple(self.leaves_by_name[name] for name in names)

    def inputs(self) -> dict[str, Tensor]:
        """All ``in_X`` under X; those with a stored ``grad_X`` require a gradient."""
        found: dict[str, Tensor] = {}
        for name in self.matching("in_*"):
            short = name.removeprefix("in_")
            found[short] = self.leaves(name)[0] if f"grad_{short}" in self else self.tensor(name)
        return found

    def parameters(self) -> Mapping[str, Any]:
        """All ``param_P`` under P; each is an input once it is read, by name or by ``**``, and not before."""
        return _Parameters(self)

    def matching(self, pattern: str) -> list[str]:
        """Names of the arrays that match a shell pattern, in the order of the file."""
        return [name for name in self if fnmatchcase(name, pattern)]

    # Results

    def compare(self, name: str, value: Any, *, tolerance: Tolerance | None = None) -> None:
        """Require that a value equals the stored one: integers exactly, floating values within the tolerance.

        Raises:
            AssertionError: if shape or value differ; NaN and infinity must stand in the same places.
        """
        bound = tolerance or self.tolerance or Tolerance()
        self._compare(name, value, bound.relative, bound.absolute)

    def compare_gradient(self, name: str, value: Tensor, *, tolerance: Tolerance | None = None) -> None:
        """Like :meth:`compare`, within the tolerance of gradients."""
        bound = tolerance or self.tolerance or Tolerance()
        self._compare(name, value, bound.gradient_relative, bound.gradient_absolute)

    def compare_gradients(
        self, loss: Tensor, *, tolerance: Tolerance | None = None, **leaves: Tensor
    ) -> None:
        """Differentiate ``loss`` and require that each gradient equals the stored array of that keyword."""
        if not loss.requires_grad:
            raise AssertionError(f"{self._where}: the loss is not attached to the graph.")
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            self.compare_gradient(name, gradient, tolerance=tolerance)

    def compare_tuples(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Require that index vectors read side by side are the same set of tuples, in any order."""
        stored = [self._take(name).tolist() for name in names]
        given = [value.tolist() for value in values]
        expected, found = sorted(zip(*stored, strict=True)), sorted(zip(*given, strict=True))
        if expected != found:
            missing, extra = set(expected) - set(found), set(found) - set(expected)
            raise AssertionError(
                f"{self._where}: ({', '.join(names)}) should hold {len(expected)} tuples, got {len(found)}; "
                f"missing {sorted(missing)[:3]}, not expected {sorted(extra)[:3]}."
            )

    def check(self, loss: Tensor, *, tolerance: Tolerance | None = None) -> None:
        """Compare ``loss_f64``, and each ``grad_X`` with the gradient of the leaf ``in_X``."""
        self.compare("loss_f64", loss, tolerance=tolerance)
        names = [n for n in self.matching("grad_*") if f"in_{n.removeprefix('grad_')}" in self.leaves_by_name]
        leaves = {name: self.leaves_by_name[f"in_{name.removeprefix('grad_')}"] for name in names}
        if leaves:
            self.compare_gradients(loss, tolerance=tolerance, **leaves)

    def waive(self, *patterns: str, reason: str) -> None:
        """Say that arrays matching these patterns, where the file has any, are not compared, and why."""
        if not reason.strip():
            raise ValueError(
                f"reason must say why {', '.join(patterns)} are not compared, got an empty text."
            )
        for pattern in patterns:
            self._accounted.update(self.matching(pattern))

    def close(self) -> None:
        """Require that every array was an input, compared or waived."""
        left = [name for name in self if name not in self._accounted]
        if left:
            raise AssertionError(
                f"{self._where}: {', '.join(left)} {'were' if len(left) > 1 else 'was'} neither an input, "
                "nor compared, nor waived with a reason."
            )

    # Inside

    @property
    def _where(self) -> str:
        return f"{self.case.slug}/{self.case.path.name} in {str(self.dtype).removeprefix('torch.')}"

    def _take(self, name: str) -> Any:
        if name not in self._contents:
            raise AssertionError(f"{self._where} has no array {name!r}; it has {', '.join(self)}.")
        self._accounted.add(name)
        return self._contents[name]

    def _tensor(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array.copy())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _compare(self, name: str, value: Any, relative: float, absolute: float) -> None:
        expected = torch.from_numpy(self._take(name).copy())
        given = (
            torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None).detach().cpu()
        )
        if given.shape != expected.shape:
            raise AssertionError(
                f"{self._where}: {name} has shape {tuple(expected.shape)}, got {tuple(given.shape)}."
            )
        if not expected.is_floating_point():
            relative = absolute = 0.0
        expected, given = expected.double(), given.double()
        error, largest = _largest_error(given, expected)
        bound = relative * largest + absolute
        if not error <= bound:
            raise AssertionError(
                f"{self._where}: {name} is off by {error:.3g}, more than {bound:.3g} "
                f"(largest stored entry {largest:.6g})."
            )


class _Parameters(Mapping[str, Any]):
    """The parameters of a case, which notes those that are read."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._names = {name.removeprefix("param_"): name for name in arrays.matching("param_*")}

    def __getitem__(self, name: str) -> Any:
        return self._arrays.parameter(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _largest_error(given: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest difference (infinite if NaN or infinities stand elsewhere) and largest finite stored entry."""
    finite = expected.isfinite()
    same = torch.equal(given.isfinite(), finite) and torch.equal(
        given[~finite].nan_to_num(nan=0.0), expected[~finite].nan_to_num(nan=0.0)
    )
    if not same:
        return math.inf, math.nan
    if not finite.any():
        return 0.0, 0.0
    return (given - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
