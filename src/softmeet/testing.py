"""Laws that every reader has to obey, as assertions that a reader of your own can be tried by.

>>> from softmeet.testing import LAWS
>>> [law.__name__ for law in LAWS][:3]
['tells_distributions', 'whole_equals_one_by_one', 'told_again_is_the_same']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import SoftmeetError
from softmeet.readers.byte_tokenizer import byte_tokenizer
from softmeet.readers.reader import Predictions, Read, Reader, Row, finished
from softmeet.readers.stateless import StatelessReader
from softmeet.readers.token_alphabet import TokenAlphabet

# Below this log-probability, differences count no more.
_LEAST = -13.8
_SYMBOLS = 12

Texts = Sequence[Sequence[int]]


def check_reader(reader: Reader, texts: Texts | None = None, seed: int = 0) -> None:
    """Try all laws on a reader, and leave it without open rows.

    Args:
        reader: the reader, in which no row is open.
        texts: at least three texts of different lengths, at least four symbols each, that it can read; None to make
            some of random symbols.
        seed: of these.

    Raises:
        AssertionError: if it breaks a law; the message says which one, and by how much.

    Example:
        >>> from softmeet import Ensemble
        >>> from softmeet.readers.transformers import TransformersReader
        >>> model = Ensemble.from_pretrained("wide").model
        >>> check_reader(TransformersReader(model.members[0], model.tokenizer, "wide/gpt2"))
    """
    texts = random_texts(reader, seed) if texts is None else texts
    assert len(texts) >= 3, "expected at least three texts to try a reader with"
    for law in LAWS:
        try:
            law(reader, texts)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{law.__name__}: the reader raised {type(error).__name__}: {error}") from error


def random_texts(reader: Reader, seed: int = 0) -> list[list[int]]:
    """Return four texts of random symbols, each of which may follow those before it, and none of which ends a text."""
    chooser, alphabet = torch.Generator().manual_seed(seed), reader.alphabet
    found = []
    for length in (_SYMBOLS, _SYMBOLS // 2, 4, _SYMBOLS - 3):
        text = list[int]()
        while len(text) < min(length, reader.limit - 1):
            allowed = alphabet.may_follow(text)
            possible = range(alphabet.size) if allowed is None else allowed.nonzero().flatten().tolist()
            going_on = [symbol for symbol in possible if symbol not in alphabet.ends]
            # Symbols that stand in a text twice could hide what is read in a wrong place.
            going_on = [symbol for symbol in going_on if symbol not in text] or going_on
            text.append(going_on[int(torch.randint(len(going_on), (), generator=chooser))])
        found.append(text)
    return found


@contextmanager
def _opened(reader: Reader, **how: Any) -> Iterator[Row]:
    """Enter a context with a row of a reader that nothing was read in before; it is closed at the end."""
    row = reader.open(reuse=False, **how)
    try:
        yield row
    finally:
        reader.close(row)


def _read(reader: Reader, row: Row, symbols: Sequence[int], at: Sequence[int], keep: bool = True) -> Tensor:
    """Read symbols of one row; returns log-probabilities, (places, v)."""
    before = row.length
    found = finished(reader.read([Read(row, symbols, at, keep=keep)]))
    assert not found.errors, f"reading {len(symbols)} symbols of a text failed: {found.errors[0]}"
    expected = before + keep * len(symbols)
    assert row.length == expected, f"expected a row of length {expected} once it was read, got {row.length}"
    return _log_probs(found)


def _log_probs(found: Predictions) -> Float[Tensor, "k v"]:
    return found.log_probs().double().cpu()


def _alone(reader: Reader, text: Sequence[int]) -> Float[Tensor, "t v"]:
    """Read a text by itself in a row of its own; returns what follows each of its symbols."""
    with _opened(reader) as row:
        return _read(reader, row, text, range(1, len(text) + 1))


def _same(reader: Reader, law: str, found: Tensor, expected: Tensor) -> None:
    """Compare log-probabilities, as exactly as the reader's traits say."""
    assert found.shape == expected.shape, f"{law}: expected predictions {expected.shape}, got {found.shape}"
    traits = reader.traits
    if traits.rounding == "bitwise":
        apart = (found - expected).nan_to_num(0.0).abs().max().item()
        assert torch.equal(found, expected), f"{law}: expected the same bits, got {apart:g} nats more or less"
    elif traits.rounding == "coarse":
        known = ~(found.isneginf() | expected.isneginf())
        apart = torch.where(known, expected.exp() * (expected - found), 0.0).sum(-1).mean().item()
        assert apart <= traits.bound, f"{law}: expected a mean KL of at most {traits.bound:g} nats, got {apart:g}"
    else:
        likely = torch.maximum(found, expected) >= _LEAST
        apart = (found - expected).abs()[likely].max().item()
        assert apart <= traits.bound, f"{law}: expected to differ by at most {traits.bound:g} nats, got {apart:g}"


