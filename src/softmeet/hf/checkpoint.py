"""Saving and loading an ensemble: its checkpoint is a folder that names the members and holds no weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.hf.card import card
from softmeet.hf.chat import ChatTemplates
from softmeet.hf.claiming import give_claims, saved_lines, with_own
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.union_space import union_space
from softmeet.hf.unread import reading, refuse_quantised
from softmeet.hf.vocabulary import choose_vocabulary
from softmeet.members import names as known
from softmeet.members import zoo
from softmeet.members.files import Files, is_files
from softmeet.members.huggingface import Dtype, load_members, load_tokenizers, random_member, require_loadable
from softmeet.members.member import Member
from softmeet.members.native import TRANSFORMERS, is_gguf, with_hash
from softmeet.members.placement import Device
from softmeet.members.prompting import prefix_of, require_room
from softmeet.members.registered import is_registered, refuse_servers
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.vocabulary import CommonVocabulary, surely_differ
from softmeet.members.zoo import Named
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning, require_followed
from softmeet.readers.union_form import UnionForm

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble


def assemble(
    over_tokens: type[Any],
    config: EnsembleConfig,
    models: Sequence[PreTrainedModel],
    vocabulary: CommonVocabulary | Sequence[Spelling],
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> Any:
    """Make an ensemble, over tokens or over bytes, of loaded members, in evaluation mode.

    Args:
        over_tokens: :class:`softmeet.hf.EnsembleForCausalLM`, of which the class of ensembles over bytes is a subclass.
        config: the configuration, which names the members.
        models: the members' models, loaded by :func:`softmeet.members.huggingface.load_members`, in the same order.
        vocabulary: the result of :func:`softmeet.hf.vocabulary.choose_vocabulary`: the members' common vocabulary for
            an ensemble over tokens, or each member's spelling (its tokens as byte strings) for one over bytes.
        tokenizers: the members' tokenizers, for their chat templates.

    Returns:
        an instance of ``over_tokens``.

    Raises:
        UnsupportedHeadError: if the rule needs the members' softmax matrices, as ``meet`` does, and a member's cannot
            be read, or the ensemble is over bytes.
        VocabularyMismatchError: if a member's head has no logit for one of the common tokens.
    """
    if isinstance(vocabulary, CommonVocabulary):
        model = over_tokens(config, models)
        model.adopt(vocabulary.tokenizer, vocabulary.ids)
    else:
        kinds = {kind.__name__: kind for kind in over_tokens.__subclasses__()}
        if config.vocabulary.startswith("union"):
            space = union_space(UnionForm.parse(config.vocabulary), vocabulary, tokenizers)
            model = kinds["UnionEnsembleForCausalLM"](config, models, tokenizers, space)
        else:
            model = kinds["ByteEnsembleForCausalLM"](config, byte_members(config, models, vocabulary, tokenizers))
    model.chat = ChatTemplates(config.members, tokenizers)
    return model.eval()


def byte_members(
    config: EnsembleConfig,
    models: Sequence[PreTrainedModel],
    spellings: Sequence[Spelling],
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> list[ByteMember]:
    """Make each member's reader by bytes, from its model, its tokenizer and its spelling (its tokens as bytes)."""
    pruning = Pruning(config.prune) if config.prune else Pruning(0.0, None)
    prompts = [prefix_of(Member.parse(name), own) for name, own in zip(config.members, tokenizers, strict=True)]
    prefixes = config.prefixes or prompts
    return [
        ByteMember(model, spelling, pruning, prefix)
        for model, spelling, prefix in zip(models, spellings, prefixes, strict=True)
    ]


def require_few_ways(
    names: Sequence[str], texts: Sequence[bytes], vocabulary: str, *, trust_remote_code: bool = False
) -> None:
    """Check, by tokenizers alone, that all ways to cut texts into members' tokens can be followed, as by ``prune=0``.

    Nothing is checked if the members may be combined over tokens.

    Args:
        names: the members.
        texts: those that are read.
        vocabulary: as of :func:`softmeet.hf.vocabulary.require_vocabulary`.
        trust_remote_code: whether to run code that comes with a tokenizer.

    Raises:
        InvalidInputError: if there are too many.
    """
    tokenizers = load_tokenizers(names, trust_remote_code=trust_remote_code)
    if vocabulary == "bytes" or (vocabulary == "auto" and surely_differ(tokenizers)):
        for name, own in zip(names, tokenizers, strict=True):
            for text in texts:
                require_followed(spelling_of(name, own), text)


def saved_config(name: Any) -> EnsembleConfig | None:
    """Read the configuration of a saved ensemble; return None if ``name`` is not the name of one."""
    if not isinstance(name, str | Path | Member):
        return None
    member = Member.of(name)
    if set(member.changes()) - {"revision"} or member.source.endswith(".gguf") or _has_no_folder(member):
        return None
    where = known.find(member)
    try:
        found = EnsembleConfig.get_config_dict(where.pop("pretrained_model_name_or_path"), **where)[0]
        kind = found.get("model_type")
    except (OSError, ValueError):
        return None
    except (TypeError, AttributeError, RecursionError) as error:  # transformers takes for granted that it is a dict
        raise CheckpointError(f"config.json of {name} is damaged: it is no JSON object of moderate depth") from error
    return EnsembleConfig.from_dict(found) if kind == EnsembleConfig.model_type else None


