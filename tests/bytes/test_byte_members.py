"""Members over bytes: exhaustive sums over tokenizations, trees of tokens, what is pruned, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple

import byte_tokenizers
import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from byte_members import (
    EXACT,
    HOSTILE,
    TEXTS,
    at_once,
    exhaustive,
    member_of,
    member_words,
    model_of,
    step_by_step,
)
from scipy.stats import chi2_contingency

from softmeet.errors import VocabularyMismatchError
from softmeet.members.spelling import spelling_of
from softmeet.members.token_tree import Growth, TokenTree, run
from softmeet.readers.bytes import guesses as guesses_module
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import END, SYMBOLS, Cover, Covers, Open, Pruning

ROOT = np.empty(0, np.int64)


def total(log_probs, text):
    """The log-probability of a text and its end, by a member's scores of it."""
    return log_probs[range(len(text)), list(text)].sum() + log_probs[len(text), END]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, byte_tokenizers.END),
        ({"bos_token": None}, "\u010a"),
        ({"add_bos_token": False}, "\u010a"),
        ({"eos_token": None}, byte_tokenizers.END),
    ],
    ids=["declared", "none", "not added", "no end"],
)
def test_a_text_begins_behind_a_line_break_if_its_tokenizer_has_no_token_to_add(changes, start):
    own = byte_tokenizers.byte_level()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer, **{"bos_token": own.bos_token, "eos_token": own.eos_token, **changes}
    )
    assert spelling_of("m", tokenizer).start == (tokenizer.get_vocab()[start],)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", byte_tokenizers.KINDS)
def test_bytes_multiply_to_the_sum_over_all_tokenizations(kind, text):
    """With the end; where a space is put before every text, given that space."""
    member = member_of(kind)
    expected = exhaustive(member, text)
    assert step_by_step(member, text) == pytest.approx(expected, abs=1e-9)
    reading, log_probs, _ = member.score(text)
    assert total(log_probs, text) == pytest.approx(expected, abs=1e-9)
    assert reading.work.dropped < 1e-12


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("kind", byte_tokenizers.KINDS)
def test_tokens_spell_the_text(kind, text):
    spelling = spelling_of(kind, byte_tokenizers.KINDS[kind]())
    tokens = spelling.encode(text)
    assert spelling.spelled(tokens) == spelling.dummy + text
    assert not set(tokens) & {spelling.end}


@pytest.mark.parametrize("why", byte_tokenizers.REFUSED)
def test_tokenizers_that_lose_something_are_refused(why):
    with pytest.raises(VocabularyMismatchError, match=f"cannot use odd over bytes: .*{why}"):
        spelling_of("odd", byte_tokenizers.REFUSED[why]())


def test_a_byte_that_no_token_spells_has_no_probability_and_is_not_seen():
    tokenizer = byte_tokenizers.byte_level(missing=b"\x04\xf5")
    member = ByteMember(model_of(tokenizer), spelling_of("lacking", tokenizer), Pruning())
    (one, two), texts = (member.begin(text) for text in (b"the\x04", b"the")), (b"t\x04h", b"th")
    assert torch.equal(member.log_probs([one]), member.log_probs([two]))
    (after,) = member.advance([two], [4])
    assert torch.equal(member.log_probs([after]), member.log_probs([two]))
    scores = [member.score(text)[1] for text in texts]
    assert scores[0][1, 4] == -math.inf
    assert np.allclose(scores[0][[0, 1, 3]], scores[1], atol=1e-12)


@pytest.mark.parametrize("kind", byte_tokenizers.KINDS)
def test_what_is_pruned_is_little_and_told(kind):
    text = b" the other there, he threw"
    exact = at_once(member_of(kind, Pruning(1e-9, None)), text)
    found = []
    for prune in (0.3, 0.03, 0.003):
        member = member_of(kind, Pruning(prune))
        reading, log_probs, unasked = member.score(text)
        found.append((abs(total(log_probs, text) - exact), reading.work.dropped))
        assert reading.work.dropped == pytest.approx(unasked.sum())
        assert np.abs(np.logaddexp.reduce(log_probs, 1)).max() < 1e-9
    assert found[2][0] < 0.02 * abs(exact)
    assert found[0][1] > found[1][1] > found[2][1]


