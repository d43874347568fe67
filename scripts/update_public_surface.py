"""Record the public names of each package in its public_surface.json.

    python scripts/update_public_surface.py            # rewrite the files
    python scripts/update_public_surface.py --check    # say what a rewrite would change; 1 if anything

Public are the modules of a package that do not begin with an underscore. A package further in that has an
``__all__`` is a front: what lies behind it may move, save the modules it lists. Names are those of ``__all__``, or
without one a module's own functions and classes. Parameters are recorded too, for callers use them as keywords.
The tests refuse a recorded name or parameter that is gone; a release also one that is not recorded.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import sys
import types
from collections.abc import Iterator

from workspace import Member, members

FILE = "public_surface.json"
Surface = dict[str, dict[str, list[str] | None]]


def surface(member: Member) -> Surface:
    """Public module -> public name -> its parameters, or None for what is not called."""
    return {module.__name__: dict(_names(module)) for module in _public_modules(member.module)}


def _public_modules(package: str) -> Iterator[types.ModuleType]:
    module = importlib.import_module(package)
    yield module
    listed = getattr(module, "__all__", None) if "." in package else None
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        if not info.name.startswith("_") and (listed is None or info.name in listed):
            yield from _public_modules(f"{package}.{info.name}")


def _names(module: types.ModuleType) -> Iterator[tuple[str, list[str] | None]]:
    listed = getattr(module, "__all__", None)
    for name in sorted(vars(module) if listed is None else listed):
        value = getattr(module, name)
        own = inspect.isroutine(value) or inspect.isclass(value)
        if listed is not None or (own and value.__module__ == module.__name__ and not name.startswith("_")):
            yield name, _parameters(value)


def _parameters(value: object) -> list[str] | None:
    if not callable(value):
        return None
    try:
        return list(inspect.signature(value).parameters)
    except (TypeError, ValueError):  # a type without a signature, such as a Literal
        return None


def read(member: Member) -> Surface:
    """The recorded surface; empty if none was recorded."""
    file = member.path / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def removals(recorded: Surface, present: Surface) -> list[str]:
    """Every module, name and parameter that was recorded and is no longer there."""
    gone = []
    for module, names in recorded.items():
        if module not in present:
            gone.append(module)
            continue
        for name, parameters in names.items():
            if name not in present[module]:
                gone.append(f"{module}.{name}")
            else:
                now = present[module][name] or []
                gone += [f"{module}.{name}({one}=)" for one in parameters or [] if one not in now]
    return gone


def write(member: Member, present: Surface) -> None:
    """Write the file whole: beside it first, then in its place."""
    target = member.path / FILE
    beside = target.with_suffix(".tmp")
    beside.write_text(_text(present), encoding="utf-8")
    os.replace(beside, target)


def _text(present: Surface) -> str:
    """JSON with one line a name, so that a change reads as one line."""
    modules = []
    for module, names in present.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(parameters)}" for name, parameters in names.items()]
        body = "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
        modules.append(f"  {json.dumps(module)}: {body}")
    return "{\n" + ",\n".join(modules) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the files of all members."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a file is out of date"
    )
    options = parser.parse_args(arguments)
    stale = 0
    for member in members():
        recorded, present = read(member), surface(member)
        gone, new = removals(recorded, present), removals(present, recorded)
        stale += bool(gone or new)
        for sign, names in (("-", gone), ("+", new)):
            print("".join(f"{sign} {name}\n" for name in names), end="")
        if not options.check:
            write(member, present)
    return int(bool(stale and options.check))


if __name__ == "__main__":
    sys.exit(main())
