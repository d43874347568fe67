"""A public name, or a parameter of one, goes only together with its line in public_surface.json."""

import pytest
from update_public_surface import FILE, read, removals, surface, write
from workspace import Member, members


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_nothing_recorded_is_gone(member):
    recorded = read(member)
    assert recorded, f"{member.name} has no {FILE}; run scripts/update_public_surface.py"
    assert removals(recorded, surface(member)) == []


def test_a_removed_module_name_or_parameter_is_named():
    recorded = {"a": {"f": ["x", "y"], "g": None}, "a.b": {}}
    assert removals(recorded, recorded) == []
    assert removals(recorded, {"a": {"f": ["y"], "h": None}}) == ["a.f(x=)", "a.g", "a.b"]
    assert removals(recorded, {"a": {"f": ["y", "x", "z"], "g": ["new"]}, "a.b": {}, "a.c": {}}) == []


def test_private_and_borrowed_names_are_not_public(tmp_path, monkeypatch):
    package = tmp_path / "src" / "toy_surface"
    package.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "toy-surface"\nversion = "1"\n')
    (package / "__init__.py").write_text('__all__ = ["listed"]\nlisted = 1\ndef left_out(): ...\n')
    (package / "_hidden.py").write_text("def f(): ...\n")
    (package / "open.py").write_text(
        "from json import dumps\nCONSTANT = 1\ndef _own(): ...\ndef f(x, *, y=1): ...\n"
        "class C:\n    def __init__(self, z): ...\n"
    )
    (package / "front").mkdir()
    (package / "front" / "__init__.py").write_text(
        'from .a import g\n__all__ = ["b", "g"]\nfrom . import b\n'
    )
    (package / "front" / "a.py").write_text("def g(): ...\ndef may_move(): ...\n")
    (package / "front" / "b.py").write_text("def h(): ...\n")
    monkeypatch.syspath_prepend(tmp_path / "src")
    toy = Member(tmp_path)
    expected = {
        "toy_surface": {"listed": None},
        "toy_surface.front": {"b": None, "g": []},
        "toy_surface.front.b": {"h": []},
        "toy_surface.open": {"C": ["z"], "f": ["x", "y"]},
    }
    assert surface(toy) == expected
    assert read(toy) == {}
    write(toy, expected)
    assert read(toy) == expected
