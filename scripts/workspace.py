"""What scripts and root tests know of the workspace: its members, read from their pyproject files."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Member:
    """One package of the workspace, in the folder that holds its pyproject.toml."""

    path: Path

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        """The whole file."""
        return tomllib.loads((self.path / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def project(self) -> dict[str, Any]:
        """The [project] table."""
        return self.pyproject["project"]

    @property
    def name(self) -> str:
        """Name of the distribution, ``cl-core``."""
        return self.project["name"]

    @property
    def module(self) -> str:
        """Name to import, ``cl_core``."""
        return self.name.replace("-", "_")

    @property
    def version(self) -> str:
        """Version of the distribution."""
        return self.project["version"]

    @property
    def source(self) -> Path:
        """Folder of the importable package."""
        return self.path / "src" / self.module

    def requirements(self, *extras: str) -> list[Requirement]:
        """What an install with these extras asks for directly."""
        optional = self.project.get("optional-dependencies", {})
        lines = [
            *self.project.get("dependencies", []),
            *(line for extra in extras for line in optional[extra]),
        ]
        return [Requirement(line) for line in lines]

    @property
    def extras(self) -> list[str]:
        """Names of its extras."""
        return sorted(self.project.get("optional-dependencies", {}))

    def all_requirements(self) -> list[Requirement]:
        """What it asks for with every extra and dependency group."""
        groups = self.pyproject.get("dependency-groups", {}).values()
        return [*self.requirements(*self.extras), *(Requirement(line) for group in groups for line in group)]


def members(root: Path = ROOT) -> list[Member]:
    """The packages of the workspace by path."""
    found = [Member(file.parent) for file in sorted((root / "packages").glob("*/pyproject.toml"))]
    if not found:
        raise FileNotFoundError(f"{root} holds no packages/*/pyproject.toml.")
    return found


def member(name: str, root: Path = ROOT) -> Member:
    """The package with this distribution name.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    by_name = {one.name: one for one in members(root)}
    if canonicalize_name(name) not in by_name:
        raise ValueError(f"no package {name!r} in this workspace; there are {', '.join(sorted(by_name))}.")
    return by_name[canonicalize_name(name)]


def bound_problems(found: list[Member]) -> list[str]:
    """Requirements between members that the member's version does not meet, or whose form is not ours.

    uv takes a workspace source whatever the version bound says, so nothing else would notice. Before 1.0 a
    minor release may break: the bound is ``>=A.B,<A.(B+1)``; from 1.0 on ``>=A.B,<(A+1)``.
    """
    versions = {one.name: one.version for one in found}
    problems = []
    for one in found:
        for requirement in one.requirements(*one.extras):
            name = canonicalize_name(requirement.name)
            if name not in versions or name == one.name:
                continue
            if not requirement.specifier.contains(versions[name], prereleases=True):
                problems.append(f"{one.name} requires {requirement}, but {name} here is {versions[name]}.")
            bounds = {spec.operator: spec.version for spec in requirement.specifier}
            if set(bounds) != {">=", "<"} or bounds["<"] != _next_breaking(bounds[">="]):
                problems.append(f"{one.name} requires {requirement}; write >=A.B,<the next breaking release.")
    return problems


def _next_breaking(version: str) -> str:
    major, minor, *_ = (int(part) for part in f"{version}.0".split("."))
    return f"0.{minor + 1}" if major == 0 else str(major + 1)
