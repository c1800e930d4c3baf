"""Members over bytes: exhaustive sums over tokenizations, what is kept, what is pruned, and what is refused."""

import importlib
import math
import random
import subprocess
import sys
from dataclasses import replace

import byte_tokenizers
import numpy as np
import pytest
import torch
import transformers as tf
from byte_members import EXACT, HOSTILE, TEXTS, at_once, exhaustive, member_of, model_of, step_by_step
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softmeet.errors import InvalidInputError, VocabularyMismatchError
from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes import nodes
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Cover, Covers, Open, Pruning
from softmeet.readers.bytes.next_tokens import END, SYMBOLS
from softmeet.readers.bytes.token_model import TokenModel
from softmeet.readers.reader import Given, Reader


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


def test_of_qwen_a_text_begins_behind_a_line_break_though_its_tokenizer_was_saved_with_a_bos(tmp_path):
    vocabulary = {letter: k for k, letter in enumerate(bytes_to_unicode().values())}
    made = tf.Qwen2Tokenizer(vocabulary, [], bos_token="<|endoftext|>", add_bos_token=False)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, tf.AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.bos_token == "<|endoftext|>"
        assert spelling_of("m", tokenizer).start == (vocabulary["\u010a"],)


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


def test_what_a_member_rules_out_has_no_probability_and_may_come_all_the_same():
    """However little the member counts: the least number of its dtype to the power of a thousandth is a tenth."""
    member = member_of("gpt2")
    letters = bytes_to_unicode()
    tokenizer = byte_tokenizers.KINDS["gpt2"]()
    forbidden = [k for text, k in tokenizer.get_vocab().items() if letters[ord("h")] in text]
    bias = torch.zeros(len(tokenizer), dtype=torch.float64).index_fill(0, torch.tensor(forbidden), -math.inf)
    original = TokenModel.logits
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TokenModel, "logits", lambda self, behind: original(self, behind) + bias)
        reading = member.begin(b"")
        for byte in b"the":
            found = member.log_probs([reading])[0]
            assert found[ord("h")] == -math.inf
            assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)
            (reading,) = member.advance([reading], [byte])
        assert member.log_probs([reading]).exp().sum().item() == pytest.approx(1, abs=1e-6)


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


def test_after_the_end_comes_the_end():
    member = member_of("gpt2", Pruning())
    (reading,) = member.advance([member.begin(b"the")], [END])
    assert member.log_probs([reading])[0].exp().tolist() == [0.0] * (SYMBOLS - 1) + [1.0]
    assert member.advance([reading], [65])[0].ended


def columns(member):
    """How many tokens' keys and values a member holds, with room for more."""
    layers, width = member.model.config.n_layer, member.model.config.n_embd
    return member.reader.bytes // (2 * layers * width * 8)


def test_long_texts_keep_little_and_ask_little():
    """What was read behind covers that were let go is let go, all of it with the reading; most bytes cost no call."""
    member = member_of("gpt2", Pruning(0.05))
    kept = columns(member)
    reading, text, most = member.begin(b"the"), b" there, then he the other" * 12, 0
    before = reading.work
    for byte in text:
        (reading,) = member.advance([reading], [byte])
        most = max(most, columns(member))
    own = len(member.spelling.encode(b"the" + text))
    assert most < 1.5 * (own + 64) + 2 * 80
    assert reading.work.calls - before.calls <= len(text)
    del reading
    assert columns(member) - kept <= 80  # those before every text


def test_readings_may_go_in_any_order():
    """Of many that part from one, each is what it is alone, whatever others have gone; then nothing is left."""
    member, chance, texts = member_of("gpt2", Pruning()), random.Random(0), [b"the"]
    readings, most = [member.begin(texts[0])], 0
    for _ in range(150):
        k = chance.randrange(len(readings))
        more = chance.choice([b" the other", b"re", b", he threw"])
        readings.append(member.follow(readings[k], more))
        texts.append(texts[k] + more)
        if len(readings) > 6:
            gone = chance.randrange(6)
            del readings[gone], texts[gone]
        most = max(most, columns(member))
    for text, reading in zip(texts, readings, strict=True):
        assert torch.allclose(member.log_probs([reading]), member.log_probs([member.begin(text)]), atol=1e-9)
    assert most < 4 * sum(len(member.spelling.encode(text)) + 64 for text in texts)
    readings.clear()
    del reading
    assert columns(member) <= 80


