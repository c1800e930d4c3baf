"""``Member``: what a member of an ensemble is, in one small object and in one line of text.

The line is ``SOURCE[@REV][+key=value]…``, as in ``org/base@main+adapter=org/lora+name=tuned``; a plus in a value or a
path is written ``++``. Commands, YAML, Python, the server and saved ensembles share this form; it is read only here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from softmeet.errors import InvalidInputError, nearest

# One line that ends so is the path of a file with the prompt; any other text is the prompt itself.
_FILES = (".txt", ".md", ".jinja")
# A hub id with a revision, and maybe a file in it.
_REVISION = re.compile(r"([^@]+)@([^/@]+)(?:/([^/]+\.gguf))?")
# The most bytes of one part of a path.
_LONGEST = 255
# Where a template takes the text that is to be continued.
SLOT = "{prompt}"


@dataclass(frozen=True)
class Member:
    """One member of an ensemble: a checkpoint, and how it is loaded and what it reads.

    Args:
        source: a hub id (``org/model``), a folder, a ``.gguf`` file, its name in ollama and such
            programs (``qwen2.5-coder:0.5b``), or a bundled name (``wide/gpt2``).
        revision: the branch, tag or commit of a hub id; None for the main branch.
        subfolder: the folder, inside the source, that holds the checkpoint.
        file: the name of a GGUF file in the source.
        adapter: a hub id (``org/lora``, ``org/lora@revision``) or folder of an adapter of peft's, put on the model.
        prompt: what this member alone reads before every text; or, with ``{prompt}`` in it, a template that the text is
            put into. One line that ends in .txt, .md or .jinja is the path of a file, which is read at once.
        device: where the weights go, as ``device`` of ``Ensemble.from_pretrained``; None for what that says.
        dtype: of the weights, such as ``bfloat16``; None for what ``dtype`` of ``Ensemble.from_pretrained`` says.
        quantization: the kind of quantisation in which the weights are loaded, such as ``int8``; None for the
            checkpoint's own.
        engine: what runs a GGUF file: ``llama.cpp``, as it is, or ``transformers``, which dequantises it; None for
            llama.cpp where that is installed and no adapter, dtype, quantisation or device is asked for.
        context: the most tokens of a text of a GGUF file that llama.cpp runs; None for those that the file names.
        gpu_layers: how many layers of such a file are put on a GPU, where the library has one; None for none.
        repack: whether llama.cpp copies such a file's weights into its layout for the processor, ``on`` or ``off``;
            None for the layout that is faster, which is measured once on a machine.
        tokenizer: the member whose tokenizer a model behind a server has.
        top: how many of the likeliest tokens such a server is asked for, or ``all``.
        hash: what :func:`softmeet.members.gguf_file.fingerprint` returns for a GGUF file, which is refused if it has
            changed; saved ensembles have it.
        name: what the member is called where it is shown; None for a name made of the others.

    Raises:
        InvalidInputError: if the source is empty, a field is no text that UTF-8 can hold, or the file of a prompt
            cannot be read, or is empty.

    Example:
        >>> member = Member.parse("org/model@v2+dtype=bfloat16")
        >>> member.source, member.revision, member.dtype, str(member)
        ('org/model', 'v2', 'bfloat16', 'org/model@v2+dtype=bfloat16')
        >>> Member("org/model", adapter="org/lora").title
        'org/model+org/lora'
    """

    source: str
    revision: str | None = None
    subfolder: str | None = None
    file: str | None = None
    adapter: str | None = None
    prompt: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    engine: str | None = None
    context: str | None = None
    gpu_layers: str | None = None
    repack: str | None = None
    tokenizer: str | None = None
    top: str | None = None
    hash: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        """Check the fields, of which an empty text is None, and read the prompt's file, if it is one."""
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field.name, value))
        if str(self.source).startswith("~"):  # which shells leave where it does not begin a word
            object.__setattr__(self, "source", os.path.expanduser(self.source))  # noqa: PTH111 - unknown users stay
        longest = max(len(part.encode()) for part in str(self.source).split("/"))
        if not (self.source or "").strip() or longest > _LONGEST:
            shown = str(self.source or "")[:80]
            raise InvalidInputError(f"expected a member's source: a hub id, a folder, or a bundled name, got {shown!r}")
        if self.prompt is None or not is_file(self.prompt):
            return
        prompt, text = self.prompt, _text_of(self.source, self.prompt)
        object.__setattr__(self, "prompt", text)
        if self.name is None:
            object.__setattr__(self, "name", f"{self.title.removesuffix('+prompt')}+{Path(prompt).stem}")

    def __repr__(self) -> str:
        return f"Member({str(self)!r})"

    def __str__(self) -> str:
        parts = [f"{key}={value}" for key, value in self.changes().items() if key != "revision"]
        return joined(self.checkpoint, *parts)

    def changes(self) -> dict[str, str]:
        """Return the fields beside ``source`` that are given, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "source"}

    @classmethod
    def parse(cls, text: str | Path, *, files: bool = True) -> Member:
        """Read a member from its line of text; the path of an existing file or folder is a source as it stands.

        Args:
            text: the line, or a path.
            files: whether its prompt may be the path of a file, which is read.

        Raises:
            InvalidInputError: if a part after a plus is no ``key=value`` with a known key, a key comes twice, or the
                prompt is a file that may not be read.
        """
        if not isinstance(text, str | Path) or not str(text).strip():
            raise InvalidInputError(f"expected a member's name: a hub id, a folder, or a bundled name, got {text!r}")
        if isinstance(text, Path) or (("+" in text or "@" in text) and _exists(text)):
            return cls(str(text))
        known = [one.name for one in fields(cls) if one.name not in ("source", "revision")]
        source, said = split(text, "SOURCE[@REV][+key=value]…", known)
        found = dict(said)
        if len(found) < len(said):
            key, _ = Counter(key for key, _ in said).most_common(1)[0]
            raise InvalidInputError(f"expected each key of a member once, got {key} twice in {text!r}")
        if not files and is_file(found.get("prompt", "")):
            raise InvalidInputError(
                f"expected the text of a prompt in a saved ensemble, got the path of a file, {found['prompt']!r}: "
                "write the text there"
            )
        is_path = source.startswith((".", "/", "~")) or _exists(source)
        if not is_path and (parted := _REVISION.fullmatch(source)):
            source, found["revision"] = parted[1], parted[2]
            found |= {"file": parted[3]} if parted[3] else {}
        return cls(source, **found)

    @classmethod
    def of(cls, given: Member | str | Path | Mapping[str, Any]) -> Member:
        """Return a member from any of its forms: itself, its line of text, a path, or a mapping of its fields.

        Raises:
            InvalidInputError: as by :meth:`parse`; or if a mapping has no ``source``, or an unknown key.
        """
        if isinstance(given, Member):
            return given
        if not isinstance(given, Mapping):
            return cls.parse(given)
        known = [one.name for one in fields(cls)]
        wrong = [str(key) for key, value in given.items() if key not in known or not isinstance(value, str | Path)]
        if wrong or "source" not in given:
            raise InvalidInputError(
                f"expected a member with a source and texts for {', '.join(known[1:])}, got "
                f"{repr(wrong[0]) if wrong else 'no source'} in {dict(given)!r}"
            )
        whole = cls.parse(str(given["source"]))
        return replace(whole, **{key: str(value) for key, value in given.items() if key != "source"})

    @property
    def title(self) -> str:
        """The name to show: ``name``, or the last two parts of the source and what is put on it.

        Example:
            >>> Member.parse("/models/wide/gpt2+prompt=You are terse.").title
            'wide/gpt2+prompt'
        """
        if self.name is not None:
            return self.name
        base = "/".join(Path(self.source.rpartition("://")[2]).parts[-2:])
        more = [self.file, self.subfolder, self.adapter and "/".join(Path(self.adapter).parts[-2:]), self.quantization]
        return "+".join([base, *filter(None, more), *(["prompt"] if self.prompt is not None else [])])

    @property
    def weights(self) -> Member:
        """The member as far as its weights go, without prompt and name. Members with equal ones share a model."""
        return replace(self, prompt=None, name=None)

    @property
    def checkpoint(self) -> str:
        """The source and, behind an @, the revision, as messages name them."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    @property
    def places(self) -> list[str]:
        """The hub ids or paths that have to be there for it: its source's and its adapter's."""
        return [self.source, *([self.adapter] if self.adapter else [])]

    @property
    def base(self) -> Member:
        """The member without its adapter, prompt and name, whose weights an adapter is put on."""
        return replace(self.weights, adapter=None)

    def reads(self, text: str) -> str:
        """Return what the member reads for a text: its template with the text in it, or its prompt and the text.

        >>> Member("org/model", prompt="Q: {prompt} A:").reads("Why?"), Member("org/model").reads("Why?")
        ('Q: Why? A:', 'Why?')
        """
        own = self.prompt or ""
        return own.replace(SLOT, text) if SLOT in own else own + text

    @property
    def before(self) -> str | None:
        """What the member reads before every text: its prompt, or what its template has before the text; or None."""
        return None if self.prompt is None else self.prompt.partition(SLOT)[0] or None

    @property
    def is_template(self) -> bool:
        """Whether its prompt has something after ``{prompt}``, so that a text is not simply put behind it."""
        return bool((self.prompt or "").partition(SLOT)[2])


