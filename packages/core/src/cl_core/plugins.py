"""What is installed: losses, methods and domains that distributions register by entry point.

A distribution registers in its ``pyproject.toml``, ours no differently from a third party's::

    [project.entry-points."contrastive.losses"]
    TheirLoss = "their_package.losses:TheirLoss"

Listing reads metadata only; nothing is imported before it is asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, entry_points
from typing import Any

LOSSES, METHODS, DOMAINS = "contrastive.losses", "contrastive.methods", "contrastive.domains"


@dataclass(frozen=True, order=True)
class Plugin:
    """One registered name.

    Attributes:
        name: what it is called on the command line.
        target: ``"module:attribute"``, or ``"module"`` for a domain.
        distribution: the installed distribution that registers it.
        version: of that distribution.
    """

    name: str
    target: str
    distribution: str
    version: str

    def load(self) -> Any:
        """Import the target.

        Raises:
            ImportError: if the module or the attribute is not there, or cannot be imported.
        """
        module, _, attribute = self.target.partition(":")
        where = f"{self.name}, which {self.distribution} registers as {self.target!r}, cannot be imported"
        try:
            loaded = import_module(module)
        except ImportError as error:
            raise ImportError(f"{where}: {error}") from error
        if not attribute:
            return loaded
        try:
            return getattr(loaded, attribute)
        except AttributeError:
            raise ImportError(f"{where}: {module} has no {attribute}.") from None


def available_losses() -> tuple[Plugin, ...]:
    """Registered losses, sorted by name."""
    return _available(LOSSES)


def available_methods() -> tuple[Plugin, ...]:
    """Registered methods, sorted by name."""
    return _available(METHODS)


def available_domains() -> tuple[Plugin, ...]:
    """Registered domains, sorted by name."""
    return _available(DOMAINS)


def load_loss(name: str) -> Any:
    """Import one registered loss: a subclass of ``ContrastiveLoss``.

    Raises:
        ValueError: for an unknown name, with the nearest registered ones.
        ImportError: if what is registered cannot be imported.
    """
    return _find("loss", name, available_losses()).load()


def load_method(name: str) -> Any:
    """Import one registered method: a subclass of ``Method``. Raises as :func:`load_loss`."""
    return _find("method", name, available_methods()).load()


def load_domain(name: str) -> Any:
    """Import the package of one registered domain. Raises as :func:`load_loss`."""
    return _find("domain", name, available_domains()).load()


def distribution_of(method: type) -> str:
    """The distribution that registers a method or, of a class derived from it, its nearest base; else "cl-core"."""
    registered = {plugin.target: plugin.distribution for plugin in available_methods()}
    targets = (f"{base.__module__}:{base.__qualname__}" for base in method.__mro__)
    return next((registered[target] for target in targets if target in registered), "cl-core")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence about an unknown name, with the nearest known ones.

    Args:
        what: what was looked for, such as ``"loss"``.
        name: what came.
        known: what there is.
    """
    known = sorted(set(known))
    folded = {key.casefold(): key for key in known}
    near = [folded[key] for key in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    if near:
        return f"no {what} {name!r}; did you mean {' or '.join(map(repr, near))}?"
    return f"no {what} {name!r}; known are {', '.join(known)}." if known else f"no {what} {name!r}."


def _available(group: str) -> tuple[Plugin, ...]:
    found: dict[str, Plugin] = {}
    release = cache(
        _name_and_version
    )  # a distribution may register many names, and each reading parses a file
    for entry in entry_points(group=group):
        if entry.dist is None:
            continue
        plugin = Plugin(entry.name, re.sub(r"\s", "", entry.value), *release(entry.dist))
        other = found.setdefault(plugin.name, plugin)
        if other != plugin:
            raise ValueError(
                f"{group} {plugin.name!r} is registered twice, by {other.distribution} as {other.target!r} "
                f"and by {plugin.distribution} as {plugin.target!r}; uninstall one."
            )
    return tuple(sorted(found.values()))


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata
    return metadata["Name"], metadata["Version"]


def _find(what: str, name: str, plugins: tuple[Plugin, ...]) -> Plugin:
    for plugin in plugins:
        if plugin.name == name:
            return plugin
    raise ValueError(unknown(what, name, (plugin.name for plugin in plugins)))
