"""The model card of a saved ensemble: a README.md whose metadata have the Hub's schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from softmeet._version import __version__
from softmeet.members import zoo
from softmeet.members.member import Member

if TYPE_CHECKING:
    from softmeet.hf.configuration import EnsembleConfig

_TEXT = """# An ensemble of {n} language models

This is an ensemble of softmeet, which samples from several language models, the members, as one. The folder names its members and how they are combined; it holds
none of their weights.

## How to load it

```python
import softmeet

ensemble = softmeet.Ensemble.from_pretrained("this folder")
print(ensemble.generate("In the beginning", max_new_tokens=20))
```

`this folder` is the folder's path or, if it lies on the Hub, its id. After `import softmeet`, `AutoModelForCausalLM` and `AutoTokenizer` of transformers load it, too; without it they do not know
the architecture.{where}

## Members

| member | weight | trust | licence |
|---|---|---|---|
{rows}

## Settings

Rule: `{rule}`{source}, pool: `{pool}`, tolerance: {tol:g} nats, temperature: {temperature:.4g}, gate: {gate}. The members are combined over {vocabulary}. All settings are in `config.json`, which
softmeet {version} wrote.

## Limits

- Every member runs on every text, unless the gate is `unsure`, and all are in memory together.
- What the members' cards say of their languages, biases and licences holds for the ensemble; combining them makes none of it better.
{context}- Gradients do not flow through an ensemble: it can be evaluated, and its settings can be fitted, but it cannot be trained.
"""  # noqa: E501


def card(config: EnsembleConfig, names: list[str]) -> ModelCard:
    """Return the card of an ensemble.

    Its metadata name as ``base_model`` the members that have a hub id, without revisions, and never a path of this
    machine. The Hub knows four relations to base models; ``merge`` is the one for several. There is a ``license`` if
    the cards of all members are here, in their folders or the Hub's local cache, and name the same one.

    Args:
        config: the configuration, with the members' names as they were loaded.
        names: the members' names as they are saved, paths relative to the folder.
    """
    places = [_hub_id(name) for name in config.members]
    licences = [_licence(name, place) for name, place in zip(config.members, places, strict=True)]
    on_hub = list(dict.fromkeys(place[0] for place in places if place))
    agreed = licences[0] if len(set(licences)) == 1 and licences[0] != "other" else None
    data = ModelCardData(
        library_name="softmeet",
        pipeline_tag="text-generation",
        tags=["softmeet", "ensemble"],
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        license=agreed,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(config, names, licences)}")


def _text(config: EnsembleConfig, names: list[str], licences: list[str | None]) -> str:
    rows = []
    for name, weight, rho, licence in zip(names, config.weights, config.settings.member_trust, licences, strict=True):
        trust = f"{rho:g}" if config.settings.rule.uses_trust else ""
        rows.append(f"| `{name}` | {weight:g} | {trust} | {licence or 'not known here'} |")
    where = ""
    if any(_is_bundled(Member.parse(name)) for name in config.members):
        where += " Members that are bundled with softmeet need the package softmeet-zoo."
    if any(name.startswith(".") for name in names):
        where += (
            " Members whose names begin with a dot are folders or files beside this folder, which have to come along."
        )
    limit = getattr(config, "max_position_embeddings", None)
    context = f"- A text has at most {limit:,} tokens, the shortest member's context.\n" if limit else ""
    return _TEXT.format(
        n=len(names), rows="\n".join(rows), where=where, rule=config.rule, pool=config.pool, tol=config.tol,
        source=f" (of the {config.rule_source}, which has to be here)" if config.rule_source else "",
        temperature=config.rule_temperature, gate=f"`{config.gate}`" if config.gate else "none",
        vocabulary=config.vocabulary, version=__version__, context=context,
    )  # fmt: skip


def _hub_id(name: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision that a member's name stands for; None if it names no repository."""
    member = Member.parse(name)
    source = member.source
    if _is_bundled(member) or source.startswith((".", "/", "~")) or Path(source).exists():
        return None
    repository = str(Path(source).parent) if source.endswith(".gguf") else source
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return repository, member.revision


def _is_bundled(member: Member) -> bool:
    return zoo.locate(member.source) != member.source


def _licence(name: str, place: tuple[str, str | None] | None) -> str | None:
    """Return the licence that a member's own card names; None if there is no card on this machine, or none in it."""
    if place is None:
        path = Path(zoo.locate(Member.parse(name).source))
        file: object = (path.parent if path.suffix == ".gguf" else path) / "README.md"
    else:
        file = try_to_load_from_cache(place[0], "README.md", revision=place[1])
    try:
        found = (metadata_load(Path(file)) or {}).get("license") if isinstance(file, str | Path) else None
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None
