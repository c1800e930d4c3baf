"""softmeet inside vLLM itself, where that is installed; elsewhere these tests are skipped, and say so.

``pytest tests/engines/test_vllm.py`` takes three to seven minutes in an environment of vLLM's CPU build, 0.32.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from softmeet import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.positions import observe_text
from softmeet.members import zoo
from softmeet.testing import check_reader

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: the mixture inside it is not tried here")

OWN, OTHER, CONTEXT = "wide/gpt2", "wide/llama", 192
# How near the two best tokens have to be for either to be written.
TIE = 1e-3
WORDS = ["the", "king", "and", "his", "people", "came", "unto", "land", "of", "Egypt", "to", "make", "a", "covenant"]
RULES = ["logit-mean", "prob-mean", "power-mean:order=0.5"]


@pytest.fixture(scope="module", autouse=True)
def mixed():
    before = dict(os.environ)
    os.environ.update(SOFTMEET_MEMBERS=OTHER, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    yield
    os.environ.clear()
    os.environ.update(before)


def loaded(**more):
    given = {"dtype": "float32", "max_model_len": CONTEXT, "block_size": 32, "max_num_seqs": 32, "enforce_eager": True}
    given |= {"logprobs_mode": "processed_logprobs", "max_logprobs": -1, "disable_log_stats": False}
    return vllm.LLM(str(zoo.locate(OWN)), **given | more)


@pytest.fixture(scope="module")
def engine(mixed):
    found = loaded()
    yield found
    found.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.from_pretrained([OWN, OTHER], "logit-mean")


def asked(draw, longest=60):
    """A prompt, what is asked of vLLM for it, and softmeet's settings for the same."""
    prompt = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, longest)))
    weight, rule = draw.choice([0.2, 0.5, 0.9]), draw.choice(RULES)
    own = {"softmeet_weights": [weight, 1 - weight], "softmeet_rule": rule}
    return prompt, own, {"weights": [weight, 1 - weight], "rule": rule}


def log_probs(ensemble, ids, settings):
    with torch.inference_mode():
        chosen = ensemble.model.settings.changed(**settings)
        return ensemble.model(torch.tensor([ids]), settings=chosen).logits[0].double().log_softmax(-1)


def require_greedy(ensemble, prompt, answer, settings):
    """Check that an answer takes the mixture's likeliest token everywhere, or one as likely but for rounding."""
    scores = log_probs(ensemble, [*prompt, *answer], settings)[len(prompt) - 1 : -1].exp()
    taken = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert bool((scores.max(1).values - taken < TIE).all()), (prompt, answer)
    return int((scores.argmax(1) == torch.tensor(answer)).sum())


@pytest.mark.parametrize("many", [1, 6, 32])
def test_greedy_texts_are_softmeets_own(engine, ensemble, many):
    draw = random.Random(many)
    some = [asked(draw) for _ in range(many)]
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=draw.randrange(4, 40), ignore_eos=True, extra_args=own)
        for _, own, _ in some
    ]
    found = engine.generate([prompt for prompt, _, _ in some], params)
    same = total = 0
    for one, (_, _, settings) in zip(found, some, strict=True):
        answer = list(one.outputs[0].token_ids)
        same += require_greedy(ensemble, one.prompt_token_ids, answer, settings)
        total += len(answer)
    assert same > 0.99 * total


def test_texts_that_arrive_one_by_one(engine, ensemble):
    draw, core, ends, begun = random.Random(7), engine.llm_engine, {}, {}
    waiting = [asked(draw) for _ in range(24)]
    while waiting or core.has_unfinished_requests():
        if waiting and draw.random() < 0.5:
            prompt, own, settings = waiting.pop()
            params = vllm.SamplingParams(temperature=0, max_tokens=draw.randrange(4, 40), extra_args=own)
            name = str(len(begun))
            begun[name] = settings
            core.add_request(name, prompt, params)
        ends |= {one.request_id: one for one in core.step() if one.finished}
    assert len(ends) == 24
    for one in ends.values():
        settings = next(own for name, own in begun.items() if one.request_id.split("-")[0] == name)
        require_greedy(ensemble, one.prompt_token_ids, list(one.outputs[0].token_ids), settings)


def test_probabilities_are_the_mixtures_everywhere(engine, ensemble):
    draw, worst = random.Random(3), 0.0
    some = [asked(draw, 20) for _ in range(6)]
    params = [
        vllm.SamplingParams(temperature=1, max_tokens=24, logprobs=-1, seed=5, extra_args=own) for _, own, _ in some
    ]
    for one, (_, _, settings) in zip(engine.generate([p for p, _, _ in some], params), some, strict=True):
        answer = one.outputs[0]
        scores = log_probs(ensemble, [*one.prompt_token_ids, *answer.token_ids], settings)
        for place, told in enumerate(answer.logprobs, len(one.prompt_token_ids) - 1):
            own = torch.full_like(scores[0], -torch.inf)
            own[list(told)] = torch.tensor([entry.logprob for entry in told.values()], dtype=own.dtype)
            worst = max(worst, 0.5 * (own.exp() - scores[place].exp()).abs().sum().item())
    assert 0 < worst <= 1e-3, worst


