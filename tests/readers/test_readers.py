"""The laws of readers: real ones and toys obey them, and each law finds a reader that breaks it."""

import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from byte_members import EXACT, member_of
from toys import TOYS, Few, Letters, Table, read

from softmeet.errors import InvalidInputError, NonFiniteError, ReaderError, UnsupportedHeadError
from softmeet.readers.byte_reader import ByteReader
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.reader import Given, Traits, finished
from softmeet.readers.recurrent import RecurrentReader
from softmeet.readers.stateless import StatelessReader
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.readers.transformers import TransformersReader
from softmeet.testing import LAWS, check_reader

pytestmark = pytest.mark.checked


def tiny_reader(name="gpt2", dtype=torch.float64, **options):
    return TransformersReader(tiny.build(name).to(dtype), tiny.tokenizer(), name, **options)


def bounded(reader, **traits):
    """A reader that is held to a bound of its own: another would pass what reads on as if nothing had been read."""
    reader.traits = replace(reader.traits, **traits)
    return reader


# Of all tokenizations of more bytes there would be too many.
SHORT = [list(text) for text in (b"the ", b"t\xffh", b"e\n h")]
READERS = {
    **{toy.__name__: toy for toy in TOYS},
    **{name: partial(tiny_reader, name) for name in ("gpt2", "neox", "gemma2 soft-cap")},
    "own tokens": lambda: tiny_reader(own=(0,), kept_tokens=64),
    "other tokens, nothing kept": lambda: tiny_reader(own=(0, 5, 7), kept_tokens=0),
    "half precision": lambda: bounded(tiny_reader(dtype=torch.bfloat16), bound=1e-2),
    "recurrent": lambda: bounded(RecurrentReader(mamba(), None, "mamba"), bound=1e-5),
    "bytes": lambda: ByteReader(member_of("gpt2", Pruning()), "gpt2"),
    "bytes of SentencePiece": lambda: ByteReader(member_of("llama", Pruning()), "llama"),
    "all tokenizations": lambda: ByteReader(member_of("gemma", EXACT), "gemma"),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_obey(name):
    check_reader(READERS[name](), SHORT if name == "all tokenizations" else None)


def bloom():
    """A model whose attention counts columns, so that it reads no trees."""
    torch.manual_seed(0)
    return tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=tiny.V, hidden_size=32, n_layer=2, n_head=4, **tiny.IDS)
    ).eval()


HALF = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
# Models that attend to the last few tokens, some in half of their layers.
WINDOWED = {
    "sliding": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**tiny.SMALL, **tiny.GQA, **HALF)).eval(),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**tiny.SMALL, **tiny.GQA, sliding_window=4)).eval(),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**tiny.SMALL, num_key_value_heads=2, sliding_window=4)
    ).eval(),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**tiny.SMALL, num_key_value_heads=2)).eval(),
}


KINDS_OF_ROWS = [of for of in (*tiny.BUILDERS, "bloom", *WINDOWED) if of != "llama tied"]


