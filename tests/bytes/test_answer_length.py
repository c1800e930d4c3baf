"""Limits over bytes: they count the tokens of the answer, as the first member's tokenizer cuts it, on every road."""

import re
from functools import partial
from itertools import accumulate
from unittest.mock import Mock

import byte_tokenizers
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import StoppingCriteria
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app
from softmeet.engine.limits import AnswerLength
from softmeet.errors import InvalidInputError
from softmeet.hf.answer_length import AnswersEnd
from softmeet.members.huggingface import load_tokenizers
from softmeet.members.spelling import spelling_of
from softmeet.readers.byte_alphabet import ByteAlphabet
from softmeet.readers.bytes.next_tokens import END
from softmeet.readers.token_alphabet import TokenAlphabet

NAMES = ["mixed/gpt2", "mixed/llama"]
SPELLINGS = [spelling_of(name, own) for name, own in zip(NAMES, load_tokenizers(NAMES), strict=True)]
SPELLINGS += [spelling_of(own.__name__, own()) for own in (byte_tokenizers.byte_level, byte_tokenizers.llama)]
SPELLINGS += [spelling_of("gemma", byte_tokenizers.llama(dummy=False))]
# Words that begin so many tokens before the limit, or fewer, are whole.
NEAR = 16
# What joins tokens, what cuts them, and what a tokenizer would change: U+2581 is SentencePiece's space.
PIECES = st.sampled_from((
    "the", " the", "And the king said", " ", "  ", "\n\n", "\u00e9", "e\u0301", "\u65e5\u672c", "\u2581", "\U0001f642",
    "<0x0A>", "\x00", "\u2019", "\u2014", "\t ", "123,456", "a" * 30, "\u3000", "\ufffd",
))  # fmt: skip
TEXTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join)


def tokens_in(spelling, text):
    return len(spelling.encode(text)) if text else 0


def running(spelling, text):
    """The most tokens behind each character of a text up to there."""
    return list(accumulate((tokens_in(spelling, text[: k + 1].encode()) for k in range(len(text))), max))


def answers_to(spelling, text, most):
    """What may be kept of a text (all that fits, but for a word that goes on behind it), and all that fits."""
    counts = running(spelling, text)
    fits = "".join(c for c, count in zip(text, counts, strict=True) if count <= most)
    before = re.sub(r" ?[A-Za-z0-9'_]*\Z", "", fits)
    goes_on = re.match(r"[A-Za-z0-9'_]", text[len(fits) :])
    if not (goes_on and before):
        return {fits}, fits
    return {before} | ({fits} if most - counts[len(before) - 1] > NEAR else set()), fits


# A letter that breaks a token into four, and a character for which the tokenizer would cut the whole text otherwise.
@example(SPELLINGS[1], "In the Christh", 5)
@example(SPELLINGS[1], "rinker, nessord llowserv lesson, ingsfollow ingser, a\u2581 and", 33)
@given(st.sampled_from(SPELLINGS), TEXTS, st.integers(0, 40))
def test_an_answer_is_the_longest_text_of_whole_words_that_never_had_too_many_tokens(spelling, text, most):
    length, data = AnswerLength(ByteAlphabet(spelling), most), text.encode()
    for byte in data:
        if length.is_over or not length.push(byte):
            break
    answers, fits = answers_to(spelling, text, most)
    if length.is_over and length.count == length.longest:
        # Only bytes that make no tokens come so far.
        assert length.kept <= len(fits.encode())
    else:
        assert length.is_over == (most == 0 or fits != text)
        assert data[: length.kept if length.is_over else length.count].decode() in answers
        assert length.kept <= len(fits.encode())
    assert most == 0 or length.longest >= length.count


def test_a_text_is_cut_into_tokens_seldom(monkeypatch):
    spelling, alphabet = SPELLINGS[0], ByteAlphabet(SPELLINGS[0])
    cut = Mock(side_effect=alphabet.count)
    text = b"And the king said unto them, Go ye and seek the house of the LORD. " * 40
    monkeypatch.setattr(ByteAlphabet, "count", cut)
    length = AnswerLength(alphabet, 400)
    assert not all(length.push(byte) for byte in text)
    assert 300 < tokens_in(spelling, text[: length.kept]) <= 400
    assert cut.call_count < 60


def test_bytes_that_are_no_character_and_ends_within_a_text_count():
    length = AnswerLength(ByteAlphabet(SPELLINGS[0]), 3)
    assert [length.push(symbol) for symbol in (0xFF, END, END, 0x61)] == [True, True, True, False]
    assert (length.kept, length.count) == (3, 4)
    half = AnswerLength(ByteAlphabet(SPELLINGS[0]), None, 3)
    assert [half.push(symbol) for symbol in "a\u65e5".encode()[:3]] == [True, True, False]
    assert half.kept == 3
    assert AnswerLength(ByteAlphabet(SPELLINGS[0]), None).longest is None


