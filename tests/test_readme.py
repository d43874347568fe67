"""The README's two commands are the ones promised, and every relative link of a page leads somewhere."""

import re

import pytest
from PIL import Image
from workspace import ROOT

COMMANDS = [
    "pip install uv && uv run --all-packages cl-vision fit --config dcl/digits",
    "uv run --all-packages pytest",
]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("packages/*/*.md"), *ROOT.glob("docs/**/*.md")])


def quick_start():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## Quick start\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert len(sections) == 1
    return sections[0]


def test_quick_start_is_one_block_of_two_commands():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", quick_start(), flags=re.MULTILINE | re.DOTALL)
    bash = [body for language, body in blocks if language in ("bash", "sh", "shell", "console")]
    assert [body.strip().splitlines() for body in bash] == [COMMANDS]


def test_ci_runs_the_second_command_as_it_stands():
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_first_command_names_a_shipped_configuration():
    name = COMMANDS[0].split()[-1]
    assert (ROOT / "packages/vision/src/cl_vision/configs" / f"{name}.yaml").is_file()


@pytest.mark.parametrize(
    "page", ["README.md", "packages/core/README.md", "packages/graph/README.md", "packages/vision/README.md"]
)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, images in (("photos", 48), ("labelled/cat", 8), ("labelled/dog", 8)):
        (tmp_path / name).mkdir(parents=True)
        for number in range(images):
            colour = (5 * number, 200 - 4 * number, 30 * len(name) % 255)
            Image.new("RGB", (72, 68), colour).save(tmp_path / name / f"{number}.jpg")
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert blocks
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # our own page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    broken = [
        t
        for t in targets
        if "://" not in t and not t.startswith("mailto:") and not (page.parent / t).exists()
    ]
    assert broken == []
