"""Every package keeps the rules of the house: bounds, declared dependencies, shared settings, legal files."""

import ast
import importlib.metadata
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from workspace import ROOT, bound_problems, members

MEMBERS = members()
each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)

# Parts of a package that may lean on more than a plain install brings: folder or file -> extras and groups.
ALSO_ALLOWED = {
    ("cl-core", "training"): ["lars", "train"],
    ("cl-core", "testing"): ["train", "dev"],  # numpy reads the parity arrays
    ("cl-vision", "exporting.py"): ["onnx"],
}


def test_members_require_each_other_within_bounds():
    assert bound_problems(MEMBERS) == []


@each_member
def test_every_import_is_declared(member):
    distributions = importlib.metadata.packages_distributions()
    missing = []
    for file in sorted(member.source.rglob("*.py")):
        declared = declared_for(member, file.relative_to(member.source).parts[0])
        for name in imported(file) - sys.stdlib_module_names - {member.module}:
            providers = {canonicalize_name(one) for one in distributions.get(name, [name])}
            if not providers & declared:
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert missing == []


def declared_for(member, part):
    """Distributions that this part of the package may import."""
    also = ALSO_ALLOWED.get((member.name, part), [])
    requirements = member.requirements(*(extra for extra in member.extras if extra in also))
    names = {canonicalize_name(one.name) for one in requirements}
    if "dev" in also:
        names |= {canonicalize_name(one.name) for one in member.all_requirements()}
    return names


def imported(file):
    """Top-level names of all absolute imports of a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_undeclared_imports_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import torch.nn as nn\nfrom . import a\ndef f():\n    from sklearn.svm import SVC\n")
    assert imported(file) == {"torch", "sklearn"}


@each_member
def test_no_member_replaces_the_shared_settings(member):
    """Ruff, pytest and mypy stop climbing at the first file that has their table."""
    own = member.pyproject.get("tool", {}).keys() - {"uv"}
    assert own == set()
    nested = [path for name in ("ruff.toml", ".ruff.toml", "pytest.ini", "mypy.ini", "tox.ini", "setup.cfg")
              for path in member.path.rglob(name)]  # fmt: skip
    assert nested == []


@each_member
def test_members_share_python_licence_and_backend(member):
    root = (ROOT / "LICENSE").read_bytes()
    assert (member.path / "LICENSE").read_bytes() == root
    assert member.project["requires-python"] == ">=3.11"
    assert member.project["license"] == "Apache-2.0"
    assert member.pyproject["build-system"]["build-backend"] == "uv_build"
    assert (member.source / "py.typed").is_file()
    assert (member.path / "CHANGELOG.md").is_file()
    assert importlib.metadata.version(member.name) == member.version


@each_member
def test_each_member_brings_its_own_test_tools(member):
    """Groups are per project: without pytest here, an isolated run would start some other pytest."""
    own = {canonicalize_name(Requirement(line).name) for line in member.pyproject["dependency-groups"]["dev"]}
    assert own >= {"pytest", "pytest-xdist"}  # the shared settings name options of both


@each_member
def test_members_come_from_the_workspace(member):
    names = {one.name for one in MEMBERS} - {member.name}
    wanted = {canonicalize_name(one.name) for one in member.all_requirements()} & names
    sources = member.pyproject.get("tool", {}).get("uv", {}).get("sources", {})
    assert {name for name in wanted if sources.get(name) != {"workspace": True}} == set()


def test_the_root_is_virtual_and_dates_its_resolve():
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "project" not in root
    assert root["tool"]["uv"]["exclude-newer"].endswith("T00:00:00Z")


@each_member
def test_constraints_pin_every_requirement_within_its_bounds(member):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("==")
            pins.setdefault(canonicalize_name(name), []).append(rest.split(" ; ")[0])
    own = {one.name for one in MEMBERS}
    outside = [one for one in member.all_requirements() if canonicalize_name(one.name) not in own]
    assert outside
    for requirement in outside:
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert versions, f"constraints.txt does not pin {requirement.name}"
        assert all(requirement.specifier.contains(version) for version in versions), requirement
