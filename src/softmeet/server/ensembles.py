"""A server's ensembles by name, how they are loaded, and what a request may change about one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError, SoftmeetError, UnsupportedHeadError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.chat import chat_of
from softmeet.hf.retrieval import with_passages
from softmeet.members.member import titles
from softmeet.members.passages import PASSAGE_RULE, Passage
from softmeet.readers.reader import Reader
from softmeet.readers.recurrent import RecurrentReader
from softmeet.readers.transformers import require_keys_and_values
from softmeet.rules.gates import Automatic, Disagreement
from softmeet.rules.settings import Settings, parse_rule
from softmeet.server.errors import RequestError, absent
from softmeet.server.schemas import CHANGES, Extension
from softmeet.server.sequences import Combination, unused
from softmeet.server.strict import PassedOver

_NO_ROWS = "its rows cannot join a running batch; use softmeet generate"


@dataclass(frozen=True, eq=False)
class Served:
    """An ensemble under the name by which requests ask for it.

    Args:
        name: the name.
        ensemble: the loaded ensemble.
        names: its members' titles, such as the last two parts of their paths; requests choose members by them.
        created: when it was loaded, in whole seconds since 1970.
    """

    name: str
    ensemble: Ensemble
    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    def _chosen(self, wanted: Sequence[str] | None, explicit: set[str]) -> tuple[EnsembleForCausalLM, tuple[int, ...]]:
        """Return the ensemble of the members and files that a request names, by default all, and the members' indices.

        Raises:
            RequestError: if there is none of a name, or no model among them, or weights cannot be scaled.
        """
        every = (*self.names, *self.files)
        known = set(every if wanted is None else wanted)
        if absent := sorted(known - set(every)):
            raise RequestError(
                f"the ensemble {self.name} has no member {absent[0]!r}: expected some of {', '.join(every)}",
                param="softmeet.members",
            )
        chosen = tuple(k for k, name in enumerate(self.names) if name in known)
        claiming = tuple(k for k, name in enumerate(self.files) if name in known)
        if not chosen:
            models = ", ".join(self.names)
            raise RequestError(f"expected a model among the members, {models}", param="softmeet.members")
        model = self.ensemble.model
        if len(chosen) < len(self.names):
            _require_scalable(model, chosen, explicit)
        whole = len(chosen) == len(self.names) and len(claiming) == len(self.files)
        return model if whole else _part(model, chosen, claiming), chosen

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the user's files beside the members; requests choose among them, too."""
        return tuple(reader.name for reader in self.ensemble.model.claimants)

    def combination(self, asked: Extension, allowed: Sequence[str], max_trust: float = float("inf")) -> Combination:
        """Return the members and settings that answer a request: the ensemble's own, with the request's changes.

        If a request names some of the members, the user's files among them, the others are left out; the models'
        weights in the pool are scaled to the sum that all models' have.
        Where that would turn a member's positive weight into a negative one, the request has to give weights, too.
        The ensemble's own settings that the rule does not use have no effect. Its gate is left out where it cannot be
        used; the combination says why.

        Args:
            asked: the changes, from the request's field ``softmeet``; those of its fields in
                :data:`softmeet.server.schemas.CHANGES` that are None change nothing, its other fields are ignored.
            allowed: the fields that this server lets requests change, some of :data:`softmeet.server.schemas.CHANGES`.
            max_trust: the largest trust that a request may ask for, or the member's own, if that is larger.

        Raises:
            RequestError: if the request changes a field that is not allowed, names a member that the ensemble lacks,
                gives a setting an invalid value or one that the rule does not use, asks for more trust than it may, or
                for a gate that cannot be used; if the number of weights or trusts does not fit the members; or if it
                has to give weights and does not.
            RuleError: if the rule comes from a package that fails to provide it.
        """
        given = {name: value for name in CHANGES if (value := getattr(asked, name)) is not None}
        explicit = {*given, *_in_rule(asked.rule)}
        if refused := sorted(explicit - set(allowed)):
            raise RequestError(
                f"this server does not let requests change {', '.join(refused)}", param=f"softmeet.{refused[0]}"
            )
        given.pop("passages", None)
        _require_passages(asked)
        model, chosen = self._chosen(given.pop("members", None), explicit)
        settings = _changed(model, given)
        if idle := [name for name in unused(settings.rule) if name in explicit]:
            raise RequestError(
                f"the rule {settings.rule.name} uses no {idle[0]}: leave it out, or ask for a rule that uses it, such "
                "as meet",
                param=f"softmeet.{idle[0]}", code="invalid_value",
            )  # fmt: skip
        if "trust" in explicit:
            _check_trust(settings, model.settings, max_trust)
        if why := _idle_gate(model, settings):
            if "gate" in explicit:
                raise _refused(f"{why}: leave gate out, or ask for another one, such as unsure:0.5", "softmeet.gate")
            settings = settings.ungated()
        return Combination(model, model.combiner.resolved(settings), tuple(self.names[k] for k in chosen))


