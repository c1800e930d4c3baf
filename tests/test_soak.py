"""A few seconds of the soak: 64 streams of the bundled ensemble, then malformed requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_slice_of_the_soak(tmp_path):
    arguments = ["--seconds", 1, "--requests", 50, "--examples", 1, "--tokens", 4, "--json", tmp_path / "soak.json"]
    done = subprocess.run(
        [sys.executable, SOAK, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert found["answers"] >= 64
    assert found["good"] == 1
    assert found["refused"] == 48
