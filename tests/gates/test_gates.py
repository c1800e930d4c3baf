"""Gates: their laws, and generation in which most members are behind most of the time."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest
import tiny
import torch
from commands import facts_of, ran, refusal, run
from ensembles import GREEDY, MEMBERS, PROMPTS, build
from instances import best_outputs, random_heads, zipf
from typer.testing import CliRunner

import softmeet
from softmeet import RULES, Ensemble, Status
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError, RuleError
from softmeet.evaluation.choices import RuleChoice, parse_choices, under_gates
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.report import summary
from softmeet.hf import EnsembleConfig, Recorder, TokenReports
from softmeet.rules.gates import GATES, Disagreement, parse_gate, that_closes
from softmeet.simplex import kl, total_variation

# Nats of first-order disagreement that about half of the tiny members' tokens exceed.
NEAR = 1.1
BAD = (
    "unsure",
    "unsure:",
    "unsure:x",
    "unsure:-0.1",
    "unsure:nan",
    "disagreement:inf",
    "sure:0.5",
    "",
    "none:1",
    "0.5",
)


@pytest.fixture(scope="module")
def rows():
    """(log-probabilities of two members at eight positions that differ in confidence and disagreement, heads)."""
    heads = random_heads(40, (4, 5), seed=2)
    log_p = best_outputs(heads, zipf(8, 40, seed=2))
    log_p[1] += torch.linspace(0, 2, 8)[:, None] * torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    log_p[0] *= torch.linspace(0.5, 3, 8)[:, None]
    return log_p.log_softmax(-1).double(), heads


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("gate", BAD)
def test_bad_gates_are_refused_wherever_they_are_given(gate, rows, model):
    for given in (
        lambda: softmeet.combine(*rows, gate=gate),
        lambda: EnsembleConfig(["a"], gate=gate),
        lambda: model.generate(PROMPTS, gate=gate, max_new_tokens=1),
        lambda: parse_choices([f"meet:gate={gate or 'x'}"], 2),
    ):
        with pytest.raises(InvalidInputError, match=r"expected a gate as unsure:T|unknown option|option=value"):
            given()
    with pytest.raises(InvalidInputError, match="expected a gate"):
        softmeet.combine(*rows, gate=0.5)


NEVER_CLOSED = [None, "none", "disagreement:0", "unsure:1.01", "unsure:7"]


@pytest.mark.parametrize(
    ("rule", "gate"),
    [("meet", gate) for gate in NEVER_CLOSED] + [(rule.name, "unsure:1.01") for rule in RULES if rule.name != "meet"],
)
def test_gates_that_never_close_are_no_gates(rows, rule, gate):
    log_p, heads = rows[0][:, ::3], rows[1]
    plain, ours = softmeet.combine(log_p, heads, rule), softmeet.combine(log_p, heads, rule, gate=gate)
    assert that_closes(parse_gate(gate)) is None
    assert torch.equal(ours.log_probs, plain.log_probs)
    assert torch.equal(ours.status, plain.status)
    assert torch.equal(ours.gap, plain.gap)
    assert not ours.gated.any()


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_unsure_0_is_what_the_rule_makes_of_the_first_member(rows, rule):
    log_p, heads = rows
    ours = softmeet.combine(log_p, heads, rule, gate="unsure:0")
    alone = softmeet.combine(log_p[:1], heads[:1], rule, tol=1e-12)
    assert ours.gated.all()
    assert (ours.num_passes == 0).all()
    assert total_variation(ours.log_probs, alone.log_probs).max() < 1e-6
    if rule != "one-hot":
        assert torch.allclose(ours.log_probs, log_p[0], atol=1e-12)


@pytest.mark.parametrize("pool", ["logit-mean", "prob-mean"])
def test_disagreement_is_the_pool_where_members_agree_and_the_rule_elsewhere(rows, pool):
    plain = softmeet.combine(*rows, trust=[0.5, 2.0], pool=pool)
    size = sum(rho * kl(plain.pool, own) for rho, own in zip((0.5, 2.0), rows[0], strict=True))
    assert torch.allclose(size, plain.problem.pool_bound())
    threshold = size.sort().values[3:5].mean().item()  # between two rows, so that rounding closes none
    ours = softmeet.combine(*rows, trust=[0.5, 2.0], pool=pool, gate=f"disagreement:{threshold}")
    closed = size <= threshold
    assert 0 < closed.sum() < len(closed)
    assert torch.equal(ours.gated, closed)
    assert torch.equal(ours.log_probs[closed], plain.pool[closed])
    assert torch.allclose(ours.log_probs[~closed], plain.log_probs[~closed], atol=1e-10)
    assert (ours.num_passes[closed] == 0).all()
    assert (ours.num_passes[~closed] > 0).all()
    assert ours.gap_is_certified[closed].all()
    assert (ours.status == Status.OPTIMAL).all()
    # The gap is a bound on what the solve would have gained, for any trust, and verify finds it again.
    gained = plain.objective + plain.gap
    assert (plain.objective[closed] <= ours.gap[closed]).all()
    assert (gained[closed] > 0).all()
    again = ours.verify(rows[1], rows[0])
    assert (again.gap[closed] <= ours.gap[closed] + 1e-9).all()
    assert again.total_variation[closed].max() < 1e-9


def test_rules_without_a_bound_say_so_and_those_without_a_solve_stay_open(rows):
    exact = softmeet.combine(*rows, "least-squares", gate="disagreement:1000")
    assert exact.gated.all()
    assert exact.gap.isinf().all()
    assert not exact.gap_is_certified.any()
    assert torch.equal(exact.log_probs, exact.pool)
    assert not softmeet.combine(*rows, "prob-mean", gate="disagreement:1000").gated.any()


@pytest.mark.parametrize("gate", ["unsure:0.3", "disagreement:0.2"])
def test_a_row_under_a_gate_depends_on_that_row_alone(rows, gate):
    log_p, heads = rows
    together = softmeet.combine(log_p, heads, gate=gate)
    assert 0 < together.gated.sum() < 8
    for k in range(8):
        alone = softmeet.combine(log_p[:, k : k + 1], heads, gate=gate)
        assert alone.gated[0] == together.gated[k]
        assert torch.allclose(alone.log_probs[0], together.log_probs[k], atol=1e-9)


def gated_greedy(model, prompt, gate, count):
    """By hand: whole texts, no cache, the first member's confidence and then who answers."""
    threshold, tokens = float(gate.partition(":")[2]), list(prompt)
    closed = []
    for _ in range(count):
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            own = model.members[0](input_ids=ids).logits[0, -1].double().softmax(-1)
            closed.append(own.max().item() >= threshold)
            both = own.log() if closed[-1] else model(input_ids=ids, gate="none").logits[0, -1]
        tokens.append(int(both.argmax()))
    return tokens[len(prompt) :], sum(closed)


