"""Fixtures of the fits."""

from __future__ import annotations

import pytest
import tiny
from texts import documents

from softmeet import Ensemble
from softmeet.evaluation.positions import observe_text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders)


@pytest.fixture(scope="module")
def positions(ensemble):
    return observe_text(ensemble, documents())
