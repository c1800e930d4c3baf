"""Ensembles over bytes behind the server: the same texts as generate, in any company, and what clients are told."""

import math
import random
from functools import partial
from itertools import chain, pairwise

import pytest
import torch
from batches import sequence
from serving import chunks, http, running, serving_of

from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.hf.inspected import character_reports
from softmeet.hf.sampling import RowSampler
from softmeet.readers.byte_alphabet import shown_byte
from softmeet.readers.byte_reader import ByteReader
from softmeet.readers.bytes.next_tokens import END
from softmeet.readers.reader import Read, finished
from softmeet.server.limits import Limits
from softmeet.server.texts import Cutting, cut

PROMPTS = ["the", "he t", "\u00e9t", "the then the", "t\u00e9", "hat"]


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, "prob-mean", vocabulary="bytes")


@pytest.fixture(scope="module")
def url(ensemble):
    serving = serving_of({"bytes": ensemble})
    with running(serving) as found:
        yield found


def tokens_in(spelling, text):
    return len(spelling.encode(text)) if text else 0


COUNTED = {"softmeet": {"statuses": True}}


def completion(url, **fields):
    return http.post(f"{url}/v1/completions", json={"max_tokens": 24, "seed": 3, **COUNTED} | fields)


def generated(ensemble, prompt, seed, count, key=0, **options):
    """The bytes of what generate() gives for one prompt alone."""
    ids = torch.tensor([list(prompt.encode())])
    out = ensemble.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=count,
        row_sampler=RowSampler(seed, [key]), **options,
    )  # fmt: skip
    return bytes(token for token in out[0, ids.shape[1] :].tolist() if token != END)


def test_by_itself_a_server_drafts_no_bytes(url):
    assert completion(url, prompt="the").json()["usage"]["completion_tokens"] > 4
    assert "softmeet_draft_tokens_total 0.0" in http.get(f"{url}/metrics").text