def _require_passages(asked: Extension) -> None:
    """Raise RequestError if a request gives the temperature of passages, but none of these."""
    if asked.passages is None and asked.passage_temperature is not None:
        raise RequestError(
            "passage_temperature is for the scores of passages: give these, or leave it out",
            param="softmeet.passage_temperature",
        )


def behind_passages(how: Combination, asked: Extension) -> Combination:
    """Return the combination of members behind a request's passages.

    Raises:
        RequestError: if these are no passages, or do not fit into a member's context.
    """
    try:
        found = [Passage(one.text, one.score) for one in asked.passages or ()]
        part = with_passages(
            how.model, found, temperature=asked.passage_temperature or 1.0, settings=how.settings,
            rule=PASSAGE_RULE if asked.rule is None else None,
        )  # fmt: skip
    except InvalidInputError as error:
        raise _refused(error, "softmeet.passages") from None
    shown = [f"{name}+passage{k}" for name in how.names for k in range(1, len(found) + 1)]
    return Combination(part, part.settings, tuple(shown))


def _in_rule(text: str | None) -> dict[str, Any]:
    """Return the settings that a rule's text holds, by name; none for None. Raise RequestError if it is invalid."""
    try:
        return {} if text is None else parse_rule(text)[1]
    except InvalidInputError as error:
        raise _refused(error, "softmeet.rule") from None


def _changed(model: EnsembleForCausalLM, given: dict[str, Any]) -> Settings:
    """Return a model's settings with a request's changes; raise RequestError, with the field at fault, if invalid."""
    try:
        settings = model.settings.changed(**given)
        model.require(settings)
    except (InvalidInputError, UnsupportedHeadError) as error:
        at_fault = next((f"softmeet.{k}" for k in given if _fails(model, k, given[k])), "softmeet")
        raise _refused(error, at_fault) from None
    return settings


def _check_trust(asked: Settings, own: Settings, limit: float) -> None:
    """Raise RequestError if a trust is above the limit, and above what the operator has chosen for that member."""
    for rho, given in zip(asked.member_trust, own.member_trust, strict=True):
        if not rho <= max(limit, given):
            raise RequestError(
                f"expected a trust of at most {limit:g}, this server's limit, got {rho:g}: ask for less, or start the "
                "server with a larger --max-trust",
                param="softmeet.trust", code="invalid_value",
            )  # fmt: skip


def _fails(model: EnsembleForCausalLM, name: str, value: Any) -> bool:
    """Return whether one change of a model's settings is invalid by itself."""
    try:
        model.require(model.settings.changed(**{name: value}))
    except (InvalidInputError, UnsupportedHeadError):
        return True
    return False


def _refused(error: SoftmeetError | str, param: str) -> RequestError:
    """Return what is wrong with a setting as a request's error, with advice that can be followed in a request."""
    return RequestError(str(error), param=param, code="invalid_value")


def _idle_gate(model: EnsembleForCausalLM, settings: Settings) -> str | None:
    """Return a clause that says why a gate that was named has no solve to save; None if it has, or is ``auto``."""
    gate = settings.gate
    if isinstance(gate, Automatic) or not isinstance(gate, Disagreement):
        return None
    if not settings.rule.reads_heads:
        return f"the rule {settings.rule.name} has no solve that the gate {gate} could save"
    if model.combiner.average(settings):
        return f"the members have one head, so there is no solve that the gate {gate} could save"
    return None


def _require_scalable(whole: EnsembleForCausalLM, chosen: tuple[int, ...], explicit: set[str]) -> None:
    """Raise RequestError if members' weights cannot be scaled to the sum of all, and a request gives no others.

    They cannot if their sum is 0 or of another sign than that of all: what is positive would become negative.
    """
    own = whole.config.weights
    weights = [own[k] for k in chosen]
    if "weights" not in explicit and max(weights) > 0 >= sum(weights) * sum(own):
        raise RequestError(
            f"expected weights for the members asked for, as the ensemble's own for them, {weights}, cannot be scaled "
            f"to a sum of {sum(own):g}: give softmeet.weights",
            param="softmeet.weights", code="invalid_value",
        )  # fmt: skip


