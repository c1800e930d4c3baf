"""``softmeet evaluate``: its numbers against transformers' own loss, and its intervals against simulation."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tiny
import torch
from commands import facts_of, ran, refusal, run
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.evaluate import show
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError, TraceError
from softmeet.evaluation.choices import RuleChoice, parse_choices, with_baselines
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.perplexity import evaluate, evaluate_positions, evaluate_text
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.report import calibration, gain_by_disagreement, summary
from softmeet.evaluation.scores import Scores
from softmeet.members.weighting import perplexity_weights
from softmeet.scaling.local import LocalEngine

pytestmark = pytest.mark.checked

WORDS = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(WORDS)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_within_a_long_text_is_told_member_by_member(ensemble, tmp_path, workers):
    told, window, cache = [], 24, PieceCache(tmp_path / "kept", {"a": 1})

    def begin(total):
        told.append([total])
        return told[-1].append

    for _ in range(2):
        with LocalEngine(workers) as engine:
            observe_text(ensemble, [Document("d", WORDS * 3)], engine=engine, cache=cache, window=window, begin=begin)
    (total, kept, *counts), (_, *again) = told
    assert kept == 0
    assert sum(counts) == total
    assert max(counts) <= -(-window // len(ensemble.names))
    assert again == [total]


def test_one_member_has_transformers_own_loss(ensemble):
    """On the same sliding windows, with transformers masking what was counted before."""
    window, stride = 24, 10
    positions = observe_text(ensemble, [Document("d", WORDS * 3)], window=window, stride=stride)
    found = evaluate(ensemble, positions, [RuleChoice("average", {"rule": "logit-mean"})])
    ids = ensemble.tokenizer(WORDS * 3, return_tensors="pt")["input_ids"]
    for member, scores in zip(ensemble.model.members, found.members.values(), strict=True):
        total, done = 0.0, 1
        for start in range(0, ids.shape[1] - 1, stride):
            stop = min(start + window + 1, ids.shape[1])
            if stop <= done:
                continue
            labels = ids[:, start:stop].clone()
            labels[:, : done - start] = -100
            with torch.no_grad():
                total += member(input_ids=ids[:, start:stop], labels=labels).loss.item() * (stop - done)
            done = stop
        assert scores.mean == pytest.approx(total / (ids.shape[1] - 1), abs=1e-4)


def test_rules_are_those_of_combine(ensemble):
    positions = observe_text(ensemble, [Document("d", WORDS)])
    choices = [
        RuleChoice("meet", {"rule": "meet", "trust": [0.5, 2.0]}),
        RuleChoice("cool", {"rule": "prob-mean", "weights": [0.25, 0.75], "rule_temperature": 0.5}),
    ]
    found = evaluate(ensemble, positions, choices)
    settings = ensemble.model.settings.changed(rule="meet", trust=[0.5, 2.0]).ungated()
    log_probs, meet = ensemble.model.combiner.solve_rows(positions.hidden, settings)
    target = positions.targets[:, None]
    assert torch.allclose(found.choices["meet"].nats, -meet.log_probs.gather(-1, target)[:, 0].double(), atol=1e-6)
    mean = (0.25 * log_probs[0].exp() + 0.75 * log_probs[1].exp()) ** 2
    expected = -(mean / mean.sum(-1, keepdim=True)).log().gather(-1, target)[:, 0]
    assert torch.allclose(found.choices["cool"].nats, expected.double(), atol=1e-5)
    assert found.choices["meet"].passes > 0


@pytest.mark.unchecked
def test_a_sweep_answers_as_each_rule_alone():
    ensemble = Ensemble.from_pretrained("narrow")
    positions = observe_text(ensemble, [Document("d", "And the king said")])
    choices = [RuleChoice(rule, {"rule": rule}) for rule in ("max-entropy", "min-reverse-cross-entropy", "logit-mean")]
    choices += [RuleChoice(f"meet {trust:g}", {"rule": "meet", "trust": trust}) for trust in (2.0, 0.3, 0.1)]
    together = evaluate(ensemble, positions, choices)
    assert together.choices["max-entropy"].fallbacks
    for choice in choices:
        alone = evaluate(ensemble, positions, [choice]).choices[choice.name]
        found = together.choices[choice.name]
        # Each is within 1e-4 nats of its optimum, in KL; by Pinsker's inequality a probability moves by some 1e-2.
        assert torch.allclose(found.nats.neg().exp(), alone.nats.neg().exp(), atol=1.5e-2)
        assert found.mean == pytest.approx(alone.mean, abs=2e-3)
        assert (found.fallbacks, found.statuses) == (alone.fallbacks, alone.statuses)


def test_weights_from_the_prompt_apply_after_it(ensemble):
    documents = [Document("a", WORDS), Document("b", WORDS[::-1])]
    positions = observe_text(ensemble, documents)
    found = evaluate(ensemble, positions, [RuleChoice("packed", {"rule": "logit-mean"}, prompt=10)])
    log_probs, _ = ensemble.model.combiner.own_log_probs(positions.hidden)
    nats = -log_probs.gather(-1, positions.targets.expand(2, -1)[..., None])[..., 0]
    for k in range(2):
        own = (positions.document == k).nonzero()[:, 0]
        weights = perplexity_weights(nats[:, own[:10]].mean(-1).tolist())
        for rows, w in ((own[:10], [0.5, 0.5]), (own[10:], weights)):
            settings = ensemble.model.settings.changed(rule="logit-mean", weights=w)
            _, solution = ensemble.model.combiner.solve_rows([h[rows] for h in positions.hidden], settings)
            expected = -solution.log_probs.gather(-1, positions.targets[rows, None])[:, 0].double()
            assert torch.allclose(found.choices["packed"].nats[rows], expected, atol=1e-6)


def test_prompt_weights_in_generation(ensemble):
    """The member that finds the prompt likelier counts more, and each prompt has weights of its own."""
    prompts = ["the quick", "zzzz"]
    weights = [ensemble.prompt_weights(prompt) for prompt in prompts]
    assert weights[0] != weights[1]
    ids = ensemble.tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [member(input_ids=ids, labels=ids).loss.item() for member in ensemble.model.members]
    assert weights[0] == pytest.approx(perplexity_weights(losses), abs=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "gate": "none"}
    together = ensemble.generate(prompts, **options, prompt_weights=True)
    for prompt, own, text in zip(prompts, weights, together, strict=True):
        assert text == ensemble.generate(prompt, **options, weights=own)
    with pytest.raises(InvalidInputError, match="two tokens"):
        ensemble.prompt_weights("z")


def test_intervals_cover_what_they_say():
    """Clusters that share an error: an interval that took tokens for independent would cover far less."""
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(15).repeat_interleave(40)
    covered = naive = 0
    for _ in range(400):
        difference = 0.3 * torch.randn(15, generator=generator)[document] + torch.randn(600, generator=generator) + 0.1
        found = paired(difference, torch.zeros(600), clusters(document))
        covered += found.low <= 0.1 <= found.high
        half = 1.96 * difference.std().item() / math.sqrt(600)
        naive += abs(difference.mean().item() - 0.1) <= half
    assert 0.93 * 400 <= covered <= 0.98 * 400
    assert naive < 0.75 * 400


def test_few_documents_are_cut_into_blocks():
    found = clusters(torch.tensor([0] * 300 + [1] * 100))
    assert (found.kind, found.count) == ("blocks", 20)
    assert found.of.diff().ge(0).all()
    assert not set(found.of[:300].tolist()) & set(found.of[300:].tolist())
    assert clusters(torch.zeros(2, dtype=torch.int64)).count == 2
    with pytest.raises(InvalidInputError, match="two positions"):
        clusters(torch.zeros(1, dtype=torch.int64))


def test_calibration_and_gain_by_disagreement():
    confidence = torch.tensor([0.95, 0.95, 0.15, 0.15], dtype=torch.float64)
    found = calibration(Scores(torch.zeros(4), torch.tensor([True, False, False, False]), confidence))
    assert found["error"] == pytest.approx((0.45 + 0.15) / 2)
    assert found["positions"] == [2, 2]
    ours, base = (Scores(x, torch.ones(6) > 0, torch.ones(6)) for x in (torch.arange(6.0), torch.full((6,), 3.0)))
    bins = gain_by_disagreement(ours, base, torch.tensor([5.0, 4, 3, 2, 1, 0]), bins=2)
    assert [b["gain"] for b in bins] == [-1.0, 2.0]
    assert [b["disagreement"] for b in bins] == [1.0, 4.0]


def test_the_baseline_is_the_best_of_members_and_averages(ensemble):
    positions = observe_text(ensemble, [Document("d", WORDS * 2)])
    facts = summary(evaluate(ensemble, positions, with_baselines([RuleChoice("meet", {"rule": "meet"})])))
    every = {**facts["members"], **{name: facts["rules"][name] for name in ("logit-mean", "prob-mean")}}
    best = min(every, key=lambda name: every[name]["nll"])
    assert facts["rules"]["meet"]["vs"]["baseline"] == best
    assert facts["rules"]["meet"]["vs"]["delta"] == pytest.approx(facts["rules"]["meet"]["nll"] - every[best]["nll"])
    nats = facts["rules"]["meet"]["nll"] * facts["tokens"]
    assert facts["rules"]["meet"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / facts["bytes"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vote", "unknown rule 'vote'"),
        ("meet:rho=1", "unknown option 'rho'"),
        ("meet:trust=much", "expected NUMBER or NUMBER/NUMBER"),
        ("meet:trust=1/2/3", "one trust"),
        ("meet:trust=-1", "trusts from 0"),
        ("prob-mean:weights=1/1/1", "one weight per member"),
        ("meet:pool=both", "pool to be 'logit-mean' or"),
        ("meet:temperature=0", "temperature to be greater than 0"),
        ("", "at least one rule"),
        *(
            (f"meet:prompt_weights={given}", "an integer of at least 1, in 'meet:prompt_weights=")
            for given in ("-3", "2.5", "0", "inf", "nan")
        ),
    ],
)
def test_rules_that_are_none(text, message):
    with pytest.raises(InvalidInputError, match=message):
        parse_choices([text] if text else [], 2)


def test_the_command(folders, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS * 3)
    done = ran(
        "evaluate", *tiny.each("-m", folders), "--text", tmp_path / "a.txt",
        *tiny.each("--rule", ["logit-mean", "prob-mean", "meet"]),
        "--trust", "1.0", "--max-tokens", 50, "--json", tmp_path / "out.json", "--plots", tmp_path / "plots",
    )  # fmt: skip
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["tokens"] == 50
    assert list(facts["members"]) == [str(f) for f in folders]
    assert list(facts["rules"]) == ["logit-mean", "prob-mean", "meet"]
    low, high = facts["rules"]["meet"]["vs"]["ci95"]
    assert low <= facts["rules"]["meet"]["vs"]["delta"] <= high
    assert "against the" in done.stdout
    pictures = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert pictures == ["calibration.png", "differences.png", "gain.png"]
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.unchecked
def test_over_a_trace_and_over_its_text_alike(folders, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    cut = ("--text", tmp_path / "a.txt", "--separator", " fox", "--window", 9)
    ran("trace", tmp_path / "t", *tiny.each("-m", folders), *cut)
    arguments = ["--rule", "meet:trust=0/1", "--rule", "logit-mean"]
    a = facts_of("evaluate", "--trace", tmp_path / "t", *arguments)
    b = facts_of("evaluate", *tiny.each("-m", folders), *cut, *arguments)
    assert a["rules"]["meet:trust=0/1"]["nll"] == pytest.approx(b["rules"]["meet:trust=0/1"]["nll"], abs=1e-6)
    assert a["bytes"] == b["bytes"]
    assert a["run"]["window"] == b["run"]["window"] == 9
    assert "in its place stands" in refusal("evaluate", "--trace", tmp_path / "t", *tiny.each("-m", folders[::-1]))
    (tmp_path / "t" / "document-00000.safetensors").write_bytes(b"{}")
    first = json.loads((tmp_path / "t" / "trace.json").read_text())["documents"][0]["positions"]
    done = run("evaluate", "--trace", tmp_path / "t", "--json", "-")
    assert json.loads(done.stdout)["tokens"] == a["tokens"] - first
    assert "missing or damaged" in done.stderr.replace("\n", " ")


@pytest.mark.unchecked
def test_a_full_disk_takes_neither_the_table_nor_what_was_there(folders, here, full_disk):
    (here / "x.json").write_text("before")
    command = ["evaluate", *tiny.each("-m", folders), "-t", "a.txt", "--rule", "prob-mean", "--force"]
    for more, name in (("--json", "x.json"), ("--plots", ".")):
        done = CliRunner().invoke(app, [*command, more, name])
        assert isinstance(done.exception, TraceError)
        assert "no room on the disk for" in str(done.exception)
        assert "against the" in done.output
        assert sorted(path.name for path in here.iterdir()) == ["a.txt", "x.json"]
    assert (here / "x.json").read_text() == "before"


@pytest.mark.unchecked
def test_infinite_nats_are_null_in_json_and_short_in_the_table_and_names_are_shown_as_they_are(folders, here):
    shutil.copytree(folders[0], "[red]one[x]")
    command = ["evaluate", "--member=[red]one[x]", "-m", str(folders[1]), "--text=a.txt", "-t", "a.txt"]
    command += ["--rule", "meet", "--rule", "one-hot", "--json", "x.json", "--plots", "plots"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    facts = json.loads((here / "x.json").read_text(), parse_constant=pytest.fail)
    row = facts["rules"]["one-hot"]
    assert row["nll"] is row["perplexity"] is row["vs"]["delta"] is None
    assert facts["rules"]["meet"]["nll"] > 0
    [line] = [line for line in done.output.splitlines() if "one-hot" in line]
    assert line.count("∞") == 4
    assert "[red]one[x]" in done.output
    assert "88 tokens" in done.output


@pytest.mark.parametrize("width", [60, 80, None])
def test_a_table_cuts_no_figure(width, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    row = {
        "nll": 2.1234, "perplexity": 812.34, "bits_per_byte": 1.2345, "top1": 0.512, "calibration": {"error": 0.123},
        "gated": 0.256, "against": {"delta": -0.0123, "ci95": [-0.03, 0.0]}, "fallbacks": 795,
        "statuses": {"OPTIMAL": 888, "NOT_CONVERGED": 12},
    }  # fmt: skip
    facts = {"clusters": {"count": 20, "kind": "blocks"}, "tokens": 900, "baseline": "a", "disagreement": 0.2}
    facts |= {"vocabulary": "tokens", "documents": 20}
    show({**facts, "members": {}, "rules": {"meet:trust=1/0.3:pool=prob-mean": row}})
    shown = capsys.readouterr().out
    for figure in ("2.1234", "812.34", "1.2345", "0.512", "0.123", "-0.0123 ± 0.0150"):
        assert figure in shown
    # Where a table has no room even without the column, all figures stand below each other.
    assert ("25.6%" in shown) == (width != 80)
    assert ('shows one more column: "gated"' in shown) == (width == 80)
    said = " ".join(shown.split())
    assert "meet:trust=1/0.3:pool=prob-mean: NOT_CONVERGED at 12 of 900 tokens: the tolerance was not reached" in said
    assert "answered by meet at 795 of 900 tokens, as no distribution agrees with every member there" in said
    assert all(len(line) <= width for line in shown.splitlines()) if width else "│" in shown


def test_a_member_called_like_a_rule_is_refused(folders, here):
    shutil.copytree(folders[0], "meet")
    with pytest.raises(InvalidInputError, match="meet is both: rename the member"):
        CliRunner().invoke(app, ["evaluate", "-m", "meet", "-t", "a.txt", "--rule", "meet"], catch_exceptions=False)


def test_prompts_longer_than_every_document_are_refused(ensemble):
    documents, chosen = [Document("a", WORDS), Document("b", "abc")], parse_choices(["meet:prompt_weights=40"], 2)
    positions = observe_text(ensemble, documents, max_per_document=40)
    message = "more than 40 predictions for weights from so many, but the longest has 40: give fewer"
    with pytest.raises(InvalidInputError, match=message):
        evaluate_text(ensemble, documents, chosen, max_per_document=40)
    with pytest.raises(InvalidInputError, match=message):
        evaluate_positions(ensemble, positions, chosen)
    assert evaluate_text(ensemble, documents, chosen, max_per_document=41).choices


@pytest.mark.unchecked
def test_uniform_averages_stand_beside_an_ensemble_with_weights_of_its_own(folders, here):
    command = ["evaluate", "-t", "a.txt", "--rule", "meet", *tiny.each("-m", folders)]
    plain, facts = facts_of(*command)["rules"], facts_of(*command, "--weights", "0.9,0.1")
    assert list(plain) == ["logit-mean", "prob-mean", "meet"]
    assert list(facts["rules"]) == ["uniform logit-mean", "uniform prob-mean", *plain]
    for name in ("logit-mean", "prob-mean"):
        assert facts["rules"][f"uniform {name}"]["nll"] == plain[name]["nll"] != facts["rules"][name]["nll"]
    rows = {**facts["members"], **{name: row for name, row in facts["rules"].items() if name != "meet"}}
    assert rows[facts["best_baseline"]]["nll"] == min(row["nll"] for row in rows.values())


@pytest.mark.unchecked
def test_naming_an_ensembles_own_rule_changes_no_figure(folders, here):
    made = Ensemble.from_pretrained(folders, trust=0.7, weights=[0.6, 0.4])
    made.model.config.rule_temperature = 0.5
    made.save_pretrained("e")
    given = [tiny.each("--rule", ["meet", "logit-mean", "meet:temperature=1"]), []]
    named, own = (facts_of("evaluate", "-t", "a.txt", "-m", "e", *more)["rules"] for more in given)
    for name in ("meet", "logit-mean", "uniform logit-mean"):
        assert named[name]["nll"] == own[name]["nll"]
    assert named["meet:temperature=1"]["nll"] != named["meet"]["nll"]


@pytest.mark.unchecked
def test_pieces_of_another_temperature_or_dtype_are_not_taken(folders, here):
    for k, temperature in enumerate((1.0, 2.0)):
        ensemble = Ensemble.from_pretrained(folders, rule="logit-mean")
        ensemble.model.config.rule_temperature = temperature
        ensemble.save_pretrained(f"e{k}")
    command = ["evaluate", "-t", "a.txt", "--resume", "kept", "-m"]
    assert CliRunner().invoke(app, [*command, "e0"], catch_exceptions=False).exit_code == 0
    with pytest.raises(InvalidInputError, match=r"other settings .*ensemble"):
        CliRunner().invoke(app, [*command, "e1"], catch_exceptions=False)
    with pytest.raises(InvalidInputError, match=r"other settings .*dtypes"):
        CliRunner().invoke(app, [*command, "e0", "--dtype", "float64"], catch_exceptions=False)
