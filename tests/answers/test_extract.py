"""What answers in words say, against answers made by hand, those among them that other scorers get wrong."""

from __future__ import annotations

from decimal import Decimal

import pytest

from softmeet.answers.extract import is_number, letter, matches, number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 15", "15"), ("5 + 10 = 15\n#### 15", "15"), ("The answer is 15.", "15"), ("The answer is $-3", "-3"),
        ("so she has 1,234.50 dollars", "1234.50"), ("first 3, then 4", "4"), ("It is 12. The answer is: twelve", "12"),
        ("The answer is 7 because 3 + 4 = 7 and not 8", "7"), ("about 0.5%", "0.5"), ("it is \u22125", "-5"),
        ("from 10-3", "3"), ("they are 2,3,5", "5"), ("1,234,567 of them", "1234567"), ("no number", None), ("", None),
    ],
)  # fmt: skip
def test_numbers(text, expected):
    assert number(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"), (" C.", "C"), ("(D)", "D"), ("A", "A"), ("The answer is C", "C"), ("Because of light", None),
        ("A planet turns, so B", "B"), ("A. Planets turn", "A"), ("It's D", "D"), ("E", None), ("", None),
        ("A is wrong. The answer is (B).", "B"), ("I'd say C", "C"), ("B or C", "B"),
    ],
)  # fmt: skip
def test_letters(text, expected):
    assert letter(text, 4) == expected


@pytest.mark.parametrize(
    ("right", "text", "answer", "expected"),
    [
        (is_number, "The answer is 5", "15", False),  # one scorer counts it
        (is_number, "The answer is 15", "5", False),
        (is_number, "#### 15.0", "15", True),
        (is_number, "70,000", "70000", True),
        (is_number, "#### -2", "2", False),
        (is_number, "I do not know", "0", False),
        (matches, " The Eiffel Tower.\nQuestion: what", ["Eiffel tower"], True),
        (matches, "Eiffel Towe", ["Eiffel tower"], False),  # another scorer drops a last character
        (matches, "14 December 1972 UTC", ["December 14, 1972", "14 December 1972 UTC"], True),
        (matches, "an apple", ["the apple"], True),
        (matches, "the", [""], False),
        (matches, "\n\n", ["a"], False),
    ],
)
def test_numbers_are_right_as_numbers_and_short_texts_but_for_articles_and_signs(right, text, answer, expected):
    assert right(text, answer) is expected
