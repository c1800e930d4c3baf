"""``softmeet check``, the premise test behind it, and configuration files."""

import json
import math

import pytest
import tiny
import torch
import yaml
from commands import run
from instances import best_outputs, random_heads, zipf

import softmeet
from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.premise import _first_order, _summary, premise_scores
from softmeet.heads import SoftmaxHead
from softmeet.members.heads import principal_cosines, same_column_space


def test_principal_cosines_are_those_of_scipy():
    from scipy.linalg import subspace_angles

    a, b = random_heads(80, (5, 8), seed=0)
    b[:, :2] = a[:, :2] @ torch.randn(2, 2).double() + 3
    centred = [(W - W.mean(0)).numpy() for W in (a, b)]
    expected = sorted((math.cos(x) for x in subspace_angles(*centred)), reverse=True)
    found = principal_cosines(SoftmaxHead(a), SoftmaxHead(b))
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found[:2].tolist() == pytest.approx([1, 1])


def test_shared_column_spaces_are_found():
    (a,) = random_heads(80, (5,), seed=1)
    mixed = a @ torch.randn(5, 5).double() + 2
    assert same_column_space(SoftmaxHead(a), SoftmaxHead(mixed))
    assert same_column_space(SoftmaxHead(a.half()), SoftmaxHead(a.half()))
    assert not same_column_space(SoftmaxHead(a), SoftmaxHead(a[:, :4]))
    padded = torch.cat([a, torch.randn(6, 5).double()])
    assert principal_cosines(SoftmaxHead(a), SoftmaxHead(padded)).min() > 1 - 1e-9


def test_the_premise_score_is_one_in_expectation_when_the_premise_holds():
    """With every p̂_i the best for a truth, the gain expected under that truth is its value under the premise."""
    heads = random_heads(40, (4, 5), seed=2)
    truth = zipf(3, 40, seed=2)
    log_p = best_outputs(heads, truth)
    solution = softmeet.combine(log_p, heads, trust=0.0)
    for i in range(2):
        gains = [_first_order(solution, i, torch.full((3,), y)) for y in range(40)]
        expectation = sum(truth[:, y] * gain for y, (gain, _) in enumerate(gains))
        assert torch.allclose(expectation, gains[0][1], rtol=1e-2, atol=1e-4)


def test_the_gain_is_the_slope_of_the_log_probability_in_trust():
    heads = random_heads(40, (4, 5), seed=3)
    log_p = best_outputs(heads, zipf(2, 40, seed=3)).flip(1)
    targets, step = torch.tensor([3, 17]), 1e-4
    pool = softmeet.combine(log_p, heads, trust=0.0)
    for i in range(2):
        trust = [step if k == i else 0.0 for k in range(2)]
        moved = softmeet.combine(log_p, heads, trust=trust, tol=1e-14)
        slope = (moved.log_probs - pool.log_probs).gather(-1, targets[:, None]).squeeze(-1) / step
        gain, _ = _first_order(pool, i, targets)
        assert gain.abs().max() > 0.05
        assert torch.allclose(slope, gain, rtol=0.02, atol=1e-3)


def test_verdicts():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator)
    ones = torch.ones(400)
    assert _summary(ones + noise, ones).verdict == "trust"
    assert _summary(-ones + noise, ones).verdict == "do not trust"
    assert _summary(noise, ones).verdict == "unclear"
    assert math.isnan(_summary(noise * 0, ones * 0).score)


def test_premise_scores_of_the_narrow_family(narrow):
    scores = premise_scores(narrow, "And the king said unto his daughter, What wilt thou? ", limit=25)
    assert len(scores) == 4
    assert all(math.isfinite(s.score) and s.score_error > 0 for s in scores)
    with pytest.raises(InvalidInputError, match="at least two tokens"):
        premise_scores(narrow, "")


def test_check_in_json_and_on_the_terminal(members, tmp_path):
    (tmp_path / "text.txt").write_text("some words, and more of them")
    done = run("check", *members, "--json", "--text", tmp_path / "*.txt")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [m["width"] for m in facts["members"]] == [32, 32]
    assert facts["share"] == facts["rank"] / 64
    assert facts["members"][0]["premise"]["verdict"] in ("trust", "do not trust", "unclear")
    shown = run("check", *members)
    assert "median principal cosine" in shown.stdout
    same = run("check", "-m", members[1], "-m", members[1])
    assert "one column space" in same.stdout
    assert "meet is logit-mean with weights 0.5, 0.5 here" in same.stdout
    # Facts alone: advice is another command's.
    assert not {"advice", "verdict"} & (facts.keys() | facts["movement"].keys())
    assert shown.stdout.strip().endswith("softmeet advise.")


def test_a_configuration_file_gives_any_flag(members, tmp_path):
    path = tmp_path / "c.yaml"
    given = {"member": [str(m) for m in members[1::2]], "weights": [0.25, 0.75], "max-new-tokens": 3, "json": True}
    path.write_text(yaml.safe_dump(given))
    facts = json.loads(run("generate", "hello", "--config", path).stdout)
    assert [m["weight"] for m in facts["members"]] == [0.25, 0.75]
    assert facts["tokens"] <= 3
    facts = json.loads(run("generate", "hello", "--config", path, "--weights", "0.5,0.5").stdout)
    assert [m["weight"] for m in facts["members"]] == [0.5, 0.5]
    shown = yaml.safe_load(run("config", "generate", "--config", path).stdout)
    assert shown["weights"] == "0.25,0.75"
    assert shown["do_sample"] is True


def test_an_ensemble_of_the_same_member_agrees_with_itself(tmp_path):
    folder = tiny.save(tmp_path / "a", "llama")
    ours = Ensemble.from_pretrained([folder, folder])
    assert ours.next_token("abc").solution.num_passes.item() == 0