def test_prompts_that_come_together_are_read_together_and_fail_alone(ensemble, serve, monkeypatch):
    """Together they take fewer calls of a member than each alone, and one that cannot be read ends by itself."""
    readers, calls, sizes = ensemble.model.readers, [], []

    def asking(k, text=b""):
        return sequence(ensemble.model, tuple(text or PROMPTS[k % 6].encode() + b" the"), seed=k, max_tokens=4)

    asked, (bad, refused) = [asking(k) for k in range(7)], asking(9, b"never the")
    run, beginning = readers[0].run, readers[0].beginning

    def counted(growths):
        calls.append(len(growths))
        return run(growths)

    def begun(texts, prefixes, wanted):
        if any(b"never" in text for text in texts):
            raise InvalidInputError("expected a text that can be read")
        sizes.append(len(texts))
        return beginning(texts, prefixes, wanted)

    monkeypatch.setattr(readers[0], "run", counted)
    monkeypatch.setattr(readers[0], "beginning", begun)
    engine = serve(ensemble.model, limits=Limits(rows=8))
    engine.submit([one for one, _ in asked])
    texts = [listener.tokens() for _, listener in asked]
    assert max(sizes) > 1
    assert sum(sizes) == 7
    together = len(calls)
    for k, found in enumerate(texts):
        calls.clear()
        again, listener = asking(k)
        engine.submit([again])
        assert listener.tokens() == found
        together -= len(calls)
    assert together < 0
    others = [asking(k) for k in range(3)]
    engine.submit([bad, *(one for one, _ in others)])
    assert [listener.tokens() for _, listener in others] == texts[:3]
    assert isinstance(refused.all()[-1].error, InvalidInputError)


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1, "best_of": 3}, {"ignore_eos": True}])
def test_usage_counts_the_first_members_tokens_and_everybodys(url, ensemble, fields):
    answer = completion(url, prompt=["the", "\u00e9t"], seed=1, max_tokens=5, **fields).json()
    usage, ours = answer["usage"], answer["usage"]["softmeet"]
    assert answer["softmeet"]["vocabulary"] == "bytes"
    assert (ours["unit"], ours["tokenizer"]) == ("token", answer["softmeet"]["members"][0])
    assert ours["prompt_bytes"] == len(b"the") + len("\u00e9t".encode())
    first = ours["members"][ours["tokenizer"]]
    assert first == {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    assert usage["total_tokens"] == sum(first.values())
    keys = [(prompt, p * 3 + c) for p, prompt in enumerate(["the", "\u00e9t"]) for c in range(3)]
    drawn = {"n": [(prompt, k) for k, prompt in enumerate(["the", "the", "\u00e9t", "\u00e9t"])], "best_of": keys}
    for reader, own in zip(ensemble.model.readers, ours["members"].values(), strict=True):
        count = partial(tokens_in, reader.spelling)
        assert own["prompt_tokens"] == count(b"the") + count("\u00e9t".encode())
        if "ignore_eos" in fields:
            assert own["completion_tokens"] > 0
            continue
        texts = [generated(ensemble, prompt, 1, 5, key) for prompt, key in drawn[next(reversed(fields))]]
        assert own["completion_tokens"] == sum(map(count, texts))
        assert ours["completion_bytes"] == sum(map(len, texts))
    assert usage["completion_tokens"] <= 5 * len(drawn[next(reversed(fields))] if "ignore_eos" not in fields else "ab")


def test_a_choice_ends_before_the_character_that_is_too_much(url, ensemble):
    """Whatever the answer is asked for as; nothing of that character is shown, drawn or counted."""
    body = {"prompt": "the", "seed": 4, "max_tokens": 7, "logprobs": 0, "logit_bias": {"256": -100, "195": 3}}
    whole = completion(url, **body).json()
    (choice,), spelling = whole["choices"], ensemble.model.readers[0].spelling
    assert choice["finish_reason"] == "length"
    data = choice["text"].encode()
    assert len(choice["logprobs"]["tokens"]) == len(data) == whole["usage"]["softmeet"]["completion_bytes"]
    assert tokens_in(spelling, data) == whole["usage"]["completion_tokens"] <= 7
    longer = completion(url, **body | {"max_tokens": 12}).json()["choices"][0]["text"]
    assert longer.startswith(choice["text"])
    after = longer[: len(choice["text"]) + 1].encode()
    assert tokens_in(spelling, after) > 7
    streamed = [one for chunk in chunks(f"{url}/v1/completions", body) for one in chunk["choices"]]
    assert "".join(one["text"] for one in streamed) == choice["text"]
    assert [token for one in streamed for token in (one["logprobs"] or {})["tokens"]] == choice["logprobs"]["tokens"]


def test_scores_log_probabilities_and_reports(url, ensemble):
    body = {"prompt": "th\u00e9", "echo": True, "logprobs": 3, "max_tokens": 2, "softmeet": {"report": 3}}
    choice = completion(url, **body).json()["choices"][0]
    expected = ensemble.model(input_ids=torch.tensor([list("th\u00e9".encode())])).logits[0].log_softmax(-1)
    found = choice["logprobs"]
    assert found["tokens"][:4] == ["t", "h", "bytes:\\xc3", "bytes:\\xa9"]
    ids = torch.tensor(list("th\u00e9".encode()))
    assert found["token_logprobs"][0] is None
    chosen = expected[:-1].gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:4]), chosen.float(), atol=1e-5, rtol=0)
    last = choice["softmeet"]["tokens"][-1]
    assert len(last["member_log_probs"]) == len(last["member_top"]) == 2
    assert all(x <= 1e-9 for rows in last["member_top"] for _, x in rows)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"softmeet": {"rule": "meet"}}, "softmeet.rule", "bytes have none"),
        ({"prompt": "qxz" * 100}, "prompt", "expected a prompt shorter than the context of"),
        ({"prompt": "a" * 100_000}, "prompt", "got a text of 100,000 characters"),
        ({"prompt": [104, 256, 104]}, "prompt", "only as a prompt's first id"),
        ({"prompt": [257]}, "prompt", "from 0 to 256"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "below 257"),
    ],
)
def test_what_cannot_be_is_refused(url, fields, param, said):
    answer = completion(url, **({"prompt": "the"} | fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]


def test_a_text_that_fills_a_context_ends_there(url):
    answer = completion(url, prompt="t" * 40, max_tokens=2000, logit_bias={"256": -100, "116": 100})
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["text"]) < 2000


def test_reports_of_bytes_become_reports_of_characters():
    one = {
        "log_prob": -1.0, "pool_log_prob": -1.0, "num_passes": 0.0, "member_log_probs": [-1.0, -2.0],
        "disagreement": [0.25, 0.5], "top": [["h", -0.1]], "text": "h",
    }  # fmt: skip
    symbols = [104, *"\u00e9".encode(), END, *"\u20ac".encode()[:2]]
    own = ({"token": symbol, "text": shown_byte(symbol), "claims": [k / 8]} for k, symbol in enumerate(symbols))
    found = character_reports([one | each for each in own])
    assert [report["text"] for report in found] == ["h", "\u00e9", "<|end|>"]
    assert found[1]["log_prob"] == -2.0
    assert found[1]["member_log_probs"] == [-2.0, -4.0]
    assert found[1]["disagreement"] == [0.5, 1.0]
    assert [report["claims"] for report in found] == [[0.0], [0.1875], [0.375]]


