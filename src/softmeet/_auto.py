"""Registration of ensembles with transformers' Auto classes, without importing transformers.

After ``import softmeet``, ``AutoModelForCausalLM.from_pretrained(an_ensemble)`` must work; but ``softmeet --help`` must
not wait for torch, which ``AutoModelForCausalLM.register`` imports. So ``register`` of the Auto classes is called right
after some other code has imported their module.
"""

from __future__ import annotations

from importlib import import_module

from softmeet.after_import import after_import

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register ensembles with the Auto classes if their module is imported already, else as soon as it is."""
    # Which registers them; it may be under way, and be what imports the Auto classes.
    after_import(_AUTO_CLASSES, lambda _: import_module("softmeet.hf"))
