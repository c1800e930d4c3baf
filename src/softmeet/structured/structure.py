"""``Structure``: what a text has to be, a JSON document of a schema, say, or a match of a regular expression."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra
from softmeet.structured.compilers import objection

# The largest grammar, in characters.
_LARGEST = 1 << 18
# Tokens are the model's to choose: without this, text that is certain had to be cut as the tokenizer does it.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
# Between the parts of a JSON document, as json.dumps has it, or nothing. A model that is unsure of what comes next
# would write spaces for ever.
_SPACE = " "
_PLACE = re.compile(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?")


@dataclass(frozen=True)
class Structure:
    """What a text has to be; ``Ensemble.generate(prompt, structure=…)`` writes nothing else.

    Make it by one of the methods below. Each checks and compiles it at once, before any model is needed, in a process
    of its own that is ended after 1.6 seconds.

    Args:
        kind: what it was made from, for messages: ``"JSON schema"``.
        lark: the texts that are allowed, as a grammar in llguidance's variant of Lark's syntax.

    Raises:
        InvalidInputError: if the grammar is wrong, allows no text, uses what is not supported, is longer than 262,144
            characters or takes too long to compile; or if llguidance, of the extra ``structured``, is not installed.
        BusyCompilingError: if two others are being compiled for 1.6 seconds.

    Example:
        >>> Structure.choice(["yes", "no"]).allows("yes")
        True
    """

    kind: str
    lark: str

    def __post_init__(self) -> None:
        require_extra("structured output", "structured", "llguidance")
        if len(self.lark) > _LARGEST:
            raise InvalidInputError(
                f"expected a {self.kind} of at most {_LARGEST:,} characters, got {len(self.lark):,}: use a simpler one"
            )
        if why := objection(self.lark):
            # Then follow lines of the grammar, which mostly is not the caller's.
            why = " ".join(why.split("\n   1 | ")[0].split())
            why = why if self.kind == "grammar" else _PLACE.sub("", why)
            raise InvalidInputError(f"expected a {self.kind} that texts can follow, got one that none can: {why[:300]}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Structure:
        """Allow JSON documents of a schema (draft 2020-12), as a dict or as its text in JSON.

        Properties come in the schema's order. A keyword that is not supported (``uniqueItems``, ``not``, ``if``, and
        formats other than the usual ones) is an error; unknown keywords are ignored, as the standard has it.

        Example:
            >>> Structure.json_schema({"type": "integer", "minimum": 3}).allows("2")
            False
        """
        return cls("JSON schema", f"start: {_documents(schema)}{_OPTIONS}")

    @classmethod
    def json_object(cls) -> Structure:
        """Allow every JSON document that is an object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        r"""Allow texts that match a regular expression as a whole, as ``re.fullmatch`` has it.

        The syntax is that of Rust's crate ``regex``: Python's without look-around and references.

        Example:
            >>> Structure.regex(r"\d{2}:\d{2}").allows("12:30")
            True
        """
        require_extra("structured output", "structured", "llguidance")
        from llguidance import regex_to_lark

        return cls("regular expression", f"start: /{regex_to_lark(_text(pattern), '')}/{_OPTIONS}")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Structure:
        """Allow one of several texts.

        Raises:
            InvalidInputError: if there is none.
        """
        if isinstance(texts, str) or not texts:
            raise InvalidInputError(f"expected a list of at least one text to choose from, got {texts!r}")
        # JSON leaves DEL as it is, which no string of a grammar can hold.
        shown = [json.dumps(_text(text), ensure_ascii=False).replace("\x7f", "\\u007f") for text in texts]
        every = " | ".join(shown)
        return cls("choice", f"start: {every}{_OPTIONS}")

    @classmethod
    def calls(cls, functions: Mapping[str, Mapping[str, Any]], *, several: bool = False) -> Structure:
        r"""Allow a call of a function, or several calls one below the other, as Hermes and Qwen models write them.

        Args:
            functions: by the name of each function that may be called, at least one, the JSON schema of its arguments.
            several: whether more calls than one are allowed.

        Example:
            >>> call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
            >>> Structure.calls({"now": {"type": "object"}}).allows(call)
            True
        """
        begun = [json.dumps(f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ') for name in functions]
        every = [
            f'{text} {_documents(schema)} "}}\\n</tool_call>"'
            for text, schema in zip(begun, functions.values(), strict=True)
        ]
        more = ' ("\\n" call)*' if several else ""
        return cls("JSON schema", f"start: call{more}\ncall: {' | '.join(every)}{_OPTIONS}")

    @classmethod
    def grammar(cls, lark: str) -> Structure:
        """Allow the texts of a context-free grammar, in llguidance's variant of Lark's syntax; ``start`` is its root.

        Example:
            >>> Structure.grammar('start: "(" start ")" | "x"').allows("((x))")
            True
        """
        return cls("grammar", _text(lark) + _OPTIONS)

    def allows(self, text: str) -> bool:
        """Return whether a text is complete and allowed."""
        from llguidance import LLMatcher

        from softmeet.structured.worker import LIMITS, vocabulary_of_bytes

        matcher, symbols = LLMatcher(vocabulary_of_bytes(), self.lark, log_level=0, limits=LIMITS), text.encode()
        return bool(matcher.try_consume_tokens(list(symbols)) == len(symbols) and matcher.is_accepting())


def _documents(schema: Mapping[str, Any] | str) -> str:
    """Return the part of a grammar that stands for JSON documents of a schema."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise InvalidInputError(f"expected a JSON schema that is an object, got {type(found).__name__}")
        text = json.dumps({"x-guidance": {"whitespace_pattern": _SPACE}, **found}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"expected a JSON schema, got what is no JSON: {error}") from None
    return f"%json {text}"


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise InvalidInputError(f"expected a text, got {type(given).__name__}")
    return given
