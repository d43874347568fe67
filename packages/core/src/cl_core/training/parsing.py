"""The parser of the commands, and its errors in one sentence."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import requires
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace  # type: ignore[attr-defined]
from torch import nn

from cl_core import plugins
from cl_core.method import Method
from cl_core.training.artifacts import base_classes, note_arguments, subclasses
from cl_core.training.cli import Domain, usable
from cl_core.training.data import Data
from cl_core.training.files import sentence


def load_known(domain: Domain) -> dict[str, str]:
    """Import what the command line may name by short names.

    Returns:
        For each plugin that cannot be imported, why; it matters only if it is asked for.
    """
    for module in {*domain.modules, *(target.partition(":")[0] for target in domain.data.values())}:
        import_module(module)
    broken = {}
    for plugin in (
        *usable(domain, plugins.available_methods()),
        *plugins.available_losses(),
    ):
        try:
            plugin.load()
        except Exception as error:  # a third party's module may raise anything
            broken[plugin.name] = str(error)
    return broken


class Parser:
    """A jsonargparse parser that says in one sentence what is wrong.

    Args:
        domain: whose command it is.
        verb: of the command.
        parts: of a configuration that the command has; None for all.
    """

    def __init__(self, domain: Domain, verb: str, *, parts: tuple[str, ...] | None = None) -> None:
        self.domain, self.parts = domain, parts
        self.broken = load_known(domain)
        self.parser = ArgumentParser(prog=f"{domain.command} {verb}", exit_on_error=False, allow_abbrev=False)
        # Heeded before there is a parser; here for the help.
        help_ = "module to import first, so that a run or an export may name its classes; may be repeated"
        self.parser.add_argument("--import", type=str, default=None, help=help_)

    def add_config(self) -> None:
        """Add ``--config NAME|PATH`` and ``--print_config``."""
        self.parser.add_argument(
            "--config", action=ActionConfigFile, help="name of a shipped configuration, or a file"
        )

    def add_model(self) -> None:
        """Add ``--model``, a method."""
        self.parser.add_subclass_arguments(Method, "model", required=False)

    def add_data(self) -> None:
        """Add ``--data``."""
        self.parser.add_subclass_arguments(Data, "data", required=False)

    def add_settings(self, **settings: type) -> None:
        """Add dataclasses of settings by name."""
        for name, kind in settings.items():
            self.parser.add_class_arguments(kind, name)

    def parse(self, args: Sequence[str]) -> Namespace:
        """Parse arguments.

        Raises:
            ValueError: in one sentence.
        """
        return self._parse(self._resolved(args))

    def parse_over(self, config: dict[str, Any], args: Sequence[str]) -> Namespace:
        """Parse arguments on top of a configuration that a run or an export holds.

        Raises:
            ValueError: in one sentence; also if the configuration names what is not imported, or is of the standard
                library: reading what somebody sent must not run code.
        """
        self._check_stored(config)
        return self._parse([f"--config={yaml.safe_dump(config)}", *self._resolved(args)])

    def _check_stored(self, config: dict[str, Any]) -> None:
        """Parse what a stored configuration says of classes by itself, while nothing that it names can be imported."""
        if "config" in config:
            raise ValueError("the stored configuration names another one, which none that a run wrote does.")
        alone = Parser(self.domain, "", parts=self.parts)
        alone.add_config()
        alone.add_model()
        alone.add_data()
        classes = {name: config[name] for name in ("model", "data") if config.get(name) is not None}
        text = yaml.safe_dump(classes)
        for path in _class_paths(classes):
            _check_imported(path)
        with _importing_nothing(text):
            parsed = alone._parse([f"--config={text}"])
        for path in _class_paths(parsed.as_dict()):
            _check_imported(path)

    def _resolved(self, args: Sequence[str]) -> list[str]:
        """The arguments, what others stand on top of first: configurations, then classes, then their arguments."""
        groups: list[list[str]] = []
        for arg in args:
            if arg.startswith("--") or not groups:
                groups.append([arg])
            else:
                groups[-1].append(arg)
        ordered = sorted(groups, key=lambda group: -1 if _is_config(group) else _name(group).count("."))
        resolved: list[str] = []
        for group in ordered:
            if _is_config(group):
                value, *rest = [group[0].partition("=")[2]] * ("=" in group[0]) + group[1:] or [""]
                group = [f"--config={self._config(value)}", *rest]
            resolved += group
        return resolved

    def _config(self, name: str) -> str:
        """The file of a configuration, or the parts of its text that this command has."""
        path = self.domain.find_config(name)
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a configuration: it is not readable YAML.")
        if self.parts is None:
            return str(path)
        return str(yaml.safe_dump({part: content[part] for part in self.parts if part in content}))

    def _parse(self, args: list[str]) -> Namespace:
        try:
            return self.parser.parse_args(args)
        except ArgumentError as error:
            raise ValueError(self.explain(str(error))) from None
        except (TypeError, KeyError) as error:
            raise ValueError(sentence(error)) from None

    def instantiate(self, config: Namespace) -> Namespace:
        """Build the classes of a parsed configuration.

        Raises:
            ValueError: in one sentence, with what a constructor said.
        """
        build: Any = getattr(self.parser, "instantiate", None) or self.parser.instantiate_classes
        try:
            if "instantiators" in inspect.signature(build).parameters:
                return build(config, instantiators=[(_noted, nn.Module, True)])  # type: ignore[no-any-return]
            self.parser.add_instantiator(_noted, nn.Module)  # before jsonargparse 4.49
            return build(config)  # type: ignore[no-any-return]
        except ValueError as error:
            raise ValueError(self.explain(str(error))) from error

    def dump(self, config: Namespace, *, without: Iterable[str]) -> str:
        """A parsed configuration as YAML."""
        kept = config.clone()
        for name in without:
            kept.pop(name, None)
        # By place: what says to keep explicit nulls has another name in each release.
        return str(self.parser.dump(kept, "yaml", False))

    def explain(self, message: str) -> str:
        """One sentence for an error of the parser."""
        if found := re.search(r"unrecognized arguments: (.+)", message):
            option = found[1].split()[0].partition("=")[0]
            if not option.startswith("-"):
                return f"{option!r} is no option; a configuration is named by --config {option}."
            known = [name for action in self.parser._actions for name in action.option_strings]
            return plugins.unknown("option", option, known)
        if found := re.search(r"Option '([^']+)' is not accepted", message):
            owner = self._class(message[: found.start()])
            parameters = list(inspect.signature(owner).parameters) if owner else []
            where = _option(message[: found.start()])
            return plugins.unknown(f"parameter of {owner.__name__ if owner else where}", found[1], parameters)
        if found := re.search(r"arguments are required: (.+)", message):
            owner, key = self._class(message[: found.start()]), _option(message[: found.start()])
            stem = "--" if key == "--" else f"{key}."
            missing = " and ".join(stem + name.strip() for name in found[1].split(","))
            return f"{owner.__name__ if owner else self.parser.prog} needs {missing}."
        if found := re.search(r"Expected a dot import path string: (.+)", message):
            return self._unknown_class(found[1].strip(), message[: found.start()])
        if found := re.search(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.+)", message):
            expected = found["type"].replace("<class '", "").replace("'>", "").replace("typing.", "")
            return f"{_option(message[: found.start()])} must be of type {expected}, got {found['value']!r}."
        if found := re.search(r"'([^']+)':\s+((?:No module named|module '|cannot import name).*)", message):
            where, reason = _option(message[: found.start()]), found[2].strip()
            return (
                f"{where} names {found[1]!r}, which cannot be imported ({reason}): a package of your own must be "
                "installed, or lie on PYTHONPATH."
            )
        if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", message):
            return f"{_option(message[: found.start()])} must be a {found[2]}, which {found[1]} is not."
        reasons = [
            reason for reason in re.findall(r"^ *- (.+)$", message, flags=re.M) if "NoneType" not in reason
        ]
        if reasons:  # what a constructor said
            return str(reasons[-1])
        return " ".join(re.sub(r"Given value type:.*", "", message, flags=re.S).split())

    def _unknown_class(self, name: str, before: str) -> str:
        if name in self.broken:
            return self.broken[name]
        key = _option(before).rpartition(".")[2].lstrip("-")
        owner = self._class(before)
        roots: dict[str, list[type]] = {"model": [Method], "data": [Data]}
        bases = roots.get(key, [])
        if owner is not None:
            hint = typing.get_type_hints(inspect.getattr_static(owner, "__init__")).get(key)
            if words := [word for part in typing.get_args(hint) for word in typing.get_args(part)]:
                allowed = [*map(repr, words), *["null"] * (type(None) in typing.get_args(hint))]
                return f"{_option(before)} must be {' or '.join(allowed)}, got {name!r}."
            bases = base_classes(hint)
        known = {child.__name__ for base in bases for child in subclasses(base) if child not in bases}
        known = {entry for entry in known if not entry.startswith("_")}
        kinds = " or ".join(base.__name__ for base in bases) or "class"
        for plugin in plugins.available_methods() if key == "model" else ():
            if plugin.name == name and plugin not in usable(self.domain, (plugin,)):
                return f"{name} is a method of {plugin.distribution}, which has a command of its own."
        if name in {plugin.name for plugin in (*plugins.available_methods(), *plugins.available_losses())}:
            return f"{_option(before)} takes a {kinds}, which {name} is not: {', '.join(sorted(known))}."
        topic = {"model": "methods", "data": "data", "loss": "losses"}.get(key)
        hint = f' ("{self.domain.command} list {topic}" shows all)' if topic else ""
        return plugins.unknown(f"{kinds} for {_option(before)}", name, known) + hint

    def _class(self, before: str) -> type | None:
        """The class whose arguments the last part of a nested error is about."""
        paths = re.findall(r"class_path '([^']+)'", before)
        if not paths:
            return None
        module, _, name = paths[-1].rpartition(".")
        for base in (Method, Data):
            for child in subclasses(base):
                if (child.__module__, child.__qualname__) == (module, name):
                    return child
        return getattr(import_module(module), name, None)


def _noted(kind: type[nn.Module], *args: Any, **arguments: Any) -> nn.Module:
    """A module that was asked for, with what it was built with written down."""
    built = kind(*args, **arguments)
    if not args:
        note_arguments(built, arguments)
    return built


def _name(group: Sequence[str]) -> str:
    """The option that a group of arguments begins with."""
    return group[0].partition("=")[0]


def _is_config(group: Sequence[str]) -> bool:
    return _name(group) == "--config"


def _class_paths(config: Any) -> Iterator[str]:
    """Every class that a configuration names, and every function that it was parsed to."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "class_path" and isinstance(value, str):
                yield value
            else:
                yield from _class_paths(value)
    elif isinstance(config, list | tuple):
        for entry in config:
            yield from _class_paths(entry)
    elif callable(config) and isinstance(getattr(config, "__module__", None), str):
        yield f"{config.__module__}.{getattr(config, '__qualname__', type(config).__qualname__)}"


