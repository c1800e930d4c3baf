"""Fixtures of the commands' tests."""

import pytest
import tiny


@pytest.fixture(scope="module")
def members(folders):
    """Two tiny members, as options."""
    return tiny.each("-m", folders)