@lru_cache(maxsize=64)
def _part(whole: EnsembleForCausalLM, chosen: tuple[int, ...], claiming: tuple[int, ...]) -> EnsembleForCausalLM:
    """Return an ensemble of some members and files, by their indices; weights are scaled to sum to what they all do.

    Where they cannot be, weights are equal, until a request gives others.
    """
    config, total = whole.config, sum(whole.config.weights)
    weights = [config.weights[k] for k in chosen]
    share, own = sum(weights), dict(config.settings)
    own["weights"] = [total * w / share for w in weights] if share * total > 0 else None
    own["trust"] = [config.settings.member_trust[k] for k in chosen]
    if own["weights"] and weights[0] < 0:
        own["gate"] = None  # it may let this member answer alone
    prefixes = config.prefixes and [config.prefixes[k] for k in chosen]
    names = [config.members[k] for k in chosen]
    kept: dict[str, Any] = {"vocabulary": config.vocabulary, "prune": config.prune, "prefixes": prefixes}
    part = whole.part(chosen, EnsembleConfig(names, settings=Settings.of(own), **kept))
    part.generation_config = whole.generation_config
    part.chat = chat_of(whole).of(chosen)
    part.claimants = [whole.claimants[k] for k in claiming]
    return part


class Ensembles:
    """All ensembles of a server, by name; requests that name none get the first.

    Args:
        served: the ensembles, at least one, with distinct names; iteration gives them in this order.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_name = {s.name: s for s in served}

    def __iter__(self) -> Iterator[Served]:
        """Iterate over the ensembles in the order in which they were given."""
        return iter(self._by_name.values())

    def find(self, name: str | None, passed_over: PassedOver | None = None) -> Served:
        """Return the ensemble with this name, or the first one if ``name`` is None, or "default" and no ensemble's.

        Args:
            name: the name that a request has, or None.
            passed_over: takes note of a name that is no ensemble's; None if it is refused.

        Raises:
            RequestError: if there is no ensemble with this name (status 404).
        """
        first = next(iter(self))
        if name is None or (name == "default" and name not in self._by_name):
            return first
        if name not in self._by_name:
            if passed_over is not None:
                passed_over.model(name, first.name)
                return first
            raise RequestError(
                absent(f"there is no model {name[:100]!r}", name, list(self._by_name)),
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self._by_name[name]


def load(named: dict[str, list[str]], find: Callable[..., Ensemble] | None = None, **settings: Any) -> Ensembles:
    """Load ensembles; a member that several of them contain is loaded once.

    Args:
        named: for each ensemble's name, a list with one saved ensemble or bundled family, or with its members' names.
        find: a function that loads one ensemble and returns it, called once for each name, in order, with the list of
            that name, ``loaded=`` (a dict to which it adds the members that it loads, at first empty, the same in all
            calls) and ``settings``. None for ``Ensemble.from_pretrained``.
        settings: further keyword arguments of ``find``, such as ``dtype`` or ``rule``, for all ensembles.

    Raises:
        SoftmeetError: if an ensemble cannot be loaded: the errors of ``find`` are not caught.
    """
    shared: dict[Any, Any] = {}
    served = []
    for name, members in named.items():
        ensemble = (find or _found)(members, loaded=shared, **settings)
        served.append(Served(name, ensemble, tuple(titles(ensemble.names))))
    return Ensembles(served)


def _found(members: list[str], **settings: Any) -> Ensemble:
    return Ensemble.from_pretrained(members[0] if len(members) == 1 else members, **settings)


def readers_of(
    models: Iterable[EnsembleForCausalLM], names: Iterable[Iterable[str]], kept_tokens: int = 0
) -> dict[Any, Reader]:
    """Make a reader of every member of ensembles, one of those that several ensembles share.

    Args:
        models: the ensembles, in evaluation mode.
        names: for each, its members' names in messages.
        kept_tokens: for each member, the most prompt tokens whose keys and values are kept for prompts that begin
            alike. Such a prompt is run in other pieces, and so rounded otherwise.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values, as a recurrent model's does.
    """
    found = dict[Any, Reader]()
    for model, own in zip(models, names, strict=True):
        for i, name in enumerate(own):
            if model.key_of(i) in found:
                continue
            reader = found[model.key_of(i)] = model.new_reader(i, name, kept_tokens)
            if isinstance(reader, RecurrentReader):
                require_keys_and_values(name, model.members[i].config, _NO_ROWS)
    return found
