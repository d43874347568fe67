"""Say which packages a change can break, so that CI tests those.

    python scripts/changed_packages.py origin/main    # one name a line, what others require first

A file in ``packages/X`` touches X and every member that requires it; any other file but prose touches all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath

from packaging.utils import canonicalize_name
from workspace import ROOT, Member, members

PROSE = {".md", ".txt"}
PINS = "constraints.txt"


def changed_files(base: str) -> list[str]:
    """Files that differ between the work tree and where it left ``base``, untracked ones included."""
    commands = (
        ["git", "diff", "--name-only", "--merge-base", base],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    found = [subprocess.run(c, cwd=ROOT, capture_output=True, text=True) for c in commands]
    for result in found:
        if result.returncode != 0:
            raise SystemExit(f"git cannot compare with {base!r}: {result.stderr.strip()}")
    return sorted({line for result in found for line in result.stdout.splitlines()})


def affected(files: Iterable[str], found: list[Member]) -> list[str]:
    """Names of the members that these files can break."""
    by_folder = {one.path.name: one for one in found}
    touched: set[str] = set()
    for file in files:
        parts = PurePosixPath(file).parts
        if parts[0] == "packages" and len(parts) > 2 and parts[1] in by_folder:
            touched.add(by_folder[parts[1]].name)
        elif PurePosixPath(file).suffix not in PROSE or file == PINS:
            return _ordered({one.name for one in found}, found)
    while grown := {name for name, needs in _needs(found).items() if needs & touched} - touched:
        touched |= grown
    return _ordered(touched, found)


def _needs(found: list[Member]) -> dict[str, set[str]]:
    names = {one.name for one in found}
    return {one.name: {canonicalize_name(r.name) for r in one.all_requirements()} & names for one in found}


def _ordered(names: set[str], found: list[Member]) -> list[str]:
    """A member after those it requires."""
    needs, done = _needs(found), []
    while waiting := [name for name in needs if name not in done]:
        ready = [name for name in waiting if needs[name] - {name} <= set(done)]
        if not ready:
            raise ValueError(f"{', '.join(waiting)} require each other in a circle.")
        done += ready
    return [name for name in done if name in names]


def main(arguments: list[str] | None = None) -> int:
    """Print the affected members."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="branch, tag or commit to compare with")
    print("\n".join(affected(changed_files(parser.parse_args(arguments).base), members())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
