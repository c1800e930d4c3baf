"""Who is asked: members alone, and ensembles of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.hf.checkpoint import member_names, saved_config
from softmeet.hf.claiming import fingerprints
from softmeet.members.files import Files, is_files
from softmeet.members.gguf_file import fingerprint
from softmeet.members.member import Member, short, titles
from softmeet.members.native import with_hash
from softmeet.members.zoo import expand
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import parse_rule

# What an ensemble may have beside members and a rule, and whether it is for loading or for writing.
_OPTIONS = {"vocabulary": "loading", "gate": "loading", "decoder": "writing"}
_NAMED = re.compile(r"[^\s=:/]+=")


@dataclass(frozen=True)
class Subject:
    """Who answers.

    Attributes:
        name: as tables show it.
        members: lines of text, one for each member.
        rule: how they are combined; None of a saved ensemble, which has its own.
        saved: a saved ensemble; None of others.
        loading, writing: further arguments of ``Ensemble.from_pretrained``, and of ``generate``.
        instead: whether it is a model that could be run in place of all others, and is no member.
        beside: the user's files that stand beside it, as lines of text.
    """

    name: str
    members: tuple[str, ...]
    rule: str | None = None
    saved: str | None = None
    loading: dict[str, str] = field(default_factory=dict)
    writing: dict[str, str] = field(default_factory=dict)
    instead: bool = False
    beside: tuple[str, ...] = ()

    @property
    def is_member(self) -> bool:
        """Whether it is one member alone."""
        return len(self.members) == 1 and not (self.instead or self.saved or self.beside)

    @property
    def named(self) -> str | list[str]:
        """What ``Ensemble.from_pretrained`` loads it from: a saved ensemble or members, and files behind them."""
        first = [self.saved] if self.saved else self.members
        return self.saved if self.saved and not self.beside else [*first, *self.beside]

    def facts(self) -> dict[str, Any]:
        """Return all that its answers depend on, as JSON has it."""
        config = saved_config(self.saved) if self.saved else None
        # With the words of prompts that are files, and with files' hashes.
        members = [str(with_hash(Member.of(line))) for line in self.members]
        files = [*(_files(line) for line in self.members), *([fingerprints(self.beside)] if self.beside else [])]
        return {**vars(self), "members": members, "files": files, "config": config and config.to_json_string()}


def _files(line: str) -> list[str]:
    """Return what tells the files of the folders apart that a member is loaded from."""
    member = Member.of(line)
    places = [Path(place, member.subfolder or "") for place in (member.checkpoint, member.adapter) if place]
    return [
        fingerprint(file) for place in places if place.is_dir() for file in sorted(place.iterdir()) if file.is_file()
    ]


def subjects(members: Sequence[str], ensembles: Sequence[str], instead: Sequence[str] = ()) -> list[Subject]:
    """Return every member alone, those of ensembles among them, then the ensembles, and models in place of all.

    Args:
        members: lines of text; a family is all its members, and of a saved ensemble these and the ensemble are asked.
            Beside files among them every member and ensemble without files is asked once more.
        ensembles: ``NAME=A B RULE``, members by their names, or by the last part of those in ``members``, or files, and
            a rule, and maybe ``vocabulary=…``, ``gate=…`` and ``decoder=…``; or ``NAME=SAVED``. ``NAME=`` may be left
            out.
        instead: lines of text of models that could be run in place of the members, and are none.

    Raises:
        InvalidInputError: if an ensemble has no rule, or an unknown one, or cannot have files, or two have one name.

    Example:
        >>> [one.name for one in subjects(["wide/gpt2", "wide/llama"], ["both=gpt2 llama prob-mean"])]
        ['wide/gpt2', 'wide/llama', 'both']
        >>> [one.name for one in subjects(["wide/gpt2", "files:~/project"], [])]
        ['wide/gpt2', 'wide/gpt2 + files:project']
    """
    members, files = ([line for line in members if is_files(line) is kind] for kind in (False, True))
    saved = [line for line in members if Path(line).is_dir() and saved_config(line)]
    named = [member_names(line) if line in saved else expand(line) for line in members]
    lines, found = list(dict.fromkeys(chain.from_iterable(named))), list[Subject]()
    for text in [*saved, *ensembles]:
        found.append(_ensemble(text, lines))
        lines += [line for line in found[-1].members if line not in lines]
    alone = [Subject(title, (line,), "logit-mean") for title, line in zip(titles(lines), lines, strict=True)]
    if files:
        more = tuple(str(Files.parse(line)) for line in files)
        bare = [one for one in alone + found if not one.beside]
        found += [replace(one, name=_beside(one.name, more), beside=more) for one in bare]
    for one in found:
        if one.beside and (one.writing or one.loading.get("vocabulary", "").startswith("union")):
            raise InvalidInputError(
                f"expected no union of tokens and no decoder beside files, got {one.name!r}: name the files in -e "
                "'A B files:PATH RULE', beside other ensembles alone"
            )
    found += [Subject(f"instead: {short(line)}", (line,), "logit-mean", instead=True) for line in instead]
    names = [one.name for one in alone + found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidInputError(f"expected a name of its own for each, got {twice!r} twice: say -e 'NAME=…'")
    return alone + found


def _beside(name: str, files: Sequence[str]) -> str:
    return " + ".join([name, *(Files.parse(line).title for line in files)])


def _ensemble(text: str, lines: Sequence[str]) -> Subject:
    words, name = shlex.split(text), ""
    if words and (given := _NAMED.match(words[0])) and given.group()[:-1] not in _OPTIONS:
        name, words[0] = given.group()[:-1], words[0][given.end() :]
    own = {key: x for key, equals, x in (word.partition("=") for word in words) if equals and key in _OPTIONS}
    plain = [word for word in words if word.partition("=")[0] not in _OPTIONS and not is_files(word)]
    parts: dict[str, Any] = {
        kind: {key: x for key, x in own.items() if _OPTIONS[key] == kind} for kind in ("loading", "writing")
    }
    files = parts["beside"] = tuple(str(Files.parse(word)) for word in words if is_files(word))
    if len(plain) == 1:
        members = member_names(plain[0])
        if len(members) < 2 and not ((config := saved_config(plain[0])) and config.files):
            raise InvalidInputError(f"expected members and a rule, or a saved ensemble, got {text!r}")
        return Subject(name or _beside(short(plain[0]), files), tuple(members), saved=plain[0], **parts)
    *members, rule = plain or [""]
    if rule.partition(":")[0] not in rule_names():
        raise InvalidInputError(
            f"expected members and then a rule, one of {', '.join(rule_names())}, maybe with vocabulary=, gate= or "
            f"decoder= behind it, got {text!r}"
        )
    parse_rule(rule)
    meant = [_line(word, lines) for word in members]
    usual = f"{_beside(' + '.join(map(_brief, meant)), files)}, {' '.join([rule, *own.values()])}"
    return Subject(name or usual, tuple(meant), rule, **parts)


def _brief(line: str) -> str:
    return short(line).rpartition("/")[2]


def _line(word: str, lines: Sequence[str]) -> str:
    """Return the member that a word means: one of ``lines`` by its name, or that of its last part, or another.

    Raises:
        InvalidInputError: if it means several.
    """
    if (line := str(Member.of(word))) in lines:  # however its parts are ordered
        return line
    for names in (lambda line: (line, short(line)), lambda line: (_brief(line), _brief(line).split(".")[0])):
        meant = [line for line in lines if word in names(line)]
        if len(meant) > 1:
            raise InvalidInputError(f"expected a name of one member, got {word!r}, which may be {' or '.join(meant)}")
        if meant:
            return meant[0]
    return word
