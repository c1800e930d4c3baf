"""The API as the real openai client meets it."""

import math
import platform
import time

import httpx
import openai
import pytest
import tiny
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble, wait_until

from softmeet import Ensemble
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM


@pytest.fixture(scope="module")
def ensembles():
    plain = tiny_ensemble("gpt2", "llama")
    chatty = tiny_ensemble(
        "llama", "neox", rule="logit-mean", template=TEMPLATE, models=[plain.model.members[1], tiny.build("neox", 2)]
    )
    return {"plain": plain, "chatty": chatty}


@pytest.fixture(scope="module")
def serving(ensembles):
    return serving_of(ensembles, max_trust=math.inf)


@pytest.fixture(scope="module")
def url(serving):
    with running(serving) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, prompt="hello", **options):
    return client.completions.create(**{"model": "plain", "prompt": prompt, "seed": 4, "max_tokens": 12} | options)


def test_models_are_listed_with_their_members(client):
    listed = client.models.list().data
    assert [m.id for m in listed] == ["plain", "chatty"]
    assert listed[0].softmeet["members"] == ["tiny/gpt2", "tiny/llama"]
    assert client.models.retrieve("chatty").softmeet["rule"] == "logit-mean"
    with pytest.raises(openai.NotFoundError, match="expected one of plain, chatty") as caught:
        client.models.retrieve("absent")
    assert caught.value.body == {
        "message": "there is no model 'absent': expected one of plain, chatty",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_a_seeded_completion_is_the_same_streamed_or_not(client):
    options = {"temperature": 0.8, "top_p": 0.9}
    whole = ask(client, **options)
    assert whole.object == "text_completion"
    assert whole.usage.prompt_tokens == 5
    assert whole.usage.total_tokens == 5 + whole.usage.completion_tokens
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].softmeet["seed"] == 4


def test_without_a_seed_answers_differ_and_say_their_seed(client):
    first, second = ask(client, seed=openai.omit), ask(client, seed=openai.omit)
    assert first.choices[0].text != second.choices[0].text
    assert ask(client, seed=first.softmeet["seed"]).choices[0].text == first.choices[0].text


