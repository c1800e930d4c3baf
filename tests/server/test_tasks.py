"""Rules that take long: they hold up nobody, end in time, and lose nothing when they are suspended."""

import gc
import threading
import time
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from batches import LENGTHS, MEMBERS, Listener, ensemble_of, generated, prompt, sequence

from softmeet import Rule, time_is_over
from softmeet.engine.draw import Sampling
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM, Recorder
from softmeet.server.kinds import Kinds
from softmeet.server.limits import Limits
from softmeet.server.sequences import Account, Combination, GenerationRequest, Sequence, Token
from softmeet.server.tasks import SAVED, Task, Turns
from softmeet.solvers.base import Status

BEGUN = threading.Event()


class Slow(Rule):
    """The logit mean, after a loop that does nothing for a while, or until its time is over."""

    name = "slow"
    summary = "the logit mean, slowly"
    seconds: float = 0.0

    def solve(self, problem):
        spent = 0.0
        BEGUN.set()
        while spent < self.seconds and not time_is_over():
            started = time.perf_counter()
            time.sleep(0.002)
            spent += time.perf_counter() - started
        return problem.restricted(torch.log_softmax(problem.log_p.mean(0), -1))


@pytest.mark.parametrize("rule", ["logit-mean", "meet"])
def test_rows_that_leave_the_batch_and_come_back_lose_nothing(serve, rule):
    """Slow rows beside quick ones, of members with sliding windows and soft-caps; all get generate's tokens."""
    model = ensemble_of(MEMBERS, rule)
    engine, slow = serve(model, limits=Limits(rows=6, waiting=50)), Slow(seconds=0.02)
    asked = [
        sequence(model, prompt(k, n), seed=k, max_tokens=2 + k % 2, rule=slow if k % 2 else None)
        for k, n in enumerate(LENGTHS)
    ]
    engine.submit([one for one, _ in asked])
    found = [listener.tokens() for _, listener in asked]
    for k, (one, _) in enumerate(asked):
        model.config.rule = "logit-mean" if k % 2 else rule
        assert found[k] == generated(model, one.prompt, seed=k, max_tokens=one.max_tokens)


def test_a_token_whose_time_is_over_is_drawn_and_says_so(serve):
    model = ensemble_of(("gpt2", "llama"), "meet")
    one, listener = sequence(model, prompt(1, 6), max_tokens=3)
    endless, heard = sequence(model, prompt(1, 6), max_tokens=2, rule=Slow(seconds=1e9))
    engine = serve(model, limits=Limits(token_seconds=1e-9))
    engine.submit([one, endless])
    assert [e.status for e in listener.all() if isinstance(e, Token)] == ["BUDGET"] * 3
    assert len(heard.tokens()) == 2
    sample = engine.metrics.registry.get_sample_value
    assert sample("softmeet_unsolved_tokens_total", {"status": Status.BUDGET.name}) >= 3


def test_a_prompt_is_scored_without_holding_up_others_and_in_its_time(serve):
    model = ensemble_of(("gpt2", "llama"))
    options = {"rule": Slow(seconds=1e9), "top": 0, "score_prompt": True, "max_tokens": 0}
    patient = serve(model, limits=Limits(token_seconds=1e9))
    endless, _ = sequence(model, prompt(1, 11), **options)
    quick, heard = sequence(model, prompt(2, 6), max_tokens=20)
    BEGUN.clear()
    patient.submit([endless])
    assert BEGUN.wait(300)
    patient.submit([quick])
    assert len(heard.tokens()) == 20
    assert not endless.done
    endless.cancel()
    scored, listener = sequence(model, prompt(1, 11), **options)
    serve(model, limits=Limits(token_seconds=0.01)).submit([scored])
    assert len(listener.all()[0].tokens) == 10