@pytest.mark.parametrize(("of", "seed"), [(of, seed) for k, of in enumerate(KINDS_OF_ROWS) for seed in (k % 2, 2)])
def test_whatever_is_done_to_rows_they_are_read_as_the_model_reads_their_texts(of, seed):
    """Rows are opened, read, forked, cropped and closed at random; each prediction is that of the text by itself."""
    torch.manual_seed(0)
    model = {"bloom": bloom, **WINDOWED}.get(of, lambda: tiny.build(of))().double()
    at_once = seed == 2 and of != "bloom"
    reader = TransformersReader(model, tiny.tokenizer(), of, kept_tokens=40, at_once=at_once)
    chance = random.Random(seed)
    assert reader._kv.reads_trees == (of != "bloom")
    texts = {reader.open(): []}
    for _ in range(40):
        row = chance.choice(list(texts))
        match chance.choice(["open", "read", "read", "read", "fork", "crop", "close"]):
            case "open":
                text = [*chance.choice(list(texts.values())), 1 + chance.randrange(60)]
                row = reader.open(text)
                texts[row] = text[: row.known]
            case "fork":
                length = chance.randrange(row.length + 1)
                for fork in reader.fork(row, 2, length):
                    texts[fork] = texts[row][:length]
            case "crop":
                length = chance.randrange(row.length + 1)
                reader.crop(row, length)
                texts[row] = texts[row][:length]
            case "close" if len(texts) > 1:
                reader.close(row)
                del texts[row]
            case _:
                several = chance.sample(list(texts), min(len(texts), chance.choice([1, 2, 4])))
                asked = []
                for one in several:
                    new = [1 + chance.randrange(60) for _ in range(chance.choice([1, 1, 1, 3]))]
                    begun = not texts[one]
                    at = sorted(chance.sample(range(begun, len(new) + 1), chance.choice([0, 1])))
                    asked.append(read(one, new, at, keep=chance.random() < 0.8))
                compared(reader, model, texts, asked)


def compared(reader, model, texts, asked):
    """Read, and compare what follows with the model's own logits for each text."""
    found = finished(reader.read(asked))
    told = found.log_probs()
    for k, one in enumerate(asked):
        whole = [*texts[one.row], *one.symbols]
        if len(whole) > reader.limit:
            assert k in found.errors
            continue
        with torch.inference_mode():
            ids = torch.tensor([whole])
            expected = model(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        for place, row in zip(one.at, told[found.of(k)], strict=True):
            assert torch.allclose(row, expected[len(texts[one.row]) + place - 1], atol=1e-9)
        if one.keep:
            texts[one.row] = whole


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_to_bytes_they_are_read_as_texts(seed):
    """Rows are read in pieces, forked and cropped at random; each prediction is that of the text as it is scored."""
    member, chance = member_of("gpt2", Pruning()), random.Random(seed)
    reader = ByteReader(member, "bytes")
    texts, known = {reader.open(): b""}, b"the hat\n ehth\xc3\xa9 he theethe th" * 3
    for _ in range(30):
        row = chance.choice(list(texts))
        match chance.choice(["read", "read", "read", "fork", "crop"]):
            case "fork":
                length = chance.randrange(row.length + 1)
                (fork,) = reader.fork(row, 1, length)
                texts[fork] = texts[row][:length]
            case "crop":
                length = max(0, row.length - chance.choice([1, 2, 9]))
                reader.crop(row, length)
                texts[row] = texts[row][:length]
            case _:
                asked = []
                for one in chance.sample(list(texts), min(len(texts), 3)):
                    start = chance.randrange(30)
                    new = list(known[start : start + chance.choice([1, 1, 2, 5, 9])])
                    at = sorted(chance.sample(range(len(new) + 1), chance.choice([0, 1, 2])))
                    asked.append(read(one, new, at, keep=chance.random() < 0.8))
                found = finished(reader.read(asked))
                for k, one in enumerate(asked):
                    whole = texts[one.row] + bytes(one.symbols)
                    _, expected, _ = member.score(whole)
                    for place, told in zip(one.at, found.log_probs(found.of(k)), strict=True):
                        place += len(texts[one.row])
                        assert torch.allclose(told.exp(), torch.from_numpy(expected[place]).exp(), atol=1e-9)
                    if one.keep:
                        texts[one.row] = whole


def mamba():
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=tiny.V, hidden_size=16, num_hidden_layers=2, state_size=4, **tiny.IDS)
    return tf.MambaForCausalLM(config).eval()