def tells_distributions(reader: Reader, texts: Texts) -> None:
    """Check that each prediction is a distribution over the alphabet, or is bounded where symbols are not known."""
    with _opened(reader) as row:
        found = finished(reader.read([Read(row, texts[0], range(1, len(texts[0]) + 1))]))
    told, v = _log_probs(found), reader.alphabet.size
    assert told.shape == (len(texts[0]), v), f"expected log-probabilities {(len(texts[0]), v)}, got {tuple(told.shape)}"
    assert not told.isnan().any(), "expected log-probabilities, got NaN"
    mass, most = told.logsumexp(-1), found.bounds()
    if reader.traits.known is None:
        assert most is None, "expected no bounds of a reader that knows all symbols"
        assert (mass.abs() < 1e-4).all(), f"expected probabilities that sum to 1, got {mass.exp().tolist()}"
        return
    assert most is not None, "expected bounds of a reader that does not know all symbols"
    known = (~told.isneginf()).sum(-1)
    assert (known <= reader.traits.known).all(), f"expected {reader.traits.known} known symbols at most, got {known}"
    left = torch.log1p(-mass.exp().clamp_max(1.0))
    assert (mass < 1e-6).all(), "expected known probabilities that sum to 1 at most"
    assert (most.double() >= left - (v - known).log() - 1e-6).all(), "expected bounds that leave room for what is left"


def whole_equals_one_by_one(reader: Reader, texts: Texts) -> None:
    """Check that a text which is read at once is predicted as one that is read symbol by symbol."""
    for text in texts:
        with _opened(reader) as row:
            found = torch.cat([_read(reader, row, [symbol], [1]) for symbol in text])
            assert row.length == len(text), f"expected a row of length {len(text)}, got {row.length}"
        _same(reader, "one by one", found, _alone(reader, text))


def told_again_is_the_same(reader: Reader, texts: Texts) -> None:
    """Check that what follows the symbols that were read is told again, before further ones are read."""
    text, half = texts[0], len(texts[0]) // 2
    with _opened(reader) as row:
        before = _read(reader, row, text[:half], [half])
        _same(reader, "told again", _read(reader, row, [], [0]), before)
        _same(reader, "told with what follows", _read(reader, row, text[half:], [0]), before)


def forks_read_on_by_themselves(reader: Reader, texts: Texts) -> None:
    """Check that a fork is the text read anew, and that neither it nor the row it was made of changes the other."""
    if not reader.traits.can_fork:
        with _opened(reader) as row, _refused(reader, "a fork by a reader whose traits say that it has none"):
            reader.fork(row)
        return
    one, other = texts[0], texts[1]
    half = min(len(one), len(other)) // 2
    row = reader.open(reuse=False)
    _read(reader, row, one[:half], [])
    first, second = reader.fork(row, 2)
    lengths = [own.length for own in (first, second)]
    assert lengths == [half, half], f"expected forks of length {half}, got {lengths}"
    told = [_read(reader, own, rest, range(1, len(rest) + 1)) for own, rest in ((first, one), (row, other))]
    told.append(_read(reader, second, one[half:], range(1, len(one) - half + 1)))
    for own in (row, first, second):
        reader.close(own)
    for found, rest in ((told[0], one), (told[1], other)):
        _same(reader, "a fork", found, _alone(reader, [*one[:half], *rest])[half:])
    _same(reader, "another fork", told[2], _alone(reader, one)[half:])


