"""The batcher: seeded rows are generate's, whoever shares the batch; rows come, go, fail and time out alone."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from batches import LENGTHS, MEMBERS, ensemble_of, generated, prompt, sequence

from softmeet.engine.ask import Members
from softmeet.engine.combine import Combiner
from softmeet.errors import NonFiniteError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.readers.prefixes import PrefixCache
from softmeet.server.errors import BusyError, ClosingError, TooLateError
from softmeet.server.limits import Limits
from softmeet.server.members import readers_of
from softmeet.server.sequences import Failed, Finished, PromptScored, Token
from softmeet.simplex import total_variation


@pytest.mark.parametrize("rule", ["logit-mean", "prob-mean", "power-mean"])
def test_an_average_is_solved_for_only_where_a_report_is_asked_for(serve, monkeypatch, rule):
    solved, original = [], Combiner.combine_rows

    def combine_rows(self, scores, *args, **options):
        solved.append(scores.shape[1])
        return original(self, scores, *args, **options)

    monkeypatch.setattr(Combiner, "combine_rows", combine_rows)
    model = ensemble_of(MEMBERS[:2], rule)
    engine = serve(model)
    found = {}
    for report in (None, 2):
        one, listener = sequence(model, prompt(0, 4), top=3, report=report)
        engine.submit([one])
        found[report] = [e for e in listener.all() if isinstance(e, Token)]
        assert len(solved) == (0 if report is None else 12)
    plain, told = found[None], found[2]
    assert [e.token for e in plain] == [e.token for e in told]
    assert [e.status for e in plain] == [e.status for e in told] == ["OPTIMAL"] * 12
    for one, other in zip(plain, told, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


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


def test_columns_shift_and_buffers_grow_under_long_rows(serve):
    """Rows come and go for longer than the buffers have columns."""
    config = {"vocab_size": tiny.V, "n_positions": 2048, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    import transformers as tf

    member = tf.GPT2LMHeadModel(tf.GPT2Config(**config, **tiny.IDS)).eval()
    model = EnsembleForCausalLM(EnsembleConfig(members=["a"], rule="logit-mean"), [member]).eval()
    model.generation_config.eos_token_id = None
    engine = serve(model, limits=Limits(rows=3, waiting=99))
    asked = [sequence(model, prompt(k, 20), seed=k, max_tokens=60 + 17 * k) for k in range(5)]
    asked.append(sequence(model, prompt(9, 240), seed=9, max_tokens=30))
    engine.submit([one for one, _ in asked])
    for one, listener in asked:
        assert listener.tokens() == generated(
            model, one.prompt, seed=one.request.sampling.seed, max_tokens=one.max_tokens
        )


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


def test_reports_scores_and_ends(serve):
    model = ensemble_of(("gpt2", "llama"), "meet")
    one, listener = sequence(model, prompt(1, 6), top=3, report=4, score_prompt=True, max_tokens=2)
    engine = serve(model)
    engine.submit([one])
    scored, first, second, end = listener.all()
    log_probs = model(input_ids=torch.tensor([one.prompt])).logits[0]
    expected = log_probs[:-1].gather(-1, torch.tensor(one.prompt[1:])[:, None]).squeeze(-1)
    assert isinstance(scored, PromptScored)
    assert [t.token for t in scored.tokens] == list(one.prompt[1:])
    torch.testing.assert_close(torch.tensor([t.log_prob for t in scored.tokens]), expected, atol=1e-5, rtol=0)
    assert first.log_prob == pytest.approx(log_probs[-1, first.token].item(), abs=1e-5)
    assert [j for j, _ in first.top] == log_probs[-1].topk(3).indices.tolist()
    assert (second.report["token"], second.report["text"]) == (second.token, str(second.token))
    assert len(second.report["member_top"]) == 2
    assert end == Finished("length")
    nothing, quiet = sequence(model, prompt(1, 6), max_tokens=0, score_prompt=True)
    engine.submit([nothing])
    assert [type(event) for event in quiet.all()] == [PromptScored, Finished]
    model.generation_config.eos_token_id = [7]
    ended, told = sequence(model, prompt(1, 6), sampling={"logit_bias": {7: 100.0}})
    engine.submit([ended])
    assert told.all() == [Token(7, status="OPTIMAL"), Finished("stop")]


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


@pytest.mark.parametrize("parallel", [True, "auto"])
def test_members_may_run_in_threads_of_their_own(serve, parallel):
    model = ensemble_of(MEMBERS)
    asked = [sequence(model, prompt(k, 6), seed=k, max_tokens=6) for k in range(3)]
    torch.set_num_threads(2)
    try:
        serve(model, parallel=parallel).submit([one for one, _ in asked])
    finally:
        torch.set_num_threads(1)
    for k, (one, listener) in enumerate(asked):
        assert listener.tokens() == generated(model, one.prompt, seed=k, max_tokens=6)


def test_a_member_without_keys_and_values_is_refused():
    import transformers as tf

    from softmeet.errors import InvalidInputError

    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=tiny.V, hidden_size=16, num_hidden_layers=1, state_size=4))
    model = EnsembleForCausalLM(EnsembleConfig(members=["a mamba"]), [mamba]).eval()
    with pytest.raises(InvalidInputError, match="its rows cannot join a running batch"):
        readers_of([model], [["a mamba"]])


@pytest.mark.parametrize("rule", ["logit-mean", "meet"])
def test_company_changes_a_row_by_rounding_alone(narrow, rule):
    """Why a seeded token does not depend on its batch: the chance that it does is the total variation."""
    ids = narrow.tokenizer("And the king said unto his daughter")["input_ids"]

    def after(lengths):
        readers = readers_of([narrow.model], [narrow.model.config.members])
        served, rows = Members(len(readers)), []
        for length in lengths:
            row, _ = sequence(narrow.model, tuple(ids[:length]))
            row.readers = list(readers.values())
            served.read_on([row])
            row.tokens.append(50)
            rows.append(row)
        hidden = [torch.cat(own) for own in zip(*served.read_on(rows).values(), strict=True)]
        settings = narrow.model.settings.changed(rule=rule).ungated()
        with torch.inference_mode():
            return narrow.model.combiner.solve_rows(hidden, settings)[1].log_probs

    together = after([2 + k % 5 for k in range(24)])[:5]
    alone = torch.cat([after([2 + k]) for k in range(5)])
    assert total_variation(together.double(), alone.double()).max() < 1e-5
