"""Reports: what they say is what the model did, with beams too; ``softmeet inspect`` shows it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import tiny
import torch
from commands import run

from softmeet.hf import EnsembleConfig, EnsembleForCausalLM, TokenReports

pytestmark = pytest.mark.checked

MEMBERS = ("gpt2", "llama")


@pytest.fixture
def model():
    models = [tiny.build(name, seed).double() for seed, name in enumerate(MEMBERS)]
    return EnsembleForCausalLM(EnsembleConfig(members=list(MEMBERS), trust=1.0, tol=1e-9), models).eval()


PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@torch.inference_mode()
def test_greedy_reports_are_what_the_model_computed(model):
    reports = TokenReports(top=4)
    out = model.generate(
        PROMPTS, max_new_tokens=5, do_sample=False, eos_token_id=None, recorder=reports,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = out.sequences[:, 3:].tolist()
    found = reports.of(new, rows=2)
    for s in range(2):
        for t, report in enumerate(found[s]):
            logits = out.logits[t][s]
            assert report.token == new[s][t] == logits.argmax().item()
            assert report.log_prob == pytest.approx(logits.max().item(), abs=1e-5)
            assert report.top[0] == pytest.approx((report.token, report.log_prob))
            prefix = out.sequences[s : s + 1, : 3 + t]
            for own, member in zip(report.member_log_probs, model.members, strict=True):
                expected = member(input_ids=prefix).logits[0, -1].log_softmax(-1)[report.token]
                assert own == pytest.approx(expected.item(), abs=1e-5)
            assert report.status == "OPTIMAL"
            assert report.gap_is_certified
            assert json.dumps(asdict(report))
            changes = [abs(math.exp(a) - math.exp(b)) for _, b, a in report.moved]
            assert changes == sorted(changes, reverse=True)
            assert max(changes) > 0


@torch.inference_mode()
def test_beam_reports_add_up_to_the_beams_scores(model):
    reports = TokenReports()
    out = model.generate(
        PROMPTS, max_new_tokens=6, do_sample=False, num_beams=3, num_return_sequences=2, eos_token_id=None,
        length_penalty=0.0, recorder=reports, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = reports.of(out.sequences[:, 3:].tolist(), rows=6, beam_indices=out.beam_indices)
    assert len(found) == 4
    for score, rows in zip(out.sequences_scores.tolist(), found, strict=True):
        assert sum(report.log_prob for report in rows) == pytest.approx(score, abs=1e-4)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [x for name in MEMBERS for x in ("-m", tiny.save(folder / name, name))]


def test_inspect_in_json_and_on_the_terminal(members):
    done = run("inspect", "hello", *members, "--json", "--top", 3)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["first"] + "".join(token["text"] for token in facts["tokens"]) == "hello"
    assert facts["nats"] == pytest.approx(-sum(token["log_prob"] for token in facts["tokens"]) / 4)
    assert all(len(token["top"]) == len(token["moved"]) == 3 for token in facts["tokens"])
    shown = run("inspect", "hello", *members).stdout
    assert "meet, trust 0.3: " in shown
    assert "nats a token" in shown


def test_inspect_as_one_page(members, tmp_path):
    done = run("inspect", "a<q>&c", *members, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    record = json.loads(page.partition('id="record">')[2].partition("</script>")[0])
    (turn,) = record["turns"]
    assert turn["text"] + "".join(token["text"] for token in turn["tokens"]) == "a<q>&c"
    assert "<q>" not in page
    assert not [word for word in ("http:", "https:", "src=", "@import") if word in page]
    assert "default-src 'none'" in page
    facts = json.loads(run("inspect", "--text", "a<q>&c", *members[1::2], "--json").stdout)
    assert facts["bytes"] == 5
    each = zip(*(token["member_log_probs"] for token in facts["tokens"]), strict=True)
    for bits, logs, shown in zip(facts["member_bits"], each, record["figures"][1:], strict=True):
        assert bits == pytest.approx(-sum(logs) / math.log(2))
        assert shown[1:] == [pytest.approx(bits), pytest.approx(bits / 5)]


@pytest.mark.parametrize("flag", [[], ["--text"], ["-t"]])
def test_inspect_takes_its_text_first_or_by_a_flag_and_then_models(flag, members, tmp_path):
    names = members[1::2]
    (tmp_path / "a.txt").write_text("hello")
    given = tmp_path / "a.txt" if flag == ["-t"] else "hello"
    own, other = (json.loads(run("inspect", *words, "--json").stdout) for words in (
        ["hello", *members], [*flag, given, *names],
    ))  # fmt: skip
    assert own == other
    done = run("inspect")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a text, as in softmeet inspect" in done.stderr


def test_inspect_needs_two_tokens(members):
    done = run("inspect", "h", *members)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a text of at least two tokens")


@torch.inference_mode()
def test_reports_of_a_batch_in_which_one_sequence_ends_first(model):
    def first_ends(ids, scores, **more):
        return torch.tensor([ids.shape[1] >= 5, False][-len(ids) :])

    shared = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together, alone = TokenReports(), TokenReports()
    new = model.generate(PROMPTS, recorder=together, stopping_criteria=[first_ends], **shared)[:, 3:].tolist()
    model.generate(PROMPTS[1:], recorder=alone, **shared)
    first, second = together.of([new[0][:2], new[1]], rows=2)
    (expected,) = alone.of([new[1]], rows=1)
    assert len(first) == 2
    assert [one.log_prob for one in second] == pytest.approx([one.log_prob for one in expected])