def test_a_recurrent_model_that_fails_amid_a_text_reads_it_again(monkeypatch):
    model, texts = mamba(), [5, 6, 7, 8]
    reader = RecurrentReader(model, None, "mamba")
    row = reader.open(own=(3,))
    finished(reader.read([read(row, texts[:2], [2])]))
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.norm_f, "forward", lambda x: x * torch.nan)
        found = finished(reader.read([read(row, [9], [1])]))
        assert isinstance(found.errors[0], NonFiniteError)
    told = finished(reader.read([read(row, texts[2:], [0, 2])])).log_probs()
    with torch.inference_mode():
        expected = model(torch.tensor([[3, *texts]])).logits[0].log_softmax(-1)
    assert torch.allclose(told, expected[[2, 4]], atol=1e-5)
    with pytest.raises(InvalidInputError, match="puts none before a text"):
        raise finished(reader.read([read(reader.open(), [5], [0])])).errors[0]


def test_bytes_round_as_the_reader_below_does():
    member = member_of("gpt2", Pruning())
    assert ByteReader(member, "bytes").traits.rounding == "fine"
    half = ByteMember(member.model.bfloat16(), member.spelling, EXACT)
    reader = ByteReader(half, "bytes")
    assert (reader.traits.rounding, reader.traits.places) == ("coarse", half.reader.traits.places)
    assert reader.traits.cost == half.reader.traits.cost > 0


class Shares(Table):
    def fork(self, row, count=1, length=None):
        return [row] * count

    def close(self, row):
        if row in self.rows:
            super().close(row)


class Leaks(Table):
    """Symbols that were taken back are forgotten by the row's length alone."""

    def crop(self, row, length):
        row.symbols = (*row.symbols[: length - 1], row.symbols[-1])


class Keeps(Table):
    def read(self, asked):
        return super().read([read(one.row, one.symbols, one.at) for one in asked])


class Mixes(Table):
    def told(self, logits, counts, errors):
        many = len(counts) > 1 and not errors
        return super().told(logits[:1].expand_as(logits) if many else logits, counts, errors)


class Overwrites(Table):
    buffer = torch.zeros(64, len(Letters().ends) + 27, dtype=torch.float64)

    def told(self, logits, counts, errors):
        self.buffer[: len(logits)] = logits
        return super().told(self.buffer[: len(logits)], counts, errors)


class Unnormalised(Table):
    def told(self, logits, counts, errors):
        found = super().told(logits, counts, errors)
        found.log_probs = lambda places=slice(None): found.logits(places) + 1
        return found


class Promises(Few):
    """Bounds that are below what is left."""

    def told(self, logits, counts, errors):
        found = super().told(logits, counts, errors)
        found.bounds = lambda places=slice(None): torch.full_like(logits[places, 0], -50.0)
        return found


class Silent(Table):
    def refused(self, row, symbols):
        return None

    def follows(self, symbols):
        return super().follows([symbol % self.alphabet.size for symbol in symbols])


class Halfway(Table):
    def read(self, asked):
        for one in asked:
            if self.refused(one.row, one.symbols) and one.row in self.rows:
                one.row.symbols = (*one.row.symbols, 0)
        return super().read(asked)


class Hoards(Table):
    hoard = 0

    def close(self, row):
        self.hoard += 100 * (row.length + 1) ** 2 * (self.hoard + 1)
        super().close(row)

    @property
    def bytes(self):
        return self.hoard


class Forgets(Table):
    """What a text was opened with counts as known, though nothing was read."""

    def open(self, text=(), own=(), *, reuse=True):
        row = super().open(text, own)
        row.known = max(0, len(text) - 1)
        return row


class Dead(Table):
    def checked(self, asked):
        return


class Once(Table):
    """What follows is told at once or not at all."""

    def follows(self, symbols):
        found = super().follows(symbols)
        self.asked = getattr(self, "asked", 0) + 1
        return found.roll(self.asked % 2)


class Shy(Table):
    """What follows is told once, and is anything when it is asked for again."""

    def read(self, asked):
        found = yield from super().read(asked)
        again = any(not one.symbols for one in asked)
        return Given(found.logits().roll(1, -1), found.counts, found.errors) if again else found


