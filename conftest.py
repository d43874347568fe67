"""How the tests run: several worker processes of one thread each, none of which waits for the disk."""

import os
import sys

import pytest

# The workers share the cores, so each has one thread; what they and the tests start inherits this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Container images often forbid byte code: each worker and each subprocess would compile all that it imports anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_xdist_auto_num_workers(config):
    """One a core, at most four, as each takes up to 2 GB; none for single files, most of which end sooner without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = cores == 1 or all(".py" in argument for argument in config.args)
    return 0 if alone else min(4, cores)


@pytest.fixture(scope="session", autouse=True)
def _unhurried_disk():
    """Thousands of small files are written; no test can cut the power, which is what flushing is for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.fsync", lambda handle: None)
        yield