def test_prompts_come_in_four_forms_and_choices_in_order(client, ensembles):
    ids = ensembles["plain"].tokenizer("world")["input_ids"]
    expected = ensembles["plain"].generate(["hello", "world"], seed=4, max_new_tokens=12, do_sample=True, top_k=0)
    for prompt in (["hello", "world"], [[*ensembles["plain"].tokenizer("hello")["input_ids"]], ids]):
        assert [c.text for c in ask(client, prompt).choices] == expected
    assert ask(client, ids).choices[0].text == ask(client, "world").choices[0].text
    several = ask(client, n=3).choices
    assert [c.index for c in several] == [0, 1, 2]
    assert several[0].text == expected[0]
    assert len({c.text for c in several}) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(client, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [c.text for c in several]


def test_log_probs_and_echo_are_the_ensembles_own(client, ensembles):
    found = ask(client, "hello", max_tokens=1, logprobs=2, echo=True, temperature=0).choices[0]
    reports = ensembles["plain"].inspect("hello", top=2)
    lp = found.logprobs
    assert lp.tokens[:5] == list("hello")
    assert lp.text_offset == list(range(6))
    assert found.text.startswith("hello")
    assert lp.token_logprobs[0] is None
    assert lp.token_logprobs[1:5] == pytest.approx([r.log_prob for r in reports], abs=1e-4)
    for top, report in zip(lp.top_logprobs[1:5], reports, strict=True):
        assert list(top.values())[:2] == pytest.approx([x for _, x in report.top], abs=1e-4)
    # Greedy: its own log-probability is the largest one, to the last bit, which lm-eval relies on.
    assert lp.token_logprobs[5] == max(lp.top_logprobs[5].values())
    scored = ask(client, "hello", max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs == lp.token_logprobs[:5]
    assert scored.usage.completion_tokens == 0


def test_biases_penalties_and_greedy(client, ensembles):
    assert ask(client, temperature=0, logit_bias={"5": 100}).choices[0].text == "e" * 12
    greedy = ensembles["plain"].generate("hello", max_new_tokens=12, do_sample=False)
    assert ask(client, temperature=0).choices[0].text == greedy
    text = ask(client, presence_penalty=2, frequency_penalty=2, temperature=0, logit_bias={"0": -100}).choices[0].text
    assert len(set(text)) > len(set(greedy))
    varied = ask(client, extra_body={"softmeet": {"top_k": 1}}, seed=9).choices[0].text
    assert varied == greedy


def test_chat_uses_the_tokenizers_template(client, ensembles):
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    messages = [{"role": "user", "content": "hello"}, said]
    options = {"model": "chatty", "messages": messages, "seed": 4, "max_completion_tokens": 9}
    how = {"seed": 4, "max_new_tokens": 9, "temperature": 0.7, "do_sample": True, "top_k": 0}
    expected = ensembles["chatty"].generate("u:hello!a:yes!a:", **how)
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    nothing = client.chat.completions.create(model="chatty", messages=messages, max_tokens=0)
    assert (nothing.choices[0].message.content, nothing.choices[0].finish_reason) == ("", "length")
    entries = whole.choices[0].logprobs.content
    assert bytes(entries[0].bytes).decode() == entries[0].token
    assert len(entries[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks) == expected


def test_a_request_chooses_rule_trust_weights_and_members(client, ensembles):
    plain = ensembles["plain"]

    def expected(models, **settings):
        config = EnsembleConfig(members=[str(k) for k in range(len(models))], **settings)
        model = EnsembleForCausalLM(config, models).eval()
        model.adopt(plain.tokenizer)
        options = {"seed": 4, "max_new_tokens": 12, "do_sample": True, "top_k": 0}
        return Ensemble(model, plain.tokenizer).generate("hello", **options)

    both, alone = list(plain.model.members), [plain.model.members[1]]
    for given, text in (
        ({"rule": "prob-mean", "weights": [0.1, 0.9]}, expected(both, rule="prob-mean", weights=[0.1, 0.9])),
        ({"rule": "power-mean:order=0.2"}, expected(both, rule="power-mean:order=0.2")),
        ({"trust": ["inf", 0.5]}, expected(both, trust=[math.inf, 0.5])),
        ({"members": ["tiny/llama"]}, expected(alone, trust=1.0)),
    ):
        answer = ask(client, extra_body={"softmeet": given})
        assert answer.choices[0].text == text
        assert given.items() <= answer.softmeet.items()


def test_reports_are_those_of_inspect(client, ensembles):
    answer = ask(client, "hello", max_tokens=3, echo=True, extra_body={"softmeet": {"report": 4}}, temperature=0)
    found = answer.choices[0].softmeet["tokens"]
    expected = [r.spelled(ensembles["plain"].tokenizer) for r in ensembles["plain"].inspect(answer.choices[0].text, 4)]
    assert [t["text"] for t in found] == [t["text"] for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["disagreement"] == pytest.approx(b["disagreement"], abs=1e-4)
        assert a["member_log_probs"] == pytest.approx(b["member_log_probs"], abs=1e-4)
        assert [x for x, _ in a["top"]] == [x for x, _ in b["top"]]
        assert (a["status"], a["gap_is_certified"]) == (b["status"], b["gap_is_certified"])
        assert a["num_passes"] > 0
    told = ask(client, "hello", max_tokens=3, stream=True, extra_body={"softmeet": {"report": 0}})
    chunks = [c.choices[0] for c in told]
    assert [len(c.softmeet["tokens"]) for c in chunks[:3]] == [1, 1, 1]
    assert chunks[0].softmeet["tokens"][0]["top"] == []


def test_the_context_ends_an_answer_and_bounds_a_prompt(client):
    answer = ask(client, "a" * 60, max_tokens=50, logit_bias={"0": -100})
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].finish_reason == "length"
    for prompt, message in (
        ("a" * 64, "context of 64 tokens, got 64"),
        ("", "empty"),
        ([64], "to 63"),
        ([-1], "from 0"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, prompt)


def test_health_readiness_and_metrics(client, url):
    ask(client)
    assert http.get(f"{url}/health").json() == {"status": "ok"}
    assert http.get(f"{url}/ready").status_code == 200
    text = http.get(f"{url}/metrics").text
    assert 'softmeet_requests_total{path="/v1/completions",status="200"}' in text
    assert ("\nsoftmeet_allocated_bytes " in text) == (platform.libc_ver()[0] == "glibc")


def test_a_client_that_leaves_frees_its_place(client, url, serving):
    gauge = lambda: serving.metrics.registry.get_sample_value("softmeet_rows")  # noqa: E731
    member = serving.ensembles.find("plain").ensemble.model.members[0]
    slow = member.base_model.register_forward_hook(lambda *_: time.sleep(0.1))
    try:
        stream = ask(client, "a", max_tokens=60, stream=True, logit_bias={"0": -100})
        next(iter(stream))
        assert gauge() == 1
        stream.close()
        before = serving.metrics.registry.get_sample_value("softmeet_tokens_total")
        wait_until(lambda: not serving.batcher._running)
        asked = {"prompt": "a", "max_tokens": 60, "logit_bias": {"0": -100}}
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{url}/v1/completions", json=asked, timeout=httpx.Timeout(300, read=0.3))
        wait_until(lambda: not serving.batcher._running)
    finally:
        slow.remove()
    assert serving.metrics.registry.get_sample_value("softmeet_tokens_total") < before + 60
    ask(client)
    assert gauge() == 0  # as of now, not of the last step


def test_a_member_that_returns_nan_is_named_in_the_error(client, ensembles):
    embedding = ensembles["plain"].model.members[1].base_model.embed_tokens.weight
    kept = embedding.data[50].clone()
    embedding.data[50] = math.nan
    bad = {"prompt": [5, 50, 7]}
    try:
        with pytest.raises(openai.BadRequestError, match="from tiny/llama: leave it out"):
            ask(client, **bad)
        with pytest.raises(openai.APIError, match="from tiny/llama: leave it out"):
            list(ask(client, **bad, stream=True))
        assert ask(client, **bad, extra_body={"softmeet": {"members": ["tiny/gpt2"]}}).choices[0].text
    finally:
        embedding.data[50] = kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gets_the_ensembles_log_likelihoods(narrow):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from softmeet.members import zoo

    pairs = [("And the king said", " unto the people"), ("In the beginning", " God created the heaven"), ("x", " y")]
    with running(serving_of({"narrow": narrow})) as url:
        lm = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="narrow", tokenizer=zoo.locate("narrow/opt-a"), max_length=256,
            num_concurrent=3,
        )  # fmt: skip
        found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
        asked = ("And the king said", {"until": ["\n"], "max_gen_toks": 8})
        written = lm.generate_until([Instance("generate_until", {}, asked, 0)], disable_tqdm=True)
    for (context, text), (log_likelihood, greedy) in zip(pairs, found, strict=True):
        length = len(narrow.tokenizer(context)["input_ids"])
        reports = narrow.inspect(context + text)[length - 1 :]
        assert log_likelihood == pytest.approx(sum(r.log_prob for r in reports), abs=1e-3)
        assert greedy == all(r.top[0][0] == r.token for r in reports)
    assert written == [narrow.generate("And the king said", max_new_tokens=8, do_sample=False)]


@pytest.mark.parametrize(("allowed", "warm"), [(("trust",), False), (("rule", "trust"), True)])
def test_what_is_done_once_is_done_before_the_server_is_ready(allowed, warm):
    """Heads are whitened for the ensemble's own rule, and for meet if requests may ask for it."""
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean")
    with running(serving_of({"plain": ensemble}, allowed=allowed)):
        assert [bool(head._whitening) for head in ensemble.model.heads] == [warm] * 2