class Deaf(StatelessReader):
    def __init__(self):
        super().__init__("deaf", TokenAlphabet.of(tiny.tokenizer()), 64)
        self.table = torch.randn(97, self.alphabet.size, generator=torch.Generator().manual_seed(0))

    def open(self, text=(), own=(), *, reuse=True):
        return super().open(text, (), reuse=reuse)

    def next_logits(self, texts):
        return torch.stack([self.table[sum(text) % 97] for text in texts])


class Boasts(StatelessReader):
    """Claims more than there is, or whatever was drawn as well."""

    def __init__(self, share=lambda text, given: 1.0):
        super().__init__("boasts", TokenAlphabet.of(tiny.tokenizer()), 64, Traits(claims=True))
        self.share = share

    def next_logits(self, texts):
        return torch.zeros(len(texts), self.alphabet.size)

    def next_claims(self, texts, given):
        return torch.tensor([self.share(text, count) for text, count in zip(texts, given, strict=True)])


def test_claims_of_a_reader_of_ones_own_are_looked_at():
    check_reader(Boasts(lambda text, given: given / 100))
    counts = iter(range(10_000))
    with pytest.raises(AssertionError, match="whole or in pieces"):
        check_reader(Boasts(lambda text, given: next(counts) / 10_000))
    with pytest.raises(ReaderError, match="boasts claimed no share from 0 to below 1"):
        GuardedReader(Boasts()).read_whole([[1, 2]], [[2]])


# By a reader that breaks it, the law that finds it.
BROKEN = {
    Unnormalised: "tells_distributions",
    Promises: "tells_distributions",
    Once: "whole_equals_one_by_one",
    Shy: "told_again_is_the_same",
    Shares: "forks_read_on_by_themselves",
    Leaks: "cropped_is_never_read",
    Deaf: "own_tokens_stand_before",
    Keeps: "what_is_not_kept_is_not_read",
    Mixes: "company_changes_nothing",
    Forgets: "texts_that_begin_alike_are_read_the_same",
    Overwrites: "predictions_are_their_own",
    Silent: "what_cannot_be_read_harms_nobody",
    Halfway: "what_cannot_be_read_harms_nobody",
    Hoards: "closed_rows_are_given_back",
    Dead: "closed_rows_are_given_back",
    Boasts: "claims_are_shares",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_what_breaks_a_law_is_found_by_that_law(broken):
    with pytest.raises(AssertionError, match="expected") as found:
        check_reader(broken())
    assert BROKEN[broken] in [entry.name for entry in found.traceback]
    assert {law.__name__ for law in LAWS} == {*BROKEN.values()}


def told(reader, rows, new):
    """What follows, where each row has read on."""
    return finished(reader.read([read(row, own) for row, own in zip(rows, new, strict=True)])).log_probs()


def alone(reader, text, at=None):
    """What follows a text that is read by itself."""
    return reader.read_whole([text], [[len(text)] if at is None else at]).log_probs()


@contextmanager
def calls_of(reader):
    """The shapes of what the model is given at once, and its masks, while this lasts."""
    seen = []
    note = lambda module, given, options: seen.append((options["input_ids"].shape, options.get("attention_mask")))  # noqa: E731
    hook = reader.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


LONG = [1 + k % 60 for k in range(40)]


def test_a_call_that_fails_leaves_rows_as_they_were(monkeypatch):
    reader, text = tiny_reader(), LONG[:20]
    expected = alone(reader, text, range(1, 21))
    for piece, failing in ((256, 1), (4, 3)):
        monkeypatch.setattr("softmeet.readers.kv.PIECE", piece)
        row = reader.open(reuse=False)
        told(reader, [row], [text[:5]])
        fail = Mock(side_effect=[None] * (failing - 1) + [RuntimeError("out of memory")])
        hook = reader.model.base_model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            told(reader, [row], [text[5:]])
        hook.remove()
        found = finished(reader.read([read(row, text[5:], range(1, 16))])).log_probs()
        assert torch.allclose(found, expected[5:], atol=1e-9)


def test_texts_that_are_closed_leave_no_rows_to_be_run_in_vain():
    reader = tiny_reader()
    rows = [reader.open(reuse=False) for _ in range(16)]
    told(reader, rows, [[1, 2]] * 16)
    for row in rows[:-1]:
        reader.close(row)
    with calls_of(reader) as calls:
        told(reader, rows[-1:], [[3]])
        rows = [rows[-1], *(reader.open(reuse=False) for _ in range(15))]
        told(reader, rows, [[4]] * 16)
        told(reader, rows[:2], [[5]] * 2)
    widths = [shape[0] for shape, _ in calls]
    assert widths[0] == 1
    assert widths[-2:] == [16, 2]


def test_at_once_all_texts_are_one_call():
    """However many tokens are new in each of some, forks among them; else some wait for others."""
    calls = []
    for at_once in (True, False):
        reader = tiny_reader(at_once=at_once)
        row, other = reader.open(reuse=False), reader.open(reuse=False)
        told(reader, [row], [LONG[:5]])
        fork = reader.fork(row, 1, 3)[0]
        asked = [read(row, LONG[5:]), read(fork, [7]), read(other, LONG[:12])]
        calls.append(finished(reader.read(asked)).work.calls)
    assert calls[0] == 1 < calls[1]


def test_a_long_text_that_is_closed_leaves_a_short_one_little():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=1024, n_embd=32, n_layer=2, n_head=4))
    reader = TransformersReader(model.eval().double(), tiny.tokenizer(), "long", kept_tokens=0, at_once=True)
    short = reader.open()
    told(reader, [short], [[1]])
    before, (long,) = reader.bytes, reader.fork(short)
    told(reader, [long], [LONG * 20])
    assert reader.bytes > 8 * before
    reader.close(long)
    assert reader.bytes <= 2 * before
    assert torch.allclose(told(reader, [short], [[9]]), alone(reader, [1, 9]), atol=1e-9)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_text_takes_back_leaves_no_columns_to_be_read(at_once):
    """As of drafts that are wrong: a text by itself is as wide as it is long, and needs no mask."""
    reader = tiny_reader(at_once=at_once)
    row, text = reader.open(reuse=False), [1, 2, 3]
    told(reader, [row], [text])
    with calls_of(reader) as calls:
        for k in range(30):
            found = told(reader, [row], [[4 + k, 5, 6, 7]])
            reader.crop(row, row.length - 3)
            text.append(4 + k)
    assert all(mask is None for _, mask in calls)
    assert row.seat.block.end == len(text)
    assert torch.allclose(found, alone(reader, [*text, 5, 6, 7]), atol=1e-9)


