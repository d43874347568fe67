"""Runs in an environment that holds cl-graph's wheel and what it requires."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import cl_graph

command = Path(sys.executable).with_name("cl-graph")
listed = subprocess.run([command, "list", "configs"], check=True, stdout=subprocess.PIPE, text=True).stdout
assert "grace/karate" in listed, listed
assert (files("cl_graph") / "configs" / "grace" / "karate.yaml").is_file()
print(f"cl-graph {cl_graph.__version__} lists its configs")
