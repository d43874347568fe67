"""An exported method: ``config.json`` and ``model.safetensors``, read back without executing code.

The configuration names each class by its import path, but a name alone imports nothing: it must be registered
by an installed distribution, or be a subclass, already imported, of what the constructor's annotation asks for.

Every argument of a constructor is stored under its own name. Where the annotation asks for any ``nn.Module``, which may
be of somebody who knows nothing of this, :func:`note_arguments` has written down what it was built with.
"""

from __future__ import annotations

import hashlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_core import plugins
from cl_core.losses._base import ContrastiveLoss
from cl_core.method import Method
from cl_core.training.files import make_folder, read_json, sentence, to_json, write_atomically

FORMAT = "cl-export"
VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_ALIASES = {"loss": "criterion"}
_NOTED = "_built_with"
_ENCODER = "encoder."  # what methods call the part that others take over


class _UnknownClass(ValueError):
    """What an export may not name."""


def export_method(method: Method, folder: str | Path, *, class_names: Sequence[str] | None = None) -> Path:
    """Write a method as ``config.json`` and ``model.safetensors``.

    Args:
        method: to export; every constructor argument is stored under its own name (the loss as
            ``criterion``) and is a plain value or a module for which the same holds.
        folder: where to write.
        class_names: that the columns of its own classifier's scores speak for; None where there are none.

    Returns:
        The folder.

    Raises:
        TypeError: if an argument cannot be written down.
        OSError: in one sentence, if the files cannot be written.
    """
    folder = make_folder(folder)
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": describe(method)}
    if class_names is not None:
        config["class_names"] = list(class_names)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in method.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": FORMAT}))
    config["weights"] = {"file": WEIGHTS, "sha256": _digest(folder / WEIGHTS)}
    write_atomically(folder / CONFIG, to_json(config))
    return folder


def load_export(folder: str | Path) -> Method:
    """Build an exported method again, with its weights, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: if the folder holds no export.
        ValueError: in one sentence, if it is truncated, corrupt, of another format version, names a class
            that is not known here, or its weights do not fit.
    """
    folder = Path(folder)
    config = read_export_config(folder)
    method: Method = build(config["model"], Method)
    try:
        method.load_state_dict(read_export_weights(folder))
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {folder} do not fit its {type(method).__name__}: {' '.join(str(error).split())}"
        ) from None
    return method.eval()


def read_export_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of an export, checked; raises as :func:`load_export`."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no export: there is no {CONFIG} in it.")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT or "model" not in config:
        raise ValueError(f"{path} does not describe an exported method.")
    if config.get("version") != VERSION:
        raise ValueError(f"{path} has export format {config.get('version')}, this version reads {VERSION}.")
    return config


