"""Readers that packages and programs register: ``-m NAME:REST`` makes a member of what the factory NAME returns.

A package names its factory by an entry point of the group ``softmeet.readers``; it is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points
from inspect import signature
from typing import Any
from weakref import WeakValueDictionary

from softmeet.errors import InvalidInputError, SoftmeetError, cannot_load
from softmeet.members.member import Member

GROUP = "softmeet.readers"
# What softmeet uses of a reader.
_PARTS = ("name", "alphabet", "limit", "traits", "bytes", "open", "read", "close")
# What stands behind a member for its factory, if that takes it.
_OPTIONS = ("tokenizer", "top", "context", "dtype")
# What the addresses of servers begin with.
_SERVERS = ("http:", "https:")
_registered: dict[str, Callable[[str], Any]] = {}
_made: WeakValueDictionary[str, Any] = WeakValueDictionary()


def register_reader(name: str, factory: Callable[[str], Any]) -> None:
    """Register a factory of readers for this process, so that members ``NAME:REST`` are found.

    Args:
        name: the part before the colon; one that was registered before is replaced.
        factory: a function of REST, the part behind the colon, that returns a :class:`softmeet.Reader` whose alphabet
            is a :class:`softmeet.readers.token_alphabet.TokenAlphabet` with a tokenizer.

    Raises:
        InvalidInputError: if the name is no identifier, or a package has it.

    Example:
        >>> import softmeet
        >>> from softmeet.testing import Uniform
        >>> softmeet.register_reader("uniform", Uniform)
        >>> found = softmeet.Ensemble.from_pretrained("uniform:bytes").next_token("a", top=1)
        >>> round(found.top[0][1] * 257, 6)
        1.0
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise InvalidInputError(f"expected a name of letters, digits and underscores for readers, got {name!r}")
    if name in _installed():
        raise InvalidInputError(f"the name {name!r} is taken by {_installed()[name].value}: choose another one")
    _registered[name] = factory
    for line in [line for line in _made if line.partition(":")[0] == name]:
        del _made[line]


def is_registered(member: Member) -> bool:
    """Return whether a member's source is ``NAME:REST``, with the NAME of a factory of readers that is known here."""
    name, colon, _ = member.source.partition(":")
    return bool(colon) and (name in _registered or name in _installed())


def claims(member: Member) -> bool:
    """Return whether a member is a registered reader that claims, as the attribute ``claims`` of its factory says."""
    if not is_registered(member):
        return False
    name = member.source.partition(":")[0]
    return bool(getattr(_registered[name] if name in _registered else _installed()[name].load(), "claims", False))


def refuse_servers(members: Iterable[Member], where: str = "a saved ensemble") -> None:
    """Check that no member that a file names is behind a server: whoever loads the file would send it prompts and key.

    Args:
        members: the members.
        where: the file, for the message.

    Raises:
        InvalidInputError: if one is, or its tokenizer.
    """
    named = (name for one in members for name in (one.source, one.tokenizer or ""))
    if server := next((name for name in named if name.startswith(_SERVERS)), None):
        raise InvalidInputError(
            f"expected members of {where} that are files or on the Hub, got the server {server[:200]!r}, which would "
            "be sent the prompts and the key of whoever loads it: name the members by -m, or in Python"
        )


def reader_names() -> list[str]:
    """Return the names of all factories of readers that are known here."""
    return [*_installed(), *_registered]


def registered_reader(member: Member) -> Any:
    """Return the reader of a member that :func:`is_registered`, as its factory made it; the same while it is in use.

    Raises:
        InvalidInputError: if the member has a field that only checkpoints have, such as a dtype.
        CheckpointError: if the factory fails, or what it returns is no reader, or has no tokenizer.
    """
    line, given = member.source, member.base.changes()
    name, _, rest = line.partition(":")
    try:
        factory = _registered[name] if name in _registered else _installed()[name].load()
        taken = {key: given.pop(key) for key in _OPTIONS if key in given and key in signature(factory).parameters}
    except Exception as error:
        raise cannot_load(line, f"its factory cannot be imported: {error}") from error
    if wrong := sorted(set(given) | ({"adapter"} if member.adapter else set())):
        raise InvalidInputError(
            f"expected nothing but a prompt and a name behind {line}, which is no checkpoint, got {wrong[0]}: leave "
            "it out"
        )
    if (known := _made.get(str(member.base))) is not None:
        return known
    try:
        found = factory(rest, **taken)
    except SoftmeetError:
        raise
    except Exception as error:
        raise cannot_load(line, f"its factory raised {type(error).__name__}: {error}") from error
    _require_reader(line, found)
    # Whoever has the tokenizer keeps the reader, so that a member is not made once for each.
    vars(found.alphabet.tokenizer)["_softmeet_reader"] = found
    _made[str(member.base)] = found
    return found


def _require_reader(line: str, found: Any) -> None:
    if missing := [part for part in _PARTS if not hasattr(found, part)]:
        got = f"{type(found).__name__} without {missing[0]}"
        raise cannot_load(line, f"expected a softmeet.Reader of its factory, got {got}")
    if not (isinstance(found.limit, int) and found.limit > 1):
        got = f"{found.limit!r}: say 2**30 if there is none"
        raise cannot_load(line, f"expected a number of symbols as its reader's limit, got {got}")
    if found.traits.predictions is not None:
        raise cannot_load(line, "expected a reader that tells of every place, as decoding needs them")
    from transformers import PreTrainedTokenizerBase

    if not isinstance(getattr(found.alphabet, "tokenizer", None), PreTrainedTokenizerBase):
        remedy = "let its alphabet be a softmeet.readers.token_alphabet.TokenAlphabet with a tokenizer"
        raise cannot_load(line, f"expected the tokens of a tokenizer as its reader's symbols: {remedy}")


@cache
def _installed() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
