"""Fixtures of the core's tests."""

import pytest

from cl_core.testing import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Four processes joined by gloo, started when first asked for."""
    with Ranks(4) as pool:
        yield pool
