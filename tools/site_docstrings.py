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
# Two or three parameters that share a description, of which griffe takes one at a time.
_TOGETHER = re.compile(r"^    (?!\w*Error)(\w+), (?:(\w+), )?(\w+): ", re.MULTILINE)
_SHAPED = {"Bool", "Float", "Int"}  # of jaxtyping, whose shapes griffe would read as products
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([^`]+)`")


def _one_by_one(found: re.Match[str]) -> str:
    *others, last = filter(None, found.groups())
    return "".join(f"    {name}: see ``{last}``.\n" for name in others) + f"    {last}: "


class Docstrings(griffe.Extension):
    """Turn roles into links, which show as code if the site has no such entry, and read pydantic's fields."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Take a field's docstring and default from its call of ``Field``, and leave checks out of its type."""
        typed, call = attr.annotation, attr.value
        if isinstance(typed, griffe.ExprSubscript) and str(typed.left) == "Annotated":
            typed = typed.slice.elements[0] if isinstance(typed.slice, griffe.ExprTuple) else typed
        if isinstance(call, griffe.ExprCall) and str(call.function) == "Field":
            named = {each.name: each.value for each in call.arguments if isinstance(each, griffe.ExprKeyword)}
            first = [each for each in call.arguments if not isinstance(each, griffe.ExprKeyword)]
            if "description" in named and attr.docstring is None:
                attr.docstring = griffe.Docstring(ast.literal_eval(str(named["description"])), parent=attr)
            call = named.get("default", first[0] if first else None)
        attr.annotation, attr.value = _shaped(typed), _shown(call, attr.package)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Leave private base classes out."""
        cls.bases = [base for base in cls.bases if not str(base).rpartition(".")[2].startswith("_")]

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Leave private fields out of a dataclass's signature, and show what defaults are."""
        func.returns = _shaped(func.returns)
        func.parameters = griffe.Parameters(*(each for each in func.parameters if not each.name.startswith("_")))
        for one in func.parameters:
            one.annotation, one.default = _shaped(one.annotation), _shown(one.default, func.package)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of ``obj``, in place."""
        if obj.docstring:
            text = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)
            text = _TOGETHER.sub(_one_by_one, text).replace("::\n", ":\n")
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


def _shown(value: Any, package: griffe.Module) -> Any:
    """A public constant's value, if it is a number or a text; any other default as it stands."""
    if not isinstance(value, griffe.ExprName | griffe.ExprAttribute):
        return value
    try:
        constant: Any = package[value.canonical_path.removeprefix(f"{package.path}.")]
        return constant.value if isinstance(ast.literal_eval(str(constant.value)), float | int | str) else value
    except (KeyError, ValueError, SyntaxError, AttributeError, griffe.GriffeError):
        return value


def _shaped(typed: Any) -> Any:
    """A type whose shapes stand in quotation marks, as in the source."""
    if isinstance(typed, griffe.Expr):
        for part in typed.iterate(flat=False):
            if part is not typed:
                _shaped(part)
    if isinstance(typed, griffe.ExprSubscript) and str(typed.left) in _SHAPED:
        pair: Any = typed.slice
        shape = str(pair.elements[1])
        pair.elements[1] = shape if shape.startswith(("'", '"')) else repr(shape)
    return typed
