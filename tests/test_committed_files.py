"""What no committed file may hold: an address of a package registry, a path of one machine, a lock file."""

import re
import subprocess

import pytest
from workspace import ROOT

# Written in pieces, so that this file does not hold what it looks for.
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org", "anaconda" + ".org",
              "npmjs" + ".com", "crates" + ".io"]  # fmt: skip
MACHINE_PATH = re.compile(r"(?<![\w.\-*])/(?:" + "|".join(["home", "root", "Users", "work", "mnt"]) + r")/\w")
LARGEST = 1_000_000  # bytes; a clone should stay light


@pytest.fixture(scope="module")
def committed():
    """Path and bytes of every file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout: there is no list of committed files")
    paths = [ROOT / name for name in result.stdout.decode().split("\0") if name]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def offences(committed, found_in):
    texts = {path: data.decode(errors="replace") for path, data in committed.items() if b"\0" not in data}
    return [f"{path.relative_to(ROOT)}: {hit}" for path, text in texts.items() for hit in found_in(text)]


def test_no_registry_is_named(committed):
    assert offences(committed, lambda text: [name for name in REGISTRIES if name in text]) == []


def test_no_path_of_a_machine_is_named(committed):
    assert offences(committed, MACHINE_PATH.findall) == []


def test_the_pattern_of_paths_finds_paths_and_leaves_addresses_alone():
    slash = "/"
    assert MACHINE_PATH.search(f"cd {slash}work{slash}x") and MACHINE_PATH.search(f'"{slash}home{slash}me"')
    for harmless in ("net/work/x", "https://x.org/work/1", "../work/x", "**/root/x", "a/home/b"):
        assert not MACHINE_PATH.search(harmless), harmless


def test_no_lock_file_and_nothing_large(committed):
    assert [path for path in committed if path.name in ("uv.lock", "pylock.toml")] == []
    assert [path for path, data in committed.items() if len(data) > LARGEST] == []