class Plain(Reader):
    """A reader whose output layer nobody sees."""

    def __init__(self, below, **can):
        self.below, self.head = below, None
        self.name, self.alphabet, self.limit = below.name, below.alphabet, below.limit
        self.traits = replace(below.traits, **can)

    bytes = property(lambda self: self.below.bytes)

    def open(self, text=(), own=(), *, reuse=True):
        return self.below.open(text, own, reuse=reuse)

    def fork(self, row, count=1, length=None):
        return self.below.fork(row, count, length)

    def crop(self, row, length):
        self.below.crop(row, length)

    def close(self, row):
        self.below.close(row)

    def read(self, asked):
        told = yield from self.below.read(asked)
        return Given(told.log_probs(), told.counts, told.errors, told.work)


@pytest.mark.parametrize("pruning", [Pruning(), EXACT])
def test_any_reader_of_tokens_that_forks_and_crops_is_read_by_bytes(pruning):
    member = member_of("llama", pruning)
    plain = ByteMember(Plain(member.reader), spelling_of("plain", byte_tokenizers.KINDS["llama"]()), pruning)
    assert (plain.model, plain.head, plain.limit, plain.ends) == (None, None, member.limit, member.ends)
    for text in TEXTS:
        (ours, found, _), (theirs, expected, _) = plain.score(text), member.score(text)
        assert np.allclose(np.exp(found), np.exp(expected), atol=1e-9)
        assert ours.work.calls == theirs.work.calls
        assert step_by_step(plain, text) == pytest.approx(step_by_step(member, text), abs=1e-9)


class Few(Plain):
    """A reader of few rows, which refuses more."""

    def __init__(self, below, rows):
        super().__init__(below, rows=rows)
        self.opened, self.most = 0, 0

    def _counted(self, rows):
        self.opened += len(rows)
        self.most = max(self.most, self.opened)
        assert self.opened <= self.traits.rows
        return rows

    def open(self, text=(), own=(), *, reuse=True):
        return self._counted([super().open(text, own, reuse=reuse)])[0]

    def fork(self, row, count=1, length=None):
        return self._counted(super().fork(row, count, length))

    def close(self, row):
        self.opened -= 1
        super().close(row)


def test_a_reader_of_few_rows_reads_long_texts_and_goes_on(monkeypatch):
    """Rows of many tokenizations are given up, and read again where a text goes on behind them."""
    monkeypatch.setattr(nodes, "_SPARE", 3)
    spelling = spelling_of("plain", byte_tokenizers.KINDS["llama"]())
    few = Few(member_of("llama", Pruning()).reader, 8)
    scarce, plenty = ByteMember(few, spelling, Pruning()), ByteMember(Plain(few.below), spelling, Pruning())
    text = b"the other there, then he threw the rest here"
    (ours, found, _), (theirs, expected, _) = scarce.score(text), plenty.score(text)
    assert np.allclose(np.exp(found), np.exp(expected), atol=1e-9)
    for more in (b" and", b"re", b"s of the"):
        ours, theirs = scarce.follow(ours, more), plenty.follow(theirs, more)
        assert torch.allclose(scarce.log_probs([ours]), plenty.log_probs([theirs]), atol=1e-9)
    (ours,), (theirs,) = scarce.advance([ours], [ord("e")]), plenty.advance([theirs], [ord("e")])
    assert torch.allclose(scarce.log_probs([ours]), plenty.log_probs([theirs]), atol=1e-9)
    assert few.most > 4


TOLD = [
    b"the other there, then he threw the rest here and there",
    b"he then rested there, other than the hens here too",
]


