"""What a package offers is registered, and what is registered is there."""

import importlib
import importlib.metadata
import inspect

import pytest
from workspace import member, members

GROUPS = {"contrastive.losses", "contrastive.methods", "contrastive.domains"}
each_member = pytest.mark.parametrize("one", members(), ids=lambda one: one.name)


def registered(one, group):
    return one.project.get("entry-points", {}).get(group, {})


@each_member
def test_the_environment_knows_what_pyproject_registers(one):
    installed = {
        (entry.group, entry.name, entry.value)
        for entry in importlib.metadata.distribution(one.name).entry_points
        if entry.group in GROUPS
    }
    written = {(group, name, value) for group in GROUPS for name, value in registered(one, group).items()}
    assert installed == written, "the installed metadata is older than pyproject.toml; run uv sync"


@each_member
def test_every_registered_name_is_the_name_of_its_class(one):
    for group in GROUPS - {"contrastive.domains"}:
        for name, value in registered(one, group).items():
            module, _, attribute = value.partition(":")
            assert getattr(importlib.import_module(module), attribute).__name__ == name


def test_every_loss_of_core_is_registered():
    from cl_core import losses

    offered = {
        name
        for name in losses.__all__
        if not inspect.getmodule(getattr(losses, name)).__name__.endswith("._base")
    }
    assert offered == set(registered(member("cl-core"), "contrastive.losses"))


@each_member
def test_every_method_of_a_domain_is_registered(one):
    if not (one.source / "methods").is_dir():
        assert registered(one, "contrastive.methods") == {}
        return
    from cl_core.method import Method

    offered = {}
    for file in sorted((one.source / "methods").glob("[!_]*.py")):
        module = importlib.import_module(f"{one.module}.methods.{file.stem}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__:
                offered[name] = f"{module.__name__}:{name}"
    assert offered == registered(one, "contrastive.methods")
