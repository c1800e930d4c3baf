"""The page's conversation: what is told to the ensemble, and what is left out where a context is full."""

from __future__ import annotations

import asyncio

import pytest
from serving import TEMPLATE, serving_of, tiny_ensemble

from softmeet.server.errors import RequestError

SAID = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "assistant", "content": "the fox"}]


def test_a_history_is_told_as_the_api_has_it():
    # The page's library takes seconds to import: where the tests are run, and nowhere else.
    from softmeet.server.ui_chat import turns

    told = turns(SAID, " ", "dog")
    assert [(one["role"], one["content"]) for one in told] == [
        ("user", "hello"), ("assistant", "the fox"), ("user", "dog"),
    ]  # fmt: skip
    assert turns([], "be terse", "dog")[0] == {"role": "system", "content": "be terse"}
    assert turns([], None, "dog") == [{"role": "user", "content": "dog"}]


def test_the_first_turns_are_left_out_where_a_context_is_full():
    from softmeet.server.ui_chat import _prepared, is_for_chats, turns

    serving = serving_of({"default": tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)})
    assert is_for_chats(serving)
    given = {"model": "default", "max_tokens": 8}
    long = [turn for _ in range(6) for turn in turns(SAID, None, "x")[:2]]
    request = asyncio.run(
        _prepared(serving, given, [{"role": "system", "content": "s"}, *long, turns([], "", "dog")[0]])
    )
    text = request.tokenizer.decode(request.prompts[0])
    assert text.startswith("s:s!")
    assert text.endswith("u:dog!a:")
    assert 0 < text.count("hello") < 6
    with pytest.raises(RequestError, match="context"):
        asyncio.run(_prepared(serving, given, turns([], None, "dog " * 99)))


def test_members_without_templates_are_for_texts():
    from softmeet.server.ui_chat import is_for_chats

    assert not is_for_chats(serving_of({"default": tiny_ensemble("gpt2", "llama", rule="logit-mean")}))


def test_trust_is_shown_where_a_rule_has_any():
    from softmeet.server.ui import _has_trust

    assert _has_trust(["logit-mean", "meet"])
    assert not _has_trust(["logit-mean", "prob-mean", "pointwise-min"])
