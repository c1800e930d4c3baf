"""Files as a reader: distributions, claims and sums against an oracle that counts naively."""

import random
from itertools import chain
from math import exp, log

import numpy as np
import pytest
from toys import Letters

from softmeet.readers.files.claim import TOKENS
from softmeet.readers.files.corpus import find_texts
from softmeet.readers.files.index import Index
from softmeet.readers.files.matches import match
from softmeet.readers.files.reader import FilesReader
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader

V = Letters.size


def followed(files, text, v):
    """P_n by the formula of the guide, and how many orders matched, by a look at every place of every file."""
    p, order = np.full(v, 1 / v), 0
    for n in [n for n in TOKENS.orders if n <= len(text)]:
        counts = np.zeros(v)
        for file in files:
            for k in range(n, len(file)):
                counts[file[k]] += file[k - n : k] == text[-n:]
        if not counts.any():
            break
        p = (np.maximum(counts - 0.6, 0) + (1 + 0.6 * (counts > 0).sum()) * p) / (counts.sum() + 1)
        order += 1
    return p, order


def claimed(files, text, given, v):
    """The share that is claimed behind a text, of which the first symbols were given."""

    def weight(p, order):
        row, column = (
            sum(order >= least for least in (1, 3, 6)), sum(p.max() > x for x in (0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97))
        )  # fmt: skip
        return TOKENS.weights[row - 1][column] if row else 0

    factors, logs = (0.02, 0.1, 0.3, 0.6, 1.0, 1.3), [log(p) for p in (0.1, 0.1, 0.1, 0.1, 0.3, 0.3)]
    for k in range(max(0, given - 256), given):
        p, order = followed(files, text[:k], v)
        shares = [min(factor * weight(p, order), 0.97) for factor in factors]
        logs = [0.99 * old + log((1 - c) * 0.5 + c * p[text[k]]) for old, c in zip(logs, shares, strict=True)]
    odds = [exp(one - max(logs)) for one in logs]
    relevance = sum(f * o for f, o in zip(factors, odds, strict=True)) / sum(odds)
    return min(relevance * weight(*followed(files, text, v)), 0.97)


def index_of(files, tmp_path, v=V):
    for k, file in enumerate(files):
        (tmp_path / f"{k:03}.txt").write_text(" ".join(map(str, file)))
    return Index.of(
        find_texts([str(tmp_path)]),
        lambda every: [[int(word) for word in text.split()] for text in every],
        v,
        "toy",
        None,
    )


def corpora():
    chooser = random.Random(0)
    letters = lambda v, most: [chooser.randrange(v) for _ in range(chooser.randrange(most))]  # noqa: E731
    yield from ([letters(v, 40) for _ in range(count)] for v in (1, 2, 4, V) for count in (1, 3))
    yield from ([], [[]], [[0]], [[], [3, 3, 3], []], [[1, 2, 3, 1, 2]] * 3)


@pytest.mark.parametrize("files", list(corpora()), ids=lambda files: str(len([*chain(*files)])))
def test_distributions_and_claims_are_those_of_an_oracle(files, tmp_path):
    reader, chooser = FilesReader("files", Letters(), index_of(files, tmp_path)), random.Random(1)
    for trial in range(4):
        text = [chooser.choice([*[*chain(*files)], 0, V - 1]) for _ in range(12)]
        # Some of a text stands in the files.
        text[2:10] = [*chain(*files)][trial : trial + 8] if trial % 2 else text[2:10]
        given = chooser.randrange(1, len(text) + 1)
        row = reader.open(text[:given])
        found = finished(reader.read([Read(row, text, range(len(text) + 1))]))
        for k in range(len(text) + 1):
            p, _ = followed(files, text[:k], V)
            assert found.log_probs()[k].exp().numpy() == pytest.approx(p, abs=1e-12)
            assert found.claims[k].item() == pytest.approx(claimed(files, text[:k], min(k, given), V), abs=1e-12)
        reader.close(row)


def test_many_places_are_counted_by_evenly_spread_ones(tmp_path):
    index = index_of([[0, 1] * 7_500 + [0, 2] * 2_500], tmp_path)
    ((ids, counts), *_) = match(index, [0], TOKENS.orders, V).levels
    assert ids.tolist() == [1, 2]
    assert 2_000 <= counts.sum() <= 4_000
    assert counts[0] / counts.sum() == pytest.approx(0.75, abs=0.01)


def test_a_reader_of_files_obeys_the_laws(tmp_path):
    check_reader(FilesReader("files", Letters(), index_of([[1, 2, 3, 4] * 5], tmp_path)))


def test_what_cannot_follow_has_no_share(tmp_path):
    allowed = np.arange(V) != 3
    reader = FilesReader("files", Letters(), index_of([[1, 2, 1, 3]], tmp_path), allowed)
    told = reader.read_whole([[1]], [[1]]).log_probs().exp()
    assert told[0, 3] == 0
    assert told.sum().item() == pytest.approx(1, abs=1e-12)


def test_drawn_symbols_prove_nothing(tmp_path):
    """A text that the files have written would prove them right."""
    file = [random.Random(3).randrange(V) for _ in range(60)]
    reader = FilesReader("files", Letters(), index_of([file], tmp_path), weight=0.5)
    given, drawn = reader.open(file[:40]), reader.open([V - 1, *file[:4]])
    text = {given: file[:40], drawn: [V - 1, *file[:40]]}
    claims = [finished(reader.read([Read(row, text[row], [len(text[row])])])).claims.item() for row in (given, drawn)]
    assert claims[0] > claims[1]
    (fork,) = reader.fork(drawn)
    reader.crop(fork, 2)
    again = finished(reader.read([Read(fork, file[1:40], [39])]))
    assert again.claims.item() < claims[1]  # of what was given, fewer are left
    assert again.log_probs().equal(finished(reader.read([Read(drawn, [], [0])])).log_probs())


def test_weight_and_relevance_can_be_fixed(tmp_path):
    index = index_of([[1, 2, 3, 4] * 5], tmp_path)
    reader = FilesReader("files", Letters(), index, weight=0.5, relevance=0.4)
    assert reader.read_whole([[1, 2], [9]], [[2], [1]]).claims.tolist() == [0.2, 0.0]
