"""Makes transformers' Auto classes know ensembles, without importing transformers before anyone else does.

``import softmeet`` must be enough for ``AutoModelForCausalLM.from_pretrained(an_ensemble)``, and ``softmeet --help``
must not wait for torch, which ``AutoModelForCausalLM.register`` would have to import. So it is called right after the
module with the Auto classes has been executed, which nothing but a hook of the import system can tell.
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
    """Register ensembles if the Auto classes are there, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        import_module("softmeet.hf")  # registers; it may be under way, and be what imports the Auto classes
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Calls :func:`register` after the Auto classes' module has been imported, once."""

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