@functools.cache
def median_gate(model):
    """A gate that is closed at about half of the tokens that greedy generation gives."""
    reports = TokenReports()
    model.generate(PROMPTS, max_new_tokens=12, recorder=reports, **GREEDY)
    sure = torch.tensor([log_p[0, row].max().exp().item() for _, log_p, row in reports._kept])
    return f"unsure:{sure.median().item():.6f}"


def test_unsure_is_the_first_member_where_it_is_sure_and_all_of_them_elsewhere(model):
    gate, recorder = median_gate(model), Recorder()
    short = torch.tensor([[0, 0, 7, 8], *PROMPTS.tolist()])
    mask = torch.tensor([[0, 0, 1, 1], [1] * 4, [1] * 4])
    options = {"max_new_tokens": 7, "gate": gate, **GREEDY}
    together = model.generate(short, attention_mask=mask, recorder=recorder, **options)
    assert torch.equal(together, model.generate(short, attention_mask=mask, use_cache=False, **options))
    by_hand = [gated_greedy(model, prompt, gate, 7) for prompt in ([7, 8], *PROMPTS.tolist())]
    assert together[:, 4:].tolist() == [tokens for tokens, _ in by_hand]
    assert recorder.gate.gated == sum(closed for _, closed in by_hand)
    assert 0 < recorder.gate.share < 1
    assert recorder.gate.rows == recorder.rows == 21
    assert recorder.asked == 21 - recorder.gate.gated
    assert recorder.gate.saved > 0
    for k, prompt in enumerate(([7, 8], *PROMPTS.tolist())):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert alone[0, len(prompt) :].tolist() == together[k, 4:].tolist()


