"""constraints.txt holds exact versions and nothing that names an index or a machine."""

import pytest
from update_constraints import FILE, problems


def test_the_committed_file_holds_pins_only():
    text = FILE.read_text(encoding="utf-8")
    assert problems(text) == []
    assert "\ntorch==" in text


@pytest.mark.parametrize(
    "line",
    [
        "torch>=2.6",
        "torch",
        "torch @ https://host/torch.whl",
        "-e ./packages/core",
        "--index-url https://host/simple",
        "./packages/core",
        "torch[extra]==2.6",
        "torch==2.6 --hash=sha256:0",
    ],
)
def test_anything_else_is_refused(line):
    assert problems(f"# a comment\n\nnumpy==2.4.6 ; python_full_version < '3.12'\n{line}\n") == [
        f"constraints.txt, line 4: {line!r} is not name==version ; marker."
    ]