def test_a_batch_is_its_rows(monkeypatch):
    member = member_of("gpt2", Pruning(0.02))
    texts = [b"the th", b"", b"he said: there", b"\n\nth"]
    calls, run = [], member.run
    member.behind(member.prefix)  # once for all texts

    def counted(growths):
        calls.append(len(growths))
        return run(growths)

    monkeypatch.setattr(member, "run", counted)
    alone = []
    for text in texts:
        (reading,) = [member.begin(text)]
        for byte in b"e the":
            (reading,) = member.advance([reading], [byte])
        alone.append(reading)
    before = len(calls)
    readings = [member.begin(text) for text in texts]
    for byte in b"e the":
        readings = member.advance(readings, [byte] * len(texts))
    assert torch.allclose(member.log_probs(readings), member.log_probs(alone), atol=1e-9)
    for own, other in zip(readings, alone, strict=True):
        assert astuple(own.work) == pytest.approx(astuple(other.work))
    assert len(calls) - before < before
    assert sum(calls[:before]) == sum(reading.work.calls for reading in alone)


def test_after_the_end_comes_the_end():
    member = member_of("gpt2", Pruning())
    (reading,) = member.advance([member.begin(b"the")], [END])
    assert member.log_probs([reading])[0].exp().tolist() == [0.0] * (SYMBOLS - 1) + [1.0]
    assert member.advance([reading], [65])[0].ended


def test_long_texts_keep_little_and_ask_little():
    """States of covers that were let go are let go, and most bytes cost no call."""
    member = member_of("gpt2", Pruning(0.05))
    reading, text = member.begin(b"the"), b" there, then he the other" * 12
    before = reading.work
    for byte in text:
        (reading,) = member.advance([reading], [byte])
    own = len(member.spelling.encode(b"the" + text))
    assert reading.tree.columns < own + 80
    assert reading.work.calls - before.calls <= len(text)


@pytest.mark.parametrize("text", HOSTILE[1:6], ids=range(1, 6))
def test_hostile_texts_are_read(text):
    member = member_of("gpt2", Pruning())
    reading, log_probs, _ = member.score(text)
    assert np.isfinite(log_probs[range(len(text)), list(text)]).all()
    (more,) = member.advance([reading], [ord("t")])
    assert member.log_probs([more]).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("pruning", [Pruning(), EXACT])
def test_bytes_that_a_member_holds_for_impossible_may_come(pruning):
    """Logits so far apart that most probabilities are 0 to the last bit."""
    tokenizer = byte_tokenizers.byte_level()
    member = ByteMember(model_of(tokenizer, scale=1e6), spelling_of("certain", tokenizer), pruning)
    text = b"the he"
    assert np.isfinite(at_once(member, text))
    assert np.isfinite(step_by_step(member, text))
    assert at_once(member, text) < -87  # no token is held for less likely than 1e-38


def test_no_byte_is_ruled_out_by_what_is_dropped():
    """The heavy cover goes on by tokens that begin with "th" alone; a light one, once closed, by any byte."""
    member = member_of("gpt2", Pruning())
    spelling, (reading,) = member.spelling, member.begin_all([b""], [None])
    probs = reading.covers.closed[0].probs
    _, longer, end = spelling.among(b"th")
    heavy = Cover(probs, 1.0, 1.0, b"th", longer, end)
    light = Open(probs, spelling.encode(b"h")[0], 1e-12, 1e-12, b"", 1.0, probs.root)
    covers = Covers((heavy,), (light,)).answered(spelling, [(light, probs)], Pruning())
    assert [one.rest for one in covers.closed] == [b"th", b""]
    assert (covers.prediction(spelling)[[byte for byte in range(128) if bytes([byte]) in spelling.words]] > 0).all()
    assert Covers((heavy,)).prediction(spelling)[ord("z")] == 0