@pytest.mark.parametrize("rule", ["meet", "one-hot"])
def test_all_asked_is_no_gate_though_each_catches_up_by_itself(rule):
    """At 1 every row is open, but goes through the caches of members that may be behind."""
    ours = build(rule)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}):
        prompts = PROMPTS[:1] if "prompt_lookup_num_tokens" in options else PROMPTS
        plain = ours.generate(prompts, max_new_tokens=4, **options, **GREEDY)
        for gate in ("unsure:1",) if options else ("unsure:1", "disagreement:0"):
            assert torch.equal(ours.generate(prompts, max_new_tokens=4, gate=gate, **options, **GREEDY), plain)


def test_unsure_0_never_runs_the_others(model):
    def ran(*_):
        raise AssertionError("another member ran")

    hooks = [member.base_model.register_forward_pre_hook(ran) for member in model.members[1:]]
    try:
        for options in ({}, {"num_beams": 3}, {"use_cache": False}):
            ours = model.generate(PROMPTS, max_new_tokens=8, gate="unsure:0", **options, **GREEDY)
            assert torch.equal(ours, model.members[0].generate(PROMPTS, max_new_tokens=8, **options, **GREEDY))
    finally:
        for hook in hooks:
            hook.remove()


def test_beams_take_their_members_places_with_them(model):
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 4, "gate": median_gate(model), **GREEDY}
    cached = model.generate(PROMPTS, **options)
    assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **options))
    assert torch.equal(cached[3:], model.generate(PROMPTS[1:], **options))


@pytest.mark.parametrize("kind", ["unsure", "disagreement"])
def test_prompt_lookup_and_continuing_from_a_cache(model, kind):
    gate = median_gate(model) if kind == "unsure" else f"disagreement:{NEAR}"
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    plain = model.generate(prompt, max_new_tokens=6, gate=gate, **GREEDY)
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=6, gate=gate, prompt_lookup_num_tokens=3, **GREEDY))
    first = model.generate(prompt, max_new_tokens=3, gate=gate, return_dict_in_generate=True, **GREEDY)
    then = model.generate(first.sequences, cache=first.cache, max_new_tokens=3, gate=gate, **GREEDY)
    assert torch.equal(then, plain)
    # A cache whose members are behind serves a call without a gate too: then all of them catch up; and the reverse.
    for before, after in ((gate, "none"), ("none", gate)):
        first = model.generate(prompt, max_new_tokens=3, gate=before, return_dict_in_generate=True, **GREEDY)
        rest = model.generate(first.sequences, cache=first.cache, max_new_tokens=3, gate=after, **GREEDY)
        assert torch.equal(rest, model.generate(first.sequences, max_new_tokens=3, gate=after, **GREEDY))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_assisted_decoding_under_a_gate():
    ours, other = build("logit-mean"), tiny.build("llama", 1).double()
    ours.config.gate = median_gate(ours)
    options = {"max_new_tokens": 12, **GREEDY}
    for main, assistant in ((ours, other), (other, ours)):
        plain = main.generate(PROMPTS[:1], **options)
        assert torch.equal(plain, main.generate(PROMPTS[:1], assistant_model=assistant, **options))


def test_reports_say_who_was_not_asked(model):
    reports, gate = TokenReports(), median_gate(model)
    out = model.generate(PROMPTS[:1], max_new_tokens=16, gate=gate, recorder=reports, **GREEDY)
    (found,) = reports.of([out[0, 4:].tolist()], 1)
    closed = [report for report in found if report.gated]
    assert 0 < len(closed) < 16
    for report in closed:
        assert report.member_top[0]
        assert report.member_top[1:] == [[], []]
        assert report.log_prob == pytest.approx(report.member_log_probs[0], abs=1e-6)
        assert all(before == after for _, before, after in report.moved)
    for report in found:
        assert report.gated or all(report.member_top)


