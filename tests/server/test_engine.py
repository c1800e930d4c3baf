"""The batcher: seeded rows are generate's, whoever shares the batch; rows come, go, fail and time out alone."""

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from batches import LENGTHS, MEMBERS, ensemble_of, generated, prompt, sequence

from softmeet.errors import NonFiniteError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.readers.prefixes import PrefixCache
from softmeet.server.errors import BusyError, ClosingError, TooLateError
from softmeet.server.limits import Limits
from softmeet.server.sequences import Failed, Finished, Token


def test_seeded_tokens_are_those_of_generate_whoever_shares_the_batch(serve):
    model = ensemble_of(MEMBERS)
    engine = serve(model, limits=Limits(rows=5, waiting=50))
    asked = [sequence(model, prompt(k, n), seed=k, max_tokens=4 + 3 * (k % 4)) for k, n in enumerate(LENGTHS)]
    for one, _ in asked[:3]:
        engine.submit([one])
    first = asked[0][1].all()
    engine.submit([one for one, _ in asked[3:]])
    found = [[e.token for e in first if isinstance(e, Token)], *(listener.tokens() for _, listener in asked[1:])]
    expected = [generated(model, s.prompt, seed=k, max_tokens=s.max_tokens) for k, (s, _) in enumerate(asked)]
    assert found == expected


def test_members_that_round_coarsely_read_a_seeded_request_anew(serve, monkeypatch):
    """As what they have read before changes their rounding."""
    model = ensemble_of(("gpt2", "llama"))
    engine, begun = serve(model), []
    for reader in engine.readers.values():
        monkeypatch.setattr(reader, "traits", replace(reader.traits, rounding="coarse"))
        monkeypatch.setattr(reader, "to_itself", lambda own=reader: begun.append(own) or nullcontext())
    counts = []
    for is_seeded in (False, True, True, False):
        one, listener = sequence(model, prompt(3, 10), sampling={"is_seeded": is_seeded})
        engine.submit([one])
        listener.tokens()
        counts.append(len(begun))
    assert counts == [0, 2, 4, 4]


def test_prefixes_forget_the_oldest_and_always_leave_a_token():
    kept = PrefixCache(limit=10)
    kept.keep([1, 2, 3, 4], ["a"])
    kept.keep([1, 2, 5], ["b"])
    assert kept.longest([1, 2, 3, 4]) == (3, ["a"])
    assert kept.longest([7, 7]) == (0, None)
    kept.keep([8] * 4, ["c"])
    assert kept.longest([1, 2, 5, 6]) == (2, ["a"])
    kept.keep([9] * 11, ["d"])
    assert kept.longest([9, 9]) == (0, None)


def test_ensembles_that_share_a_member_run_it_once(serve):
    first = ensemble_of(("gpt2", "llama"))
    second = EnsembleForCausalLM(
        EnsembleConfig(members=["llama", "opt"], rule="prob-mean"), [first.members[1], tiny.build("opt projected")]
    ).eval()
    second.generation_config.eos_token_id = None
    engine = serve(first, second)
    # Which is tried once, on three calls, where texts are padded.
    assert all(reader._kv.reads_trees for reader in engine.readers.values())
    calls = []
    first.members[1].base_model.register_forward_hook(lambda m, a, out: calls.append(len(out.last_hidden_state)))
    asked = [sequence(model, prompt(k, 4), seed=k) for k, model in enumerate((first, second, first))]
    engine.submit([one for one, _ in asked])
    found = [listener.tokens() for _, listener in asked]
    # Three prompts and eleven more tokens of each, most of them together.
    assert sum(calls) == 3 + 3 * 11
    assert calls.count(3) > 5
    assert found == [generated(one.combination.model, one.prompt, seed=k) for k, (one, _) in enumerate(asked)]


def test_a_member_that_returns_nan_fails_that_request_alone_by_name(serve):
    model = ensemble_of(("gpt2", "llama"))
    bad = model.members[1].base_model
    bad.embed_tokens.weight.data[60] = torch.nan
    engine = serve(model)
    good = [
        sequence(model, tuple(t for t in prompt(k, 9) if t != 60), seed=k, sampling={"logit_bias": {60: -100.0}})
        for k in range(3)
    ]
    poisoned, listener = sequence(model, (5, 60, 7))
    # One that turns bad while it runs: 60 is all that it may draw.
    turning, turned = sequence(model, (5, 6), sampling={"logit_bias": {60: 100.0}})
    engine.submit([good[0][0], turning, poisoned, good[1][0]])
    for events in (listener.all(), turned.all()):
        assert isinstance(events[-1].error, NonFiniteError)
        assert "member 1" in str(events[-1].error)
    engine.submit([good[2][0]])
    bad.embed_tokens.weight.data[60] = 0.0
    for k, (one, own) in enumerate(good):
        expected = generated(model, one.prompt, seed=k, sequence_bias={(60,): -100.0})
        assert own.tokens() == expected


def test_a_full_queue_a_deadline_and_a_cancellation(serve):
    model = ensemble_of(("gpt2", "llama"))
    engine = serve(model, limits=Limits(rows=1, waiting=2))
    long, listener = sequence(model, prompt(0, 2), max_tokens=50)
    late, told = sequence(model, prompt(1, 2), deadline=time.monotonic() - 1)
    gone, heard = sequence(model, prompt(2, 2))
    with pytest.raises(BusyError, match="this request needs 4 of its 3 places, and 3 are free"):
        engine.submit([long, late, gone, sequence(model, prompt(3, 2))[0]])
    engine.submit([long, late, gone])
    gone.cancel()
    assert isinstance(told.all()[-1].error, TooLateError)
    assert not heard.tokens()
    long.cancel()
    assert isinstance(listener.all()[-1], Failed | Finished)
    after, answered = sequence(model, prompt(4, 2))
    engine.submit([after])
    assert len(answered.tokens()) == 12


def test_closing_ends_what_runs_by_name_and_takes_nothing_more(serve):
    model = ensemble_of(("gpt2", "llama"))
    engine = serve(model)
    running, listener = sequence(model, prompt(0, 2), max_tokens=50)
    engine.submit([running])
    listener.get(timeout=300)
    engine.close(grace=0)
    assert isinstance(listener.all()[-1].error, ClosingError)
    engine.join()
    with pytest.raises(ClosingError, match="shutting down"):
        engine.submit([running])


def test_a_defect_fails_its_rows_and_the_engine_lives_on(serve, caplog):
    model = ensemble_of(("gpt2", "llama"))
    engine = serve(model)
    hook = model.members[0].base_model.register_forward_hook(lambda *_: 1 / 0)
    one, listener = sequence(model, prompt(0, 2))
    engine.submit([one])
    assert "see its log" in str(listener.all()[-1].error)
    assert "ZeroDivisionError" in caplog.text
    hook.remove()
    again, answered = sequence(model, prompt(0, 2))
    engine.submit([again])
    assert answered.tokens() == generated(model, again.prompt)
