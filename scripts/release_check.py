"""Check that packages are fit to release.

    python scripts/release_check.py                                 # all packages
    python scripts/release_check.py cl-core --tag cl-core-v0.1.0    # one, about to be tagged so

Without ``--tag`` the changelog may begin with an Unreleased section, its top entry may be without a date, and new
public names need not be recorded yet. The wheel is built, read, and installed in a clean environment beside nothing
but what it requires, where scripts/smoke/<module>.py must run (``--no-install`` leaves that out). Prints every problem
found; exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import update_public_surface
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from workspace import ROOT, Member, bound_problems, member, members

UV = os.environ.get("UV", "uv")
LICENCE = "Apache-2.0"


def version_problems(one: Member, tag: str | None = None) -> list[str]:
    """Version, tag and the top entry of the changelog must be the same."""
    problems = []
    try:
        plain = str(Version(one.version)) == one.version and Version(one.version).local is None
    except InvalidVersion:
        plain = False
    if not plain:
        problems.append(f"{one.name}: version {one.version!r} is not a plain PEP 440 version such as 0.1.0.")
    if tag is not None and tag != f"{one.name}-v{one.version}":
        problems.append(f"{one.name}: the tag is {tag}, the version asks for {one.name}-v{one.version}.")
    entries = changelog_entries(one)
    if tag is None and entries[:1] == ["Unreleased"]:
        entries = entries[1:]
    if entries[:1] != [one.version]:
        top = entries[0] if entries else "missing"
        problems.append(f"{one.name}: the top entry of CHANGELOG.md is {top}, the version {one.version}.")
    elif tag is not None and not _dated(one):
        problems.append(f"{one.name}: the top entry of CHANGELOG.md has no date such as 2026-11-30.")
    return problems


def _dated(one: Member) -> bool:
    """Whether the newest entry of the changelog says when, as a release must."""
    text = (one.path / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## .*$", text, flags=re.MULTILINE)
    return heading is not None and re.search(r"\b\d{4}-\d\d-\d\d\b", heading[0]) is not None


def changelog_entries(one: Member) -> list[str]:
    """Titles of the changelog's entries, newest first: ``## 0.1.0 (2026-11-30)`` or ``## [0.1.0]``."""
    file = one.path / "CHANGELOG.md"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return re.findall(r"^## \[?([^\]\s]+)", text, flags=re.MULTILINE)


def metadata_problems(one: Member) -> list[str]:
    """The [project] table must hold what an index and its readers need, and nothing an index refuses."""
    project, problems = one.project, []
    try:
        known = canonicalize_license_expression(project.get("license", "")) == LICENCE
    except (InvalidLicenseExpression, TypeError, AttributeError):
        known = False
    if not known:
        problems.append(f"license must be the SPDX expression {LICENCE}, got {project.get('license')!r}.")
    if project.get("license-files") != ["LICENSE"] or not (one.path / "LICENSE").is_file():
        problems.append('license-files must be ["LICENSE"], a file of the package\'s own folder.')
    readme = one.path / project.get("readme", "README.md")
    if not readme.is_file() or len(readme.read_text(encoding="utf-8")) < 200:
        problems.append(f"{readme.name} must say what the package is for.")
    description = project.get("description", "")
    if not 20 <= len(description) <= 512 or "\n" in description:
        problems.append("description must be one line of 20 to 512 characters.")
    if canonicalize_name(one.name) != one.name:
        problems.append(f"name must be {canonicalize_name(one.name)}, got {one.name}.")
    classifiers = project.get("classifiers", [])
    if any(text.startswith("License ::") for text in classifiers):
        problems.append("classifiers must not name a licence beside the SPDX expression.")
    if "Typing :: Typed" not in classifiers:
        problems.append("classifiers must hold 'Typing :: Typed'.")
    problems += [
        f"{key} is missing." for key in ("requires-python", "authors", "keywords") if key not in project
    ]
    for requirement in one.requirements(*one.extras):
        if requirement.url:
            problems.append(f"{requirement} is an address; an index refuses it.")
        elif not any(spec.operator in (">=", "==", "~=") for spec in requirement.specifier):
            problems.append(f"{requirement} has no lower bound.")
    return [f"{one.name}: {problem}" for problem in problems]


def surface_problems(one: Member, tag: str | None = None) -> list[str]:
    """Nothing recorded may be gone; at a release all must be recorded, for the next one is held to it."""
    recorded, present = update_public_surface.read(one), update_public_surface.surface(one)
    gone = update_public_surface.removals(recorded, present)
    new = update_public_surface.removals(present, recorded) if tag else []
    says = f"{one.name}: {update_public_surface.FILE}"
    return [f"{says} still lists {name}." for name in gone] + [f"{says} lacks {name}." for name in new]