def joined(*parts: str) -> str:
    """Return the line of text of a source and what stands behind it, of which :func:`split` makes these parts."""
    return "+".join(part.replace("+", "++") for part in parts)


def split(line: str, form: str, known: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return (the source, the keys and values behind it) of a line of text.

    Raises:
        InvalidInputError: if a part after a plus is no ``key=value`` with a key that is known.

    Example:
        >>> split("a++b+name=c", "SOURCE[+key=value]…", ["name"])
        ('a+b', [('name', 'c')])
    """
    source, *parts = [part.replace("\0", "+") for part in line.replace("++", "\0").split("+")]
    found = list[tuple[str, str]]()
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in known or not (equals and value):
            raise InvalidInputError(
                f"expected {form} with the keys {', '.join(known)}, got {part!r} in {line!r}: "
                f"{nearest(key, known) if equals else ''}write ++ for a plus in a path"
            )
        found.append((key, value))
    return source, found


def is_file(prompt: str) -> bool:
    """Return whether a prompt is the path of a file with it: one line that ends as such files do."""
    return "\n" not in prompt and prompt.endswith(_FILES)


def _checked(name: str, value: Any) -> str | None:
    """Return a field of a member as text, None for an empty one.

    Raises:
        InvalidInputError: if it is no text or path, or holds what UTF-8 or a path cannot.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str | Path):
        raise InvalidInputError(f"expected a member's {name} as a text, got {value!r}")
    text = str(value)
    if "\0" in text or len(text.encode(errors="ignore")) != len(text.encode(errors="surrogatepass")):
        raise InvalidInputError(f"expected a member's {name} without NUL and surrogates, got {text[:80]!r}")
    return text


