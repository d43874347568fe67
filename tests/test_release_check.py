"""The release check passes a sound package and names every fault planted in one."""

import zipfile

import pytest
import release_check
from workspace import Member, bound_problems, member, members

PYPROJECT = """\
[project]
name = "cl-toy"
version = "0.1.0"
description = "A package that exists for the length of one test."
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
license-files = ["LICENSE"]
authors = [{ name = "Nobody" }]
keywords = ["toy"]
classifiers = ["Typing :: Typed"]
dependencies = ["torch>=2.6"]
"""


@pytest.fixture
def toy(tmp_path):
    """A sound package in a folder of its own, for the test to spoil."""
    source = tmp_path / "src" / "cl_toy"
    (source / "configs").mkdir(parents=True)
    (source / "__init__.py").write_text('"""Toy."""\n')
    (source / "configs" / "a.yaml").write_text("a: 1\n")
    (source / "py.typed").touch()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "LICENSE").write_text("Apache")
    (tmp_path / "README.md").write_text("# cl-toy\n" + "It is for tests. " * 20)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 (2026-11-30)\n\n## 0.0.9\n")
    return Member(tmp_path)


@pytest.fixture
def edit(toy):
    """Replace text in one of the toy's files and read the package again."""

    def editor(name, old, new):
        file = toy.path / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        return Member(toy.path)

    return editor


def test_a_sound_package_has_no_problems(toy):
    assert release_check.version_problems(toy) == []
    assert release_check.version_problems(toy, "cl-toy-v0.1.0") == []
    assert release_check.metadata_problems(toy) == []


@pytest.mark.parametrize("tag", ["v0.1.0", "cl-toy-v0.1.1", "cl-core-v0.1.0", "cl-toy-0.1.0"])
def test_a_tag_that_is_not_name_and_version_is_refused(toy, tag):
    assert release_check.version_problems(toy, tag) == [
        f"cl-toy: the tag is {tag}, the version asks for cl-toy-v0.1.0."
    ]


def test_the_changelog_must_begin_with_the_version(edit):
    edited = edit("CHANGELOG.md", "## 0.1.0", "## [0.2.0]")
    assert (
        "top entry of CHANGELOG.md is 0.2.0, the version 0.1.0" in release_check.version_problems(edited)[0]
    )
    edited = edit("CHANGELOG.md", "## [0.2.0]", "## [Unreleased]\n\n## [0.1.0]")
    assert release_check.version_problems(edited) == []
    assert "is Unreleased" in release_check.version_problems(edited, "cl-toy-v0.1.0")[0]
    (edited.path / "CHANGELOG.md").unlink()
    assert "is missing" in release_check.version_problems(edited)[0]


@pytest.mark.parametrize("heading", ["## [0.1.0] - Unreleased", "## 0.1.0"])
def test_what_is_released_has_a_date(edit, heading):
    edited = edit("CHANGELOG.md", "## 0.1.0 (2026-11-30)", heading)
    assert release_check.version_problems(edited) == []
    assert "has no date" in release_check.version_problems(edited, "cl-toy-v0.1.0")[0]


def test_a_package_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        release_check.main(["cl-foo"])
    assert "no package 'cl-foo' in this workspace" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["0.1", "0.1.0+local", "v0.1.0", "0.01.0", "soon"])
def test_only_plain_versions_are_released(edit, version):
    problems = release_check.version_problems(edit("pyproject.toml", '"0.1.0"', f'"{version}"'))
    plain = [problem for problem in problems if "plain PEP 440" in problem]
    assert bool(plain) == (version != "0.1")  # 0.1 is plain; the changelog disagrees
    assert problems


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('license = "Apache-2.0"', 'license = "MIT"', "SPDX expression Apache-2.0, got 'MIT'"),
        ('license = "Apache-2.0"', 'license = { file = "LICENSE" }', "SPDX expression"),
        ('["LICENSE"]', '["../LICENSE"]', "license-files"),
        ("A package that exists for the length of one test.", "Toy.", "description"),
        ('"cl-toy"', '"CL_toy"', "name must be cl-toy"),
        ('"Typing :: Typed"', '"License :: OSI Approved", "Typing :: Typed"', "must not name a licence"),
        ('"Typing :: Typed"', "", "Typing :: Typed"),
        ('requires-python = ">=3.11"\n', "", "requires-python is missing"),
        ("authors", "maintainers", "authors is missing"),
        ("torch>=2.6", "torch", "torch has no lower bound"),
        ("torch>=2.6", "torch<3", "torch<3 has no lower bound"),
        ("torch>=2.6", "torch @ file:///torch.whl", "an index refuses it"),
    ],
)
def test_metadata_an_index_refuses_or_a_reader_misses(edit, old, new, problem):
    found = release_check.metadata_problems(edit("pyproject.toml", old, new))
    assert any(problem in one for one in found), found