def test_a_long_prompt_is_run_in_pieces_between_which_others_step(serve):
    import transformers as tf

    torch.manual_seed(0)
    config = {"vocab_size": tiny.V, "n_positions": 2048, "n_embd": 16, "n_layer": 1, "n_head": 2}
    member = tf.GPT2LMHeadModel(tf.GPT2Config(**config, **tiny.IDS)).eval()
    model = EnsembleForCausalLM(EnsembleConfig(members=["a"], rule="logit-mean"), [member]).eval()
    model.generation_config.eos_token_id = None
    engine, lengths = serve(model), []
    # Which is tried once, on a few calls, where texts are padded.
    assert all(reader._kv.reads_trees for reader in engine.readers.values())
    long, listener = sequence(model, prompt(9, 1500), seed=9, max_tokens=3)
    expected = generated(model, long.prompt, seed=9, max_tokens=3)

    def count(module, arguments, out):
        lengths.append(out.last_hidden_state.shape[1])
        time.sleep(0.1 if lengths[-1] > 6 else 0)

    member.base_model.register_forward_hook(count)
    other, heard = sequence(model, prompt(1, 6), max_tokens=400)
    engine.submit([other])
    heard.get(timeout=300)
    engine.submit([long])
    assert listener.tokens() == expected
    other.cancel()
    pieces = [k for k, length in enumerate(lengths) if length > 6]
    assert max(lengths) == 256
    assert sum(lengths[k] for k in pieces) == 1500
    # Three pieces, of a tenth of a second each, have the time that was saved; the rest take turns with the other.
    assert all(later - earlier > 1 for earlier, later in pairwise(pieces[3:]))


