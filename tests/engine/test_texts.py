"""Texts that are written over readers of tables: who reads, what fails, and drafts, without any model."""

from __future__ import annotations

import gc
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from toys import Late, Stubborn, Table, joint

from softmeet.engine.ask import Members
from softmeet.engine.combine import Combiner
from softmeet.engine.continuation import Continuation, Dropped
from softmeet.engine.speculate import FullError, MemberTurns
from softmeet.engine.step import ask, combined, of_one_each
from softmeet.errors import InvalidInputError, NonFiniteError
from softmeet.members.opaque import NoHead
from softmeet.rules.gates import Unsure
from softmeet.rules.settings import Settings

V = Table().alphabet.size


class Broken(Table):
    """Gives no numbers behind letter 13."""

    name = "broken"

    def refused(self, row, symbols):
        return NonFiniteError("expected numbers") if 13 in symbols else super().refused(row, symbols)


def near():
    """A reader that agrees with Table(0) mostly."""
    found = Table()
    found.table = (found.table + 0.3 * Table(1).table).log_softmax(-1)
    return found


def same(found, expected):
    return torch.allclose(found, expected, atol=1e-12)


def ensemble(*readers):
    return SimpleNamespace(
        members=list(readers),
        readers_of_members=list(readers),
        combiner=Combiner([reader.name for reader in readers], [NoHead(V) for _ in readers]),
        tokenizer=None,
        garbage=deque(),
        claimants=(),
        before=lambda i, prompt, own: ((), 0),
    )


def settings(rule="logit-mean"):
    return Settings.of({"rule": rule}).for_members(2)


def test_each_member_reads_what_it_has_not_read():
    model, members = ensemble(Table(0), Table(1)), Members(2)
    one, other = Continuation(model, [1, 2, 3]), Continuation(model, [4])
    members.read_on([one], slice(1))
    one.tokens += [5, 6]
    found = members.read_on([one, other])
    for text in (one, other):
        for told, reader in zip(found[text], model.members, strict=True):
            assert same(told[0], reader.follows(text.tokens))
        assert [text.read_by(i) for i in range(2)] == [len(text.tokens)] * 2
    every = Continuation(model, [1, 2, 3])
    every.drafts = [7, 8]
    told = members.read_on([every], slice(1), every=True)[every][0]
    for k, own in enumerate(told, 1):
        assert same(own, model.members[0].follows([1, 2, 3, 7, 8][:k]))
    assert len(told) == 5


def test_a_text_that_a_member_cannot_read_fails_alone_and_by_the_members_name():
    model, members = ensemble(Table(0), Broken(1)), Members(2)
    good, bad = Continuation(model, [1, 2]), Continuation(model, [13])
    found = members.read_on([bad, good])
    with pytest.raises(NonFiniteError, match="from broken: leave it out"):
        bad.check()
    good.check()
    assert same(found[good][1][0], model.members[1].follows([1, 2]))


def test_forks_go_on_by_themselves_and_garbage_is_closed():
    model, members = ensemble(Table(0), Table(1)), Members(2)
    text = Dropped(model, [1, 2])
    members.read_on([text])
    fork = text.fork()
    fork.tokens.append(3)
    text.tokens.append(4)
    found = members.read_on([fork, text])
    for own in (fork, text):
        assert same(found[own][0][0], model.members[0].follows(own.tokens))
    text.crop(0, 1)
    assert (text.read_by(0), text.read_by(1)) == (1, 3)
    gone = fork.fork()
    gone.close()
    assert [len(reader.rows) for reader in model.members] == [2, 2]
    del text, fork, gone, found, own
    assert len(model.garbage) == 4
    for reader, row in model.garbage:
        reader.close(row)
    assert not model.members[0].rows


def test_members_that_are_not_asked_catch_up():
    model, members, gate = ensemble(Table(0), Table(1)), Members(2), Unsure(0.15)
    text, closed = Continuation(model, [1]), 0
    for token in (2, 3, 4, 5, 6, 7, 8):
        both = ask(members.read_on([text], slice(1)), gate, members)[text]
        is_open = bool(text.asked.rows)
        assert is_open == (model.members[0].follows(text.tokens).exp().max() < 0.15)
        expected = model.members[1].follows(text.tokens) if is_open else torch.zeros(V, dtype=torch.float64)
        assert same(both[1][0], expected)
        closed += not is_open
        text.tokens.append(token)
    assert 0 < closed < 7


