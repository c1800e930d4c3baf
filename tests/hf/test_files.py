"""The user's own files beside members: what they change, and where they are refused."""

from __future__ import annotations

import json
import math
import re
from statistics import fmean

import httpx as http
import pytest
import torch
from commands import run
from serving import running, serving_of
from transformers import AutoModelForCausalLM

from softmeet import Ensemble, Files
from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.evaluation.claimed import beside as losses_beside
from softmeet.evaluation.claimed import claims_of
from softmeet.evaluation.likelihoods import likelihoods
from softmeet.hf.chat import take_plain
from softmeet.hf.report import TokenReports
from softmeet.server.ensembles import load
from softmeet.server.naming import named

MEMBERS = ["wide/gpt2", "wide/llama"]
SAID = "Zorblax the quick went to Quixby, and Zorblax the slow went home. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("project")
    (found / "a.txt").write_text(SAID * 3)
    (found / "b.md").write_text("Nothing of that kind.")
    return found


@pytest.fixture(scope="module")
def alone():
    return Ensemble.from_pretrained(MEMBERS, "logit-mean")


@pytest.fixture(scope="module")
def beside(folder):
    return Ensemble.from_pretrained([*MEMBERS, Files(folder, include="*.txt")], "logit-mean")


def test_a_member_that_has_read_something_else_knows_it(alone, beside):
    assert beside.generate(SAID[:33], max_new_tokens=8, do_sample=False).startswith(" and Zorblax")
    assert "Zorblax" not in alone.generate(SAID[:33], max_new_tokens=8, do_sample=False)
    assert (beside.names, beside.model.config.weights) == (MEMBERS, alone.model.config.weights)
    # Elsewhere nothing changes by much.
    apart = [ensemble.next_token("In the beginning", 1).top[0][1] for ensemble in (alone, beside)]
    assert apart[1] == pytest.approx(apart[0], rel=0.1)


def test_the_mixture_is_the_rules_answer_behind_the_claim(alone, beside):
    (reader,) = beside.model.claimants
    ids = alone.tokenizer(SAID)["input_ids"]
    own = reader.read_whole([ids], [[len(ids)]])
    share, rule = own.claims.item(), alone.next_token(SAID).solution
    wanted = (1 - share) * rule.log_probs.exp() + share * own.log_probs().exp()
    found = beside.next_token(SAID).solution
    assert found.log_probs.exp().numpy() == pytest.approx(wanted.numpy(), abs=1e-7)
    assert found.claims.tolist() == [[pytest.approx(share)]]
    assert found.gap.equal(rule.gap)  # what is certified is what the rule has found
    assert beside.inspect(SAID + "x")[-1].claims == [pytest.approx(share)]


@torch.inference_mode()
def test_several_files_take_their_parts_one_after_the_other(alone, folder):
    both = Ensemble.from_pretrained(
        [*MEMBERS, f"files:{folder}+weight=0.5+relevance=1", f"files:{folder}+weight=0.25+relevance=1"], "prob-mean"
    )
    ids = torch.tensor([both.tokenizer(SAID)["input_ids"]])
    found = both.next_token(SAID).solution.log_probs[0].exp()
    rule = Ensemble(both.model.part([0, 1], alone.model.config), both.tokenizer).model
    rule = rule(input_ids=ids, settings=both.model.settings).logits[0, -1].exp()
    first, second = (reader.read_whole([ids[0].tolist()], [[ids.shape[1]]]) for reader in both.model.claimants)
    assert (first.claims.item(), second.claims.item()) == (0.5, 0.25)
    behind = 0.5 * rule + 0.5 * first.log_probs()[0].exp()
    assert found.numpy() == pytest.approx((0.75 * behind + 0.25 * second.log_probs()[0].exp()).numpy(), abs=1e-6)


