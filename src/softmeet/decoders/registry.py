"""All decoders, by name."""

from __future__ import annotations

from typing import TypeVar

from softmeet.decoders.base import Decoder
from softmeet.errors import InvalidInputError
from softmeet.rules.frozen import unknown
from softmeet.rules.named import Named

_OWN = {
    "particles": "softmeet.decoders.particles:Particles",
    "agreement": "softmeet.decoders.agreement:Agreement",
    "spans": "softmeet.decoders.spans:Spans",
}

D = TypeVar("D", bound=type[Decoder])

DECODERS: Named[Decoder] = Named("decoder", Decoder, "a method decode", _OWN, "softmeet.decoders")


def register_decoder(decoder: D) -> D:
    """Register a decoder under its name for this process, so that texts such as ``--decoder NAME`` find it.

    Usable as a decorator. A package makes one known by an entry point of the group ``softmeet.decoders``.

    Args:
        decoder: a subclass of :class:`softmeet.decoders.base.Decoder` with a ``name``, a ``summary`` and a default for
            each option.

    Returns:
        ``decoder`` itself.

    Raises:
        InvalidInputError: if it is not such a class, or another class has its name.
    """
    DECODERS.register(decoder, "register_decoder")
    return decoder


def decoder_names() -> list[str]:
    """Return the names of all known decoders, without importing any.

    Example:
        >>> decoder_names()
        ['particles', 'agreement', 'spans']
    """
    return DECODERS.names()


def decoder_of(given: str | Decoder) -> Decoder:
    """Return a decoder from its text, ``NAME:option=value:option=value``; one that is given is returned.

    Raises:
        InvalidInputError: if there is no such decoder or option, or a value is not allowed.

    Example:
        >>> str(decoder_of("particles:n=8:ess=0.5"))
        'particles:n=8'
    """
    if isinstance(given, Decoder):
        return given
    if not isinstance(given, str):
        raise InvalidInputError(f"expected a decoder's name or a softmeet.decoders.base.Decoder, got {given!r}")
    name, *options = given.strip().split(":")
    kind, own = DECODERS.find(name), dict[str, str]()
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not value:
            raise InvalidInputError(f"expected option=value after the colon in {given!r}, got {option!r}")
        if key not in kind.model_fields:
            raise unknown(f"unknown option {key!r} in {given!r}", key, list(kind.model_fields))
        if key in own:
            raise InvalidInputError(f"expected each option once, got {key} twice in {given!r}")
        own[key] = value
    return kind(**own)