def _has_no_folder(member: Member) -> bool:
    """Return whether a member is no checkpoint, or a bundled one."""
    return is_registered(member) or zoo.expand(member) != [str(member)] or zoo.locate(member.source) != member.source


def member_names(members: Sequence[Named | Files] | Named) -> list[str]:
    """Return the members, in order, each as a line of text: of a saved ensemble, a family, or a list of names.

    Raises:
        CheckpointError: if a saved ensemble names a member that does not exist, or there is nothing of one given name.
    """
    saved = saved_config(members)
    if saved is not None:
        return absolute(saved.members, Path(str(members)))
    several = isinstance(members, Iterable) and not isinstance(members, str | Mapping)
    named: list[Any] = list(members) if several else [members]  # type: ignore[arg-type]
    return [name for entry in named for name in zoo.expand(entry)]


def absolute(names: Sequence[str], base: Path) -> list[str]:
    """Turn the relative paths of saved members into absolute ones; GGUF files that name no engine are transformers'.

    Args:
        names: the saved members, each as a line of text; sources and adapters that begin with a dot are paths relative
            to ``base``.
        base: the folder of the checkpoint.

    Raises:
        CheckpointError: if a path does not exist.
    """

    def found(path: str) -> str:
        if not path.startswith("."):
            return path
        there = os.path.normpath(base.resolve() / path)
        if not Path(there).exists():
            raise CheckpointError(
                f"the ensemble in {base} names a member {path}, but there is no {there}: move the member there, or "
                f"edit members in {base / 'config.json'}"
            )
        return there

    moved = [_moved(Member.parse(name), found) for name in names]
    return [str(replace(one, engine=one.engine or TRANSFORMERS) if is_gguf(one) else one) for one in moved]


def relative(names: Sequence[str], base: Path) -> list[str]:
    """Turn local paths of members and adapters into paths relative to the checkpoint's folder ``base``.

    Such a path begins with a dot. Hub ids and bundled names are returned unchanged; GGUF files that llama.cpp runs get
    their hashes.
    """

    def found(path: str) -> str:
        if zoo.locate(path) != path or not Path(path).exists():
            return path
        near = os.path.relpath(Path(path).resolve(), base.resolve())
        return near if near.startswith(".") else f"./{near}"

    return [str(_moved(with_hash(Member.parse(name)), found)) for name in names]


def _moved(member: Member, path: Callable[[str], str]) -> Member:
    """Return a member with other paths of its source and its adapter."""
    adapter = None if member.adapter is None else path(member.adapter)
    return replace(member, source=path(member.source), adapter=adapter)


def places(device_map: Device | Sequence[Device], n: int) -> Device | Sequence[Device]:
    """Split a map from modules of the ensemble to devices into one for each member.

    Args:
        device_map: a dict whose keys are ``members.0`` to ``members.{n - 1}`` or modules below them, such as
            ``members.1.lm_head``; any other value is returned unchanged, but ``{"": device}`` as the device.
        n: the number of members.

    Returns:
        For each member a device, a map from its own modules to devices, or None if ``device_map`` leaves it out.

    Raises:
        InvalidInputError: if the dict names members, and a key is of none of the n.
    """
    if not isinstance(device_map, dict):
        return device_map
    if set(device_map) == {""}:
        return device_map[""]  # type: ignore[no-any-return]
    if not any(str(name).startswith("members.") for name in device_map):
        return device_map
    found: list[dict[str, Any]] = [{} for _ in range(n)]
    for name, place in device_map.items():
        head, _, rest = str(name).removeprefix("members.").partition(".")
        if not (str(name).startswith("members.") and head.isdigit() and int(head) < n):
            raise InvalidInputError(f"expected a map of members.0 to members.{n - 1} and their modules, got {name!r}")
        found[int(head)][rest] = place
    return [own[""] if set(own) == {""} else own or None for own in found]