def read_export_weights(folder: str | Path) -> dict[str, Tensor]:
    """``model.safetensors`` of an export, checked against its configuration; raises as :func:`load_export`."""
    path = Path(folder) / WEIGHTS
    weights = read_export_config(folder).get("weights")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no weights: there is no {WEIGHTS} in it.")
    if not isinstance(weights, dict) or _digest(path) != weights.get("sha256"):
        raise ValueError(f"{path} is truncated, corrupt, or not the file that {CONFIG} was written with.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def initialise(method: Method, weights: dict[str, Tensor], *, source: str | Path) -> list[str]:
    """Load every weight that fits by name and shape, to start from or to fine-tune.

    Args:
        method: to initialise, in place.
        weights: state of another method.
        source: where they come from, for the message.

    Returns:
        Names of the method's own weights that keep their initial values.

    Raises:
        ValueError: if nothing fits, or nothing of the encoder where both have one.
    """
    kept = fitting(method, weights, source=source)
    method.load_state_dict(kept, strict=False)
    return [name for name in method.state_dict() if name not in kept]


def fitting(method: Method, weights: dict[str, Tensor], *, source: str | Path) -> dict[str, Tensor]:
    """The weights that fit a method by name and shape; raises as :func:`initialise`."""
    own = method.state_dict()
    found = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    wide = [
        name for name, value in own.items() if value.ndim > 1
    ]  # the rest, such as counters, fits by chance
    encoder = [name for name in wide if name.startswith(_ENCODER)]
    if encoder and not found.keys() & encoder and any(name.startswith(_ENCODER) for name in weights):
        name = encoder[0]
        theirs = f"has shape {tuple(weights[name].shape)}" if name in weights else "does not exist"
        raise ValueError(
            f"the encoder of {source} does not fit that of {type(method).__name__}: {name} {theirs} there and has "
            f"shape {tuple(own[name].shape)} here."
        )
    if not found.keys() & (wide or own):
        raise ValueError(
            f"no weight of {source} fits {type(method).__name__} by name and shape: it has "
            f"{', '.join(list(weights)[:3])}, ..., the method has {', '.join(list(own)[:3])}, ..."
        )
    return found


def note_arguments(built: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Write down on a module what it was built with, by name, in case it stands where any module may stand."""
    vars(built)[_NOTED] = dict(arguments)


def describe(value: Any, *, name: str = "model", anybodys: bool = False) -> Any:
    """An object, or a constructor's argument, as plain values; see :func:`export_method`.

    Args:
        value: what to describe.
        name: of it, for the message.
        anybodys: it stands where any module may stand.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [describe(entry, name=f"{name}[{place}]") for place, entry in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: describe(entry, name=f"{name}.{key}") for key, entry in value.items()}
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # as itself: NumPy's float64, say, is a float that YAML cannot write
            return kind(value)
    if value is None:
        return None
    if isinstance(
        type(value).__init__, types.FunctionType
    ):  # written in Python, so that its arguments have names
        return {"class": _path_of(type(value)), "arguments": _arguments(value, name, anybodys)}
    raise TypeError(f"{name} is a {type(value).__name__}, which an export cannot write down.")


def as_config(described: Any) -> Any:
    """What :func:`describe` wrote down, in the words of a configuration."""
    if isinstance(described, dict) and set(described) == {"class", "arguments"}:
        arguments = {name: as_config(value) for name, value in described["arguments"].items()}
        return {"class_path": described["class"], "init_args": arguments}
    if isinstance(described, dict):
        return {name: as_config(value) for name, value in described.items()}
    return [as_config(entry) for entry in described] if isinstance(described, list) else described


def build(described: Any, expected: Any) -> Any:
    """Build what :func:`describe` wrote down.

    Args:
        described: plain values.
        expected: type annotation that a class must satisfy.

    Raises:
        ValueError: for a class that is not known here, or arguments that it does not take.
    """
    if isinstance(described, dict) and set(described) == {"class", "arguments"}:
        known = _known_class(described["class"], expected)
        hints = _hints(known)
        arguments = described["arguments"]
        try:
            given = {key: build(value, hints.get(key, Any)) for key, value in arguments.items()}
            built = known(**given)
            if _is_anybodys(expected):
                note_arguments(built, given)
            return built
        except _UnknownClass:  # says itself what is wrong
            raise
        except Exception as error:  # whatever a constructor says of arguments that nobody checked
            raise ValueError(
                f"{known.__name__} cannot be built from the export: {sentence(error).rstrip('.')}."
            ) from None
    if isinstance(described, list):
        parts = [build(entry, Any) for entry in described]
        return tuple(parts) if _wants_tuple(expected) else parts
    return described


def subclasses(base: type) -> Iterator[type]:
    """All imported subclasses of a class, itself included."""
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from subclasses(child)


def base_classes(annotation: Any) -> list[type]:
    """The classes that an annotation such as ``Projector | None`` allows."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [base for part in typing.get_args(annotation) for base in base_classes(part)]
    return [annotation] if isinstance(annotation, type) and annotation is not type(None) else []


def _arguments(built: Any, name: str, anybodys: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    kind: type = type(built)
    hints = _hints(kind)
    if anybodys and _NOTED in vars(built):
        return {
            key: describe(value, name=f"{name}.{key}", anybodys=_is_anybodys(hints.get(key)))
            for key, value in vars(built)[_NOTED].items()
        }
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base))
    if owner in (nn.Module, nn.Identity):  # they take anything and use nothing
        return arguments
    if owner is ContrastiveLoss:  # a loss without a constructor of its own
        return {key: describe(value, name=f"{name}.{key}") for key, value in built.hyperparameters().items()}
    for parameter in list(inspect.signature(owner.__init__).parameters.values())[1:]:  # type: ignore[misc]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            hint = ": put it into a module of your own, whose arguments are" if anybodys else ""
            raise TypeError(f"{name} is a {kind.__name__}, whose arguments are not all named{hint}.")
        attribute = parameter.name
        if not hasattr(built, attribute) or inspect.ismethod(getattr(built, attribute)):
            attribute = _ALIASES.get(attribute, attribute)
        # A module of that name is most likely made of the argument, such as dropout.
        made = anybodys and isinstance(getattr(built, attribute, None), nn.Module)
        if made or not hasattr(built, attribute):
            hint = f": pass {name.rpartition('.')[0]}.arguments" if anybodys else ""
            raise TypeError(
                f"{name} cannot be exported: {kind.__name__} does not store its argument "
                f"{parameter.name!r} under its own name{hint}."
            )
        arguments[parameter.name] = describe(
            getattr(built, attribute),
            name=f"{name}.{parameter.name}",
            anybodys=_is_anybodys(hints.get(parameter.name)),
        )
    return arguments


def _is_anybodys(annotation: Any) -> bool:
    """Whether any module may stand there."""
    return nn.Module in base_classes(annotation)


def _known_class(path: Any, expected: Any) -> type:
    bases = base_classes(expected)
    if not isinstance(path, str) or not bases:
        raise _UnknownClass(f"the export names a class {path!r} where none is allowed.")
    registered = (*plugins.available_methods(), *plugins.available_losses())
    for plugin in registered:
        if plugin.target.replace(":", ".") == path or path.endswith(f".{plugin.name}"):
            plugin.load()
    for base in bases:
        for known in subclasses(base):
            if _path_of(known) == path:
                return known
    module, _, name = path.rpartition(".")
    raise _UnknownClass(
        f"the export names {name} of {module}, which is not a registered or imported "
        f"{' or '.join(base.__name__ for base in bases)}; import that module first (--import {module}) if you trust it."
    )


def _path_of(known: type) -> str:
    return f"{known.__module__}.{known.__qualname__}"


def _hints(known: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.getattr_static(known, "__init__"))
    except (NameError, TypeError):  # names for a type checker alone, or a constructor that is no function
        return {}


def _wants_tuple(expected: Any) -> bool:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(_wants_tuple(part) for part in typing.get_args(expected))
    return expected is tuple or typing.get_origin(expected) is tuple


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds an exported method."""
    return (Path(folder) / CONFIG).is_file()


def state_of(method: Method) -> dict[str, Tensor]:
    """A copy of a method's state on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in method.state_dict().items()}
