"""The wheels and the sdist: they build, install, and hold what they should. Bundled members have one of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[2]
PROBE = """
import shutil, sys
from pathlib import Path
sys.path = [p for p in sys.path if p == sys.argv[1] or not Path(p, "softmeet_zoo").exists()]  # one that is editable
import softmeet, softmeet.cli.main
from softmeet.errors import CheckpointError
from softmeet.members import zoo
assert softmeet.__file__.startswith(sys.argv[1]), softmeet.__file__
assert str(zoo.folder()).startswith(sys.argv[1]), zoo.folder()
ensemble = softmeet.Ensemble.from_pretrained("narrow", "logit-mean")  # which compiles nothing
assert len(ensemble.names) == 4 and len(zoo.expand("wide")) == 3
print(ensemble.generate("And", max_new_tokens=2, do_sample=False))
for folder in Path(sys.argv[1]).glob("softmeet_zoo*"):
    shutil.rmtree(folder)
sys.modules.pop("softmeet_zoo", None)
try:
    softmeet.Ensemble.from_pretrained()
except CheckpointError as error:
    print(error)
"""


def run(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and the two wheels that are built from it, by the backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("dist")
    with contextlib.chdir(ROOT):
        sdist = build.build_sdist(str(folder))
    with tarfile.open(folder / sdist) as tar:
        tar.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    for part in (source, source / "zoo"):
        with contextlib.chdir(part):
            build.build_wheel(str(folder))
    return folder


def wheels(dist):
    """The wheels of softmeet and of softmeet-zoo."""
    (package,), (members,) = dist.glob("softmeet-*.whl"), dist.glob("softmeet_zoo-*.whl")
    return package, members


def probe(site):
    """Run the probe with what is installed in a folder, and whatever else is installed here."""
    return run("-c", PROBE, site, cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site)})


@pytest.mark.slow
def test_the_wheels_are_built_from_the_sdist_install_and_generate(dist, tmp_path):
    """Once the bundled members are taken away, the package says how to install them."""
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site, *wheels(dist))
    said = probe(site)
    assert "the LORD" in said
    assert "a package of their own, softmeet-zoo, which is not installed: " in said
    assert " install 'softmeet[zoo]'; or name members of your own" in said


@pytest.mark.slow
def test_the_weights_are_in_the_wheel_of_the_bundled_members_alone(dist):
    package, members = wheels(dist)
    assert package.stat().st_size < 1.2e6  # code alone
    assert not [name for name in zipfile.ZipFile(package).namelist() if name.endswith(".safetensors")]
    names = zipfile.ZipFile(members).namelist()
    assert sum(name.endswith("/model.safetensors") for name in names) == 9
    assert {"softmeet_zoo/__init__.py", "softmeet_zoo/narrow/opt-a/README.md"} <= {*names}
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_sdist_holds_what_is_needed_to_build_and_test(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    expected = {
        "README.md",
        "LICENSE",
        "Makefile",
        "tests/house/test_package.py",
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
    assert "transformers>=5.19,<6" in project["dependencies"]
    assert not [d for d in project["dependencies"] if "==" in d]
    every = project["optional-dependencies"]
    extras = set(every) - {"all", "bench", "demo", "docs", "local", "test", "dev", "zoo"}
    assert every["all"] == [f"softmeet[{','.join(sorted(extras))}]"]
    # pip would look for it on an index in vain: `pip install -e '.[all]'` has to work in a clone.
    assert [name for name in every if "zoo" in "".join(every[name])] == ["zoo"]
    # uv finds it by this: `uvx --from '.[zoo]' softmeet`.
    assert (ROOT / facts["tool"]["uv"]["sources"]["softmeet-zoo"]["path"] / "pyproject.toml").exists()


def test_the_bundled_members_are_a_distribution_of_the_same_version():
    import softmeet_zoo

    import softmeet

    assert softmeet_zoo.__version__ == softmeet.__version__
    project = tomllib.loads((ROOT / "zoo" / "pyproject.toml").read_text())["project"]
    assert project["license"] == "CC-BY-2.5"
    assert (
        f"{project['name']}>={'.'.join(softmeet.__version__.split('.')[:2])}"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["zoo"]
    )