def test_texts_with_few_new_tokens_share_a_row_of_a_call():
    """Ragged texts are run without padding, forks and texts that begin among them."""
    reader = tiny_reader(at_once=True)
    texts = [[1 + (7 * k + j) % 60 for j in range(3 * k)] for k in range(6)]
    rows = [reader.open(reuse=False) for _ in texts]
    told(reader, rows[1:], texts[1:])
    rows, texts = [*rows, *reader.fork(rows[4], 1, 7)], [*texts, texts[4][:7]]
    with calls_of(reader) as calls:
        for new in ([8], [1, 2, 3, 4], [9], [7, 7], [5], [6], [3, 2]), ([4],) * 7:
            found = told(reader, rows, new)
            texts = [[*text, *own] for text, own in zip(texts, new, strict=True)]
            assert torch.allclose(found, torch.cat([alone(reader, text) for text in texts]), atol=1e-9)
    assert calls[0][0] == (4, 4)


def test_what_stands_before_texts_is_read_once_if_it_is_read_by_itself():
    reader, own = tiny_reader(kept_tokens=0), [0, 5, 7]
    first, again = (finished(reader.read([read(reader.open(own=own), [])])) for _ in range(2))
    assert (first.work.tokens, again.work.tokens) == (3, 0)
    assert torch.equal(first.log_probs(), again.log_probs())
    for reuse, tokens in ((True, 2), (False, 5)):
        assert finished(reader.read([read(reader.open(own=own, reuse=reuse), [1, 2])])).work.tokens == tokens
    sizes = []
    for k in range(40):
        row = reader.open(own=[1 + k])
        finished(reader.read([read(row, [], [])]))
        assert finished(reader.read([read(row, [])])).work.tokens == 1
        reader.close(row)
        sizes.append(reader.bytes)
    assert sizes[-1] == sizes[20] > sizes[5]