def test_turns_are_shared_by_time_and_what_took_longer_is_owed(monkeypatch):
    done, turns, now = [], Turns(lambda task, seconds: task.run(seconds), Account()), [0.0]
    monkeypatch.setattr("softmeet.server.tasks.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(task: Task) -> None:
        for k in range(5):
            now[0] += 0.02
            done.append((k, task.rows[0].account))
            task.pause()

    accounts = Account(), Account()
    asked = [SimpleNamespace(request=SimpleNamespace(account=a), account=a, done=False) for a in accounts]
    turns.add(Task(asked[:1], work))
    turns.take(0.001, lambda: True)
    assert len(done) == 1  # one piece, however long
    for _ in range(10):
        turns.take(0.001, lambda: True)
    assert len(done) == 1
    for _ in range(20):
        turns.take(0.001, lambda: True)
    assert 1 < len(done) < 4
    # The next task of a sequence inherits what the sequence owes; another sequence's does not.
    turns.add(Task(asked[:1], work))
    turns.add(Task(asked[1:], work))
    count = len(done)
    while len(done) == count:
        turns.take(0.001, lambda: True)
    assert done[count][1] is asked[1].account
    while len(turns):
        turns.take(0.001, lambda: False)  # nobody waits
    assert len(done) == 15


def test_a_reproducible_server_gives_the_same_bits_in_any_company(serve):
    """Averages and meet, gates that ask the other members late, prompts that begin alike, rows that come and go."""
    model = ensemble_of(MEMBERS, "meet")
    kinds = [("meet", "none"), ("logit-mean", "none"), ("meet", "unsure:0.15"), ("prob-mean", "none")]

    def asked(k):
        rule, gate = kinds[k % 4]
        how = Combination(model, model.settings.changed(rule=rule, gate=gate))
        request, listener = GenerationRequest(how, Sampling(seed=k), 2 + k % 3, top=3), Listener()
        return Sequence(request, prompt(k // 2, LENGTHS[k]), 0, listener.put), listener

    def events(listener):
        return [(e.token, e.log_prob, e.top) for e in listener.all() if isinstance(e, Token)]

    together = serve(model, limits=Limits(rows=5, waiting=99), reproducible=True)
    found = [asked(k) for k in range(8)]
    together.submit([one for one, _ in found])
    alone = serve(model, reproducible=True)
    for k, (_, listener) in enumerate(found):
        one, own = asked(k)
        alone.submit([one])
        assert events(own) == events(listener)


@pytest.mark.parametrize("rule", ["logit-mean", "meet"])
def test_a_reproducible_server_and_a_reproducible_generate_agree_to_the_last_bit(serve, narrow, rule):
    class Kept(Recorder):
        def add(self, solution, log_probs):
            super().add(solution, log_probs)
            kept.extend(solution.log_probs.clone())

    texts, settings = ["And the king said", "In the beginning God created", "O"], narrow.model.settings
    how = Combination(narrow.model, settings.changed(rule=rule, gate="none"))
    asked = []
    for text in texts:
        listener, ids = Listener(), tuple(narrow.tokenizer(text)["input_ids"])
        asked.append((Sequence(GenerationRequest(how, Sampling(seed=3), 4, top=0), ids, 0, listener.put), listener))
    serve(narrow.model, reproducible=True).submit([one for one, _ in asked])
    for text, (_, listener) in zip(texts, asked, strict=True):
        kept = []
        options = {"seed": 3, "max_new_tokens": 4, "do_sample": True, "top_k": 0, "settings": how.settings}
        written = narrow.generate(text, reproducible=True, recorder=Kept(), **options)
        tokens = [e for e in listener.all() if isinstance(e, Token)]
        assert narrow.tokenizer.decode([e.token for e in tokens], skip_special_tokens=True) == written
        assert [e.log_prob for e in tokens] == [row[e.token].item() for row, e in zip(kept, tokens, strict=True)]


def test_many_slow_requests_together_hold_up_an_average_no_more_than_a_few(serve):
    """A dozen requests whose rule never ends, of as many kinds: the average's tokens come between their turns."""
    model, steps = ensemble_of(("gpt2", "llama")), []
    engine = serve(model, limits=Limits(token_seconds=1e9))
    model.members[0].base_model.register_forward_hook(lambda *_: steps.append(time.perf_counter()))
    slow = [sequence(model, prompt(k, 6), rule=Slow(seconds=1e9 + k), seed=k)[0] for k in range(12)]
    engine.submit(slow)
    while len(steps) < 12 or not all(s.busy for s in slow):
        time.sleep(0.01)
    quick, heard = sequence(model, prompt(2, 6), max_tokens=30)
    engine.submit([quick])
    turns = []
    take = engine._turns._run
    engine._turns._run = lambda task, seconds: (turns.append(len(quick.tokens)), take(task, seconds))
    assert len(heard.tokens()) == 30
    # All tasks together have two rounds' time a round, and a turn takes a round's or more.
    counts = [turns.count(k) for k in range(8, 36)]
    assert sorted(counts)[len(counts) // 2] <= 6
    for s in slow:
        s.cancel()


def test_what_prompts_leave_of_their_time_is_saved_for_prompts_that_come_together(monkeypatch):
    """Fifty prompts of a hundredth of a second each: thirty at once, then two a round."""
    read, now, prompts = [0], [0.0], Account(SAVED, saves=SAVED)
    turns = Turns(lambda task, seconds: task.run(seconds), prompts)
    monkeypatch.setattr("softmeet.server.tasks.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(task: Task) -> None:
        now[0] += 0.01
        read[0] += 1

    def come(count: int) -> None:
        for _ in range(count):
            row = SimpleNamespace(request=SimpleNamespace(account=Account()), account=prompts, done=False)
            turns.add(Task([row], work))

    def reads(rounds: int) -> int:
        before = read[0]
        for _ in range(rounds):
            turns.take(0.02, lambda: True)
        return read[0] - before

    come(50)
    assert 30 <= reads(1) <= 33
    assert reads(3) == pytest.approx(6, abs=1)
    reads(30)
    come(50)
    assert 30 <= reads(1) <= 33
    while len(turns):
        turns.take(0.02, lambda: True)
    # A round in which nobody waits, and nothing is left to do, saves as much as there may be.
    turns.take(0.02, lambda: False)
    come(50)
    assert 30 <= reads(1) <= 33


def test_a_request_of_many_rows_has_less_time_for_its_tasks():
    turns, mine, another = Turns(lambda task, seconds: shares.append(seconds), Account()), Account(), Account()
    row = SimpleNamespace(request=SimpleNamespace(account=mine), account=mine, done=False)
    for stepped, share in (
        ([], 0.1),
        ([another], 0.1),
        ([mine, another, mine], 0.05),
        ([mine], 0.1),
        (200 * [mine], 0.001),
    ):
        shares = list[float]()
        turns.add(Task([row], lambda _: None))
        mine.left = 0.0
        turns.take(0.1, lambda: True, stepped)
        turns._tasks.clear()
        assert shares == [pytest.approx(share)]


def test_a_reproducible_token_whose_time_was_over_says_so_even_within_its_tolerance(serve):
    model = ensemble_of(("gpt2", "llama"))
    engine = serve(model, limits=Limits(token_seconds=0.01), reproducible=True)
    one, listener = sequence(model, prompt(1, 6), rule=Slow(seconds=1e9), max_tokens=2)
    engine.submit([one])
    assert [e.status for e in listener.all() if isinstance(e, Token)] == ["BUDGET"] * 2


def test_an_ensemble_that_nobody_needs_any_more_is_forgotten():
    """As one that was made for a request, behind its passages: what is known of how long requests take keeps none."""

    class Combined:
        def __init__(self):
            self.model, self.settings = type("Model", (), {})(), "mean"

    kinds, request = Kinds(alone=False), SimpleNamespace(report=None, choices=2, prompts=["a"])
    sequence = SimpleNamespace(combination=Combined(), request=request)
    assert len(kinds.of(sequence)) == 2
    kinds.learn(sequence, 0.03)
    assert len(kinds.of(sequence)) == 3  # rows that take long together hold up no others of their kind
    gone = weakref.ref(sequence.combination.model)
    del sequence
    gc.collect()
    assert gone() is None
