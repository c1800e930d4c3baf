"""Retrieved passages: REPLUG's formula, what a passage costs, requests that bring them, and what is refused."""

import json
import math

import pytest
import tiny
import torch
from fastapi.testclient import TestClient
from serving import http, running, serving_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from softmeet import Ensemble, Passage
from softmeet.cli.main import app
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import parse_choices
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.members.passages import passage_weights, read_passages
from softmeet.server.app import create_app

FOUND = [Passage("a dog is lazy.", 1.5), Passage("it rains in spain.", 0.25), Passage("foxes jump.", -1.0)]
QUESTIONS = ["the quick fox", "and then it rains", "a lazy dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a set of questions with the passages that were retrieved for each."""
    folder = tmp_path_factory.mktemp("retrieval")
    tiny.save(folder / "base", "llama", seed=0)
    tiny.save(folder / "other", "gpt2", seed=1)
    lines = [json.dumps({"text": one.text, "score": one.score, "id": k}) for k, one in enumerate(FOUND)]
    (folder / "found.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return Ensemble.from_pretrained(str(folder / "base"), "prob-mean", dtype="float64")


def by_hand(folder, ids_of, passages, temperature, text, name="base"):
    """REPLUG's log-probabilities, (t, v), of what follows each token of a text: log Σ_d λ_d p(y | d, text)."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
    shares = torch.tensor([one.score for one in passages], dtype=torch.float64).div(temperature).softmax(0)
    total, ids = 0, ids_of(text)
    for share, passage in zip(shares, passages, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids_of(passage.text + "\n\n"), *ids]])).logits[0, -len(ids) :]
        total = total + share * logits.softmax(-1)
    return total.log()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_perplexity_of_a_retrieval_set_is_the_formulas(folder, base, temperature):
    def ids_of(text):
        return base.tokenizer(text)["input_ids"]

    losses, theirs = [], []
    for k, question in enumerate(QUESTIONS):
        passages = FOUND[k:] + FOUND[:k]
        behind = base.with_passages(passages, temperature=temperature)
        positions = observe_text(behind, [Document("d", question)])
        found = evaluate(behind, positions, parse_choices(["prob-mean"], len(behind.names)))
        losses += found.choices["prob-mean"].nats.tolist()
        log_probs, ids = by_hand(folder, ids_of, passages, temperature, question), ids_of(question)
        theirs += [-log_probs[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
        # What is generated follows the same distribution.
        solution = behind.next_token(question).solution
        torch.testing.assert_close(solution.log_probs[0].double(), log_probs[-1], atol=1e-6, rtol=0)
    assert math.isclose(math.exp(sum(losses) / len(losses)), math.exp(sum(theirs) / len(theirs)), rel_tol=1e-6)


def test_of_several_members_each_reads_every_passage(folder):
    lines = [str(folder / name) for name in ("base", "other")]
    pair = Ensemble.from_pretrained(lines, "prob-mean", weights=[0.75, 0.25], dtype="float64")
    behind = pair.with_passages(FOUND)

    def ids_of(text):
        return pair.tokenizer(text)["input_ids"]

    parts = [by_hand(folder, ids_of, FOUND, 1.0, QUESTIONS[0], name)[-1].exp() for name in ("base", "other")]
    wanted = (0.75 * parts[0] + 0.25 * parts[1]).log()
    found = behind.next_token(QUESTIONS[0]).solution.log_probs[0].double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert [name.rpartition("+passage")[2] for name in map(str, behind.names)] == ["1", "2", "3"] * 2
    assert {id(model) for model in behind.model.members} == {id(model) for model in pair.model.members}


def test_over_bytes():
    ensemble = Ensemble.from_pretrained("mixed/llama", "prob-mean", vocabulary="bytes", dtype="float64")
    behind = ensemble.with_passages(FOUND)
    alone = [ensemble.with_passages([one]) for one in FOUND]
    weights = torch.tensor(passage_weights(FOUND), dtype=torch.float64)
    each = torch.stack([one.next_token("the king").solution.log_probs[0].double() for one in alone])
    wanted = (each + weights.log()[:, None]).logsumexp(0)
    torch.testing.assert_close(behind.next_token("the king").solution.log_probs[0].double(), wanted, atol=1e-9, rtol=0)


def test_the_command(folder, base):
    command = ["generate", QUESTIONS[0], "-m", str(folder / "base"), "--seed", "2", "--max-new-tokens", "6", "--json"]
    command += ["--dtype", "float64", "--passages", str(folder / "found.jsonl"), "--passage-temperature", "0.5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["rule"] == "prob-mean"
    behind = base.with_passages(FOUND, temperature=0.5)
    assert found["completions"][0]["text"] == behind.generate(QUESTIONS[0], seed=2, max_new_tokens=6)
    assert [one["weight"] for one in found["members"]] == pytest.approx(passage_weights(FOUND, 0.5), abs=1e-6)
    other = CliRunner().invoke(app, [*command, "--rule", "logit-mean"])
    assert json.loads(other.stdout[other.stdout.index("{") :])["rule"] == "logit-mean"


def test_requests_bring_passages_over_bytes():
    ensemble = Ensemble.from_pretrained("mixed", "prob-mean")
    given = [{"text": "The king", "score": 1}, {"text": "A dog", "score": 0.5}]
    body = {"prompt": "And the", "max_tokens": 3, "seed": 1, "softmeet": {"passages": given}}
    behind = ensemble.with_passages([Passage(one["text"], one["score"]) for one in given])
    with running(serving_of({"mixed": ensemble})) as url:
        reported = {"softmeet": {"passages": given, "report": 1}}
        for more in ({}, {"n": 2}, {"echo": True}, {"prompt_logprobs": 1}, reported):
            answer = http.post(f"{url}/v1/completions", json=body | more)
            assert answer.status_code == 200, answer.text
            text = answer.json()["choices"][0]["text"].removeprefix("And the" if "echo" in more else "")
            assert text == behind.generate("And the", seed=1, max_new_tokens=3)
        streamed = http.post(f"{url}/v1/completions", json=body | {"stream": True}).text
        assert "error" not in streamed
        assert streamed.endswith("data: [DONE]\n\n")


def test_requests_bring_passages(folder, base):
    body = {"prompt": QUESTIONS[0], "max_tokens": 6, "seed": 2, "temperature": 1}
    ours = {"passages": [{"text": one.text, "score": one.score} for one in FOUND], "passage_temperature": 0.5}
    with TestClient(create_app(serving_of({"it": base})), base_url="http://localhost") as client:
        answer = client.post("/v1/completions", json=body | {"softmeet": ours | {"report": 1}}).json()
        behind = base.with_passages(FOUND, temperature=0.5)
        assert answer["choices"][0]["text"] == behind.generate(QUESTIONS[0], seed=2, max_new_tokens=6)
        assert len(answer["softmeet"]["members"]) == 3
        assert answer["softmeet"]["rule"] == "prob-mean"
        named = client.post("/v1/completions", json=body | {"softmeet": ours | {"rule": "logit-mean"}}).json()
        assert named["softmeet"]["rule"] == "logit-mean"
        for wrong, param in (
            ({"passages": [{"text": "x"}]}, "score"),
            ({"passages": []}, "passages"),
            ({"passage_temperature": 2.0}, "softmeet.passage_temperature"),
            ({"passages": [{"text": "{prompt}", "score": 1}]}, "softmeet.passages"),
            ({"passages": [{"text": "x" * 70, "score": 1}]}, "softmeet.passages"),
            ({"passages": [{"text": "x", "score": 1}] * 20}, "softmeet.passages"),
        ):
            refused = client.post("/v1/completions", json=body | {"softmeet": wrong})
            assert refused.status_code == 400, refused.json()
            assert param in refused.json()["error"]["param"] + refused.json()["error"]["message"]
    with TestClient(create_app(serving_of({"it": base}, allowed=("rule",))), base_url="http://localhost") as client:
        refused = client.post("/v1/completions", json=body | {"softmeet": ours})
        assert "does not let requests change passages" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "expected passages in .*, got an empty file"),
        ('{"text": "a"}', 'expected {"text": …, "score": …} in line 1'),
        ('{"text": "a", "score": 1}\n["a", 1]', "in line 2"),
        ("no json", "in line 1"),
        ('{"text": "a", "score": "high"}', "in line 1 of .*: expected a passage with a score, a finite number"),
        ('{"text": "a", "score": NaN}', "a finite number"),
        ('{"text": " ", "score": 1}', "a passage with a text"),
        ('{"text": "a {prompt}", "score": 1}', "without {prompt} in it"),
        (None, "cannot read the passages in .*: No such file"),
    ],
)
def test_bad_files_are_refused_before_anything_is_loaded(lines, said, tmp_path):
    path = tmp_path / "found.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(InvalidInputError, match=said) as caught:
        read_passages(path)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(app, ["generate", "x", "-m", "/absent/model", "--passages", str(path)])
    assert isinstance(done.exception, InvalidInputError | SystemExit)
    assert "absent" not in done.output + str(done.exception)


def test_bad_options(base, tmp_path):
    with pytest.raises(InvalidInputError, match="at least one passage"):
        base.with_passages([])
    with pytest.raises(InvalidInputError, match="temperature of passages above 0, got 0"):
        base.with_passages(FOUND, temperature=0)
    with pytest.raises(InvalidInputError, match="leave room in the shortest member's context"):
        base.with_passages([Passage("x" * 70, 1.0)])
    (tmp_path / "found.jsonl").write_text('{"text": "a", "score": 1}')
    for wrong, said in (
        (["--passages", str(tmp_path / "found.jsonl"), "--prompt-weights"], "leave --prompt-weights out"),
        (["--passage-temperature", "2"], "name a file"),
    ):
        done = CliRunner().invoke(app, ["generate", "x", "-m", "/absent/model", *wrong])
        assert said in done.output + str(done.exception)