@pytest.mark.parametrize(("most", "symbols"), [(3, None), (5, 3), (None, 3)])
def test_where_symbols_are_tokens_their_number_counts(most, symbols):
    length = AnswerLength(TokenAlphabet(None, 300, frozenset({256})), most, symbols)
    # Ids that are no bytes, and would begin a character if they were.
    assert [length.push(symbol) for symbol in (299, 0xC3, 0xE2)] == [True, True, False]
    assert (length.kept, length.count, length.longest) == (3, 3, 3)


def test_rows_may_change_places():
    criterion = AnswersEnd(1, partial(AnswerLength, ByteAlphabet(SPELLINGS[0]), 2))
    for rows in (["a", "b"], ["ba", "ab"], ["ab ", "ab "], ["ab c", "ab x"]):
        found = criterion(torch.tensor([[0, *row.encode()] for row in rows]), None)
        assert found.tolist() == [tokens_in(SPELLINGS[0], row.encode()) > 2 for row in rows]


@pytest.fixture(scope="module")
def mixed():
    return Ensemble.from_pretrained("mixed", "logit-mean", gate="none")


PROMPT = "And the king said"


def test_model_generate_counts_tokens_however_it_is_told(mixed):
    ids, model = torch.tensor([list(PROMPT.encode())]), mixed.model
    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    wanted = mixed.generate(PROMPT, max_new_tokens=6, do_sample=False).encode()
    assert tokens_in(model.readers[0].spelling, wanted) <= 6

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    config = type(model.generation_config)(max_new_tokens=6, eos_token_id=END, pad_token_id=END)
    for told in ({"max_new_tokens": 6}, {"generation_config": config}, {"stopping_criteria": [Never()]}):
        more = told if "generation_config" in told else {"max_new_tokens": 6, **told}
        out = model.generate(ids, **greedy, **more)
        assert bytes(out[0, ids.shape[1] :].tolist()) == wanted
    found = model.generate(ids, **greedy, max_new_tokens=6, return_dict_in_generate=True)
    assert found.sequences.equal(out)
    beams = model.generate(ids, **greedy, max_new_tokens=6, num_beams=2)
    assert tokens_in(model.readers[0].spelling, bytes(beams[0, ids.shape[1] :].tolist())) <= 6
    # In a batch, what is behind a text's end is padding.
    both = model.generate(torch.cat([ids, ids.roll(1, -1)]), do_sample=False, max_new_tokens=6, pad_token_id=END)
    rows = [bytes(s for s in row if s != END) for row in both[:, ids.shape[1] :].tolist()]
    assert rows[0] == wanted
    assert all(tokens_in(model.readers[0].spelling, row) <= 6 for row in rows)
    # A length of the whole, and a least length, count symbols, as input_ids are.
    assert model.generate(ids, **greedy, max_length=ids.shape[1] + 9).shape[1] == ids.shape[1] + 9


def test_bytes_can_be_counted_instead(mixed):
    short = mixed.generate(PROMPT, max_bytes=11, seed=5)
    assert len(short.encode()) == 11
    text = mixed.generate(PROMPT, max_bytes=11, max_new_tokens=2, seed=5)
    assert text == mixed.generate(PROMPT, max_new_tokens=2, seed=5)
    flags = ["--seed", "5", "--rule", "logit-mean", "--no-summary", "--max-new-bytes", "120"]
    done = CliRunner().invoke(app, ["generate", PROMPT, "-m", "mixed", *flags], catch_exceptions=False)
    assert done.stdout.startswith(short)
    assert len(done.stdout.encode()) == 120 + len("\n")
    for wrong in (0, "many", True):
        with pytest.raises(InvalidInputError, match="expected max_bytes as a number of bytes from 1"):
            mixed.generate(PROMPT, max_bytes=wrong)
    with pytest.raises(ValueError, match="max_new_tokens"):
        mixed.generate(PROMPT, max_new_tokens=0)


def test_scores_and_the_cache_end_where_the_text_does(mixed):
    """Not behind the character with which it would be too long."""
    ids = mixed.tokenizer("And the king said", return_tensors="pt")["input_ids"]
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    out = mixed.model.generate(ids, max_new_tokens=3, **told)
    count = out.sequences.shape[1] - ids.shape[1]
    assert len(out.scores) == len(out.logits) == count
    assert out.cache.get_seq_length() == out.sequences.shape[1] - 1
    longer = mixed.model.generate(out.sequences, cache=out.cache, max_bytes=9, do_sample=False)
    assert longer.equal(mixed.model.generate(ids, max_bytes=count + 9, do_sample=False))


def test_over_tokens_there_are_no_bytes_to_count(wide):
    with pytest.raises(InvalidInputError, match="over tokens say max_new_tokens"):
        wide.generate(PROMPT, max_bytes=5)
