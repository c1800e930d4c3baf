"""``softmeet advise``: its verdicts on members made to be equal, unequal, broken or the same, and its promises."""

from __future__ import annotations

import functools
import itertools
import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from commands import facts_of, ran, run, stages
from texts import LETTERS, documents

from softmeet import Ensemble
from softmeet.evaluation import advise as advising
from softmeet.evaluation import own_files
from softmeet.evaluation.advise import Advice, Alternative, advise, own_documents, within_budget
from softmeet.evaluation.costs import Others, milliseconds
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.intervals import Clusters
from softmeet.evaluation.judged import Judged
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.premise import best_hidden
from softmeet.evaluation.save import save
from softmeet.evaluation.verdict import figures, plainly
from softmeet.hf import claiming
from softmeet.members.member import short

N, DOCUMENTS = 1000, 20


def states(first, second, generator):
    """Positions at which the truth is a head's distribution, and each member errs by so much noise of its own."""
    truth = torch.randn(N, 32, generator=generator)
    return truth, [truth + noise * torch.randn(N, 32, generator=generator) for noise in (first, second)]


def positions(one_head, first, second, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth, hidden = states(first, second, generator)
    return of_truth(hidden, one_head.model.heads[0].logits(truth).log_softmax(-1), generator)


def of_truth(hidden, log_truth, generator):
    targets = torch.multinomial(log_truth.exp(), 1, generator=generator).squeeze(-1)
    document = torch.arange(N) * DOCUMENTS // N
    return Positions(hidden, targets, document, torch.full((N,), 3), [f"d{k}" for k in range(DOCUMENTS)])


TEXT = [Document("d", "the quick brown fox jumps over a lazy dog " * 3)]


def advised(one_head, first, second, **how):
    return advise(one_head, TEXT, positions(one_head, first, second), **how)


@functools.cache
def equal(one_head):
    return advised(one_head, 1.0, 1.0, folds=2)


@functools.cache
def as_good(one_head):
    return advised(one_head, 0.3, 0.3)


@pytest.fixture(autouse=True)
def _measured_twice(monkeypatch):
    """Not four times: how much members cost is nothing that a test looks at."""
    monkeypatch.setattr(advising, "milliseconds", functools.partial(milliseconds, repeats=2))


@pytest.fixture
def unmeasured(monkeypatch, _measured_twice):
    """For tests that do not look at what members cost."""
    monkeypatch.setattr(advising, "milliseconds", lambda runs: [1.0] * len(runs))


def test_equal_members_are_averaged(one_head):
    found = figures(equal(one_head))
    assert found["verdict"] in ("average", "gate")
    assert found["interval"][0] > 0
    assert found["gain"] == pytest.approx(sum(found["interval"]) / 2)
    assert min(found["weights"]) > 0.3
    assert found["cost_ratio"] > 0
    assert [m["bits_per_byte"] > 0 and m["ms_per_byte"] > 0 for m in found["members"]] == [True, True]
    assert sum(m["knows_better"] for m in found["members"]) == pytest.approx(1)


def test_a_much_better_member_is_used_alone(one_head, tmp_path):
    advice = advised(one_head, 0.05, 3.0, folds=2)
    found = figures(advice)
    save(advice.ensemble, advice.fitted, tmp_path / "saved", found["says"])
    alone = Ensemble.from_pretrained(tmp_path / "saved")
    assert (alone.names, alone.model.config.weights) == (one_head.names[:1], [1.0])
    assert alone.model.config.rule_temperature == advice.candidate.settings["rule_temperature"]
    assert found["verdict"] == "single"
    assert (found["members_in_order"], found["weights"]) == (one_head.names[:1], [1.0])
    assert found["best_member"] == one_head.names[0]
    assert found["interval"][0] <= 0
    assert found["cost_ratio"] == pytest.approx(1)
    assert f"Use {short(one_head.names[0])} alone" in found["says"]


def test_the_same_member_twice_is_one(one_head, unmeasured):
    same = positions(one_head, 0.3, 0.3)
    same = replace(same, hidden=[same.hidden[0], same.hidden[0]])
    found = figures(advise(one_head, TEXT, same, folds=2))
    assert found["verdict"] == "single"
    assert found["gain"] == pytest.approx(0, abs=3e-3)


def test_an_interval_that_holds_zero_is_no_advice(one_head, unmeasured):
    """Whatever the mean is, over many draws of members about as good as their average."""
    for seed in range(2):
        found = figures(advise(one_head, TEXT, positions(one_head, 0.8, 1.1, seed), folds=2))
        assert (found["verdict"] != "single") == (found["interval"][0] > 0)


def apart(judged):
    """The same, with scores that may be changed."""
    return replace(judged, fitted=replace(judged.fitted, test=deepcopy(judged.fitted.test)))


def judged_by(one_head, nats, confidence=None, times=(1.0, 1.0), sizes=None):
    """What is judged of given losses: of two members, each fitted average and ``meet``."""
    judged = apart(as_good(one_head).judged)
    fitted = judged.fitted
    for name, own in zip(judged.names, nats["members"], strict=True):
        fitted.test.members[name].nats = own.double()
        if confidence is not None:
            fitted.test.members[name].confidence = confidence[name == judged.names[1]].double()
    for candidate in fitted.candidates[:2]:
        fitted.test.choices[candidate.label].nats = nats["members"][fitted.candidates.index(candidate)].double()
    for candidate in fitted.candidates[2:]:
        fitted.test.choices[candidate.label].nats = nats["averages"].double()
    return Judged(one_head, fitted, times)


def noise(seed):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cheap", [0, 1])
def test_a_gate_is_advised_where_a_cheap_member_is_sure_which_is_then_the_first(one_head, cheap):
    """Where it is sure all agree, and elsewhere the average gains."""
    sure = torch.arange(N) % 2 == 0
    own = [torch.where(sure, 0.1, 2.0 + noise(0)), torch.where(sure, 0.1, 2.1 + noise(1))]
    averages = torch.where(sure, 0.1, 1.7 + noise(2))
    confidence = [torch.where(sure, 0.95, 0.3), torch.full((N,), 0.3)]
    times, order = [1.0, 4.0], slice(None, None, -1 if cheap else 1)
    nats = {"members": own[order], "averages": averages}
    judged = judged_by(one_head, nats, confidence[order], times[order])
    verdict, candidate, losses, gated = judged.chosen()
    assert (verdict, gated.member, gated.threshold, gated.alone) == ("gate", cheap, 0.5, 0.5)
    candidate = replace(candidate, settings=candidate.settings | {"weights": [0.3, 0.7]})
    advice = Advice(judged, verdict, candidate, losses, gated, 3.0)
    assert advice.ensemble.names == one_head.names[order]
    assert advice.ensemble.model.config.weights == [0.3, 0.7][order]
    assert advice.ensemble.model.config.gate == advice.fitted.chosen.settings["gate"] == "unsure:0.5"
    # A gate before the dear one saves too little.
    dear = judged_by(one_head, nats, confidence[order], [40.0, 1.0][order])
    assert dear.chosen()[0] == "average"


def test_the_first_line_says_what_to_do_and_whether_it_is_worth_it(one_head):
    one, two, averages = 2.0 + noise(0), 2.0 + noise(1), 1.9 + noise(0)
    judged = judged_by(one_head, {"members": [one, two], "averages": averages})
    verdict, candidate, nats, gated = judged.chosen()
    assert verdict == "average"
    said = [plainly(Advice(judged, verdict, candidate, nats, gated, time)) for time in (0.9, 1.2, 1.9)]
    best = short(judged.best)
    assert said[0] == f"Combine them: 4.0 % fewer bits than {best} alone, in no more time."
    assert said[1].startswith(
        f"Combine them: 4.0 % fewer bits than {best} alone for 20 % more time, more than a larger"
    )
    assert said[2].startswith(f"4.0 % fewer bits than {best} alone for 90 % more time: keep {best}, or try a larger")
    times = [time * (1 + (name != judged.best)) for name, time in zip(judged.names, judged.times, strict=True)]
    slower = replace(judged, times=times)
    assert plainly(Advice(slower, verdict, candidate, nats, gated, 1.9)).endswith(f"90 % more time: keep {best}.")
    each = Clusters(judged.found.positions.document, "documents")
    other = Alternative("other/model", 0.8 * each.sums(judged.base), each.sums(judged.bytes), 1.3)
    named = Advice(judged, verdict, candidate, nats, gated, 1.2, alternatives=[other])
    assert plainly(named).startswith("Use other/model alone: 16.7 % fewer bits than all together, for +8 % time")
    assert not figures(named)["worth_it"]
    named.alternatives = [replace(other, time=9.0)]
    assert plainly(named) == said[1]
    busy = Advice(judged, verdict, candidate, nats, gated, 1.0, busy=0.5)
    assert "Other programs took 50% of the processors" in figures(busy)["cautions"][-1]
    assert not any("Other programs" in said for said in figures(replace(busy, busy=0.01))["cautions"])


def test_what_others_take_is_what_is_busy_and_not_our_own(monkeypatch):
    from collections import namedtuple

    import psutil

    every, ours = namedtuple("every", "user nice system idle"), namedtuple("ours", "user system")
    now = {"every": every(10.0, 0.0, 0.0, 90.0), "ours": ours(5.0, 1.0)}
    process = SimpleNamespace(cpu_times=lambda: now["ours"], children=lambda recursive: [])
    monkeypatch.setattr(psutil, "cpu_times", lambda: now["every"])
    monkeypatch.setattr(psutil, "Process", lambda: process)
    others = Others()
    now |= {"every": every(16.0, 0.0, 0.0, 94.0), "ours": ours(7.0, 1.0)}
    assert others.share() == pytest.approx(0.4)
    now["ours"] = ours(99.0, 0.0)
    assert others.share() == 0.0


def test_a_gate_is_judged_on_documents_that_it_was_not_chosen_by(one_head):
    """A low threshold is good in the first fold alone; seen from the others a higher one is the cheapest."""
    place, first = torch.arange(N) % 4, (torch.arange(N) * DOCUMENTS // N) % 5 == 0
    sure, maybe = place < 2, place == 2
    averages = torch.where(sure, 0.1, 1.7)
    one = averages + torch.where(sure, 0.0, torch.where(maybe, torch.where(first, -0.32, 0.08), 0.5))
    confidence = [torch.where(sure, 0.95, torch.where(maybe, 0.6, 0.3)), torch.full((N,), 0.3)]
    judged = judged_by(one_head, {"members": [one, one + 1.0], "averages": averages}, confidence, (1.0, 4.0))
    found = judged.gated(averages.double())
    assert (found.member, found.threshold) == (0, 0.5)
    assert torch.equal(found.nats[first], averages.double()[first])
    assert torch.equal(found.nats[~first], torch.where(sure | maybe, one, averages).double()[~first])


def test_one_model_that_costs_no_more_and_is_better_is_used_instead(one_head):
    advice = replace(equal(one_head))
    ours = advice.judged
    losses = Clusters(ours.found.positions.document, "documents").sums(ours.base)
    sizes = Clusters(ours.found.positions.document, "documents").sums(ours.bytes)
    better, worse = (
        Alternative("other/model", factor * losses, sizes, time) for factor, time in ((0.5, advice.time), (1.5, 0.1))
    )
    advice.alternatives = [worse]
    assert figures(advice)["verdict"] != "single"
    assert figures(advice)["alternatives"][0]["gain"] < 0
    advice.alternatives = [worse, better]
    facts = figures(advice)
    assert (facts["verdict"], facts["rule"], facts["weights"]) == ("single", None, None)
    assert "Use other/model alone" in facts["says"]
    advice.alternatives = [replace(better, time=2 * advice.time)]
    assert figures(advice)["verdict"] != "single"


def test_meet_is_advised_where_members_err_only_by_their_heads(tmp_path, unmeasured):
    """The premise holds: each member's hidden state is the best that its narrow head allows."""
    narrow = Ensemble.from_pretrained([tiny.save(tmp_path / str(k), "opt projected", seed=k) for k in range(2)])
    generator = torch.Generator().manual_seed(0)
    log_truth = torch.randn(N, tiny.V, generator=generator, dtype=torch.float64).log_softmax(-1)
    hidden = [best_hidden(head, log_truth, 1e-6).float() for head in narrow.model.heads]
    found = figures(advise(narrow, TEXT, of_truth(hidden, log_truth, generator), folds=2))
    assert found["verdict"] == found["rule"] == "meet"
    assert found["meet"]["interval"][0] > 0
    assert found["movement"]["total_variation"]["mean"] > 0.005
    assert found["settings"]["trust"] == [1.0, 1.0]


def test_where_meet_is_the_average_it_is_not_tried(one_head):
    advice = as_good(one_head)  # one head, so meet is an average
    assert advice.judged.unfitted_meet is not None
    assert not advice.judged.meets
    assert not figures(advice)["meet"]["fitted"]


def test_one_member_is_used_alone(tmp_path):
    alone = Ensemble.from_pretrained([tiny.save(tmp_path / "a", "gpt2")])
    from softmeet.evaluation.positions import observe_text

    texts = documents()
    found = figures(advise(alone, texts, observe_text(alone, texts)))
    assert (found["verdict"], found["gain"]) == ("single", None)


def test_what_may_mislead_is_said(one_head, unmeasured):
    few = apart(as_good(one_head).judged)
    assert few.cautions() == []
    short = positions(one_head, 0.3, 0.3).take(slice(300))
    cautions = advise(one_head, TEXT, short, folds=2).judged.cautions()
    assert cautions[0].startswith("300 tokens are few")
    assert "blocks of text" in cautions[1]
    known = few.found.members[few.names[0]]
    known.nats = torch.where(few.found.positions.document == 4, 0.01, known.nats)
    assert "1 of 20 documents (such as d4)" in few.cautions()[0]


def test_a_budget_is_spread_over_documents(one_head):
    texts = [Document("short", "x" * 10), Document("long", "é" * 500), Document("longer", "z" * 5000)]
    found = within_budget(one_head, texts, 210)
    assert [len(own.text.encode()) for own in found] == [10, 100, 100]
    assert within_budget(one_head, texts, 10_000) == texts
    assert sum(len(own.text) for own in within_budget(one_head, [Document("d", "x" * 10**6)])) == 80_000


def test_members_write_a_text_of_their_own(one_head):
    told = []
    texts = own_documents(one_head, 200, lambda *what: told.append(what) or told.append)
    assert told[0] == ("the members write a text, in tokens", 0, 220)
    assert sum(told[1:]) >= 220
    assert set(told[1:]) == {5}
    assert len(texts) == 10
    assert min(len(one_head.tokenizer(own.text)["input_ids"]) for own in texts) > 20
    assert not [own.name for own in texts if own.name.startswith("/")]
    assert texts == own_documents(one_head, 200)
    assert len({own.text for own in texts}) == 10


def test_the_command(folders, texts, tmp_path, monkeypatch):
    told = stages(monkeypatch, "advise")
    asked = [*folders, "-t", texts, "--folds", 2, "--instead", folders[0]]
    done = ran(
        "advise", *asked, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html", "--save", tmp_path / "saved"
    )
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["verdict"] in ("single", "average", "meet", "gate")
    assert {"rule", "weights", "gain", "interval", "cost_ratio", "says"} <= facts.keys()
    assert facts["alternatives"][0]["bits_per_byte"] == pytest.approx(facts["members"][0]["bits_per_byte"], rel=1e-3)
    read = {name: (total, sum(counts)) for name, total, counts in told if total is not None}
    parts = (facts["tokens"], facts["movement"]["positions"], facts["tokens"], facts["tokens"])
    does = ("reading the text", "comparing meet with its average", "scoring averages", "scoring meet")
    assert read == {f"{name}, in tokens": (size, size) for name, size in zip(does, parts, strict=True)} | {
        f"reading the text by {short(str(folders[0]))}, in tokens": (facts["tokens"], facts["tokens"])
    }
    shown = " ".join(done.stdout.split())
    assert "instead: " in shown
    assert "are few" in shown
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<table>" in page
    again = Ensemble.from_pretrained(tmp_path / "saved")
    assert again.model.config.weights == pytest.approx(facts["weights"])
    assert facts["says"] in (tmp_path / "saved" / "README.md").read_text()


def test_files_are_judged_on_those_that_are_held_out(folders, tmp_path, unmeasured):
    project, kept = tmp_path / "project", []
    project.mkdir()
    for document in documents(48, 450):
        (project / f"{document.name}.txt").write_text(f"{document.text} {' '.join(LETTERS.split()[::-1])} " * 2)
    model = Ensemble.from_pretrained([folders[0], f"files:{project}"]).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_files, "give_claims", lambda *args, **how: kept.append(how["without"]) or give(*args, **how))
        give = claiming.give_claims
        beside = [folders[0], f"files:{project}", "--save", tmp_path / "saved", "--html", tmp_path / "a.html"]
        facts = facts_of("advise", *beside)
    ((*held,),) = kept
    assert (facts["documents"], facts["files"]["held_out"], len(held)) == (12, 12, 12)
    assert facts["clusters"]["kind"] == "documents"
    claiming.give_claims(model, without=held)
    (reader,) = model.claimants
    assert set(reader.index.files) == {*project.iterdir()} - {*held}
    assert facts["files"]["worth_it"]
    assert facts["plainly"].startswith(f"Put files:project beside {short(str(folders[0]))}: ")
    assert "each read without itself" in facts["plainly"]
    assert facts["files"]["behind_header"]["interval"][0] > 0
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["files"] == [f"files:{project}"]
    assert "What is advised, and files:project beside it" in (tmp_path / "a.html").read_text()


def test_files_that_say_nothing_of_a_text_are_left_out(folders, texts, tmp_path, unmeasured):
    (tmp_path / "other.txt").write_text("0123456789" * 200)
    line = f"files:{tmp_path}/other.txt"
    facts = facts_of("advise", *folders, line, "-t", texts, "--folds", 2, "--save", tmp_path / "saved")
    assert facts["plainly"].startswith("Leave files:other.txt out: ")
    assert "combine" in facts["plainly"].lower()  # and what to do with the models
    assert facts["files"]["gain"] == pytest.approx(0, abs=0.01)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["files"] == []
    assert "expected 4 files or more of 900 bytes" in run("advise", folders[0], line).stderr


def test_members_are_named_by_options_too(folders, texts, monkeypatch):
    seen = []
    monkeypatch.setattr(Ensemble, "from_pretrained", lambda names, *args, **how: seen.append(names) or 1 / 0)
    for named in (folders, tiny.each("-m", folders)):
        with pytest.raises(ZeroDivisionError):
            run("advise", *named, "-t", texts)
    assert seen[0] == seen[1] == list(map(str, folders))


def test_the_members_own_text(folders, tmp_path, unmeasured):
    done = ran("advise", *folders, "--tokens", 300, "--folds", 2, "--json", tmp_path / "own.json")
    facts = json.loads((tmp_path / "own.json").read_text())
    assert facts["own_text"]
    assert facts["tokens"] == 300
    assert "wrote this text themselves" in " ".join(done.stdout.split())


def test_what_cannot_work_is_refused_before_anything_is_loaded(texts, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Ensemble, "from_pretrained", lambda *args, **how: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("x")
    for words, message in (
        (["--text", tmp_path / "nothing.txt"], "No such file"),
        (["--text", texts, "--save", tmp_path / "full"], "holds other files"),
        (["--text", texts, "--json", tmp_path / "no" / "a.json"], "in a folder that is there"),
    ):
        assert message in run("advise", *folders, *words).stderr.replace("\n", " ")


def test_finished_work_is_kept(folders, texts, tmp_path, monkeypatch, unmeasured):
    words = ["advise", *folders, "-t", texts, "--folds", 2, "--resume", tmp_path / "kept"]
    first = facts_of(*words)
    monkeypatch.setattr(advising, "fit", kept_only(advising.fit))
    assert facts_of(*words)["candidates"] == first["candidates"]


def test_where_meet_would_take_too_long_it_is_not_tried(one_head, monkeypatch, unmeasured):
    monkeypatch.setattr(advising, "_UNMOVED", 0.0)
    monkeypatch.setattr(advising, "_SECONDS", 1e-6)
    judged = advised(one_head, 1.0, 1.0, folds=2).judged
    assert not judged.meets
    assert [own for own in judged.cautions() if own.startswith("meet may differ")]
    assert len(judged.found.positions) > 500


def kept_only(fit):
    from softmeet.evaluation.scoring import Piece

    def run(*args, **how):
        before, Piece.sums = Piece.sums, lambda *args: pytest.fail("evaluated again")
        try:
            return fit(*args, **how)
        finally:
            Piece.sums = before

    return run


def test_a_run_that_goes_on_judges_at_the_same_positions(one_head, tmp_path, monkeypatch, unmeasured):
    """How many are judged depends on time: a second run is quicker, as much is kept."""
    monkeypatch.setattr(advising, "_UNMOVED", 0.0)
    monkeypatch.setattr(advising, "_FEWEST", 1)
    monkeypatch.setattr(advising, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    kept = []
    for seconds in (0.25, 0.5):  # of all positions that were compared, in a second
        monkeypatch.setattr(advising, "_SECONDS", seconds)
        kept.append(advised(one_head, 1.0, 1.0, folds=2, cache=PieceCache(tmp_path / "kept", {})).judged)
    assert all(own.meets for own in kept)
    assert not [said for own in kept for said in own.cautions() if said.startswith("meet may differ")]
    first, second = (len(own.found.positions) for own in kept)
    assert first == second
    assert figures_of(kept[0]) == figures_of(kept[1])


def figures_of(judged):
    return {name: scores.nats.tolist() for name, scores in judged.found.choices.items()}