def test_what_one_call_has_drawn_is_given_to_the_next(folder):
    beside = Ensemble.from_pretrained([*MEMBERS, f"files:{folder}+weight=0.3"], "logit-mean")
    ids = beside.tokenizer([SAID[:33]], return_tensors="pt")["input_ids"]
    drawn = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}
    out = beside.model.generate(ids, **drawn)
    again = beside.model.generate(out.sequences, **drawn)
    kept = beside.model.generate(out.sequences, cache=out.cache, **drawn)
    assert kept.sequences.equal(again.sequences)
    with torch.inference_mode():
        every, some = (beside.model(input_ids=out.sequences, given=given).logits for given in (None, ids.shape[1]))
    assert every[:, : ids.shape[1]].equal(some[:, : ids.shape[1]])
    assert not every[0, -1].equal(some[0, -1])
    # Scores, too, are told how much was given.
    text, targets = beside.tokenizer.decode(out.sequences[0]), out.sequences[0, 1:, None]
    for given, logits in (None, every), (ids.shape[1], some):
        found = [one.log_prob for one in beside.inspect(text, given=given)]
        assert found == pytest.approx(logits[0, :-1].gather(-1, targets).squeeze(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("members", [MEMBERS[:1], MEMBERS])
@pytest.mark.parametrize("drawing", [{"do_sample": False}, {"do_sample": True, "temperature": 0.2, "seed": 3}])
def test_files_draft_what_they_are_sure_of(folder, members, drawing):
    beside = Ensemble.from_pretrained([*members, Files(folder)], "logit-mean", weights=[1] * len(members))
    counts, texts = [], []
    for speculate in (0, 6):
        calls = []
        hook = beside.model.members[-1].base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        texts.append(beside.generate(SAID[:33], max_new_tokens=30, speculate=speculate, **drawing))
        counts.append(len(calls))
        hook.remove()
    assert texts[0] == texts[1]
    assert counts[1] < 0.8 * counts[0]


def test_likelihoods_and_evaluation_have_the_mixture(beside, folder, tmp_path):
    before, after = (beside.tokenizer(text)["input_ids"] for text in (SAID[:33], SAID[33:60]))
    (found,) = likelihoods(beside.model, [(before, after)])
    ids = torch.tensor([[*before, *after]])
    with torch.inference_mode():
        told = beside.model(input_ids=ids, given=len(before)).logits[0, len(before) - 1 : -1].double()
    assert found.log_prob == pytest.approx(told.gather(-1, torch.tensor(after)[:, None]).sum().item(), abs=1e-5)
    (tmp_path / "held.txt").write_text(SAID)
    bits = []
    for names in MEMBERS, [*MEMBERS, f"files:{folder}"]:
        named = [word for name in names for word in ("-m", name)]
        done = run(
            "evaluate", *named, "-t", tmp_path / "held.txt", "--rule", "logit-mean", "--gate", "unsure:0.01",
            "--json", "-",
        )  # fmt: skip
        rows = json.loads(done.stdout)["rules"]
        bits.append([row["bits_per_byte"] for name, row in rows.items() if name.startswith("logit-mean")])
    assert len(bits[0]) == 2
    assert max(bits[1]) < min(bits[0]) - 1  # where the gate is closed, too


def evaluated(folder, *names):
    """The figures of ``softmeet evaluate`` on the text in a folder, and under ``said`` what it prints."""
    words = [word for name in names for word in ("-m", name)]
    out = folder / "figures.json"
    done = run("evaluate", *words, "-t", folder / "held.txt", "--rule", "logit-mean", "--json", out, "--force")
    return json.loads(out.read_text()) | {"said": done.stdout}


def test_commands_say_how_much_was_claimed_in_the_mean(beside, folder, tmp_path):
    (reader,), ids = beside.model.claimants, beside.tokenizer(SAID)["input_ids"]
    files = f"files:{folder}+include=*.txt"
    share = reader.read_whole([ids[:-1]], [range(1, len(ids))]).claims.mean().item()
    (tmp_path / "held.txt").write_text(SAID)
    facts = evaluated(tmp_path, *MEMBERS, files)
    assert facts["claims"] == {reader.name: pytest.approx(share)}
    assert f"{reader.name} claimed {share:.1%} of every rule's answers" in facts["said"]
    assert f"{reader.name} claimed {share:.1%} of the answers" in run("inspect", SAID, *MEMBERS, files).stdout
    run("inspect", SAID, *MEMBERS, files, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    record = json.loads(page.partition('id="record">')[2].partition("</script>")[0])
    assert fmean(one["claims"][0] for one in record["turns"][0]["tokens"]) == pytest.approx(share)
    assert record["turns"][0]["tokens"][-1]["sources"][0]["line"] == beside.inspect(SAID)[-1].sources[0].line
    reports, asked = TokenReports(1), {"max_new_tokens": 4, "do_sample": False}
    beside.generate(SAID[:33], recorder=reports, **asked)
    shares = [reports.at(k, 0).claims[0] for k in range(4)]
    words = [word for name in (*MEMBERS, files) for word in ("-m", name)]
    drawn = ["--rule", "logit-mean", "--no-do-sample", "--max-new-tokens", 4]
    done = run("generate", SAID[:33], *words, *drawn, "--json", "--summary")
    assert json.loads(done.stdout)["claims"] == {reader.name: pytest.approx(fmean(shares))}
    assert f"{reader.name} claimed {fmean(shares):.1%} of the answers" in done.stderr


def test_a_saved_ensemble_keeps_the_paths_alone(beside, folder, tmp_path):
    beside.save_pretrained(tmp_path / "saved")
    again = Ensemble.from_pretrained(str(tmp_path / "saved"))
    assert again.model.config.files == [f"files:{folder}+include=*.txt"]
    assert again.next_token(SAID).top == beside.next_token(SAID).top
    assert "Quixby" not in "".join(path.read_text(errors="ignore") for path in (tmp_path / "saved").glob("*.json"))


def test_a_saved_ensemble_from_elsewhere_reads_no_files_that_are_not_named(beside, folder, tmp_path, monkeypatch):
    beside.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "of somebody else"))
    saved, line = str(tmp_path / "saved"), f"files:{folder}+include=*.txt"
    with monkeypatch.context() as before_loading:
        before_loading.setattr("softmeet.ensemble.load_members", None)
        before_loading.setattr("softmeet.hf.checkpoint.load_members", None)
        for load_it in Ensemble.from_pretrained, AutoModelForCausalLM.from_pretrained:
            with pytest.raises(CheckpointError, match=rf"would read files of yours: {re.escape(line)}; if you mean"):
                load_it(saved)
        with pytest.raises(CheckpointError, match="would read files of yours"):  # other files are no leave
            Ensemble.from_pretrained([saved, f"files:{folder}"])
    named = Ensemble.from_pretrained([saved, f"{line}+weight=0.5"])
    assert named.model.config.files == [f"{line}+weight=0.5"]
    monkeypatch.chdir(folder.parent)
    trusted = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert trusted.config.files == [line]
    with pytest.raises(InvalidInputError, match="got files of this machine"):
        trusted.push_to_hub("me/mine")
    trusted.config.files = [f"files:{folder.name}+include=*.txt"]  # from here
    trusted.save_pretrained(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    assert Ensemble.from_pretrained(str(tmp_path / "again")).model.config.files == [line]


def test_the_index_is_no_part_of_itself(folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SAID)
    monkeypatch.setenv("SOFTMEET_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        (reader,) = Ensemble.from_pretrained(["wide/gpt2", f"files:{tmp_path}"]).model.claimants
        assert [file.name for file in reader.index.files] == ["a.txt"]
    assert reader.index.left_out == {"indexes of softmeet's": 1}


def test_requests_may_leave_files_out(alone, beside):
    asked = {"prompt": SAID[:33], "max_tokens": 8, "temperature": 0}
    name = beside.model.claimants[0].name
    with running(serving_of({"both": beside})) as url:
        ask = lambda **ours: http.post(f"{url}/v1/completions", json=asked | {"softmeet": ours}).json()  # noqa: E731
        whole, models, neither = ask(), ask(members=MEMBERS), ask(members=[name])
        assert http.get(f"{url}/v1/models").json()["data"][0]["softmeet"]["files"] == [name]
    assert whole["choices"][0]["text"] == beside.generate(SAID[:33], max_new_tokens=8, do_sample=False)
    assert models["choices"][0]["text"] == alone.generate(SAID[:33], max_new_tokens=8, do_sample=False)
    assert (whole["softmeet"]["files"], "files" in models["softmeet"]) == ([name], False)
    assert "expected a model among the members" in neither["error"]["message"]


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        (["files:{}"], InvalidInputError, "expected a model beside files"),
        ([*MEMBERS, "files:{}/nowhere"], CheckpointError, "nowhere"),
        ([*MEMBERS, "files:{}+colour=red"], InvalidInputError, "keys path, include, weight"),
        ([*MEMBERS, "files:{}+weight=2"], InvalidInputError, "from 0 to 1"),
        ([*MEMBERS, "files:{}+relevance=much"], InvalidInputError, "expected a number for relevance"),
        ([*MEMBERS, "files:"], InvalidInputError, "expected the path of files"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(named, error, said, folder, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.load_members", None)
    with pytest.raises(error, match=said):
        Ensemble.from_pretrained([one.format(folder) for one in named])


def test_what_cannot_have_files_says_so(beside, folder, tmp_path):
    text, named = ["-t", folder / "a.txt"], [word for name in (*MEMBERS, f"files:{folder}") for word in ("-m", name)]
    beside.save_pretrained(tmp_path / "saved")
    for command, said in (
        (["trace", tmp_path / "x", *named, *text], "trace the models alone"),
        (["trace", tmp_path / "x", "-m", tmp_path / "saved", *text], "trace the models alone"),
        (["evaluate", *named, "--trace", tmp_path / "x"], "name the files with a text"),
        (["fit", "--out", tmp_path / "y", *named, "--trace", tmp_path / "x"], "name the files with a text"),
        (["evaluate", *named, *text, "--folds", 2], "leave --folds out"),
        (["evaluate", "-m", tmp_path / "saved", *text, "--folds", 2], "leave --folds out"),
    ):
        done = run(*command)
        assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    with pytest.raises(InvalidInputError, match="files beside members over tokens or bytes"):
        Ensemble.from_pretrained(["mixed/gpt2", "mixed/llama", f"files:{folder}"], vocabulary="union")
    with pytest.raises(InvalidInputError, match="leave the files out"):
        beside.decode("a", "particles:n=2", max_new_tokens=2)
    with pytest.raises(InvalidInputError, match="use_cache=True beside"):
        beside.generate("a", use_cache=False, max_new_tokens=2)


def test_over_bytes_a_conversation_is_what_was_given(folder):
    both = Ensemble.from_pretrained(["mixed/gpt2", "mixed/llama", f"files:{folder}"])
    assert both.generate(SAID[:33], max_bytes=12, do_sample=False).startswith(" and Zorblax")
    take_plain(both.model)
    turns = [{"role": "user", "content": SAID}]
    (text,) = both.model.claimants
    seen = []
    text.open = lambda given=(), own=(), reuse=True: seen.append(bytes(own)) or type(text).open(text, given, own)
    both.generate(turns, max_bytes=2)
    assert SAID.strip().encode() in seen[0]
    del text.open
    reports = both.inspect(SAID[:60])
    assert all(0 <= report.claims[0] < 0.9701 for report in reports)
    # Two numbers a place are enough for losses, and are what whole distributions say there.
    ids = torch.tensor([256, *(SAID * 2).encode()])
    ours = losses_beside(torch.full((100,), 2.0), claims_of(both.model, ids, 100))
    ((*_, states),) = [both.model.hidden_states(ids[None, :-1])]
    own, log_c = states[-100:, :-1].exp(), states[-100:, -1]
    wanted = (1 - log_c.exp()) * math.exp(-2) + log_c.exp() * own.gather(-1, ids[-100:, None]).squeeze(-1)
    assert ours.neg().exp().tolist() == pytest.approx(wanted.tolist())


def test_a_server_puts_files_beside_its_models(folder, tmp_path):
    beside, file = f"files:{folder}", tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert named([str(file), beside]) == {"default": [str(file), beside]}
    assert named(["wide", beside]) == {"wide": ["wide", beside]}
    assert named([], ["big=wide/gpt2", f"big={beside}"]) == {"big": ["wide/gpt2", beside]}
    with pytest.raises(InvalidInputError, match="say -m NAME=files"):
        named(["wide", "narrow", beside])
    found = load(named(["wide", beside]), rule="logit-mean")
    assert found.find("wide").files == (found.find("wide").ensemble.model.claimants[0].name,)
