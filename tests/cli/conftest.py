"""Fixtures of the commands' tests."""

import pytest
import tiny


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Two tiny members, as options."""
    folder = tmp_path_factory.mktemp("members")
    return [x for name in ("gpt2", "llama") for x in ("-m", tiny.save(folder / name, name))]
