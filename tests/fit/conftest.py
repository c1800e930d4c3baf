"""Fixtures of the fits."""

from __future__ import annotations

import pytest
import tiny
import torch
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


@pytest.fixture(scope="module")
def one_head(folders):
    """Two members of one head, and so of hidden states that can be made to say anything."""
    found = Ensemble.from_pretrained(folders, "logit-mean")
    one, other = (member.get_output_embeddings().weight for member in found.model.members)
    with torch.no_grad():
        other.copy_(one)
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A pattern of files, one for each document."""
    folder = tmp_path_factory.mktemp("texts")
    for document in documents():
        (folder / f"{document.name}.txt").write_text(document.text)
    return folder / "*.txt"
