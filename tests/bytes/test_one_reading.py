"""A text over bytes is read in one way, whatever the pieces in which it came: scored, followed, begun or written."""

import functools
import random

import byte_tokenizers
import numpy as np
import pytest
from byte_members import HOSTILE, member_of

from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes.covers import Pruning
from softmeet.readers.bytes.known_text import anchor_of, parting, path_of
from softmeet.readers.bytes.next_tokens import END

KINDS = list(byte_tokenizers.KINDS)
TEXTS = {
    "words": b"the other there, he threw the the thether. Then\n\n\nhe there: therethe",
    "hostile": " \u05e9\u05dc\u05d5\u05dd \U0001f642\u200d\u2642 the\x00\xffthe  \t  \n\n the\xc3\xa9r".encode()
    + b"\xf0\x9f",
    "one letter": b"the " + b"e" * 260 + b" the there",
    "characters": "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8".encode() * 11,
}
# A stretch of more than 256 bytes is read by one kind of tokenizer: all are cut there alike.
LONG = {"gpt2": "one letter", "llama": "characters"}
# Of tokenizers that differ in how they cut words alone, one reads what are none.
HOSTILE_KINDS = ("qwen", "llama", "unigram")
CASES = [
    (kind, text)
    for kind in KINDS
    for text in ("words", "hostile" if kind in HOSTILE_KINDS else None, LONG.get(kind))
    if text
]


def by_bytes(member, text):
    """The log-probabilities after each byte, read one by one, and the readings."""
    readings = [member.begin(b"")]
    for byte in text:
        readings += member.advance(readings[-1:], [byte])
    return member.log_probs(readings).numpy(), readings


@functools.cache
def known(kind, text):
    """(a member, what it says of a text by its bytes, the readings)."""
    member = member_of(kind, Pruning(), seed=2)
    return member, *by_bytes(member, TEXTS[text])


@functools.cache
def spelling(kind):
    return spelling_of(kind, byte_tokenizers.KINDS[kind]())


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_pieces_do_not_matter(kind, text):
    (member, expected, _), whole, draw = known(kind, text), TEXTS[text], random.Random(0)
    scored, log_probs, _ = member.score(whole)
    assert np.abs(np.exp(log_probs) - np.exp(expected)).max() < 1e-9
    assert np.allclose(member.log_probs([scored]), expected[-1:], atol=1e-9)
    reading, place = member.begin(b""), 0
    while place < len(whole):
        more = whole[place : place + draw.choice([1, 2, 3, 9, 40])]
        reading, place = member.follow(reading, more), place + len(more)
        assert np.abs(member.log_probs([reading]).exp().numpy() - np.exp(expected[place])).max() < 1e-9, place
    for place in draw.sample(range(len(whole) + 1), 3):
        begun = member.begin(whole[:place])
        assert np.abs(member.log_probs([begun]).exp().numpy() - np.exp(expected[place])).max() < 1e-9, place
        # A reading from anywhere goes on as the others do.
        after = member.follow(begun, whole[place : place + 7]) if place < len(whole) else begun
        assert np.abs(member.log_probs([after]).exp().numpy() - np.exp(expected[len(after.text)])).max() < 1e-9, place


@pytest.mark.parametrize("text", [*HOSTILE, *TEXTS.values()], ids=range(len(HOSTILE) + len(TEXTS)))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_found_by_the_end_of_a_text_alone(kind, text):
    """Behind an anchor the path is that of the bytes behind it, whatever follows; and it spells the text."""
    read = spelling(kind)
    written = read.written(text)
    bounds = read.bounds(path_of(read, written))
    for place in {*range(min(len(written), 40)), *range(0, min(len(written), 300), 7), len(written) // 3, len(written)}:
        own, anchor = path_of(read, written[:place]), anchor_of(read, written[:place])
        assert read.spelled(own) == written[:place]
        assert anchor < max(place, 1)
        assert place - anchor <= 2 * 256 + 8
        assert own == [*path_of(read, written[:anchor]), *path_of(read, written[anchor:place])]
        latest = parting(read, written, place)
        assert latest <= place
        assert latest in bounds


def test_the_path_of_ordinary_text_is_the_tokenizers_own():
    for kind in KINDS:
        read = spelling(kind)
        assert path_of(read, read.written(TEXTS["words"])) == read.encode(TEXTS["words"])
        assert END not in read.encode(TEXTS["words"])