def cropped_is_never_read(reader: Reader, texts: Texts) -> None:
    """Check that symbols which were taken back leave nothing behind."""
    one, other = texts[0], texts[1]
    half = min(len(one), len(other)) // 2
    with _opened(reader) as row:
        _read(reader, row, one, [len(one)])
        if not reader.traits.can_crop:
            with _refused(reader, "taking back by a reader whose traits say that it cannot"):
                reader.crop(row, half)
            return
        reader.crop(row, half)
        assert row.length == half, f"expected a row of length {half} after crop, got {row.length}"
        expected = _alone(reader, [*one[:half], *other])
        _same(reader, "told after crop", _read(reader, row, [], [0]), expected[half - 1 : half])
        _same(reader, "read after crop", _read(reader, row, other, range(1, len(other) + 1)), expected[half:])
    if reader.traits.can_fork:
        with _opened(reader) as row:
            _read(reader, row, one, [])
            (fork,) = reader.fork(row, length=half)
            _same(reader, "forked at less", _read(reader, fork, other, range(1, len(other) + 1)), expected[half:])
            reader.close(fork)


def own_tokens_stand_before(reader: Reader, texts: Texts) -> None:
    """Check that a member's own tokens before a text count as read, where they are symbols of a tokenizer."""
    if not isinstance(reader.alphabet, TokenAlphabet):
        return
    (first, *rest), text = texts[1][:4], texts[0]
    found = list[Tensor]()
    for own, symbols in (([first], [*rest, *text]), ([first, *rest], text)):
        with _opened(reader, own=own) as row:
            assert row.length == 0, f"expected a new row of length 0, got {row.length}"
            found.append(_read(reader, row, symbols, [len(symbols)]))
    _same(reader, "behind its own tokens", found[1], found[0])
    with _opened(reader, own=[first, *rest]) as row:
        found.append(_read(reader, row, [], [0]))
    with _opened(reader, own=[first]) as row:
        _same(reader, "right behind its own tokens", found[2], _read(reader, row, rest, [len(rest)]))


def what_is_not_kept_is_not_read(reader: Reader, texts: Texts) -> None:
    """Check that symbols which are read without being kept leave a row as it was."""
    text, half = texts[0], len(texts[0]) // 2
    with _opened(reader) as row:
        _read(reader, row, text[:half], [])
        expected = _alone(reader, text)[half:]
        for keep in (False, True):
            found = _read(reader, row, text[half:], range(1, len(text) - half + 1), keep=keep)
            _same(reader, "kept" if keep else "not kept", found, expected)
        assert row.length == len(text), f"expected a row of length {len(text)}, got {row.length}"


def company_changes_nothing(reader: Reader, texts: Texts) -> None:
    """Check that texts of any lengths, read in one call in any order, are predicted as each by itself."""
    texts = texts[: reader.traits.rows]
    expected = [_alone(reader, text) for text in texts]
    for order in (list(range(len(texts))), list(reversed(range(len(texts))))):
        rows = [reader.open(reuse=False) for _ in texts]
        for begin, end in ((0, 2), (2, None)):  # from the beginning, and on from there
            asked = [Read(rows[k], texts[k][begin:end], range(1, len(texts[k][begin:end]) + 1)) for k in order]
            found = finished(reader.read(asked))
            assert not found.errors, f"in company: {found.errors}"
            told = _log_probs(found)
            for place, k in enumerate(order):
                _same(reader, "in company", told[found.of(place)], expected[k][begin:end])
        for row in rows:
            reader.close(row)


def texts_that_begin_alike_are_read_the_same(reader: Reader, texts: Texts) -> None:
    """Check that what is used of earlier texts changes nothing, and leaves a last symbol to be read."""
    expected = _alone(reader, texts[0])
    for _ in range(2):
        row = reader.open(texts[0])
        assert row.known < len(texts[0]), "expected a symbol of a known text that is left to be read"
        rest = texts[0][row.known :]
        _same(reader, "known", _read(reader, row, rest, range(1, len(rest) + 1)), expected[row.known :])
        reader.close(row)


def predictions_are_their_own(reader: Reader, texts: Texts) -> None:
    """Check that a later call changes nothing in predictions that were made."""
    with _opened(reader) as row:
        found = finished(reader.read([Read(row, texts[0], [1, len(texts[0])])]))
        _read(reader, row, texts[1], range(1, len(texts[1]) + 1))
    _same(reader, "asked late", _log_probs(found), _alone(reader, texts[0])[[0, -1]])


