"""Write constraints.txt: the exact version of everything the workspace installs, without an address.

    python scripts/update_constraints.py            # resolve (as of exclude-newer) and rewrite the file
    python scripts/update_constraints.py --check    # resolve and say whether the file is up to date

The lock file of uv holds the addresses of the index it was made with, so it is not committed. The fixed date
``exclude-newer`` in the root pyproject.toml makes every resolve the same; this file is the readable record of
it, and ``pip install -c constraints.txt`` gives the same versions without uv.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
EXPORT = [
    "uv", "export", "--all-packages", "--all-extras", "--all-groups", "--no-hashes", "--no-emit-workspace",
    "--no-annotate", "--no-header", "--quiet",
]  # fmt: skip
HEADER = """\
# Exact versions of the whole workspace, written by scripts/update_constraints.py. Do not edit.
# uv needs no help from this file; with pip: pip install -c constraints.txt <package>
"""


def resolve() -> str:
    """The text that constraints.txt should have."""
    result = subprocess.run(EXPORT, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"uv could not resolve the workspace:\n{result.stderr}")
    for line in problems(result.stdout):
        raise SystemExit(line)
    return HEADER + result.stdout


def problems(text: str) -> list[str]:
    """Lines that are not ``name==version`` with an optional marker: an address or a path among them."""
    return [
        f"constraints.txt, line {number}: {line!r} is not name==version ; marker."
        for number, line in enumerate(text.splitlines(), 1)
        if line and not line.startswith("#") and not _is_pin(line)
    ]


def _is_pin(line: str) -> bool:
    if "://" in line or " @ " in line or not re.match(r"[\w.-]+==[\w.+!]+( ; .+)?$", line):
        return False
    requirement = Requirement(line)
    return requirement.url is None and not requirement.extras


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the file is out of date"
    )
    options = parser.parse_args(arguments)
    old = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    new = resolve()
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), "recorded", "resolved", lineterm=""):
        print(line)
    if not options.check and old != new:
        beside = FILE.with_suffix(".tmp")
        beside.write_text(new, encoding="utf-8")
        os.replace(beside, FILE)
    return int(options.check and old != new)


if __name__ == "__main__":
    sys.exit(main())
