"""Fixtures of the tests over bytes."""

import pytest
from byte_members import save_two


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members with different tokenizers."""
    return save_two(tmp_path_factory.mktemp("members"))