def _check_imported(path: str) -> None:
    """Refuse a path whose module is not imported, or is one of the standard library, which could do anything."""
    module = path.rpartition(".")[0]
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"the stored configuration names {path!r} of the standard library, which is no part of a run."
        )
    if module and module not in sys.modules:
        raise _untrusted(path, module)


def _untrusted(path: str, module: str) -> ValueError:
    return ValueError(
        f"the stored configuration names {path!r}, which is not imported; if you trust it, pass --import {module}."
    )


@contextlib.contextmanager
def _importing_nothing(text: str) -> Iterator[None]:
    """Refuse to import what a text names, and what belongs to no package that is imported already.

    A name may stand wherever the parser takes it for a class or a function: as a text in place of one, in a text that
    is a configuration in turn, in a file that such a text names.
    """
    refused: list[str] = []

    class Guard:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            package = name.partition(".")[0]
            if package in sys.stdlib_module_names or package in _helpers():
                return
            if package not in sys.modules or re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text):
                refused.append(name)
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Guard)
    try:
        yield
    except (ValueError, ImportError):
        if not refused:
            raise
    finally:
        sys.meta_path.remove(Guard)
    if refused:
        raise _untrusted(refused[0], refused[0])


@cache
def _helpers() -> frozenset[str]:
    """Packages that the parser itself may import when it needs them."""
    return frozenset(
        re.split(r"[^\w-]", requirement, maxsplit=1)[0].replace("-", "_").lower()
        for requirement in requires("jsonargparse") or ()
    )


def _option(before: str) -> str:
    """The option that a nested error is about."""
    return "--" + ".".join(re.findall(r'Parser key "([^"]+)"', before))
