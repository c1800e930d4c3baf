"""How the site reads docstrings: :class:`Settings` is a link to its entry, and a field's description its docstring.

An extension of griffe, which reads the sources for mkdocstrings.
"""

from __future__ import annotations

import ast
import re
from textwrap import indent
from typing import Any

import griffe

# griffe knows sections of examples by this title alone.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_BARE_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")


class Docstrings(griffe.Extension):
    """Turn roles into links, which show as code if the site has no such entry, and read pydantic's fields."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Take a field's docstring and default from its call of ``Field``, and leave checks out of its type."""
        typed = attr.annotation
        if isinstance(typed, griffe.ExprSubscript) and str(typed.left) == "Annotated":
            attr.annotation = typed.slice.elements[0] if isinstance(typed.slice, griffe.ExprTuple) else typed
        call = attr.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) != "Field":
            return
        named = {each.name: each.value for each in call.arguments if isinstance(each, griffe.ExprKeyword)}
        first = [each for each in call.arguments if not isinstance(each, griffe.ExprKeyword)]
        if "description" in named and attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(named["description"])), parent=attr)
        attr.value = named.get("default", first[0] if first else None)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, in place."""
        if obj.docstring:
            text = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)
            text = _BARE_EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[0], "    "), text)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)


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
