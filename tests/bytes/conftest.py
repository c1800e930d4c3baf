"""Fixtures of the tests over bytes."""

import pytest
from byte_members import save_two, unpruned

from softmeet import Ensemble


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members with different tokenizers."""
    return save_two(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def ensemble(folders):
    return unpruned(folders)


@pytest.fixture(scope="module")
def pruned(folders):
    return Ensemble.from_pretrained(folders, "logit-mean", vocabulary="bytes")
