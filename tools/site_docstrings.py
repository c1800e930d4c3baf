"""Cross-references of docstrings, for the site: :class:`Settings` becomes a link where the site documents Settings."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")


class Roles(griffe.Extension):
    """Turn the roles of docstrings into links, which lead nowhere, and show as code, if the site has no such entry."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, in place."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, named: str) -> str:
    name, shown = named.lstrip("~"), named.rpartition(".")[2] if named.startswith("~") else named
    home = obj if obj.is_class or obj.is_module else obj.parent
    first, _, rest = name.partition(".")
    target = name
    if home is not None and first != "softmeet":
        try:
            target = ".".join(filter(None, [home.resolve(first), rest]))
        except griffe.NameResolutionError:
            target = f"{home.path}.{name}"
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