def _text_of(source: str, path: str) -> str:
    """Return the prompt in a file.

    Raises:
        InvalidInputError: if it cannot be read, or holds no prompt.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or ("it is not UTF-8" if isinstance(error, ValueError) else str(error))
        raise InvalidInputError(
            f"cannot read the prompt of {source}, the file {path}: {why}: check the path"
        ) from error
    if not text.strip() or is_file(text):
        raise InvalidInputError(f"expected the text of a prompt in {path}, got {text!r}")
    return text


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # a text too long for a path, or with a NUL
        return False


def short(name: str) -> str:
    """Return the name to show for a member's line of text, or for a path: its last two parts.

    Example:
        >>> short("/models/wide/gpt2"), short("/models/gpt2+name=small")
        ('wide/gpt2', 'small')
    """
    try:
        return Member.parse(name).title
    except InvalidInputError:
        return "/".join(Path(name).parts[-2:])


def titles(members: Sequence[str | Member]) -> list[str]:
    """Return a distinct name to show for each member: its title, with ``#2`` and so on for those of one title.

    >>> titles(["wide/gpt2", "wide/gpt2+prompt=Be terse.", "wide/gpt2+prompt=Be kind."])
    ['wide/gpt2', 'wide/gpt2+prompt', 'wide/gpt2+prompt#2']
    """
    return numbered([Member.of(member).title for member in members])


def numbered(names: Sequence[str]) -> list[str]:
    """Return names with ``#2``, ``#3`` and so on added to the second, third and so on of one name.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen, found = Counter[str](), []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found
