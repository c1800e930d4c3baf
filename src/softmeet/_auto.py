"""Registration of ensembles with transformers' Auto classes, without importing transformers.

After ``import softmeet``, ``AutoModelForCausalLM.from_pretrained(an_ensemble)`` must work; but ``softmeet --help`` must
not wait for torch, which ``AutoModelForCausalLM.register`` imports. So ``register`` of the Auto classes is called right
after some other code has imported their module, by a hook of the import system.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register ensembles with the Auto classes if their module is imported already, else as soon as it is."""
    if _AUTO_CLASSES in sys.modules:
        import_module("softmeet.hf")  # registers; it may be under way, and be what imports the Auto classes
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """An import hook that calls :func:`register` once, right after the Auto classes' module has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
