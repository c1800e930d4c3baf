"""What an answer in words says: a number, a letter or a short text, and whether it is the right one."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# A sign stands before a number, not between two; commas stand before three digits each.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MARK = re.compile(r"####|answer is|answer:", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def number(text: str) -> Decimal | None:
    """Return the number that an answer ends with: behind the last ``####`` or "answer is" the first, else the last.

    Commas between thousands are left out. None if there is no number.

    Example:
        >>> number("so 3 + 12 = 15. The answer is $1,015.00."), number("5 apples and 7 pears"), number("none")
        (Decimal('1015.00'), Decimal('7'), None)
    """
    marks = list(_MARK.finditer(text))
    behind = _NUMBER.findall(text[marks[-1].end() :]) if marks else []
    found = behind[:1] or _NUMBER.findall(text)[-1:]
    try:
        return Decimal(found[0].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:
        return None


def is_number(text: str, answer: str) -> bool:
    """Return whether an answer's number is the right one, as a number: 15.0 is 15, and 5 is not."""
    return (found := number(text)) is not None and found == number(answer)


def letter(text: str, count: int) -> str | None:
    """Return the letter of the option that an answer names: behind "answer is" the first, else the first at all.

    A letter stands by itself, or before a bracket, point or colon. None if there is none of the first ``count``.

    Example:
        >>> letter("A good question. The answer is (C).", 4), letter("B", 4), letter("Because", 4)
        ('C', 'B', None)
    """
    own = re.compile(rf"(?<![A-Za-z'])([{string.ascii_uppercase[:count]}])(?![A-Za-z'])")
    marks = list(_MARK.finditer(text))
    found = own.search(text, marks[-1].end()) if marks else None
    # An article is no answer: by itself A counts where the answer begins with it, or a sign follows.
    plain = own.search(re.sub(r"(?<=\S )A (?=[a-z])|^A (?=[a-z])", "", text))
    found = found or plain
    return found.group(1) if found else None


def tidy(text: str) -> str:
    """Return a short text as it is compared: lower case, without articles, punctuation and spaces too many.

    Source: the evaluation of SQuAD (Rajpurkar et al., 2016).

    Example:
        >>> tidy("The  Eiffel Tower!")
        'eiffel tower'
    """
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def matches(text: str, accepted: Sequence[str]) -> bool:
    """Return whether the first line of an answer is one of the accepted texts, as :func:`tidy` has them."""
    line = tidy(text.strip().partition("\n")[0])
    return bool(line) and line in map(tidy, accepted)
