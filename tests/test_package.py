"""The wheel and the sdist: they build, install, and hold the bundled members."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[1]
PROBE = """
import sys
import softmeet, softmeet.cli.main
from softmeet.members import zoo
assert softmeet.__file__.startswith(sys.argv[1]), softmeet.__file__
ensemble = softmeet.Ensemble.from_pretrained("narrow", "logit-mean")  # which compiles nothing
assert len(ensemble.names) == 4 and len(zoo.expand("wide")) == 3
print(ensemble.generate("And", max_new_tokens=2, do_sample=False))
"""


def run(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and with the wheel that is built from it, by the backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("dist")
    with contextlib.chdir(ROOT):
        sdist = build.build_sdist(str(folder))
    with tarfile.open(folder / sdist) as tar:
        tar.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    with contextlib.chdir(source):
        build.build_wheel(str(folder))
    return folder


@pytest.mark.slow
def test_the_wheel_is_built_from_the_sdist_installs_and_generates(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    assert run("-c", PROBE, tmp_path / "site", cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_the_sdist_holds_what_is_needed_to_build_and_test(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    expected = {
        "README.md",
        "LICENSE",
        "Makefile",
        "tests/test_package.py",
        "tools/train_zoo.py",
        "docs/theory/agreement.md",
    }
    assert expected <= names
    assert sum(name.endswith("model.safetensors") for name in names) == 9


def test_metadata():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert facts["build-system"]["build-backend"] == "hatchling.build"
    project = facts["project"]
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert "transformers>=5.24,<6" in project["dependencies"]
    assert not [d for d in project["dependencies"] if "==" in d]
    extras = set(project["optional-dependencies"]) - {"all", "bench", "demo", "docs", "test", "dev"}
    assert project["optional-dependencies"]["all"] == [f"softmeet[{','.join(sorted(extras))}]"]


def test_no_file_is_past_400_lines():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert not {f.name: n for f in files if (n := len(f.read_text().splitlines())) > 400}