def test_a_members_own_tokens_are_those_that_its_covers_allow(ensemble):
    reader = ByteReader(ensemble.model.readers[0], "first")
    row = reader.open()
    finished(reader.read([Read(row, b"the t", [])]))
    found = reader.explain(row, 4).expected
    assert len(found) == 4
    assert all(x <= 1e-9 for _, x in found)
    every = reader.explain(row, 10_000).expected
    # Each of them gives the byte behind what the member has read of it: together, the next byte's distribution.
    assert sum(math.exp(x) for _, x in every) == pytest.approx(1.0, abs=0.2)
    after = {text for text, _ in every}
    assert after >= {text for text, _ in found}


def test_a_conversation_has_no_tokens_that_members_share(url):
    answer = http.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": "the"}]})
    assert answer.status_code == 400
    assert "every member has a chat prompt of its own" in answer.json()["error"]["message"]
    assert http.post(f"{url}/tokenize", json={"prompt": "\u00e9"}).json()["tokens"] == [195, 169]


@pytest.fixture(scope="module")
def talking():
    """An ensemble whose members have a chat template, and the address of a server of it."""
    found = Ensemble.from_pretrained("mixed")
    with running(serving_of({"default": found})) as url:
        yield found, url


def test_log_probabilities_of_a_chat_are_of_the_first_members_tokens_unless_bytes_are_asked_for(talking):
    ensemble, url = talking
    body = {"messages": [{"role": "user", "content": "the king"}], "max_tokens": 9, "seed": 3, "logprobs": True,
            "top_logprobs": 2, "logit_bias": {"256": -100}}  # fmt: skip
    asked = {**body, "softmeet": {"byte_logprobs": True}}
    told = [http.post(f"{url}/v1/chat/completions", json=one).json() for one in (body, asked)]
    assert all("choices" in one for one in told), told
    grouped, single = (one["choices"][0] for one in told)
    text, spelling = grouped["message"]["content"].encode(), ensemble.model.readers[0].spelling
    assert single["message"]["content"].encode() == text
    entries, each = grouped["logprobs"]["content"], single["logprobs"]["content"]
    tokens = [spelling.spelled([token]) for token in spelling.encode(text)]
    tokens[0] = tokens[0].removeprefix(spelling.dummy)
    assert [bytes(one["bytes"]) for one in entries] == [token for token in tokens if token]
    assert len(entries) < len(each) == len(text)
    assert [len(one["top_logprobs"]) for one in each] == [2] * len(each)
    at = 0
    for one in entries:
        own = each[at : at + len(one["bytes"])]
        assert one["logprob"] == pytest.approx(sum(x["logprob"] for x in own))
        assert one["top_logprobs"] == [{key: one[key] for key in ("token", "logprob", "bytes")}]
        at += len(own)
    streamed = [one["logprobs"] for chunk in chunks(f"{url}/v1/chat/completions", body) for one in chunk["choices"]]
    assert [entry for told in streamed if told for entry in told["content"]] == entries


@pytest.mark.parametrize("asked", [{"prompt": "And the king"}, {"messages": [{"role": "user", "content": "Who?"}]}])
def test_a_text_with_a_stop_string_is_the_same_streamed_or_not(talking, asked):
    path = f"{talking[1]}/v1/{'completions' if 'prompt' in asked else 'chat/completions'}"
    body = asked | {"seed": 5, "max_tokens": 16, "stop": ["e"]}
    (whole,) = http.post(path, json=body).json()["choices"]
    pieces = [one["text"] if "text" in one else one["delta"].get("content") or ""
              for chunk in chunks(path, body) for one in chunk["choices"]]  # fmt: skip
    assert "".join(pieces) == (whole["text"] if "text" in whole else whole["message"]["content"])
    assert whole["finish_reason"] == "stop"
    assert "e" not in pieces


def test_tokens_are_cut_alike_while_they_come(ensemble):
    text = "The king  said:\n\tgo unto\u00a0 \u00e9l  and Jerusalem's 12 gates , \u2014 lo!".encode()
    rng = random.Random(0)
    for reader in ensemble.model.readers:
        whole = cut([*text, 256], reader.spelling)
        for _ in range(30):
            ends = sorted(rng.sample(range(len(text)), 6))
            cutting, found = Cutting(reader.spelling), list[list[int]]()
            for start, end in pairwise([0, *ends, len(text)]):
                found += cutting.push([*text[start:end]], last=False)
            assert len(found) > len(whole) // 2
            found += cutting.push([256], last=True)
            assert list(map(len, found)) == whole
            assert list(chain.from_iterable(found)) == [*range(len(text) + 1)]


def test_what_a_tokenizer_cannot_spell_is_cut_into_bytes(ensemble):
    spelling = ensemble.model.readers[0].spelling
    assert sum(cut([*b"the \xff\xfe king", 256], spelling)) == 12
    assert cut([256, *b"a", 256], spelling)[0] == 1
    assert cut([], spelling) == []