def wheel_problems(one: Member, wheel: Path) -> list[str]:
    """Source, licence and metadata must be in the wheel whole, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        information = f"{one.module}-{one.version}.dist-info"
        try:
            metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
        except KeyError:
            return [f"{one.name}: {wheel.name} holds no {information}/METADATA."]
    source = {
        f"{one.module}/{path.relative_to(one.source).as_posix()}"
        for path in one.source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in names if not name.startswith(information)}
    problems = [f"{name} is not in the wheel." for name in sorted(source - packed)]
    problems += [f"{name} is in the wheel, but not in src." for name in sorted(packed - source)]
    if f"{one.module}/py.typed" not in packed:
        problems.append("py.typed is not in the wheel.")
    if f"{information}/licenses/LICENSE" not in names:
        problems.append("LICENSE is not in the wheel.")
    if metadata["Version"] != one.version or metadata["License-Expression"] != LICENCE:
        problems.append("version or licence in the wheel's METADATA differ from pyproject.toml.")
    if metadata["Metadata-Version"] not in ("2.3", "2.4"):
        problems.append(f"Metadata-Version {metadata['Metadata-Version']} is one that indexes may refuse.")
    if not str(metadata.get_payload()).strip():
        problems.append("the wheel's METADATA carries no readme.")
    return [f"{one.name}: {problem}" for problem in problems]


def required_members(one: Member, found: list[Member]) -> list[Member]:
    """The member and those of the workspace it needs at run time, itself last."""
    names = {canonicalize_name(requirement.name) for requirement in one.requirements()}
    needed = [other for other in found if other.name in names and other is not one]
    before = [more for other in needed for more in required_members(other, found)]
    return [*dict.fromkeys(before), one]


def build(one: Member, into: Path) -> Path:
    """Build wheel and source archive without the workspace's sources; the path of the wheel."""
    _run(UV, "build", "--quiet", "--package", one.name, "--no-sources", "--out-dir", str(into))
    return into / f"{one.module}-{one.version}-py3-none-any.whl"


def install_problems(one: Member, wheels: list[Path], work: Path) -> list[str]:
    """Install the wheel alone in a clean environment and run its smoke script there, away from the source."""
    environment = work / f"environment-{one.name}"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    try:
        _run(UV, "venv", "--quiet", "--python", sys.executable, str(environment))
        _run(UV, "pip", "install", "--quiet", "--python", str(python), *constraints, *map(str, wheels))
        _run(UV, "pip", "check", "--quiet", "--python", str(python))
        print(_run(str(python), "-I", str(ROOT / "scripts" / "smoke" / f"{one.module}.py"), cwd=work), end="")
    except subprocess.CalledProcessError as error:
        return [f"{one.name}: {' '.join(map(str, error.cmd[:4]))} ... failed.\n{error.stdout}"]
    return []


def _run(*command: str, cwd: Path = ROOT) -> str:
    """Output and errors of a command; CalledProcessError, which holds them, if it fails."""
    return subprocess.run(
        command, cwd=cwd, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def check(one: Member, found: list[Member], work: Path, *, tag: str | None, install: bool) -> list[str]:
    """All problems of one member."""
    problems = version_problems(one, tag) + metadata_problems(one) + surface_problems(one, tag)
    wheels = [build(other, work / "dist") for other in required_members(one, found)]
    problems += wheel_problems(one, wheels[-1])
    if install:
        problems += install_problems(one, wheels, work)
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Check one or all members and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", nargs="?", help="distribution name; all packages if left out")
    parser.add_argument("--tag", help="the tag of the release, cl-core-v0.1.0")
    parser.add_argument("--no-install", action="store_true", help="do not install the wheel anywhere")
    options = parser.parse_args(arguments)
    if options.tag and not options.package:
        parser.error("--tag needs the package it belongs to.")
    found = members()
    try:
        chosen = [member(options.package)] if options.package else found
    except ValueError as error:
        parser.error(str(error))
    problems = bound_problems(found)
    with tempfile.TemporaryDirectory() as work:
        for one in chosen:
            here = check(one, found, Path(work), tag=options.tag, install=not options.no_install)
            print(f"{one.name} {one.version}: {'ok' if not here else f'{len(here)} problems'}")
            problems += here
    print("".join(f"{problem}\n" for problem in problems), end="")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
