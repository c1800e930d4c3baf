"""Weights below 0: contrastive decoding, classifier-free guidance and proxy tuning, each against numpy by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from serving import http, running, serving_of
from typer.testing import CliRunner

import softmeet
from softmeet import Ensemble, Status
from softmeet.cli.main import app
from softmeet.errors import DisjointSupportError, InvalidInputError
from softmeet.rules.settings import Settings
from softmeet.server.ensembles import Served
from softmeet.server.schemas import CHANGES, Extension
from softmeet.simplex import weighted_log_probs

V, WEIGHTS, ALPHA = 12, [1.5, -0.5], 0.1
CONTRAST = f"logit-mean:plausibility={ALPHA}"
MEMBERS = ["wide/neox", "narrow/opt-a"]
PROMPT = "And the king said"


def members(n, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, rows, V, dtype=torch.float64, generator=generator)).log_softmax(-1)


HEADS = [torch.eye(V, 3)] * 3


def softmax(scores):
    mass = np.exp(scores - scores.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def contrasted(expert, amateur, beta, alpha):
    """Contrastive decoding as O'Brien and Lewis have it: (1 + β) expert - β amateur, among what the expert finds
    plausible; both log-probabilities (*b, v).
    """
    scores = (1 + beta) * expert - beta * amateur
    return softmax(np.where(np.exp(expert) >= alpha * np.exp(expert).max(-1, keepdims=True), scores, -np.inf))


def own_log_probs(ensemble, text=PROMPT):
    """Each member's log-probabilities after the text, by transformers alone, (n, v)."""
    ids = ensemble.tokenizer(text, return_tensors="pt")["input_ids"]
    logits = [member(input_ids=ids).logits[0, -1].double() for member in ensemble.model.members]
    return torch.stack(logits).log_softmax(-1).detach().numpy()


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.from_pretrained(MEMBERS, CONTRAST, weights=WEIGHTS)


@pytest.fixture(scope="module")
def over_bytes():
    return Ensemble.from_pretrained("mixed", CONTRAST, weights=WEIGHTS)


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_contrastive_decoding(beta, alpha):
    log_p = members(2)
    for rule, options in ((f"logit-mean:plausibility={alpha}", {}), ("logit-mean", {"plausibility": alpha})):
        found = softmeet.combine(log_p, HEADS[:2], rule, weights=[1 + beta, -beta], **options).log_probs.exp()
        assert np.allclose(found, contrasted(*log_p.numpy(), beta, alpha), atol=1e-12)
    assert (found == 0).any() == (alpha > 0)


def test_classifier_free_guidance():
    """Of p(x | c)^γ p(x)^(1-γ): the member behind a prompt and the member alone are one model."""
    prompt, gamma = "The words of Solomon the king. ", 1.5
    found = Ensemble.from_pretrained(
        [f"wide/gpt2+prompt={prompt}", "wide/gpt2"], "logit-mean", weights=[gamma, 1 - gamma]
    )
    model, logits = found.model.members[0], []
    for text in (prompt + PROMPT, PROMPT):
        with torch.inference_mode():
            logits.append(model(found.tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].numpy())
    expected = softmax(gamma * logits[0] + (1 - gamma) * logits[1])
    assert np.abs(found.next_token(PROMPT).solution.log_probs[0].exp().numpy() - expected).max() < 1e-5
    assert model is found.model.members[1]


def test_proxy_tuning():
    """A large model moved as a small one was by its tuning: large + (tuned - untuned), in logits."""
    found = Ensemble.from_pretrained(["wide/neox", "narrow/opt-a", "narrow/opt-b"], "logit-mean", weights=[1, 1, -1])
    large, tuned, untuned = own_log_probs(found)
    expected = softmax(large + (tuned - untuned))
    assert np.abs(found.next_token(PROMPT).solution.log_probs[0].exp().numpy() - expected).max() < 1e-5


