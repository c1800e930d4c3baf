"""Tokens that are parts of characters: how they are shown, and where they begin."""

from itertools import pairwise

import byte_tokenizers
import pytest
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import chunks, http, running, serving_of

from softmeet import Ensemble
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.server.answer import TextStream
from softmeet.server.texts import Places, TokenTexts

KINDS = {name: byte_tokenizers.KINDS[name] for name in ("gpt2", "llama", "gemma", "unigram")}
TOKENIZERS = {name: build() for name, build in KINDS.items()}
# Any text, with more of the characters that take several bytes, and tokens, than chance would have.
TEXT = st.text(st.one_of(st.sampled_from("theé😀日 \n"), st.characters(exclude_categories=["Cs"])), max_size=12)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def url():
    with running(serving_of({kind: ensemble(TOKENIZERS[kind]) for kind in ("gpt2", "gemma")})) as found:
        yield found


def ensemble(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    core = tf.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config = EnsembleConfig(members=["a"], rule="logit-mean", gate=None)
    model = EnsembleForCausalLM(config, [tf.GPT2LMHeadModel(core).eval()]).eval()
    model.adopt(tokenizer)
    return Ensemble(model, tokenizer)


def asked(url, path="completions", **fields):
    answer = http.post(f"{url}/v1/{path}", json={"seed": 1, "logit_bias": {"0": -100}} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def pieces(text, offsets):
    assert offsets == sorted(offsets)
    return [text[a:b] for a, b in pairwise([*offsets, len(text)])]


@each_kind
@given(text=TEXT)
def test_a_texts_tokens_begin_where_their_characters_do(kind, text):
    tokenizer = TOKENIZERS[kind]
    texts, ids = TokenTexts(tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids)
    places = Places(tokenizer, special=True)
    offsets = [places.push(token) for token in ids]
    assert "".join(pieces(decoded, [0, *offsets])) == decoded
    spelled = b"".join(map(texts.bytes_of, ids)).decode()
    dropped = len(spelled) - len(decoded)  # SentencePiece's space before a text
    for k, at in enumerate(offsets):
        before = b"".join(map(texts.bytes_of, ids[:k])).decode(errors="ignore")
        assert at == max(len(before) - dropped, 0)


@each_kind
@given(ids=st.lists(st.integers(3, 260), max_size=12), start=st.integers(0, 5))
def test_bytes_in_any_order_have_places_in_order_that_rebuild_the_text(kind, ids, start):
    tokenizer = TOKENIZERS[kind]
    text = " " * start + tokenizer.decode(ids)
    places = Places(tokenizer, start, special=True)
    offsets = [places.push(token) for token in ids]
    assert offsets[:1] == [start][: len(ids)]
    assert "".join(pieces(text, [0, *offsets])) == text


@given(ids=st.lists(st.integers(3, 270), max_size=16))
@each_kind
def test_bytes_that_are_no_text_break_no_stream(kind, ids):
    """SentencePiece's decoder changes text that was certain, once a byte behind it makes no character."""
    tokenizer = TOKENIZERS[kind]
    stream, places = TextStream(tokenizer), Places(tokenizer, special=False)
    text = "".join(map(stream.push, ids)) + stream.end()
    assert "".join(pieces(text, [0, *map(places.push, ids)])) == text


@each_kind
def test_no_two_bytes_have_the_same_text(kind):
    tokenizer = TOKENIZERS[kind]
    texts = TokenTexts(tokenizer)
    by_text = {}
    for token in range(len(tokenizer)):
        by_text.setdefault(texts.text_of(token), set()).add(texts.bytes_of(token))
    assert all(len(own) == 1 for own in by_text.values())
    assert sum(text.startswith("bytes:\\x") for text in by_text) == 128


@settings(max_examples=8)
@given(prompt=TEXT.filter(bool), seed=st.integers(0, 1 << 30))
def test_an_echo_is_rebuilt_from_its_offsets_streamed_or_not(url, prompt, seed):
    fields = {"model": "gpt2", "prompt": prompt, "max_tokens": 8, "seed": seed, "echo": True, "logprobs": 2}
    whole = asked(url, **fields)
    found = whole["logprobs"]
    assert "".join(pieces(whole["text"], found["text_offset"])) == whole["text"]
    body = fields | {"logit_bias": {"0": -100}}
    streamed = [chunk["choices"][0] for chunk in chunks(f"{url}/v1/completions", body)]
    assert "".join(choice["text"] for choice in streamed) == whole["text"]
    for key in ("tokens", "text_offset"):
        assert [x for choice in streamed for x in (choice["logprobs"] or {key: []})[key]] == found[key]
    alone = asked(url, **fields | {"echo": False})["logprobs"]
    assert alone["text_offset"] == found["text_offset"][-len(alone["tokens"]) :]


def test_chat_always_has_the_bytes(url):
    fields = {"model": "gpt2", "messages": [{"role": "user", "content": "é"}], "max_tokens": 12, "temperature": 2}
    found = asked(url, "chat/completions", **fields, logprobs=True, top_logprobs=20)
    entries = found["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode(errors="replace") == found["message"]["content"]
    for entry in [*entries, *(top for e in entries for top in e["top_logprobs"])]:
        text = entry["token"]
        assert text.startswith("bytes:\\x") or text.encode() == bytes(entry["bytes"])