def what_cannot_be_read_harms_nobody(reader: Reader, texts: Texts) -> None:
    """Check that a symbol of no alphabet, or past the limit, is an error of its row alone, which stays as it was."""
    good, bad, told = reader.open(reuse=False), reader.open(reuse=False), list[Tensor]()
    _read(reader, bad, texts[1][:2], [])
    wrong = [[reader.alphabet.size]]
    if reader.limit < 1 << 16:
        wrong.append([texts[1][0]] * (reader.limit + 1))
    for symbols in wrong:
        asked = [Read(bad, symbols, [1]), Read(good, texts[0], [1], keep=False)]
        found = finished(reader.read(asked))
        assert set(found.errors) == {0}, f"expected an error of the first read alone, got {found.errors}"
        assert isinstance(found.errors[0], SoftmeetError), f"expected a SoftmeetError, got {found.errors[0]!r}"
        assert reader.name in str(found.errors[0]), f"expected an error that names {reader.name}: {found.errors[0]}"
        assert found.counts == [0, 1], f"expected predictions of the second read alone, got {found.counts}"
        told.append(_log_probs(found))
    rest = texts[1][2:]
    after = _read(reader, bad, rest, range(1, len(rest) + 1))
    reader.close(good)
    reader.close(bad)
    _same(reader, "after an error", after, _alone(reader, texts[1])[2:])
    for beside in told:
        _same(reader, "beside an error", beside, _alone(reader, texts[0])[:1])


def closed_rows_are_given_back(reader: Reader, texts: Texts) -> None:
    """Check that rows which are closed leave their memory and their places to others, and cannot be read."""
    held = list[int]()
    for _ in range(2):  # what is kept for texts that begin alike is kept once
        for text in texts:
            row = reader.open()
            _read(reader, row, text[row.known :], [])
            reader.close(row)
        held.append(reader.bytes)
    assert held[1] <= held[0], f"expected {held[0]:,} bytes at most once rows are closed, got {held[1]:,}"
    with _refused(reader, "a row that is closed"):
        finished(reader.read([Read(row, texts[0], [1])]))
    with _opened(reader) as row, _refused(reader, "a row that stands in a call twice"):
        finished(reader.read([Read(row, texts[0], [1])] * 2))
    if reader.traits.rows is not None:
        rows = [reader.open(reuse=False) for _ in range(reader.traits.rows)]
        with _refused(reader, "a row too many"):
            reader.open(reuse=False)
        for row in rows:
            reader.close(row)


@contextmanager
def _refused(reader: Reader, what: str) -> Iterator[None]:
    """Enter a context that has to end by a SoftmeetError which names the reader."""
    try:
        yield
    except SoftmeetError as error:
        if reader.name not in str(error):
            raise AssertionError(f"expected an error that names {reader.name}, got: {error}") from error
    else:
        raise AssertionError(f"expected a SoftmeetError for {what}")


def claims_are_shares(reader: Reader, texts: Texts) -> None:
    """Check that a reader which claims does so at every place, by shares of what it was given, however it is read."""
    for text in texts if reader.traits.claims else ():
        told = list[list[float]]()
        for pieces in ([text], [text[:2], text[2:]]):
            row, claims = reader.open(text), list[float]()
            for piece in pieces:
                found = finished(reader.read([Read(row, piece[row.known :], range(1, len(piece) + 1))])).claims
                assert found is not None, "expected claims of a reader whose traits say that it claims"
                assert found.shape == (len(piece),), f"expected a claim for each of {len(piece)} places, got {found}"
                claims += found.tolist()
            reader.close(row)
            told.append(claims)
        assert all(0 <= share < 1 for share in told[0]), f"expected claims of 0 or more, below 1, got {told[0]}"
        assert told[0] == told[1], f"expected the same claims, whole or in pieces, got {told[0]} and {told[1]}"


LAWS: tuple[Callable[[Reader, Texts], None], ...] = (
    tells_distributions,
    whole_equals_one_by_one,
    told_again_is_the_same,
    forks_read_on_by_themselves,
    cropped_is_never_read,
    own_tokens_stand_before,
    what_is_not_kept_is_not_read,
    company_changes_nothing,
    texts_that_begin_alike_are_read_the_same,
    predictions_are_their_own,
    what_cannot_be_read_harms_nobody,
    closed_rows_are_given_back,
    claims_are_shares,
)


class Uniform(StatelessReader):
    """A reader for tests and examples, by which every byte, and the end of a text, is as likely as any other.

    Args:
        name: its name in messages.
    """

    def __init__(self, name: str = "uniform") -> None:
        super().__init__(name, TokenAlphabet.of(byte_tokenizer()))

    def next_logits(self, texts: Texts) -> Float[Tensor, "k v"]:
        """Return a logit of 0 for every byte and for the end, behind each text."""
        return torch.zeros(len(texts), self.alphabet.size)