def test_texts_that_part_keep_their_own_states():
    """Two continuations of one reading, by turns: each says what it says alone, though both follow the same columns."""
    member = member_of("gpt2")
    (begun,) = member.advance([member.begin(b"")], [ord("t")])
    texts, readings = [b"he then the", b"o other hot"], [begun, begun]
    for symbols in zip(*texts, strict=True):
        for k, symbol in enumerate(symbols):
            (readings[k],) = member.advance([readings[k]], [symbol])
    for text, reading in zip(texts, readings, strict=True):
        alone = member.begin(b"")
        for symbol in b"t" + text:
            (alone,) = member.advance([alone], [symbol])
        assert torch.allclose(member.log_probs([reading]), member.log_probs([alone]), atol=1e-10)


def test_a_prompt_is_read_from_its_end():
    """The tokenizer's own tokens stand for what lies further back; what comes next is the same."""
    member = member_of("gpt2", Pruning(1e-4))
    text = b"he said that the other there threw it, " * 5
    whole, *_ = member.score(text)
    found = member.log_probs([whole, member.begin(text)]).exp()
    assert (found[0] - found[1]).abs().sum() < 1e-3


def test_a_prefix_of_ones_own():
    tokenizer = byte_tokenizers.byte_level()
    model = model_of(tokenizer)
    spelling = spelling_of("m", tokenizer)
    own = ByteMember(model, spelling, EXACT, prefix=[0, *spelling.encode(b"the")])
    with torch.inference_mode():
        log_p = model(torch.tensor([own.prefix])).logits[0, -1].log_softmax(-1)
    assert own.log_probs([own.begin(b"")])[0, END].item() == pytest.approx(log_p[0].item(), abs=1e-9)


WINDOWED = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**tiny.SMALL, num_key_value_heads=2, sliding_window=4)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**tiny.SMALL, **tiny.GQA, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny.SMALL, num_key_value_heads=2)),
}


@pytest.mark.parametrize("name", [*tiny.BUILDERS, *WINDOWED])
def test_a_tree_of_tokens_says_what_each_of_its_paths_says(name):
    """Two trees in a batch, grown twice; windows are counted along the path."""
    if name in WINDOWED:
        torch.manual_seed(0)
        model = WINDOWED[name]().eval().double()
    else:
        model = tiny.build(name).double()
    trunks = [[3, 9, 4, 1, 7, 2], [5, 6]]
    with torch.inference_mode():
        begun = run(model, [Growth(TokenTree(), [ROOT], [trunk]) for trunk in trunks])
        paths = [np.arange(len(trunk)) for trunk in trunks]
        grown = run(
            model,
            [
                Growth(begun[0][0], [paths[0], paths[0][:3], paths[0]], [[8], [10, 11], [12]]),
                Growth(begun[1][0], [paths[1][:1]], [[13]]),
            ],
        )
        deep = np.append(paths[0][:3], [7, 8])
        ((_, (last,)),) = run(model, [Growth(grown[0][0], [deep], [[14, 15, 16]])])

        def plain(tokens):
            return model.base_model(torch.tensor([tokens])).last_hidden_state[0]

        found = [*grown[0][1], *grown[1][1], last]
        expected = [
            plain([*trunks[0], 8])[-1:], plain([3, 9, 4, 10, 11])[-2:], plain([*trunks[0], 12])[-1:],
            plain([5, 13])[-1:], plain([3, 9, 4, 10, 11, 14, 15, 16])[-3:],
        ]  # fmt: skip
    # Some norms are taken in single precision whatever the model's is.
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_sampled_bytes_have_the_members_own_distribution():
    """The first three bytes of texts drawn byte by byte, and of texts drawn token by token."""
    member, count, length = member_of("gpt2", seed=3), 500, 3
    # Tokens of which some begin others are far more probable than the rest.
    favoured = [k for k, word in zip(*member_words(member), strict=True) if word in (b"t", b"h", b"e", b"th", b"the")]
    along = torch.ones(16, dtype=torch.float64)
    with torch.no_grad():
        member.model.transformer.ln_f.bias += along
        member.model.lm_head.weight[[*favoured, *member.ends]] += 6 * along / 16
    member = ByteMember(member.model, member.spelling, EXACT)
    generator = torch.Generator().manual_seed(0)
    readings = [member.begin(b"")] * count
    for _ in range(length):
        drawn = torch.multinomial(member.log_probs(readings).exp(), 1, generator=generator).squeeze(-1)
        readings = member.advance(readings, drawn.tolist())
    allowed = torch.full((member.model.config.vocab_size,), -torch.inf, dtype=torch.float64)
    allowed[[*member.spelling.tokens.tolist(), *member.ends]] = 0
    tokens = torch.tensor([member.prefix] * count)
    with torch.inference_mode():
        for _ in range(length):
            p = (member.model(tokens).logits[:, -1] + allowed).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
    found = [reading.text for reading in readings]
    expected = []
    for row in tokens[:, len(member.prefix) :].tolist():
        end = next((k for k, token in enumerate(row) if token in member.ends), len(row))
        expected.append(member.spelling.spelled(row[:end])[:length])
    common = [text for text, _ in Counter(found + expected).most_common(12)]
    table = [[own.count(text) for text in common] for own in (found, expected)]
    table = [[*row, count - sum(row)] for row in table]
    assert sum(table[0][:-1]) > 0.5 * count
    assert chi2_contingency(table).pvalue > 0.01


