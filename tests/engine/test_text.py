"""The text of tokens as they come: all of it, in whole characters, whatever the tokenizer is written in."""

from __future__ import annotations

import byte_tokenizers
import pytest
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from softmeet.engine.text import REPLACEMENT, Pieces

TOKENIZERS = {name: byte_tokenizers.KINDS[name]() for name in ("gpt2", "llama", "gemma", "unigram")}
# One that is written in Python.
TOKENIZERS["byt5"] = tf.ByT5Tokenizer()
TEXT = st.text(st.one_of(st.sampled_from("theé😀日 \n"), st.characters(exclude_categories=["Cs"])), max_size=12)


def pushed(tokenizer, ids):
    pieces = Pieces(tokenizer, special=False)
    return [*map(pieces.push, ids), pieces.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXT)
def test_pieces_are_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "byt5"])
def test_characters_come_whole_and_as_soon_as_they_are(kind):
    tokenizer = TOKENIZERS[kind]
    letters = "aé\n😀b"
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
    found = iter(pushed(tokenizer, [token for own in ids for token in own]))
    for letter, own in zip(letters, ids, strict=True):
        assert [next(found) for _ in own] == [""] * (len(own) - 1) + [letter]
    assert next(found) == ""
    half = pushed(tokenizer, ids[0] + ids[3][:2])
    assert half[:-1] == ["a", "", ""]
    assert not half[-1].strip(REPLACEMENT)
    assert pushed(tokenizer, [*ids[0], *tokenizer.all_special_ids, *ids[4]])[-2:] == ["b", ""]