def test_seeds_choices_and_prefixes(engine, ensemble):
    prompt = " ".join(WORDS * 3)
    params = vllm.SamplingParams(temperature=1, n=3, seed=11, max_tokens=16)
    (alone,) = engine.generate([prompt], params)
    others = [vllm.SamplingParams(temperature=1, max_tokens=30, extra_args={"softmeet_weights": [0, 1]})] * 7
    among = engine.generate([prompt, *[prompt + " and"] * 7], [params, *others])[0]
    assert [one.token_ids for one in among.outputs] == [one.token_ids for one in alone.outputs]
    assert len({tuple(one.token_ids) for one in alone.outputs}) > 1


def test_a_thousand_requests(engine, ensemble):
    draw = random.Random(1)
    kinds = [asked(draw, 12) for _ in range(40)]
    some = [draw.choice(kinds) for _ in range(1000)]
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=draw.randrange(1, 12), extra_args=own) for _, own, _ in some
    ]
    checked = set()
    for one, (_, _, settings) in zip(engine.generate([p for p, _, _ in some], params), some, strict=True):
        answer = tuple(one.outputs[0].token_ids)
        key = (*one.prompt_token_ids, *answer, str(settings))
        if key not in checked:
            require_greedy(ensemble, one.prompt_token_ids, list(answer), settings)
            checked.add(key)


def test_texts_that_are_preempted_go_on(ensemble):
    engine, draw = loaded(num_gpu_blocks_override=20), random.Random(9)
    try:
        some = [asked(draw, 10) for _ in range(16)]
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=70, ignore_eos=True, extra_args=own) for _, own, _ in some
        ]
        found = engine.generate([prompt for prompt, _, _ in some], params)
        counts = {one.name: one.value for one in engine.get_metrics() if hasattr(one, "value")}
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert counts["vllm:num_preemptions"] > 0, counts
    for one, (_, _, settings) in zip(found, some, strict=True):
        require_greedy(ensemble, one.prompt_token_ids, list(one.outputs[0].token_ids), settings)


@pytest.fixture(scope="module")
def stepped(mixed):
    """The same ensemble, of which vLLM runs the first member."""
    member = f"{zoo.locate(OWN)}+engine=vllm+dtype=float32+context={CONTEXT}"
    found = Ensemble.from_pretrained([member, OTHER], "logit-mean")
    yield found
    found.model.members[0].reader.shut_down()


@pytest.mark.parametrize("many", [1, 6, 32])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"seed": 3}], ids=["greedy", "seeded"])
def test_a_member_that_vllm_runs_writes_the_same_texts(stepped, ensemble, many, how):
    draw = random.Random(many)
    prompts = [asked(draw)[0] for _ in range(many)]
    assert stepped.generate(prompts, max_new_tokens=24, **how) == ensemble.generate(prompts, max_new_tokens=24, **how)


def test_a_member_that_vllm_runs_is_evaluated(stepped, ensemble, tmp_path):
    text = " ".join(random.Random(5).choice(WORDS) for _ in range(150))
    positions = [observe_text(one, [Document("text", text)]) for one in (stepped, ensemble)]
    for own, other in zip(positions[0].hidden[0], stepped_log_probs(ensemble, positions[1]), strict=True):
        torch.testing.assert_close(own.double(), other.double(), atol=1e-3, rtol=0)


def stepped_log_probs(ensemble, positions):
    return ensemble.model.heads[0].log_probs(positions.hidden[0])


def test_a_member_that_vllm_runs_obeys_a_readers_laws(stepped):
    check_reader(stepped.model.members[0].reader)


def command(*more, **variables):
    """A server's process, its address, and where it writes what it says."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(zoo.locate(OWN)), "--port", port]
    line += ["--dtype", "float32", "--max-model-len", CONTEXT, "--block-size", 32, "--enforce-eager", *more]
    running = subprocess.Popen(
        [*map(str, line)], env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return running, f"http://127.0.0.1:{port}"


def answered(url, **body):
    sent = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=60) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def test_a_server_mixes_by_request(ensemble, tmp_path):
    running, url = command("--logprobs-mode", "processed_logprobs", "--max-num-seqs", 8)
    try:
        for _ in range(150):
            assert running.poll() is None, running.stdout.read()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        prompt, model = "And the king said unto", str(zoo.locate(OWN))
        ask = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12}
        texts = {}
        for weights in ([1, 0], [0.5, 0.5], [0, 1]):
            status, found = answered(f"{url}/v1/completions", **ask, vllm_xargs={"softmeet_weights": weights})
            assert status == 200, found
            texts[tuple(weights)] = found["choices"][0]["text"]
            own = ensemble.generate(prompt, weights=weights, do_sample=False, max_new_tokens=12)
            assert found["choices"][0]["text"] == own
        assert len(set(texts.values())) == 3
        status, found = answered(f"{url}/v1/completions", **ask, vllm_xargs={"softmeet_weights": [1, 2, 3]})
        assert (status, "expected one weight per member, 2 in all, got 3" in str(found)) == (400, True), found
        assert answered(f"{url}/v1/completions", **ask)[0] == 200
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize(
    ("more", "variables", "said"),
    [
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], {}, "drops the mixture"),
        ([], {"SOFTMEET_MEMBERS": "mixed/llama"}, "expected members with one vocabulary"),
        ([], {"SOFTMEET_RULE": "meet"}, "the rule meet reads output layers"),
    ],
)
def test_a_server_that_cannot_mix_does_not_start(more, variables, said):
    running, _ = command(*more, **variables)
    told, _ = running.communicate(timeout=120)
    assert running.returncode != 0
    assert said in told
    assert "Loading safetensors" not in told, "its model was loaded before"