def test_the_expert_of_plausibility_is_the_mean_of_the_positive_members():
    log_p, weights = members(3), [0.5, 1.0, -0.5]
    a, b, c = log_p.numpy()
    expert = softmax((0.5 * a + b) / 1.5)
    scores = np.where(expert >= 0.3 * expert.max(-1, keepdims=True), 0.5 * a + b - 0.5 * c, -np.inf)
    found = softmeet.combine(log_p, HEADS, "logit-mean:plausibility=0.3", weights=weights).log_probs.exp()
    assert np.allclose(found, softmax(scores), atol=1e-12)


def test_plausible_is_judged_on_the_support():
    log_p, support = members(2), torch.arange(V) != int(members(2)[0, 0].argmax())
    found = softmeet.combine(log_p, HEADS[:2], "logit-mean:plausibility=1", weights=WEIGHTS, support=support)
    best = log_p[0].masked_fill(~support, -torch.inf).argmax(-1)
    assert (found.log_probs.argmax(-1) == best).all()
    assert (found.log_probs.exp().amax(-1) == 1).all()


@pytest.mark.parametrize("weights", [[1.5, -0.5], [-0.5, 1.5], [1.0, 0.0]])
def test_what_a_weighted_member_excludes_is_excluded(weights):
    log_p = members(2)
    log_p[1, :, :4] = -torch.inf
    log_p = log_p.log_softmax(-1)
    found = softmeet.combine(log_p, HEADS[:2], "logit-mean", weights=weights)
    assert not found.log_probs.isnan().any()
    assert (found.log_probs[:, :4] == -torch.inf).all() == bool(weights[1])
    assert torch.allclose(found.log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert found.objective.isfinite().all()
    if weights[1]:
        scores = weighted_log_probs(log_p, torch.tensor(weights, dtype=torch.float64))
        assert torch.allclose(scores.log_softmax(-1).exp(), found.log_probs.exp())


def test_a_row_of_which_nothing_is_left_is_named():
    log_p = members(2)
    log_p[0, 1, :6] = log_p[1, 1, 6:] = -torch.inf
    with pytest.raises(DisjointSupportError, match=r"found none in rows \[1\]"):
        softmeet.combine(log_p.log_softmax(-1), HEADS[:2], "logit-mean", weights=WEIGHTS)


@pytest.mark.parametrize("rule", ["logit-mean", CONTRAST])
def test_the_answer_minimises_the_objective_and_verifies(rule):
    log_p = members(3)
    found = softmeet.combine(log_p, HEADS, rule, weights=[1.2, 0.6, -0.8])
    q = found.log_probs.exp()
    kept = q > 0

    def value(p):
        parts = (torch.where(kept, p * (p.log() - own), 0.0).sum(-1) for own in log_p)
        return sum(w * part for w, part in zip([1.2, 0.6, -0.8], parts, strict=True))

    assert (found.verify(HEADS, log_p).status == Status.OPTIMAL).all()
    assert torch.allclose(found.objective, value(q))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.where(kept, q + 0.05 * torch.rand(q.shape, generator=generator, dtype=q.dtype), 0.0)
        other /= other.sum(-1, keepdim=True)
        assert (value(other) > found.objective).all()
    found.log_probs[0] = found.log_probs[1]
    assert found.verify(HEADS, log_p).status[0] == Status.NOT_CONVERGED


def test_zeros_are_announced():
    assert not softmeet.rules.pools.LogitMean().can_assign_zeros
    assert softmeet.rules.pools.LogitMean(plausibility=0.1).can_assign_zeros


@pytest.mark.parametrize("rule", [rule.name for rule in softmeet.RULES if not rule.takes_signed_weights])
def test_every_other_rule_refuses_by_name_before_anything_is_loaded(rule):
    refusal = rf"^the rule {rule} takes no weight below 0, got \[1.5, -0.5\]: use the rule logit-mean, or weights of"
    with pytest.raises(InvalidInputError, match=refusal):
        softmeet.combine(members(2), HEADS[:2], rule, weights=WEIGHTS)
    with pytest.raises(InvalidInputError, match=refusal):
        Ensemble.from_pretrained(["/absent/a", "/absent/b"], rule, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0, -1.0]}, r"do not sum to 0, got \[1.0, -1.0\]: let one be larger"),
        ({"weights": [1.0, -1.0], "free_weights": True}, "do not sum to 0"),
        ({"weights": [0.5, -1.5]}, "sum to more than 0, got .*: let one be larger"),
        ({"weights": [-0.5, -0.5], "free_weights": True}, "expected a positive weight"),
        ({"weights": [1.5, -0.5], "pool": "prob-mean"}, "the pool prob-mean takes no weight below 0"),
        ({"weights": [-0.5, 1.5], "gate": "unsure:0.5"}, "first member answer alone, and its weight is -0.5"),
        ({"plausibility": 1.5}, "plausibility of logit-mean to be less than or equal to 1"),
        ({"plausibility": math.nan}, "plausibility of logit-mean"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Ensemble.from_pretrained(["/absent/a", "/absent/b"], "logit-mean", **settings)


def test_free_weights_of_any_sum_but_0():
    log_p = members(2)
    found = softmeet.combine(log_p, HEADS[:2], "logit-mean", weights=[1.0, -2.5], free_weights=True).log_probs.exp()
    assert np.allclose(found, softmax(log_p[0].numpy() - 2.5 * log_p[1].numpy()), atol=1e-12)


def test_under_unsure_the_expert_answers_alone_with_its_cut():
    log_p = members(2)
    found = softmeet.combine(log_p, HEADS[:2], CONTRAST, weights=WEIGHTS, gate="unsure:1e-9")
    assert found.gated.all()
    assert np.allclose(found.log_probs.exp(), contrasted(log_p[0].numpy(), 0 * log_p[0].numpy(), 0, ALPHA), atol=1e-12)


@pytest.mark.parametrize("vocabulary", ["tokens", "bytes"])
def test_texts_are_those_of_the_formula_alone_in_batches_and_reloaded(vocabulary, ensemble, over_bytes, tmp_path):
    found = ensemble if vocabulary == "tokens" else over_bytes
    options = {"max_new_tokens": 4, "seed": 6, "reproducible": True, "do_sample": True}
    prompts = [PROMPT, "O"]
    batch = found.generate(prompts, **options)
    assert batch == [found.generate(prompt, **options) for prompt in prompts]
    found.save_pretrained(tmp_path)
    again = Ensemble.from_pretrained(tmp_path)
    assert (str(again.model.settings.rule), again.model.config.weights) == (CONTRAST, WEIGHTS)
    assert again.generate(prompts, **options) == batch
    assert found.generate(PROMPT, num_beams=2, do_sample=False, max_new_tokens=2)
    other = found.generate(PROMPT, weights=[0.0, 1.0], **options)
    assert other != batch[0]
    # Token by token, greedily, what the formula says.
    text = PROMPT
    for _ in range(2):
        expected = contrasted(*_next(found, text), 0.5, ALPHA)
        text += found.generate(
            text, do_sample=False, **{"max_bytes" if found.model.over_bytes else "max_new_tokens": 1}
        )
        spelled = found.tokenizer(text)["input_ids"] if vocabulary == "tokens" else list(text.encode())
        assert spelled[-1] == expected.argmax()


def _next(found, text):
    """Each member's log-probabilities of what follows a text, without the ensemble."""
    if not found.model.over_bytes:
        return own_log_probs(found, text)
    return np.stack([reader.score(text.encode())[1][-1] for reader in found.model.readers])


def test_requests_with_such_weights(ensemble):
    plain = Ensemble.from_pretrained(MEMBERS, "logit-mean")
    three = Ensemble.from_pretrained(["wide/neox", "wide/gpt2", "narrow/opt-a"], "logit-mean", weights=[1, 1, -1])
    with running(serving_of({"plain": plain, "contrast": ensemble, "three": three})) as url:

        def ask(model, **own):
            body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "softmeet": own}
            return http.post(f"{url}/v1/completions", json=body)

        expected = ensemble.generate(PROMPT, do_sample=False, max_new_tokens=4)
        own = ask("plain", rule=CONTRAST, weights=WEIGHTS)
        assert own.json()["choices"][0]["text"] == ask("contrast").json()["choices"][0]["text"] == expected
        assert own.json()["softmeet"]["weights"] == WEIGHTS
        # A single member is itself, whatever its weight.
        alone = ask("contrast", members=["narrow/opt-a"]).json()
        assert alone["softmeet"]["weights"] == [1.0]
        # Members of which the sum is above 0 are scaled; others cannot be.
        scaled = ask("three", members=["wide/neox", "wide/gpt2"]).json()
        assert scaled["softmeet"]["weights"] == [0.5, 0.5]
        refused = ask("three", members=["wide/neox", "narrow/opt-a"])
        assert refused.status_code == 400
        assert "cannot be scaled to a sum of 1: give softmeet.weights" in refused.json()["error"]["message"]
        given = ask("three", members=["wide/neox", "narrow/opt-a"], weights=WEIGHTS).json()
        assert given["softmeet"]["weights"] == WEIGHTS
        meet = ask("contrast", rule="meet").json()["error"]
        assert (meet["param"], "the rule meet takes no weight below 0" in meet["message"]) == ("softmeet.rule", True)
        assert ask("contrast", rule="meet", weights=[0.5, 0.5]).status_code == 200
        zero = ask("plain", weights=[1, -1]).json()["error"]
        assert (zero["param"], "do not sum to 0" in zero["message"]) == ("softmeet.weights", True)


