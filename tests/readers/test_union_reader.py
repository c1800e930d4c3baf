"""Members over the union of their tokens: what they predict, and what they read."""

import byte_members
import byte_tokenizers
import numpy as np
import pytest
import rival_oracles
import torch

from softmeet.members.spelling import spelling_of
from softmeet.readers.reader import Read, finished
from softmeet.readers.transformers import TransformersReader
from softmeet.readers.union_alphabet import UnionAlphabet
from softmeet.readers.union_reader import UnionReader
from softmeet.readers.union_tokens import SpelledTokens
from softmeet.testing import check_reader

KINDS = ("gpt2", "llama")


def over_union(reader, spelling, alphabet):
    return UnionReader(reader, SpelledTokens(spelling, alphabet, reader.alphabet.ends), alphabet)


@pytest.fixture(scope="module")
def made():
    """(readers over the union of two tokenizers, their spellings, the alphabet, the models)."""
    tokenizers = [byte_tokenizers.KINDS[kind]() for kind in KINDS]
    spellings = [spelling_of(kind, own) for kind, own in zip(KINDS, tokenizers, strict=True)]
    models = [byte_members.model_of(own, seed=k) for k, own in enumerate(tokenizers)]
    alphabet = UnionAlphabet.of(spellings)
    readers = [
        over_union(TransformersReader(model, tokenizer, kind), spelling, alphabet)
        for model, tokenizer, kind, spelling in zip(models, tokenizers, KINDS, spellings, strict=True)
    ]
    return readers, spellings, alphabet, models


def tiny(reader, spelling, model):
    """A member as the oracles know it."""
    tokens = dict(zip(spelling.tokens.tolist(), spelling.words, strict=True))
    ends = frozenset(reader.below.alphabet.ends)

    @torch.inference_mode()
    def probs(ids):
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()

    return rival_oracles.TinyMember(
        {k: word for k, word in tokens.items() if k not in ends}, ends, lambda text: spelling.cut(text), probs
    )


@pytest.mark.parametrize("k", [0, 1])
def test_readers_over_the_union_obey_the_laws(k, made):
    check_reader(made[0][k])


@pytest.mark.parametrize("k", [0, 1])
def test_what_is_predicted_and_read_is_what_the_formulas_say(k, made):
    """Of strings that the member has, and of strings that the other alone has."""
    readers, spellings, alphabet, models = made
    reader, member = readers[k], tiny(readers[k], spellings[k], models[k])
    words = {*alphabet.words} - {*spellings[k].words}
    assert words or k == 0
    generator = np.random.default_rng(0)
    row, state = reader.open(reuse=False), spellings[k].start
    chosen = [*generator.choice(len(alphabet.words), 6), *map(alphabet.symbol, sorted(words)[:3])]
    for symbol in map(int, chosen):
        told = finished(reader.read([Read(row, [symbol], [1])])).log_probs()[0].double().exp().numpy()
        state = rival_oracles.union_feed(member, state, alphabet.words[symbol])
        expected = rival_oracles.union_distribution([member], [state], np.ones(1))
        total = sum(expected.values())  # tokens that spell nothing are left out
        for word, p in expected.items():
            where = alphabet.end if word is None else alphabet.symbol(word)
            assert told[where] == pytest.approx(p / total, abs=1e-6)
        assert told.sum() == pytest.approx(1, abs=1e-5)
    reader.close(row)


def test_a_text_is_cut_as_the_first_tokenizer_cuts_it(made):
    _, spellings, alphabet, _ = made
    for text in ("The king, 12 days", "é\n\n", ""):
        symbols = alphabet.encode(text)
        assert alphabet.decode([*symbols, alphabet.end]) == text.encode()
        assert len(symbols) == alphabet.count(symbols)
    assert alphabet.size == len({*spellings[0].words} | {*spellings[1].words}) + 1
    with pytest.raises(KeyError):
        alphabet.symbol(b"\xff\xff\xff no token")


def test_an_end_that_comes_first_begins_a_text(made):
    reader, alphabet = made[0][0], made[2]
    first, other = reader.open(reuse=False), reader.open(reuse=False)
    plain = finished(reader.read([Read(first, [], [0]), Read(other, [alphabet.end], [1])])).log_probs()
    assert torch.equal(plain[0], plain[1])
    assert (first.length, other.length) == (0, 1)
    reader.close(first)
    reader.close(other)
