"""Fixtures shared by the suite. Two threads of BLAS on two cores, and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def narrow():
    """The bundled narrow family, as an ensemble."""
    from softmeet import Ensemble

    return Ensemble.from_pretrained("narrow")


@pytest.fixture(scope="session")
def wide():
    """The bundled wide family, as an ensemble."""
    from softmeet import Ensemble

    return Ensemble.from_pretrained("wide")