def test_the_gate_is_saved_loaded_and_used(tmp_path):
    folders = [tiny.save(tmp_path / name.replace(" ", "-"), name, seed) for seed, name in enumerate(MEMBERS)]
    ours, options = Ensemble.from_pretrained(folders, trust=1.0, gate="unsure:0"), {"max_new_tokens": 8, **GREEDY}
    text = ours.generate("abc", **options)
    assert text == Ensemble.from_pretrained(folders[:1]).generate("abc", **options)
    assert text != ours.generate("abc", **options, gate="none")
    ours.save_pretrained(tmp_path / "saved")
    again = Ensemble.from_pretrained(tmp_path / "saved")
    assert again.model.config.gate == "unsure:0.0"
    assert again.generate("abc", **options) == text
    inspected = again.inspect("abcd")
    assert all(report.gated and all(report.member_top) for report in inspected)
    assert again.next_token("abc").solution.gated.all()
    # The primary is the member, without a temperature that was fitted for the ensemble.
    warm = Ensemble.from_pretrained(tmp_path / "saved")
    warm.model.config.rule_temperature = 3.0
    assert [r.log_prob for r in warm.inspect("abcd")] == [r.log_prob for r in inspected]


def test_evaluation_position_by_position(tmp_path):
    folders = [tiny.save(tmp_path / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]
    ensemble = Ensemble.from_pretrained(folders, trust=1.0, gate="unsure:0")
    positions = observe_text(ensemble, [Document("d", "the quick brown fox jumps over the lazy dog. ")])
    plain = RuleChoice("meet", {"rule": "meet"})
    (_, sure, near) = under_gates([plain], ["unsure:0.1", "disagreement:0.3"])
    found = evaluate(ensemble, positions, [plain, sure, near])
    alone = evaluate(ensemble, positions, [sure, near])
    log_probs, solution = ensemble.model.combiner.solve_rows(positions.hidden, ensemble.model.settings.ungated())
    target = positions.targets[:, None]
    rule = -solution.log_probs.gather(-1, target)[:, 0].double()
    assert torch.allclose(found.choices["meet"].nats, rule, atol=1e-6)  # its own gate does not count
    closed = {
        sure.name: (log_probs[0].exp().amax(-1) >= 0.1, log_probs[0]),
        near.name: (solution.problem.pool_bound() <= 0.3, solution.pool),
    }
    for name, (where, instead) in closed.items():
        assert 0 < where.sum() < len(where)
        expected = torch.where(where, -instead.gather(-1, target)[:, 0].double(), rule)
        for one in (found.choices[name], alone.choices[name]):
            assert torch.equal(one.gated, where)
            assert torch.allclose(one.nats, expected, atol=1e-6)
        assert found.choices[name].passes == pytest.approx(alone.choices[name].passes)
        facts = summary(found)["rules"][name]
        assert facts["gated"] == pytest.approx(where.double().mean().item())
        assert facts["passes"] < summary(found)["rules"]["meet"]["passes"]
    assert summary(found)["rules"]["meet"]["gated"] == 0


def test_gates_in_the_names_of_choices():
    (choice,) = parse_choices(["meet:trust=0.5:gate=unsure:0.25"], 2)
    assert choice.settings == {"rule": "meet", "trust": [0.5, 0.5], "gate": "unsure:0.25"}
    (_, again) = under_gates(parse_choices(["meet:trust=0.5"], 2), ["unsure:0.25"])
    assert again.settings == choice.settings
    assert parse_choices([again.name], 2) == [again]


def test_gates_on_the_command_line(tmp_path):
    members = [x for name in ("gpt2", "llama") for x in ("-m", tiny.save(tmp_path / name, name))]
    done = ran("generate", "hello", *members, "--seed", 1, "--max-new-tokens", 12, "--gate", "unsure:0.1", "--summary")
    assert "gate unsure:0.1: closed at" in done.stderr
    facts = json.loads(ran("generate", "hello", *members, "--gate", "unsure:0", "--json", "--seed", 1).stdout)
    assert facts["gate"] == "unsure:0.0"
    assert facts["gated"] == 1
    assert facts["seconds_saved"] is None
    (tmp_path / "text.txt").write_text("some words, and more of them")
    asked = ["--text", tmp_path / "text.txt", "--gate", "unsure:0.1", "--gate", "disagreement:0.3"]
    found = facts_of("evaluate", *members, *asked)["rules"]
    assert {"meet", "meet:gate=unsure:0.1", "meet:gate=disagreement:0.3", "logit-mean", "prob-mean"} == set(found)
    shown = " ".join(run("inspect", "hello", *members, "--gate", "unsure:0.1").stdout.split())
    assert "gate unsure:0.1 closed at" in shown
    told = run("inspect", "hello", *members, "--gate", "unsure:0", "--json")
    facts = json.loads(told.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [token["gap"] for token in facts["tokens"]] == [None] * 4
    assert facts["gated"] == 1
    assert refusal("generate", "hello", *members, "--gate", "sure").startswith("error: expected a gate as unsure:T")


@dataclass(frozen=True)
class AfterPunctuation(Disagreement):
    """The pool answers behind a full stop or a comma."""

    threshold: float = 1.0
    name = form = "after-punctuation"
    never_closes = False

    def open(self, problem):
        return torch.tensor([text.strip() not in {".", ","} for text in problem.text_before()])


def test_a_gate_of_ones_own_has_a_name_and_may_look_at_the_text_before_each_token(rows, monkeypatch):
    monkeypatch.setitem(GATES, AfterPunctuation.name, AfterPunctuation)
    ensemble, closed = Ensemble.from_pretrained("narrow"), []

    class Closed(Recorder):
        def add(self, solution, log_probs):
            closed.extend(solution.gated.tolist())

    prompt = "And the king said unto him, Go up."
    text = ensemble.generate(
        prompt, max_new_tokens=16, do_sample=True, seed=3, gate="after-punctuation", recorder=Closed()
    )
    ids = ensemble.tokenizer(prompt + text)["input_ids"]
    before = [ensemble.tokenizer.decode([token]).strip() for token in ids[-17:-1]]
    assert closed == [word in {".", ","} for word in before]
    assert any(closed)
    assert not all(closed)
    with pytest.raises(InvalidInputError, match="text before each token"):
        softmeet.combine(*rows, gate="after-punctuation")


def test_a_package_makes_a_gate_known_by_an_entry_point(tmp_path, monkeypatch):
    info = tmp_path / "softmeet_gates-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: softmeet-gates\nVersion: 1\n")
    target = f"{AfterPunctuation.__module__}:AfterPunctuation"
    (info / "entry_points.txt").write_text(
        f"[softmeet.gates]\nafter-punctuation = {target}\nother = {target}\nbroken = nowhere:It\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("softmeet.rules.gates.GATES", dict(GATES))
    assert parse_gate("after-punctuation:2") == AfterPunctuation(2.0)
    assert ["gate", "after-punctuation", f"by {target}", ""] in [
        list(row.values()) for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    ]
    for name, said in (("other", "expected a subclass .* with that name"), ("broken", "cannot be loaded: ModuleNot")):
        with pytest.raises(RuleError, match=f"the gate '{name}' .*{said}"):
            parse_gate(f"{name}:1")


def test_a_gate_of_ones_own_needs_a_threshold_and_a_name(rows):
    @dataclass(frozen=True)
    class Nameless(Disagreement):
        def open(self, problem):
            return super().open(problem)

    for threshold in (-1.0, float("nan")):
        with pytest.raises(InvalidInputError, match=r"expected a gate disagreement:T .* with T at least 0"):
            Disagreement(threshold)
    with pytest.raises(InvalidInputError, match="got Nameless with that of Disagreement, 'disagreement': set another"):
        parse_gate(Nameless(0.5))
    with pytest.raises(InvalidInputError, match="a name of its own"):
        softmeet.combine(*rows, "meet", gate=Nameless(0.5))