def test_refusals_say_what_is_wrong():
    reader, other = tiny_reader(), tiny_reader("llama")
    row = reader.open(reuse=False)
    for wrong, said in (
        (lambda: told(reader, [other.open()], [[1]]), "expected an open row of gpt2"),
        (lambda: reader.open(own=[1] * 70), r"expected at most 63 tokens of gpt2 before a text, .* got 70 tokens"),
        (lambda: reader.open(own=[99]), "got the id 99"),
        (lambda: reader.crop(row, 1), "expected a length of gpt2 from 0 to 0"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            wrong()
    found = finished(reader.read([read(row, [], [0])]))
    assert "read a symbol first" in str(found.errors[0])
    assert len(found) == 0


def test_a_member_that_gives_nan_is_named_and_its_row_stays():
    reader = tiny_reader()
    row = reader.open(reuse=False)
    told(reader, [row], [[1, 2]])
    weight = reader.model.transformer.h[0].mlp.c_fc.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    found = finished(reader.read([read(row, [3])]))
    assert isinstance(found.errors[0], NonFiniteError)
    assert "gpt2" in str(found.errors[0])
    assert row.length == 2
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.allclose(told(reader, [row], [[3]]), alone(reader, [1, 2, 3]), atol=1e-9)


def poisoned(reader):
    """Make NaN of the token 63."""
    with torch.no_grad():
        reader.model.get_input_embeddings().weight[63] = torch.nan


def test_a_text_that_makes_nan_harms_none_that_shares_its_row_of_a_call():
    reader = tiny_reader(at_once=True)
    rows = [reader.open(reuse=False) for _ in range(4)]
    told(reader, rows, [[1, 2, 3 + k] for k in range(4)])
    poisoned(reader)
    new = [5] * 7, [9, 8], [4, 63, 7], [6]
    found = finished(reader.read([read(row, own) for row, own in zip(rows, new, strict=True)]))
    assert sorted(found.errors) == [2]
    expected = reader.read_whole([[1, 2, 3 + k, *new[k]] for k in (0, 1, 3)], [[3 + len(new[k])] for k in (0, 1, 3)])
    assert torch.allclose(found.states(), expected.states(), atol=1e-9)


def test_what_is_no_number_goes_with_a_reading_that_is_left(monkeypatch):
    monkeypatch.setattr("softmeet.readers.kv.PIECE", 4)
    reader = tiny_reader()
    row = reader.open(reuse=False)
    told(reader, [row], [[1, 2]])
    poisoned(reader)
    reading = reader.read([read(row, [63, *range(1, 9)])])
    next(reading)
    reading.close()
    found = finished(reader.read([read(row, [3])]))
    assert torch.allclose(found.states(), reader.read_whole([[1, 2, 3]], [[3]]).states(), atol=1e-9)


@pytest.mark.parametrize("own", [(), (9, 8)])
def test_a_text_that_is_not_kept_is_read_in_one_call_without_keys_and_values(own):
    reader, at = tiny_reader(), [1, 7, 40]
    row, kept = reader.open(LONG, own, reuse=False), reader.open(LONG, own, reuse=False)
    found = finished(reader.read([read(row, LONG, at, keep=False)]))
    assert (reader.bytes, row.length, found.counts) == (0, 0, [3])
    assert (found.work.calls, found.work.tokens) == (1, 40 + len(own))
    assert torch.allclose(found.states(), finished(reader.read([read(kept, LONG, at)])).states(), atol=1e-9)
    poisoned(reader)
    found = finished(reader.read([read(row, [*LONG[1:], 63], at, keep=False)]))
    assert isinstance(found.errors[0], NonFiniteError)
    assert (found.counts, row.length) == ([0], 0)


def test_long_texts_are_read_in_pieces_between_which_others_may_be_read(monkeypatch):
    reader = tiny_reader()
    every = alone(reader, LONG, range(1, 41))
    monkeypatch.setattr("softmeet.readers.kv.PIECE", 8)
    long, short = reader.open(reuse=False), reader.open(reuse=False)
    reading, found = reader.read([read(long, LONG)]), []
    for symbol in LONG[:4]:
        next(reading)
        found.append(told(reader, [short], [[symbol]]))
    found.append(finished(reading).log_probs())
    assert torch.allclose(torch.cat(found), every[[0, 1, 2, 3, -1]], atol=1e-9)


def test_a_row_that_is_closed_between_pieces_leaves_nothing_and_harms_no_other(monkeypatch):
    monkeypatch.setattr("softmeet.readers.kv.PIECE", 4)
    reader, texts = tiny_reader(kept_tokens=0), [LONG[:30], LONG[2:32]]
    empty, rows = reader.bytes, [reader.open(reuse=False) for _ in texts]
    work = reader.read([read(row, text) for row, text in zip(rows, texts, strict=True)])
    next(work)
    reader.close(rows[0])
    assert torch.allclose(finished(work).log_probs()[-1:], alone(reader, texts[1]), atol=1e-9)
    reader.close(rows[1])
    assert reader.bytes == empty
    assert not reader._kv._blocks


def test_a_text_that_begins_like_an_earlier_one_is_read_from_there_on():
    reader = tiny_reader(own=(0,))
    first = reader.open([1, 2, 3, 4, 5])
    assert first.known == 0
    told(reader, [first], [[1, 2, 3, 4, 5]])
    for text, known in (([1, 2, 3, 9], 3), ([1, 2, 3, 4, 5], 4), ([9], 0)):
        row = reader.open(text)
        assert row.known == known
        assert finished(reader.read([read(row, text[known:])])).work.tokens == len(text) - known


def test_predictions_hold_logits_states_and_costs():
    reader = tiny_reader()
    rows = [reader.open(reuse=False) for _ in range(2)]
    found = finished(reader.read([read(rows[0], [1, 2, 3], [1, 3]), read(rows[1], [4])]))
    assert (len(found), found.counts, found.of(1)) == (3, [2, 1], slice(2, 3))
    assert torch.equal(reader.head.logits(found.hidden()), found.logits())
    assert torch.allclose(found.logits().log_softmax(-1), found.log_probs())
    assert (found.work.calls, found.work.tokens) == (2, 4)
    given = Given(torch.zeros(1, 3), [1])
    assert torch.equal(given.states(), given.log_probs())
    assert torch.equal(found.states(), found.hidden())
    with pytest.raises(UnsupportedHeadError, match="for a rule that reads heads"):
        given.hidden()


def test_over_bytes_predictions_tell_what_was_left_out_and_what_a_text_has_cost():
    """Whatever else the member reads at the same time."""
    member = member_of("gpt2", Pruning())
    reader, text = ByteReader(member, "bytes"), b" the other the"
    reading, log_probs, dropped = member.score(text)
    assert dropped.max() > 0
    work, other = reader.read([read(reader.open(), [256, *text], range(1, len(text) + 2))]), reader.open()
    next(work)
    finished(reader.read([read(other, [*b"there"], [5])]))
    found = finished(work)
    assert np.allclose(found.states(), log_probs, atol=1e-9)
    assert np.allclose(found.dropped, dropped, atol=1e-12)
    assert (found.work.calls, found.work.tokens) == (reading.work.calls, reading.work.tokens)
    assert found.work.dropped == pytest.approx(dropped.sum())