def test_an_empty_readme_and_a_missing_licence_are_named(toy):
    (toy.path / "README.md").write_text("# cl-toy\n")
    (toy.path / "LICENSE").unlink()
    found = "\n".join(release_check.metadata_problems(toy))
    assert "README.md must say what the package is for" in found
    assert "license-files" in found


def wheel_of(toy, *, without="", extra=(), metadata=None):
    """A wheel as the backend would build it, with a fault."""
    information = "cl_toy-0.1.0.dist-info"
    text = (
        metadata
        or "Metadata-Version: 2.4\nName: cl-toy\nVersion: 0.1.0\nLicense-Expression: Apache-2.0\n\n# toy"
    )
    names = {
        f"{toy.module}/{p.relative_to(toy.source).as_posix()}": ""
        for p in toy.source.rglob("*")
        if p.is_file()
    }
    names |= {f"{information}/METADATA": text, f"{information}/licenses/LICENSE": ""} | dict.fromkeys(
        extra, ""
    )
    wheel = toy.path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in names.items():
            if not without or without not in name:
                archive.writestr(name, content)
    return wheel


def test_a_wheel_must_hold_the_whole_source_and_only_that(toy):
    (toy.source / "__pycache__").mkdir()
    (toy.source / "__pycache__" / "x.pyc").touch()
    plain = {"without": "__pycache__"}
    assert release_check.wheel_problems(toy, wheel_of(toy, **plain)) == []

    def problems(**fault):
        return "\n".join(release_check.wheel_problems(toy, wheel_of(toy, **fault)))

    (toy.source / "__pycache__" / "x.pyc").unlink()
    assert "cl_toy/configs/a.yaml is not in the wheel" in problems(without="a.yaml")
    assert "py.typed is not in the wheel" in problems(without="py.typed")
    assert "LICENSE is not in the wheel" in problems(without="LICENSE")
    assert "holds no cl_toy-0.1.0.dist-info/METADATA" in problems(without="METADATA")
    assert "tests/test_x.py is in the wheel" in problems(extra=["tests/test_x.py"])
    newer = "Metadata-Version: 2.5\nVersion: 0.2.0\nLicense-Expression: Apache-2.0\n\n"
    found = problems(metadata=newer)
    assert "Metadata-Version 2.5" in found
    assert "version or licence" in found
    assert "no readme" in found


@pytest.mark.parametrize(
    ("requirement", "version", "sound"),
    [
        ("cl-base>=0.1,<0.2", "0.1.5", True),
        ("cl-base[train]>=0.1.2,<0.2", "0.1.2", True),
        ("cl-base>=1.2,<2", "1.4.0", True),
        ("cl-base>=0.1,<0.2", "0.2.0", False),
        ("cl-base>=0.1", "0.1.0", False),
        ("cl-base>=0.1,<1", "0.1.0", False),
        ("cl-base==0.1.0", "0.1.0", False),
        ("cl-base", "0.1.0", False),
    ],
)
def test_bounds_between_members(tmp_path, requirement, version, sound):
    for name, one, needs in [("base", version, "torch>=2.6"), ("top", "0.1.0", requirement)]:
        (tmp_path / name).mkdir()
        text = PYPROJECT.replace("cl-toy", f"cl-{name}").replace('"0.1.0"', f'"{one}"')
        (tmp_path / name / "pyproject.toml").write_text(text.replace("torch>=2.6", needs))
    problems = bound_problems([Member(tmp_path / "base"), Member(tmp_path / "top")])
    assert (problems == []) == sound, problems


def test_a_member_comes_after_the_members_it_requires():
    found = members()
    vision = member("cl-vision")
    assert [one.name for one in release_check.required_members(vision, found)] == ["cl-core", "cl-vision"]
    assert [one.name for one in release_check.required_members(member("cl-core"), found)] == ["cl-core"]


def test_an_unknown_package_is_named_beside_the_known():
    with pytest.raises(ValueError, match="no package 'cl-nothing' in this workspace; there are cl-core"):
        member("cl-nothing")


@pytest.mark.parametrize("one", members(), ids=lambda one: one.name)
def test_the_packages_here_are_fit_for_an_index(one):
    assert release_check.version_problems(one) + release_check.metadata_problems(one) == []
    assert (release_check.ROOT / "scripts" / "smoke" / f"{one.module}.py").is_file()


def test_new_names_must_be_recorded_by_the_time_of_a_release(toy, monkeypatch):
    monkeypatch.syspath_prepend(toy.path / "src")
    (toy.source / "public.py").write_text("def new(): ...\n")
    (toy.path / "public_surface.json").write_text('{"cl_toy": {}, "cl_toy.gone": {}}')
    gone = "cl-toy: public_surface.json still lists cl_toy.gone."
    assert release_check.surface_problems(toy) == [gone]
    assert release_check.surface_problems(toy, "cl-toy-v0.1.0") == [
        gone,
        "cl-toy: public_surface.json lacks cl_toy.public.",
    ]
