"""Runs in an environment that holds cl-vision's wheel and what it requires."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import cl_vision

command = Path(sys.executable).with_name("cl-vision")
listed = subprocess.run([command, "list", "configs"], check=True, stdout=subprocess.PIPE, text=True).stdout
assert "dcl/digits" in listed, listed
assert (files("cl_vision") / "configs" / "dcl" / "digits.yaml").is_file()
print(f"cl-vision {cl_vision.__version__} lists its configs")
