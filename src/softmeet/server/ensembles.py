"""The ensembles of a server, by name, and what a request may change about them."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.calibrated import resolved
from softmeet.members.zoo import DEFAULT, short
from softmeet.rules.settings import Settings, parse_rule
from softmeet.server.errors import RequestError
from softmeet.server.schemas import CHANGES, Extension
from softmeet.server.sequences import Combination

# NAME= before a member: a member's own text may hold an equals sign behind a plus.
_PREFIX = re.compile(r"([\w.-]+)=")


@dataclass(frozen=True, eq=False)
class Served:
    """An ensemble that is served.

    Args:
        name: by which requests ask for it.
        ensemble: that answers.
        names: of its members, short.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    ensemble: Ensemble
    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    def combination(self, asked: Extension, allowed: Sequence[str]) -> Combination:
        """Return the members and the settings by which a request is answered.

        Args:
            asked: what the request says about them.
            allowed: what requests may change, of :data:`softmeet.server.schemas.CHANGES`.

        Raises:
            RequestError: the request changes what it may not, or names a member that there is not.
            InvalidInputError: a setting is wrong.
        """
        given = {name: value for name in CHANGES if (value := getattr(asked, name)) is not None}
        in_rule = parse_rule(asked.rule)[1] if asked.rule is not None else {}
        if refused := sorted({*given, *in_rule} - set(allowed)):
            raise RequestError(
                f"this server does not let requests change {', '.join(refused)}", param=f"softmeet.{refused[0]}"
            )
        wanted = set(given.pop("members", self.names))
        if absent := sorted(wanted - set(self.names)):
            raise RequestError(
                f"the ensemble {self.name} has no member {absent[0]!r}: expected some of {', '.join(self.names)}",
                param="softmeet.members",
            )
        chosen = tuple(k for k, name in enumerate(self.names) if name in wanted)
        model = self.ensemble.model if len(chosen) == len(self.names) else _part(self.ensemble.model, chosen)
        # Nothing is calibrated while requests wait.
        settings = resolved(model, model.settings.changed(**given), may_calibrate=False)
        return Combination(model, settings, tuple(self.names[k] for k in chosen))


@lru_cache(maxsize=64)
def _part(whole: EnsembleForCausalLM, chosen: tuple[int, ...]) -> EnsembleForCausalLM:
    """Return an ensemble of some of the members; their weights in the pool are scaled to sum to what all had."""
    config, total = whole.config, sum(whole.config.weights)
    weights = [config.weights[k] for k in chosen]
    share = sum(weights) or 1.0
    own = dict(config.settings) | {
        "weights": [total * w / share for w in weights] if sum(weights) else None,
        "trust": [rho for k in chosen for rho in config.settings.trusts()[k]],
    }
    part = whole.part(chosen, EnsembleConfig([config.members[k] for k in chosen], settings=Settings.of(own)))
    part.generation_config = whole.generation_config
    return part


class Ensembles:
    """All ensembles of a server; the first is the one that requests get which name none."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_name = {s.name: s for s in served}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def find(self, name: str | None) -> Served:
        """Return the ensemble of that name, or the first for None.

        Raises:
            RequestError: there is none of that name.
        """
        if name is None:
            return next(iter(self))
        if name not in self._by_name:
            raise RequestError(
                f"there is no model {name[:100]!r}: expected one of {', '.join(self._by_name)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self._by_name[name]


def named(given: Sequence[str], members: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return what each ensemble that is to be served is made of, by the ensemble's name.

    Args:
        given: saved ensembles and bundled families, with their names as ``NAME=…``; without one, an ensemble is called
            by the end of its path. Members joined by commas are an old form.
        members: of the ensemble ``default``, or as ``NAME=…`` of another one.

    Raises:
        InvalidInputError: a name comes twice.

    >>> named(["narrow", "big=folder/wide"])
    {'narrow': ['narrow'], 'big': ['folder/wide']}
    >>> named([], ["gpt2", "other=distilgpt2", "opt"])
    {'default': ['gpt2', 'opt'], 'other': ['distilgpt2']}
    """
    found: dict[str, list[str]] = {}
    for text in members:
        prefix = _PREFIX.match(text)
        name = prefix.group(1) if prefix else "default"
        found.setdefault(name, []).append(text[prefix.end() :] if prefix else text)
    for text in given:
        name, _, parts = text.rpartition("=")
        name = name or short(parts)
        if name in found:
            raise InvalidInputError(f"expected a name for each ensemble, got {name!r} twice: give names as NAME=…")
        found[name] = parts.split(",")
        if len(found[name]) > 1:
            today = " ".join(f"-m {name}={part}" for part in found[name])
            warnings.warn(f"members joined by commas are an old form and end with 0.3.0: say {today}", stacklevel=2)
    return found or {"default": [DEFAULT]}


def load(named: dict[str, list[str]], find: Callable[..., Ensemble] | None = None, **settings: Any) -> Ensembles:
    """Load ensembles by name; a member that several of them name is loaded once.

    Args:
        named: for each name a saved ensemble or a bundled family, or several members.
        find: loads an ensemble from such a list; None for ``Ensemble.from_pretrained``.
        settings: passed on to it.
    """
    shared: dict[Any, Any] = {}
    served = []
    for name, members in named.items():
        ensemble = (find or _found)(members, loaded=shared, **settings)
        resolved(ensemble.model, ensemble.model.settings)
        served.append(Served(name, ensemble, tuple(map(short, ensemble.names))))
    return Ensembles(served)


def _found(members: list[str], **settings: Any) -> Ensemble:
    return Ensemble.from_pretrained(members[0] if len(members) == 1 else members, **settings)
