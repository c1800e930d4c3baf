"""What a server knows of how long requests take keeps no ensemble in memory."""

import gc
import weakref
from types import SimpleNamespace

from softmeet.server.kinds import Kinds


class Model:
    """Stands for an ensemble that was made for one request, as behind its passages."""


def test_an_ensemble_that_nobody_needs_any_more_is_forgotten():
    kinds, model = Kinds(alone=False), Model()
    request = SimpleNamespace(report=None, choices=2, prompts=["a"])
    sequence = SimpleNamespace(combination=SimpleNamespace(model=model, settings="mean"), request=request)
    sequence.combination = type("C", (), {"model": model, "settings": "mean", "__hash__": lambda self: 1})()
    kinds.learn(sequence, 0.03)
    assert len(kinds.of(sequence)) == 3  # known to be dear
    gone = weakref.ref(model)
    del model, sequence
    gc.collect()
    assert gone() is None