def load(
    over_tokens: type[Any],
    folder: Path,
    config: EnsembleConfig | None,
    dtype: Dtype | Sequence[Dtype],
    device_map: Device | Sequence[Device],
    trust_remote_code: bool,
    offload_folder: str | Path | None = None,
    **changes: Any,
) -> Any:
    """Load a saved ensemble and its members.

    Args:
        over_tokens: :class:`softmeet.hf.EnsembleForCausalLM`, as :func:`softmeet.hf.checkpoint.assemble` takes it.
        folder: the folder or hub id of the checkpoint; members' relative paths start there.
        config: replaces the saved configuration; None to read that.
        dtype: the weights' dtype, one for all members or one each; None for fp32 on the CPU and the checkpoints' own
            elsewhere.
        device_map: a device (None: the CPU), a strategy such as ``"auto"``, or a dict by module; one for all members or
            one each. A dict may also name the members as modules of the ensemble, such as ``members.1.lm_head``.
        trust_remote_code: whether code that comes with a member may run.
        offload_folder: a folder for weights that are to stay on disk but cannot be read from a member's checkpoint.
        changes: settings in place of the saved ones, by name, if ``config`` is None; unknown names are ignored.

    Raises:
        CheckpointError: if a member cannot be found or loaded, or files are named that were not saved here.
        InvalidInputError: if a device is unknown, ``device_map`` names a member that does not exist, a list of dtypes
            or devices does not have one per member, or a setting is not valid.
        VocabularyMismatchError: if the tokenizers do not fit the ensemble's vocabulary, tokens or bytes.
        UnsupportedHeadError: if the rule needs softmax matrices, as ``meet`` does, and a member's cannot be read, or
            the ensemble is over bytes.
    """
    if config is None:
        config, _ = EnsembleConfig.from_pretrained(str(folder), return_unused_kwargs=True, **changes)
    config.members = absolute(config.members, folder)
    config.files = with_own(config.files, (), str(folder), trust_remote_code)
    device = places(device_map, len(config.members))
    quantised = require_loadable(config.members, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    refuse_quantised(config, quantised)
    tokenizers = load_tokenizers(config.members, trust_remote_code=trust_remote_code)
    require_room(config.members, tokenizers, trust_remote_code=trust_remote_code)
    vocabulary = choose_vocabulary(config, tokenizers)
    members = load_members(
        config.members,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        offload_folder=offload_folder,
        on_loaded=reading(config),
    )
    model = assemble(over_tokens, config, members, vocabulary, tokenizers)
    give_claims(model)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def random_members(config: EnsembleConfig, *, over_bytes: bool) -> tuple[list[PreTrainedModel], Any]:
    """Build each member's base from its own configuration, with random weights, in evaluation mode, without adapters.

    Args:
        config: the ensemble's configuration, which names the members. Its ``vocabulary`` is set to ``"bytes"`` or
            ``"tokens"``, and relative paths among its ``members`` to absolute ones.
        over_bytes: True for the members of an ensemble over bytes, False for one over tokens.

    Returns:
        (the members, in order; the result of :func:`softmeet.hf.vocabulary.choose_vocabulary`).

    Raises:
        InvalidInputError: if ``config.vocabulary`` is of the other kind of ensemble; or, over tokens, there are
            prefixes.
        CheckpointError: if a member's configuration or tokenizer cannot be read.
        UnsupportedHeadError: if, over bytes, the rule needs softmax matrices, as ``meet`` does.
        VocabularyMismatchError: if, over tokens, the tokenizers differ; or, over bytes, one of them cannot be used.
    """
    wanted = "bytes" if over_bytes else "tokens"
    if config.vocabulary not in ("auto", wanted):
        raise InvalidInputError(
            f"expected a configuration with vocabulary={wanted!r}, got {config.vocabulary!r}: leave the class to "
            "AutoModelForCausalLM.from_config"
        )
    config.vocabulary, config.members = wanted, absolute(config.members, Path(config.name_or_path))
    vocabulary = choose_vocabulary(config, load_tokenizers(config.members))
    bases = [Member.parse(name).base for name in config.members]
    models = {base: random_member(str(base), config.dtype).eval() for base in dict.fromkeys(bases)}
    return [models[base] for base in bases], vocabulary


def require_on_hub(config: EnsembleConfig) -> None:
    """Check that all members and adapters are on the Hub, so that others can load the ensemble.

    Raises:
        InvalidInputError: if one is a local folder, or there are files of this machine.
    """
    if files := [line for line in config.files if is_files(line)]:
        raise InvalidInputError(f"expected members on the hub, got files of this machine, {files}: leave them out")
    parts = [own for name in config.members for own in Member.parse(name).places]
    if local := [name for name in parts if Path(name).exists()]:
        raise InvalidInputError(
            f"expected members on the hub, got local folders {local}: push them first, then build the ensemble from "
            "their hub ids"
        )


def save(model: AnyEnsemble, folder: Path) -> None:
    """Write an ensemble's configuration, generation configuration, tokenizer and model card into ``folder``.

    The folder is made if there is none, and files of the same names are replaced. No weights are written: the
    configuration names the members, local ones by paths relative to the folder. ``model`` is unchanged.

    Raises:
        InvalidInputError: if a member is behind a server, which no saved ensemble may name; nothing is written then.
    """
    refuse_servers(map(Member.parse, model.config.members))
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.members, config.files = relative(config.members, folder), saved_lines(config.files)
    described = card(model.config, config.members)
    config.architectures = [type(model).__name__]
    for part in (config, model.generation_config, model.tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    (folder / "README.md").write_text(str(described), encoding="utf-8")
