"""A program that compiles grammars, in a process of its own, which can be ended where one takes too long.

It reads lines from stdin, a grammar as a JSON string each, and answers each by a line on stdout: a JSON string that
says why the grammar cannot be used, empty if it can. It imports nothing of softmeet, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence

import llguidance

# The most bytes of address space: a grammar that needs more ends the process.
_MEMORY = 1 << 30
# Seconds after which the process ends itself, should nobody be left who would end it.
_SECONDS = 10
# What may be spent on one step of a text, in the library's units: some 7 and 2 ms, where a usual step takes 0.1 ms.
LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=100_000, step_max_items=40_000, max_lexer_states=20_000, verbose_errors=False
)


class Tokens:
    """The bytes of each token, as ``llguidance.TokenizerWrapper`` takes them.

    Args:
        tokens: the bytes of each id's token; empty if it spells none.
        special: ids of tokens that are not text.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = list(tokens), list(special), special[0]

    def __call__(self, text: bytes | str) -> list[int]:
        """Refuse to cut a text into tokens, which only a grammar that forces tokens would need."""
        raise NotImplementedError(text)


def vocabulary(tokens: Sequence[bytes], ends: Sequence[int], special: Sequence[int] = ()) -> llguidance.LLTokenizer:
    """Make a vocabulary in the library's form.

    Args:
        tokens: the bytes of each id's token; empty if it spells none.
        ends: ids of the tokens that end a text, at least one.
        special: ids of other tokens that are not text.
    """
    wrapped = llguidance.TokenizerWrapper(Tokens(tokens, [*ends, *special]))
    return llguidance.LLTokenizer(wrapped, eos_token=list(ends))


def vocabulary_of_bytes() -> llguidance.LLTokenizer:
    """Make the vocabulary of 257 tokens whose first 256 are the bytes, and whose last one ends a text."""
    return vocabulary([*(bytes([byte]) for byte in range(256)), b"end"], [256])


def objection(grammar: str, over: llguidance.LLTokenizer) -> str:
    """Return why a grammar cannot be used; empty if it can be compiled and has a text that it allows."""
    matcher = llguidance.LLMatcher(over, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            return "no text is allowed by it"
    return str(matcher.get_error())


def main() -> None:
    """Answer every line of stdin."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with contextlib.suppress(AttributeError, OSError):
        os.nice(19)
    symbols = vocabulary_of_bytes()
    alarm = getattr(signal, "alarm", lambda seconds: None)
    print('"ready"', flush=True)  # noqa: T201
    for line in sys.stdin:
        alarm(_SECONDS)
        print(json.dumps(objection(json.loads(line), symbols)), flush=True)  # noqa: T201
        alarm(0)


if __name__ == "__main__":
    main()