def test_a_token_of_one_member_is_of_that_member():
    model, members = ensemble(Table(0), Table(1)), Members(2)
    texts = [Continuation(model, [k]) for k in range(3)]
    for drawn in ([0, 1, 1], [1, 1, 0]):
        found = of_one_each(texts, drawn, members, random.random)
        for own, text, i in zip(found, texts, drawn, strict=True):
            assert torch.allclose(own, model.members[i].follows(text.tokens), atol=1e-12)
            assert text.read_by(i) == len(text.tokens)
            assert text.read_by(1 - i) < len(text.tokens)  # nobody reads in vain
            text.tokens.append(9)


class Greedy(MemberTurns):
    """Takes the most probable token, until a text has twenty."""

    @property
    def is_room(self):
        return len(self.texts[0].tokens) + len(self.texts[0].drafts) < 19

    def draft(self, log_probs):
        for text, own in zip(self.texts, log_probs, strict=True):
            text.drafts.append(int(own.argmax()))
        return True

    def take(self, found, rows):
        for text, token in zip(self.texts, found.ours[rows].argmax(-1).tolist(), strict=True):
            text.tokens.append(token)
        return len(self.texts[0].tokens) < 20


@pytest.mark.parametrize("count", [0, 1, 3, "auto"])
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_change_no_token(count, rows):
    model, members = ensemble(Table(0), near()), Members(2)
    plain, drafted = ([Continuation(model, [k, 2]) for k in range(rows)] for _ in range(2))
    while len(plain[0].tokens) < 20:
        hidden = list(members.read_on(plain).values())
        (found,) = combined(plain, hidden, settings(), quickly=True)
        for text, own in zip(plain, found.ours, strict=True):
            text.tokens.append(int(own.argmax()))
    for text in drafted:
        text.tokens = text.tokens[:1]
        members.read_on([text])
        text.tokens = list(text.prompt)
    turns = Greedy(drafted, members, settings(), count, reported=False)
    while len(drafted[0].tokens) < 20:
        turns.turn()
    assert [text.tokens[:20] for text in drafted] == [text.tokens for text in plain]


def test_members_that_answer_late_are_waited_for_at_the_same_time():
    said = []
    model, members = ensemble(Late(0, said), Late(1, said)), Members(2)
    one, (first, second) = Continuation(model, [1, 2]), model.members
    found = members.read_on([one])[one]
    assert said == [("asked", first), ("asked", second), ("answered", first), ("answered", second)]
    assert all(same(told[0], reader.follows([1, 2])) for told, reader in zip(found, model.members, strict=True))


def test_members_that_know_some_symbols_each_are_combined_over_those_that_one_knows():
    model, members = ensemble(joint()), Members(1)
    (few, other), one = model.members[0].readers, Continuation(model, [1, 2])
    for _ in range(3):
        (told,) = members.read_on([one])[one]
        top = [reader.follows(one.tokens).topk(5) for reader in (few, other)]
        assert set((~told[0].isneginf()).nonzero().flatten().tolist()) == {
            k for own in top for k in own.indices.tolist()
        }
        one.tokens.append(int(told.argmax()))


def test_a_text_that_the_first_member_cannot_read_is_asked_of_nobody_and_harms_no_other():
    model, members = ensemble(Broken(0), Table(1)), Members(2)
    bad, good = Continuation(model, [13]), Continuation(model, [2, 3])
    told = ask(members.read_on([bad, good], slice(1)), Unsure(threshold=1.0), members)
    assert [name for name, _ in bad.failures] == ["broken"]
    assert bad.rows[1] is None
    assert same(told[good][1][0], model.members[1].follows([2, 3]))
    bad.tokens = [4]
    bad.crop(0, 0)
    assert bad.error is None, "what could not be read is taken back"


def test_a_draft_that_a_member_cannot_read_is_dropped_and_the_text_goes_on():
    model = ensemble(Table(0), Broken(1))
    text = Continuation(model, [1, 2])
    turns = Greedy([text], Members(2), settings(), 3, reported=False)
    text.drafts = [13]
    with pytest.raises(FullError):
        turns.run(1)
    text.drafts = []
    turns.take_back()
    assert text.error is None
    text.tokens.append(13)
    with pytest.raises(NonFiniteError):
        turns.run(1)


def test_rows_that_were_forked_are_closed_if_another_cannot_be():
    model = ensemble(Table(0), Stubborn(1))
    text = Dropped(model, [1, 2])
    Members(2).read_on([text])
    with pytest.raises(InvalidInputError, match="fork rows"):
        text.fork()
    gc.collect()
    assert [reader for reader, _ in model.garbage] == [model.members[0]]
