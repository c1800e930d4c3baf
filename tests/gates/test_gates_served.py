"""Gates in the server's running batch: generate's tokens, members that rarely run, and what is told of it."""

from __future__ import annotations

import openai
import pytest
import torch
from batches import LENGTHS, MEMBERS, ensemble_of, generated, prompt, sequence
from serving import http, running, serving_of, tiny_ensemble

from softmeet.errors import NonFiniteError
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM, Recorder
from softmeet.server.limits import Limits
from softmeet.server.sequences import PromptScored

# Closed at about half of the tokens that the tiny members draw.
GATES = ("unsure:0.15", "disagreement:1.8")


def test_tokens_are_those_of_generate_whoever_shares_the_batch(serve):
    """Rows under gates of two kinds and of two thresholds, and under none, of two rules, that come and go."""
    model = ensemble_of(MEMBERS, "meet")
    engine = serve(model, limits=Limits(rows=3, waiting=50))
    first, second = GATES
    kinds = [(first, "meet"), ("none", "meet"), (second, "meet"), (first, "logit-mean"), ("unsure:0.3", "meet")]
    asked = [
        sequence(model, prompt(k, n), gate=gate, rule=rule, seed=k, max_tokens=4 + 2 * (k % 4))
        for k, (n, (gate, rule)) in enumerate(zip(LENGTHS, kinds, strict=False))
    ]
    engine.submit([one for one, _ in asked])
    found = [listener.tokens() for _, listener in asked]
    for k, ((one, _), (gate, rule)) in enumerate(zip(asked, kinds, strict=True)):
        model.config.rule = rule
        assert found[k] == generated(model, one.prompt, seed=k, max_tokens=one.max_tokens, gate=gate)
    value = engine.metrics.registry.get_sample_value
    for name in ("unsure", "disagreement"):
        assert value("softmeet_gated_tokens_total", {"gate": name}) > 0
        assert value("softmeet_gate_saved_seconds_total", {"gate": name}) > 0


def test_the_others_run_where_the_first_is_unsure_and_never_under_unsure_0(serve):
    model = ensemble_of(("gpt2", "llama"), "logit-mean")
    engine, ran = serve(model), []
    model.members[1].base_model.register_forward_hook(lambda m, a, out: ran.append(out.last_hidden_state.shape[1]))
    one, listener = sequence(model, prompt(1, 6), gate="unsure:0")
    engine.submit([one])
    found = listener.tokens()
    assert not ran
    single = EnsembleForCausalLM(EnsembleConfig(members=["a"]), list(model.members)[:1]).eval()
    single.generation_config.eos_token_id = None
    assert found == generated(single, prompt(1, 6))
    recorder = Recorder()
    expected = generated(model, prompt(2, 6), gate="unsure:0.15", recorder=recorder)
    ran.clear()
    one, listener = sequence(model, prompt(2, 6), gate="unsure:0.15")
    engine.submit([one])
    assert listener.tokens() == expected
    assert 0 < recorder.gate.gated < 12
    # One chunk for each open token, and no token is run twice.
    assert len(ran) == 12 - recorder.gate.gated
    assert sum(ran) <= 6 + 11


def test_a_prompt_that_begins_alike_is_not_computed_again_by_those_who_lag(serve):
    model = ensemble_of(("gpt2", "llama"), "logit-mean")
    engine, ran = serve(model), []
    model.members[1].base_model.register_forward_hook(lambda m, a, out: ran.append(out.last_hidden_state.shape[1]))
    for length, new in ((10, 10), (10, 1), (14, 4), (6, 1)):
        ran.clear()
        # Open at once, so that the whole prompt is pending; then again with a gate that opens later.
        one, listener = sequence(model, prompt(3, 20)[:length], gate="unsure:1", max_tokens=1)
        engine.submit([one])
        assert listener.tokens() == generated(model, one.prompt, max_tokens=1)
        assert ran[0] == new
        one, listener = sequence(model, prompt(3, 20)[:length], gate="unsure:0.15")
        engine.submit([one])
        assert listener.tokens() == generated(model, one.prompt, gate="unsure:0.15")


def test_nan_of_a_member_that_catches_up_fails_that_row_alone(serve):
    model = ensemble_of(("gpt2", "llama"), "logit-mean")
    model.members[1].base_model.embed_tokens.weight.data[60] = float("nan")
    engine = serve(model)
    poisoned, listener = sequence(model, (5, 60, 7), gate="unsure:1")
    unheard, answered = sequence(model, (5, 60, 7), gate="unsure:0")
    good, told = sequence(model, tuple(t for t in prompt(1, 9) if t != 60), gate="unsure:0")
    engine.submit([poisoned, unheard, good])
    failure = listener.all()[-1].error
    assert isinstance(failure, NonFiniteError)
    assert "member 1" in str(failure)
    assert len(answered.tokens()) == 12  # nobody asked the member that would have failed
    assert len(told.tokens()) == 12


