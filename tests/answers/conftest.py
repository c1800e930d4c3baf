"""Two tiny members."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [str(tiny.save(folder / name, name, seed=k)) for k, name in enumerate(("gpt2", "llama"))]