def read_on(member, rows):
    """Read texts byte by byte, side by side; returns the last predictions."""
    readings = [member.begin(b"") for _ in TOLD]
    for symbols in zip(*TOLD, strict=False):
        readings = member.advance(readings, symbols)
        rows.append(member.reader.opened)
    return member.log_probs(readings)


def test_a_text_that_goes_on_gives_up_the_rows_of_its_beginning():
    rows = []
    read_on(ByteMember(Few(member_of("llama", Pruning()).reader, 500), member_of("llama").spelling, Pruning()), rows)
    assert max(rows[-10:]) <= max(rows[10:20]) + 4
    assert max(rows) < 40


def test_where_rows_are_few_little_is_read_again(monkeypatch):
    monkeypatch.setattr(nodes, "_SPARE", 2)
    below, spelling = member_of("llama", Pruning()).reader, member_of("llama").spelling
    scarce, plenty = (ByteMember(Few(below, rows), spelling, Pruning()) for rows in (8, 500))
    found, expected = (read_on(member, []) for member in (scarce, plenty))
    assert torch.allclose(found, expected, atol=1e-9)
    assert scarce.reader.most <= 8 < plenty.reader.most
    assert plenty.spent.calls < scarce.spent.calls < 2 * plenty.spent.calls
    assert plenty.spent.tokens < scarce.spent.tokens < 2 * plenty.spent.tokens


@pytest.mark.parametrize("can", [{"can_fork": False}, {"can_crop": False}])
def test_readers_that_cannot_fork_or_crop_are_refused(can):
    member = member_of("gpt2")
    with pytest.raises(InvalidInputError, match="expected a reader that can fork rows and take back what it has read"):
        ByteMember(Plain(member.reader, **can), member.spelling)


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
    spelling, reading = member.spelling, member.begin(b"")
    probs = reading.covers.closed[0].probs
    _, longer, end = spelling.among(b"th")
    heavy = Cover(probs, 1.0, 1.0, b"th", longer, end)
    light = Open(probs, spelling.encode(b"h")[0], 1e-12, 1e-12, b"", 1.0, probs.root)
    covers = Covers((heavy,), (light,)).answered(spelling, [(light, probs)], Pruning())
    assert [one.rest for one in covers.closed] == [b"th", b""]
    assert (covers.prediction(spelling)[[byte for byte in range(128) if bytes([byte]) in spelling.words]] > 0).all()
    assert Covers((heavy,)).prediction(spelling)[ord("z")] == 0


def test_a_prefix_of_ones_own():
    tokenizer = byte_tokenizers.byte_level()
    model = model_of(tokenizer)
    spelling = spelling_of("m", tokenizer)
    own = ByteMember(model, spelling, EXACT, prefix=[0, *spelling.encode(b"the")])
    with torch.inference_mode():
        log_p = model(torch.tensor([own.prefix])).logits[0, -1].log_softmax(-1)
    assert own.log_probs([own.begin(b"")])[0, END].item() == pytest.approx(log_p[0].item(), abs=1e-9)


def test_likely_tokens_that_are_run_along_save_calls_and_change_nothing():
    """They are run along where a row more of a call costs less than a call of its own."""
    below, found = member_of("gpt2", Pruning(0.01)), []
    for cost in (1.0, 0.0):
        member = ByteMember(Plain(below.reader, row_cost=cost), below.spelling, below.pruning)
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


def test_the_former_place_of_byte_members_warns():
    with pytest.warns(DeprecationWarning, match="softmeet.readers.bytes.byte_member now"):
        former = importlib.reload(importlib.import_module("softmeet.members.byte_member"))
    assert former.ByteMember is ByteMember


def test_rows_that_outlive_their_module_end_quietly_with_the_interpreter():
    code = "import sys; from softmeet.readers.bytes import nodes; sys._kept = nodes, nodes.Node(None, 0, 0, (), 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Exception ignored" not in done.stderr