def test_the_first_byte_of_two_members_of_one_tokenizer_is_that_of_their_mixture_of_tokens():
    members, weights = [member_of("gpt2", seed=seed) for seed in (1, 2)], (0.3, 0.7)
    mixture = torch.zeros(members[0].model.config.vocab_size, dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        ids = [*member.spelling.tokens.tolist(), *member.ends]
        with torch.inference_mode():
            mixture[ids] += weight * member.model(torch.tensor([member.prefix])).logits[0, -1][ids].softmax(-1)
    spelling = members[0].spelling
    expected = torch.zeros(SYMBOLS, dtype=torch.float64)
    for token, word in zip(spelling.tokens.tolist(), spelling.words, strict=True):
        expected[word[0]] += mixture[token]
    expected[END] = mixture[members[0].ends].sum()
    found = sum(
        weight * member.log_probs([member.begin(b"")])[0].exp() for member, weight in zip(members, weights, strict=True)
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_likely_tokens_that_are_run_along_save_calls_and_change_nothing(monkeypatch):
    member, found = member_of("gpt2", Pruning(0.01)), []
    for guesses in (0, 3):
        monkeypatch.setattr(guesses_module, "_GUESSES", guesses)
        (reading, log_probs) = member.begin(b"the"), []
        for _ in range(60):
            log_probs.append(member.log_probs([reading]))
            (reading,) = member.advance([reading], [int(log_probs[-1][0, :END].argmax())])
        found.append((reading, torch.cat(log_probs)))
    (without, expected), (along, ours) = found
    assert torch.allclose(ours, expected, atol=1e-9)
    assert along.text == without.text
    assert along.work.calls < without.work.calls


def test_the_space_before_a_text_is_the_tokenizers_own_and_not_the_byte_that_stands_in_for_it():
    tokenizer = byte_tokenizers.llama()
    spelling = spelling_of("llama", tokenizer)
    own, stand_in = tokenizer.convert_tokens_to_ids([byte_tokenizers.SPACE, "<0x20>"])
    assert spelling.spelled([own]) == spelling.spelled([stand_in]) == spelling.dummy
    assert spelling.encode(b"") == [own]
    assert spelling.encode(b"\xff")[0] == own


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_estimate_is_above_what_it_may_be(kind):
    """Whether the model is asked goes by the second alone; where covers are joined, both grow."""
    member = member_of(kind, Pruning(0.2))
    reading = member.begin(b"the other there")
    seen = 0
    for byte in b" the her there other the":
        (reading,) = member.advance([reading], [byte])
        for cover in reading.covers.open:
            assert cover.mass <= cover.most * (1 + 1e-12)
            seen += 1
    assert seen
