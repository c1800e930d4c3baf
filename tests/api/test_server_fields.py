"""The fields that vLLM adds to OpenAI's: what they do, and what is said of those that do not fit together."""

import pytest
from serving import TEMPLATE, chunks, http, running, serving_of, tiny_ensemble

END, NEVER, ALWAYS = 0, {"0": -100}, {"0": 100}


@pytest.fixture(scope="module")
def ensemble():
    return tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)


@pytest.fixture(scope="module")
def url(ensemble):
    with running(serving_of({"duo": ensemble}, strict=True)) as found:
        yield found


def sent(url, path="completions", **fields):
    default = {"prompt": "hello"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return http.post(f"{url}/v1/{path}", json=default | {"max_tokens": 12, "seed": 4} | fields)


def asked(url, path="completions", **fields):
    """The first choice; of a stream all of its chunks, joined."""
    answer = sent(url, path, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(url, **fields):
    body = {"prompt": "hello", "max_tokens": 12, "seed": 4} | fields
    found = [chunk["choices"][0] for chunk in chunks(f"{url}/v1/completions", body)]
    return found[-1] | {"text": "".join(one["text"] for one in found)}


def ids(ensemble, text):
    return ensemble.tokenizer(text)["input_ids"]


def test_more_ways_to_draw_stand_beside_openais_and_draw_as_transformers_does(url, ensemble):
    for fields in ({"top_k": 3}, {"min_p": 0.4}, {"repetition_penalty": 1.7, "top_k": 5}):
        expected = ensemble.generate("hello", seed=4, max_new_tokens=12, do_sample=True, **{"top_k": 0} | fields)
        assert asked(url, **fields)["text"] == expected
        # Where they stood before.
        assert asked(url, softmeet=fields)["text"] == expected
    assert asked(url, softmeet={"top_k": 1}, top_k=3)["text"] == asked(url, top_k=3)["text"]
    assert asked(url, top_k=-1)["text"] == asked(url, top_k=0)["text"] == asked(url)["text"]
    chat = asked(url, "chat/completions", top_k=1)["message"]["content"]
    assert chat == asked(url, "chat/completions", temperature=0)["message"]["content"]


def test_no_end_comes_before_min_tokens(url, ensemble):
    greedy = {"temperature": 0, "logit_bias": ALWAYS}
    assert asked(url, **greedy)["text"] == ""
    for least in (1, 3, 12):
        answer = sent(url, min_tokens=least, **greedy).json()
        choice = answer["choices"][0]
        assert len(choice["text"]) == least
        assert answer["usage"]["completion_tokens"] == min(least + 1, 12)
        assert choice["finish_reason"] == ("length" if least == 12 else "stop")
    # The same of stop tokens: the one that would come first does not come at all.
    first = asked(url, temperature=0)["text"][0]
    held = asked(url, temperature=0, stop_token_ids=ids(ensemble, first), min_tokens=4)["text"]
    assert len(held) >= 4
    assert first not in held


def test_a_stop_string_is_not_looked_for_within_min_tokens(url):
    whole = asked(url, top_k=2, logit_bias=NEVER, max_tokens=30)["text"]
    stop = whole[2:4]
    later = whole.find(stop, 4)
    common = {"top_k": 2, "logit_bias": NEVER, "max_tokens": 30, "stop": stop}
    assert asked(url, **common)["text"] == whole[: whole.index(stop)]
    for ask in (asked, streamed):
        # One that is complete with the fourth token, and one that is not.
        expected = whole if later < 0 else whole[:later]
        assert ask(url, min_tokens=4, **common)["text"] == expected
        assert ask(url, min_tokens=3, **common)["text"] == whole[: whole.index(stop)]


def test_an_ignored_end_is_drawn_as_any_other_token(url):
    fields = {"temperature": 0, "logit_bias": ALWAYS, "ignore_eos": True}
    answer = sent(url, **fields).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 12)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert asked(url, skip_special_tokens=False, **fields)["text"] == "<|end|>" * 12
    assert streamed(url, skip_special_tokens=False, **fields)["text"] == "<|end|>" * 12


def test_stop_tokens_end_an_answer_and_say_so(url, ensemble):
    whole = asked(url)["text"]
    at = next(k for k in range(3, 12) if whole[k] not in whole[:k])
    (token,) = ids(ensemble, whole[at])
    for ask in (asked, streamed):
        found = ask(url, stop_token_ids=[END, token])
        assert (found["text"], found["finish_reason"], found["stop_reason"]) == (whole[:at], "stop", token)
        shown = ask(url, stop_token_ids=[token], include_stop_str_in_output=True)
        assert (shown["text"], shown["stop_reason"]) == (whole[: at + 1], token)
        by_text = ask(url, stop=["~~~", whole[at]])
        assert (by_text["text"], by_text["finish_reason"], by_text["stop_reason"]) == (whole[:at], "stop", whole[at])
        both = ask(url, stop=whole[at - 1 : at + 1], include_stop_str_in_output=True)
        assert both["text"] == whole[: at + 1]
        assert ask(url)["stop_reason"] is None
    # An end-of-text token is no stop token, and is not shown unless asked for.
    ended = asked(url, temperature=0, logit_bias=ALWAYS, skip_special_tokens=False)
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("", "stop", None)
    shown = asked(url, logit_bias=ALWAYS, temperature=0, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown["text"] == "<|end|>"


def test_offsets_count_special_tokens_that_are_shown(url):
    fields = {"temperature": 0, "logit_bias": ALWAYS, "ignore_eos": True, "max_tokens": 3, "logprobs": 0}
    assert asked(url, **fields)["logprobs"]["text_offset"] == [5, 5, 5]
    assert asked(url, skip_special_tokens=False, **fields)["logprobs"]["text_offset"] == [5, 12, 19]


def test_a_prompt_is_cut_at_its_beginning(url):
    assert asked(url, truncate_prompt_tokens=2)["text"] == asked(url, prompt="lo")["text"]
    assert asked(url, truncate_prompt_tokens=99)["text"] == asked(url)["text"]
    cut = sent(url, prompt="a" * 80, truncate_prompt_tokens=-1).json()
    assert cut["usage"] == {"prompt_tokens": 52, "completion_tokens": 12, "total_tokens": 64}
    content = [{"role": "user", "content": "a" * 80}]
    cut = sent(url, "chat/completions", messages=content, truncate_prompt_tokens=-1, max_tokens=None).json()
    assert cut["usage"]["prompt_tokens"] == 63


def test_a_prompt_has_the_tokens_that_the_tokenizer_adds_unless_it_is_told_not_to(url, ensemble, monkeypatch):
    seen = []
    kept = type(ensemble.tokenizer).__call__
    monkeypatch.setattr(
        type(ensemble.tokenizer), "__call__", lambda self, *a, **k: seen.append(k) or kept(self, *a, **k)
    )
    for given, added in (({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)):
        asked(url, **given)
        assert seen.pop()["add_special_tokens"] is added


def test_the_prompts_log_probabilities_are_those_of_inspect(url, ensemble):
    choice = asked(url, prompt_logprobs=2, prompt="hello", max_tokens=1, logprobs=1)
    nothing, *found = choice["prompt_logprobs"]
    assert nothing is None
    assert len(choice["logprobs"]["tokens"]) == 1  # those of the prompt only where it is echoed
    assert len(choice["logprobs"]["top_logprobs"][0]) <= 2
    tokens = ids(ensemble, "hello")[1:]
    for token, report, entry in zip(tokens, ensemble.inspect("hello", top=64), found, strict=True):
        best, text = [token for token, _ in report.top], ensemble.tokenizer.decode([token])
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(report.log_prob, abs=1e-4)
        assert (own["decoded_token"], own["rank"]) == (text, best.index(token) + 1)
        assert sorted(x["rank"] for x in entry.values()) == sorted({1, 2, own["rank"]})
        assert [int(j) for j, x in entry.items() if x["rank"] == 1] == best[:1]
    echoed = asked(url, prompt_logprobs=0, prompt="hello", max_tokens=0, logprobs=1, echo=True)
    assert [[*entry] for entry in echoed["prompt_logprobs"][1:]] == [[str(token)] for token in tokens]
    assert len(echoed["logprobs"]["tokens"]) == 5


def test_the_prompts_log_probabilities_of_a_chat_stand_beside_its_choices(url):
    answer = sent(url, "chat/completions", prompt_logprobs=0, n=2).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in sent(url, "chat/completions").json()
    assert "prompt_logprobs" not in asked(url)


def test_the_best_choices_have_the_largest_mean_log_probability(url):
    fields = {"prompt": ["hello", "he"], "temperature": 1.5, "stop_token_ids": list(range(1, 8)), "logprobs": 0}

    def mean(choice):
        nats = choice["logprobs"]["token_logprobs"]
        return sum(nats) / len(nats)

    every = sent(url, n=5, **fields).json()["choices"]
    assert len({len(choice["text"]) for choice in every}) > 2
    answer = sent(url, n=2, best_of=5, **fields).json()
    expected = [c for k in (0, 5) for c in sorted(every[k : k + 5], key=mean, reverse=True)[:2]]
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in expected]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)
    # Without log-probabilities in the answer, too.
    bare = sent(url, n=2, best_of=5, **fields | {"logprobs": None}).json()["choices"]
    assert [c["text"] for c in bare] == [c["text"] for c in expected]
    assert sent(url, n=2, best_of=2).json()["choices"] == sent(url, n=2).json()["choices"]


@pytest.mark.parametrize("said", ["ab", "ab "])
def test_the_assistants_last_message_is_gone_on_with(url, said):
    """As its template has it, the last message's end left out; so that the text may go on within a word."""
    how = {"max_tokens": 8, "seed": 3, "temperature": 1}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    found = asked(url, "chat/completions", messages=turns, continue_final_message=True, **how)
    expected = asked(url, prompt=f"u:hi!a:{said}", add_special_tokens=False, **how)
    assert found["message"]["content"] == expected["text"]
    anew = asked(url, "chat/completions", messages=turns, **how)
    assert anew["message"]["content"] == asked(url, prompt=f"u:hi!a:{said}!a:", add_special_tokens=False, **how)["text"]
    refused = sent(url, "chat/completions", messages=turns[:1], continue_final_message=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")
