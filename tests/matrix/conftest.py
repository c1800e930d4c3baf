"""The worlds, their servers and the golden texts of the matrix, with the shipped defaults."""

from dataclasses import replace

import golden
import pytest
from roads import Servers
from worlds import make_worlds


@pytest.fixture(scope="package")
def worlds(tmp_path_factory):
    return make_worlds(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="package")
def servers(worlds):
    found = Servers(worlds)
    yield found
    found.close()


@pytest.fixture(scope="package")
def single(worlds):
    """The worlds in the shipped precision."""
    return {name: replace(world, dtype=None) for name, world in worlds.items()}


@pytest.fixture(scope="package")
def single_servers(single):
    found = Servers(single)
    yield found
    found.close()


@pytest.fixture(scope="package")
def known():
    return golden.texts()
