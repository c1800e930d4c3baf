"""Fixtures shared by the suite. Two threads of BLAS on two cores, and no network."""

import errno
import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray would have its workers give way to everything else, so that on a busy machine tests would wait for them in vain.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # processes that nothing here asks for

import pytest
import shapes
from browser import CHROMIUM
from hypothesis import HealthCheck, settings

shapes.install()
settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
gc.disable()  # until everything is imported
_checked = pytest.StashKey[bool]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Run a process more than there are cores: tests wait a sixth of their time, for servers above all."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Have shapes and types checked in the first case of every test of a module that is marked ``checked``.

    The checks take more than half of the time of what they check: they are on where each part is tested by itself, and
    off where all of them work together.
    """
    items.sort(key=lambda item: item.path.parent.name != "scaling")  # what waits most begins first, beside the rest
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        asked = item.get_closest_marker("checked") and not item.get_closest_marker("unchecked")
        item.stash[_checked] = bool(asked) and test not in seen
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Import transformers as the commands do, in a second less, but in the process that hands tests out to others."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return (yield)
    from softmeet.startup import _known_structure  # and not all of it: tests save quantised models

    with _known_structure():
        return (yield)


def pytest_collection_finish():
    """Spare the garbage collector what was imported: it would look through all of it again and again."""
    # Not above: the process that hands tests out to others has no use for it.
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 20, 20)  # tests are short, and leave little that only it finds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Switch the checks that ``--jaxtyping-packages`` puts in on or off."""
    shapes.only(item.stash[_checked])
    return (yield)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What is measured once, such as a gate's factor, is kept for the session alone."""
    os.environ["SOFTMEET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def interruptible():
    """Ctrl-C is not ignored, nor by processes that are started, though a shell's ``&`` has the tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def full_disk(monkeypatch):
    """There is no room for any file."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two tiny members, of which nobody changes anything."""
    import tiny

    folder = tmp_path_factory.mktemp("members")
    return [str(tiny.save(folder / name, name, seed=k)) for k, name in enumerate(("gpt2", "llama"))]


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


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; for a module alone, since its driver's event loop would be in the way of others."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """A function that starts a batcher over models' members; batchers are closed at the end."""
    # Only the tests of the server need its packages.
    from softmeet.server.batcher import Batcher
    from softmeet.server.ensembles import readers_of
    from softmeet.server.limits import Limits
    from softmeet.server.metrics import Metrics

    engines = []

    def start(*models, **options):
        limits, named = options.pop("limits", Limits()), {m: 0 for model in models for m in model.members}
        names = [[f"member {list(named).index(m)}" for m in model.members] for model in models]
        readers = readers_of(models, names, 0 if options.get("reproducible") else limits.kept_tokens)
        engines.append(Batcher(readers, limits, Metrics(), **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(0)
        engine.join()