def test_a_request_for_members_of_which_the_first_is_negative_has_no_gate():
    names = ["wide/neox", "narrow/opt-a", "wide/gpt2"]
    found = Ensemble.from_pretrained(names, "logit-mean", weights=[0.8, -0.3, 0.5], gate="unsure:0.5")
    asked = Served("three", found, tuple(names)).combination(Extension(members=names[1:]), CHANGES)
    assert asked.settings.weights == pytest.approx((-1.5, 2.5))
    assert asked.gate is None
    with pytest.raises(InvalidInputError, match=r"first member answer alone, and its weight is -0\.2"):
        found.generate(PROMPT, weights=[-0.2, 0.6, 0.6])


def test_commands(ensemble, tmp_path):
    def run(*words):
        return CliRunner().invoke(app, [*map(str, words)])

    (tmp_path / "text").write_text("And the king said unto him, Go. And he went in unto the king. " * 3)
    command = ["evaluate", "-m", "/absent/a", "-m", "/absent/b", "-t", tmp_path / "text", "--weights", "1.5,-0.5"]
    refused = run(*command, "--rule", "logit-mean", "--rule", "meet").exception
    assert str(refused).startswith("the rule meet takes no weight below 0, got [1.5, -0.5]")
    ensemble.save_pretrained(tmp_path / "saved")
    for words in (["-m", tmp_path / "saved"], [*tiny.each("-m", MEMBERS), "--weights", "1.5,-0.5"]):
        done = run("evaluate", *words, *command[5:7], "--rule", CONTRAST, "--json", "-")
        assert {"uniform prob-mean", CONTRAST, "logit-mean"} <= json.loads(done.stdout)["rules"].keys(), done.output
        assert "prob-mean" not in json.loads(done.stdout)["rules"]
    facts = json.loads(run("check", "-m", tmp_path / "saved", "--json").stdout)
    assert "movement" not in facts
    assert facts["notes"][0].startswith("A weight is below 0")


def test_settings_that_change_keep_their_meaning():
    signed = Settings.of({"rule": "logit-mean:weights=1.5/-0.5"}).for_members(2)
    assert signed.weights == (1.5, -0.5)
    assert signed.changed(weights=None, rule="meet").weights == (0.5, 0.5)
    with pytest.raises(InvalidInputError, match="the rule prob-mean takes no weight below 0"):
        signed.changed(rule="prob-mean")