def test_prompts_are_scored_under_the_gate(serve):
    model = ensemble_of(("gpt2", "llama"), "meet")
    engine, tokens = serve(model), prompt(1, 16)
    for gate in ("unsure:0.15", "unsure:0", "disagreement:0.16"):
        one, listener = sequence(model, tokens, gate=gate, top=0, report=2, score_prompt=True, max_tokens=4)
        engine.submit([one])
        scored, *rest = listener.all()
        assert isinstance(scored, PromptScored)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens]), gate=gate).logits[0, :-1]
        chosen = expected.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([t.log_prob for t in scored.tokens]), chosen, atol=1e-5, rtol=0)
        assert [t.token for t in rest[:-1]] == generated(model, tokens, max_tokens=4, gate=gate)
        assert any(t.gated for t in scored.tokens)
        assert all(t.gated == t.report["gated"] for t in [*scored.tokens, *rest[:-1]])


def ask(url, **ours):
    asked = {"prompt": "hello", "seed": 12, "max_tokens": 8, "softmeet": ours}
    return http.post(f"{url}/v1/completions", json=asked).json()


def test_requests_say_their_gate_and_hear_what_it_did():
    ensemble = tiny_ensemble("gpt2", "llama")
    with running(serving_of({"plain": ensemble})) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options = {"model": "plain", "prompt": "hello", "seed": 4, "max_tokens": 12}
        unsure = {"softmeet": {"gate": "unsure:0.15", "report": 2}}
        whole = client.completions.create(**options, extra_body=unsure)
        expected = ensemble.generate("hello", seed=4, max_new_tokens=12, do_sample=True, top_k=0, gate="unsure:0.15")
        assert whole.choices[0].text == expected
        assert whole.softmeet["gate"] == "unsure:0.15"
        told, tokens = whole.choices[0].softmeet["gate"], whole.choices[0].softmeet["tokens"]
        assert told["tokens"] == len(tokens) == whole.usage.completion_tokens
        assert told["gated"] == sum(token["gated"] for token in tokens) > 0
        assert told["share"] == pytest.approx(told["gated"] / told["tokens"])
        assert told["seconds_saved"] >= 0
        for token in tokens:
            assert (token["member_log_probs"][1] is None) == token["gated"]
        near = {"softmeet": {"gate": "disagreement:0.5"}}
        chunks = client.completions.create(**options, stream=True, extra_body=near)
        last = next(chunk.choices[0].softmeet for chunk in chunks if chunk.choices[0].finish_reason)
        assert last["gate"]["tokens"] == 12
        assert not hasattr(client.completions.create(**options).choices[0], "softmeet")
        stopped = client.completions.create(**options, stop=[expected[3:5]], extra_body=unsure)
        assert 0 < stopped.choices[0].softmeet["gate"]["tokens"] < 12
        assert "expected a gate as unsure:T" in ask(url, gate="sure:1")["error"]["message"]
    with running(serving_of({"plain": ensemble}, allowed=("rule",))) as url:
        assert "does not let requests change gate" in ask(url, gate="unsure:0.5")["error"]["message"]


def test_an_ensembles_own_gate_is_the_default_and_one_that_cannot_be_used_is_refused_unless_it_is_that():
    ensemble = tiny_ensemble("gpt2", "llama")
    ensemble.model.config.gate = "unsure:0"
    with running(serving_of({"plain": ensemble})) as url:
        own, free = ask(url), ask(url, gate="none")
        assert own["choices"][0]["softmeet"]["gate"]["share"] == 1
        assert "gate" not in free["softmeet"]
        assert free["choices"][0]["text"] != own["choices"][0]["text"]
    ensemble.model.config.gate = "auto"
    with running(serving_of({"plain": ensemble}, max_trust=float("inf"))) as url:
        assert ask(url)["softmeet"]["gate"] == "auto"
        assert ask(url, trust=0.7)["softmeet"]["gate"] == "auto"
        for ours in ({"rule": "max-entropy"}, {"trust": "inf"}, {"trust": "inf", "gate": "auto"}):
            assert "gate" not in ask(url, **ours)["softmeet"]
        # An average has no use for these gates: the ensemble's own is passed over, another one is refused.
        assert "gate" not in ask(url, rule="prob-mean")["softmeet"]
        error = ask(url, rule="prob-mean", gate="disagreement:0.1")["error"]
        assert error["message"].startswith("the rule prob-mean has no solve that the gate disagreement:0.1 could save")
        assert "leave gate out, or ask for another one" in error["message"]
        assert error["param"] == "softmeet.gate"
        assert ask(url, rule="prob-mean", gate="unsure:0.5")["softmeet"]["gate"] == "unsure:0.5"
