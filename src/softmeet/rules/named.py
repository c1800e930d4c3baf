"""``Named``: classes by name, such as all rules: softmeet's own, those of installed packages, those of this process.

A package makes a class known by an entry point; it is imported when it is first used. If a name occurs more than once,
softmeet's own class has it, else the package's, else the one registered in this process.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from typing import Any, Generic, TypeVar, cast

from softmeet.errors import InvalidInputError, RuleError
from softmeet.rules.frozen import Frozen, unknown

T = TypeVar("T", bound=Frozen)
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Named(Generic[T]):
    """The classes of one kind, by name.

    Args:
        kind: what they are, such as "rule".
        base: the class of which all are subclasses, with a ``name``, a ``summary`` and options.
        needs: what they have to define, for messages, such as "a method solve".
        own: softmeet's own, as "module:class", by name; in the order in which they are documented.
        group: the group of packages' entry points.
        check: raises InvalidInputError where a class, given as what :meth:`require` gets, is wrong in another way.
    """

    def __init__(
        self,
        kind: str,
        base: type[Any],
        needs: str,
        own: Mapping[str, str],
        group: str,
        check: Callable[[Any], None] = lambda one: None,
    ) -> None:
        self._kind, self._base, self._needs, self._own, self._group = kind, base, needs, own, group
        self._check = check
        self._registered = dict[str, type[T]]()
        self._loaded = dict[str, type[T]]()

    def register(self, one: type[T], where: str) -> None:
        """Make a class known in this process under its name; one that is defined again replaces the earlier one.

        Args:
            one: the class.
            where: what registers it, for messages.

        Raises:
            InvalidInputError: if it is no such class, or another has its name.
        """
        self.require(one, where)
        name = _name(one)
        known = self._registered.get(name)
        if name in self.installed or (known is not None and _place(known) != _place(one)):
            raise InvalidInputError(
                f"the name {name!r} is taken: there is such a {self._kind}; give yours another name"
            )
        self._registered[name] = one

    def names(self) -> list[str]:
        """Return all names, without importing anything."""
        return [*self.installed, *(name for name in self._registered if name not in self.installed)]

    def find(self, name: str) -> type[T]:
        """Return the class of a name, importing it if necessary.

        Raises:
            InvalidInputError: if there is none; the message suggests the nearest name.
            RuleError: if the package that announces it fails to provide it.
        """
        if name in self.installed:
            if name not in self._loaded:
                self._loaded[name] = self._load(self.installed[name])
            return self._loaded[name]
        if name in self._registered:
            return self._registered[name]
        raise unknown(f"unknown {self._kind} {name!r}", name, self.names())

    def every(self) -> tuple[T, ...]:
        """Return an instance of each class with its default options; one whose package fails is warned of, left out."""
        found = []
        for name in self.names():
            try:
                found.append(self.find(name)())
            except RuleError as error:
                warnings.warn(str(error), stacklevel=2)
        return tuple(found)

    def source_of(self, one: T) -> str | None:
        """Return where an instance's class is from: ``package NAME``, ``class NAME``; None if it is softmeet's own."""
        name = _name(type(one))
        if name in self._own:
            return None
        entry = self.installed.get(name)
        if entry is not None and entry.dist is not None:
            return f"package {entry.dist.name}"
        packages = packages_distributions().get(type(one).__module__.partition(".")[0])
        return f"package {packages[0]}" if packages else f"class {type(one).__qualname__}"

    def require_own_name(self, one: T, where: str) -> None:
        """Check that an instance's name leads to its own class, as it is saved by name.

        Raises:
            InvalidInputError: if another class has the name, or the class fails :meth:`require`.
            RuleError: if the name belongs to a package that fails to provide it.
        """
        kind = type(one)
        self.require(kind, where)
        if _name(kind) in self.names() and _place(self.find(_name(kind))) != _place(kind):
            raise InvalidInputError(f"the name {_name(kind)!r} of {kind.__qualname__} is taken: give it another one")

    def require(self, given: object, where: str) -> None:
        """Check that an object is a usable class of this kind.

        Args:
            given: the object.
            where: its source, for the message.

        Raises:
            InvalidInputError: if it is no concrete subclass of the base class, lacks a well-formed name or a summary,
                or has an option without a default.
        """
        base, one = self._base, cast(Any, given)
        if not (inspect.isclass(one) and issubclass(one, base)) or inspect.isabstract(one):
            raise InvalidInputError(
                f"expected a subclass of softmeet.{base.__name__} with {self._needs} in {where}, got {one!r}"
            )
        name, summary = getattr(one, "name", None), getattr(one, "summary", None)
        if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(summary, str) and summary):
            raise InvalidInputError(
                f"expected {one.__name__} to have a name of small letters, digits and hyphens, and a summary, got "
                f"name = {name!r}, summary = {summary!r}"
            )
        self._check(one)
        if needy := [option for option, field in cast(Any, given).model_fields.items() if field.is_required()]:
            raise InvalidInputError(
                f"expected a default for each option of the {self._kind} {name!r}, got none for {needy[0]}"
            )

    def forget(self) -> None:
        """Have packages be looked for anew, as after one was installed."""
        vars(self).pop("installed", None)
        self._loaded.clear()

    @cached_property
    def installed(self) -> dict[str, EntryPoint]:
        """Where softmeet's own classes and those of packages are, by name."""
        found = {name: EntryPoint(name, target, self._group) for name, target in self._own.items()}
        for entry in entry_points(group=self._group):
            if entry.name in found:
                warnings.warn(
                    f"the {self._kind} {entry.name!r} of {self._origin(entry)} is left out: "
                    f"{self._origin(found[entry.name])} has that name; it needs another one",
                    stacklevel=2,
                )
            else:
                found[entry.name] = entry
        return found

    def _load(self, entry: EntryPoint) -> type[T]:
        where = f"the {self._kind} {entry.name!r} of {self._origin(entry)}"
        try:
            one: type[T] = entry.load()
            self.require(one, entry.value)
        except Exception as error:
            raise RuleError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if _name(one) != entry.name:
            raise RuleError(f"{where} calls itself {_name(one)!r}: expected one name in both places")
        return one

    def _origin(self, entry: EntryPoint) -> str:
        owner = "softmeet itself" if entry.name in self._own else f"the entry point {entry.value}"
        return owner if entry.dist is None else f"the package {entry.dist.name}"


def _name(one: type[Any]) -> str:
    return str(one.name)  # type: ignore[attr-defined, unused-ignore]


def _place(one: type[Any]) -> tuple[str, str]:
    """Return a class's (module, qualified name); equal for a class that is defined again, as by a notebook's cell."""
    return one.__module__, one.__qualname__
