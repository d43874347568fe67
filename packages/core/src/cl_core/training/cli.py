"""The console script of a domain: its verbs, and those of them that must answer at once.

This module imports the standard library only: help, version and lists come from metadata. What trains is in
:mod:`cl_core.training.commands`, imported when it is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from cl_core import plugins

VERBS = {
    "fit": "train a method, evaluate it, write a run folder",
    "validate": "evaluate a trained method on the validation split",
    "test": "evaluate a trained method on the test split",
    "embed": "write the embeddings and labels of a split to a file",
    "list": "what there is: methods, losses, data, configs, domains",
    "reproduce": "run a grid of shipped configurations over seeds, ours beside the published numbers",
    "compare": "finished runs side by side, with intervals over seeds",
}
TOPICS = ("methods", "losses", "data", "configs", "domains")


@dataclass(frozen=True)
class Domain:
    """What a domain says about itself to get its command.

    Args:
        command: name of the console script.
        package: import name; its ``configs`` folder holds ``<method>/<data>.yaml`` and ``reproduce/*.yaml``.
        distribution: name under which it is installed.
        summary: one line for ``--help``.
        data: class name of each data set to ``"module:Class"``.
        modules: modules whose classes (encoders, projectors) go by their short names on the command line.
        artist: ``"module:function"`` that draws figures at the end of ``fit``; None for no figures.
        comparer: ``"module:function"`` that draws what ``compare`` found; None for no figure.
        inputs: what the raw inputs are called in tables.
        verbs: commands of its own: name to (summary, ``"module:function"``), called with the domain and the arguments.
    """

    command: str
    package: str
    distribution: str
    summary: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    modules: Sequence[str] = ()
    artist: str | None = None
    comparer: str | None = None
    inputs: str = "raw inputs"
    verbs: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def summaries(self) -> dict[str, str]:
        """All commands with a line on each."""
        return VERBS | {name: summary for name, (summary, _) in self.verbs.items()}

    def configs(self) -> dict[str, Path]:
        """Shipped configurations by name, such as ``"dcl/digits"``."""
        found = self._yaml("configs")
        return {name: path for name, path in found.items() if not name.startswith("reproduce/")}

    def grids(self) -> dict[str, Path]:
        """Shipped grids of ``reproduce`` by name."""
        return self._yaml("configs/reproduce")

    def find_config(self, name: str) -> Path:
        """The file of a configuration: an existing path first, then a shipped name.

        Raises:
            ValueError: if there is neither, with the nearest shipped names.
        """
        if Path(name).is_file():
            return Path(name)
        configs = self.configs()
        if name.removesuffix(".yaml") in configs:
            return configs[name.removesuffix(".yaml")]
        hint = f' ("{self.command} list configs" shows all)'
        raise ValueError(plugins.unknown(f"file or config of {self.distribution}", name, configs) + hint)

    def _yaml(self, folder: str) -> dict[str, Path]:
        root = Path(str(files(self.package))) / folder
        found = sorted(root.rglob("*.yaml"))
        return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def main(domain: Domain, args: Sequence[str] | None = None) -> int:
    """Run the command of a domain.

    Args:
        domain: whose command it is.
        args: arguments; None for those of the process.

    Returns:
        Exit status: 0, 2 for what the user can put right (said in one sentence), 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    verb = args[0] if args else "--help"
    try:
        if verb in ("-h", "--help"):
            print(_help(domain))
            return 0
        if verb == "--version":
            print(f"{domain.command} {version(domain.distribution)} (cl-core {version('cl-core')})")
            return 0
        if verb == "list":
            print(_list(domain, args[1:]))
            return 0
        if verb.startswith("-"):
            raise ValueError(
                f"options come after the command, as in: {domain.command} fit {' '.join(args[:2])}"
            )
        if verb not in domain.summaries():
            raise ValueError(plugins.unknown(f"command of {domain.command}", verb, domain.summaries()))
    except ValueError as error:
        print(f"{domain.command}: {error}", file=sys.stderr)
        return 2
    # Threads that spin while they wait slow small steps down several times over when anything else runs. It must be
    # said before torch is loaded; who sets it otherwise is heeded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from cl_core.training.commands import run
    except KeyboardInterrupt:  # the imports take a while
        print(f"\n{domain.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "lightning",
            "jsonargparse",
            "safetensors",
            "scipy",
            "yaml",
            "tqdm",
        ):
            raise
        print(f"{domain.command}: {error.name} is missing; install cl-core[train].", file=sys.stderr)
        return 2
    return run(domain, verb, args[1:])


def _help(domain: Domain) -> str:
    summaries = domain.summaries()
    width = max(map(len, summaries)) + 2
    verbs = "\n".join(f"  {name:<{width}}{text}" for name, text in summaries.items())
    return (
        f"usage: {domain.command} COMMAND [options]\n\n{domain.summary}\n\ncommands:\n{verbs}\n\n"
        f"options:\n  --help, --version\n\n{domain.command} COMMAND --help shows the options of a command."
    )


def _list(domain: Domain, args: Sequence[str]) -> str:
    if any(arg in ("-h", "--help") for arg in args):
        return f"usage: {domain.command} list [{'|'.join(TOPICS)}]"
    for topic in args:
        if topic not in TOPICS:
            raise ValueError(plugins.unknown("topic of list", topic, TOPICS))
    sections = []
    for topic in args or TOPICS:
        lines = _entries(domain, topic)
        sections.append(
            "\n".join(lines if len(args) == 1 else [f"{topic}:", *(f"  {line}" for line in lines)])
        )
    return "\n\n".join(sections)


def _entries(domain: Domain, topic: str) -> list[str]:
    if topic == "configs":
        return list(domain.configs()) + [f"reproduce {name}" for name in domain.grids()]
    if topic == "data":
        return sorted(domain.data)
    available = {
        "methods": plugins.available_methods,
        "losses": plugins.available_losses,
        "domains": plugins.available_domains,
    }[topic]()
    if topic == "methods":
        available = usable(domain, available)
    width = max((len(plugin.name) for plugin in available), default=0) + 2
    return [f"{plugin.name:<{width}}{plugin.distribution} {plugin.version}" for plugin in available]


def usable(domain: Domain, available: Sequence[plugins.Plugin]) -> tuple[plugins.Plugin, ...]:
    """Methods that this domain can use: all but those of distributions that bring a domain of their own."""
    others = {plugin.distribution for plugin in plugins.available_domains()} - {domain.distribution}
    return tuple(plugin for plugin in available if plugin.distribution not in others)
