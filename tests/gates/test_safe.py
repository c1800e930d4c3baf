"""The gate ``safe``: where members are combined at all, over tokens and over a union."""

from __future__ import annotations

import pytest
import torch
from commands import run
from serving import http, running, serving_of

from softmeet import Ensemble, combine
from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.readers.reader import Read, finished
from softmeet.readers.union_tokens import crossing

PROMPT = "Behold, the Ph"


@pytest.fixture(scope="module")
def ensemble():
    """Two members with tokenizers of their own, over the union of their tokens."""
    return Ensemble.from_pretrained("mixed", vocabulary="union")


@pytest.mark.parametrize("n", [2, 3])
def test_the_first_member_answers_where_members_agree_or_find_its_choice_likely(n):
    generator = torch.Generator().manual_seed(n)
    log_p = (2 * torch.randn(n, 60, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    heads = [SoftmaxHead(torch.randn(5, 2, generator=generator))] * n
    found, plain = (combine(log_p, heads, "prob-mean", gate=gate) for gate in ("safe:0.4", "none"))
    p = log_p.exp()
    for row in range(60):
        first = p[0, row].argmax()
        agree = all(p[i, row].argmax() == first for i in range(n))
        closed = agree or sum(p[i, row, first] for i in range(n)) / n > 0.4
        assert bool(found.gated[row]) == bool(closed)
        expected = log_p[0, row] if closed else plain.log_probs[row]
        assert torch.allclose(found.log_probs[row].double(), expected, atol=1e-6)
    assert 10 < found.gated.sum() < 50


def naive(ensemble, prompt, steps, threshold):
    """Greedy text by the gate, and how often a member would have written across a place at which it was open else."""
    model, text, crossed = ensemble.model, b"", 0
    words = model.alphabet.words
    symbols = model.alphabet.encode(prompt)
    for _ in range(steps):
        own = [model.own_prompt(prompt, special=True)]
        told = []
        for i, reader in enumerate(model.readers_of_members):
            row = reader.open(own=own[0][i])
            said = symbols[len(model.alphabet.encode(prompt)) :]
            told.append(finished(reader.read([Read(row, said, [len(said)])])).log_probs()[0].double().exp())
            reader.close(row)
        tops = [int(p.argmax()) for p in told]
        alone = len(set(tops)) == 1 or sum(float(p[tops[0]]) for p in told) / len(told) > threshold
        before, after = (words[k] if k < len(words) else b"" for k in (symbols[-1], tops[0]))
        if not alone and before and after:
            over = False
            for spelling in model.space.spellings:
                cut = spelling.cut(before + after)
                over |= all(len(spelling.spelled(cut[:k])) != len(before) for k in range(len(cut)))
            alone, crossed = alone or over, crossed + over
        symbols.append(tops[0] if alone else int(torch.stack(told).mean(0).argmax()))
        text += b"" if symbols[-1] == len(words) else words[symbols[-1]]
        if symbols[-1] == len(words):
            break
    return text.decode(errors="replace"), crossed


def test_over_a_union_nobody_is_asked_where_a_member_would_write_across_the_place(ensemble):
    expected, crossed = naive(ensemble, PROMPT, 12, 0.3)
    assert crossed
    given = {"max_new_tokens": 12, "do_sample": False}
    gated = Ensemble.from_pretrained("mixed", vocabulary="union", gate="safe:0.3")
    for prompt in (PROMPT, "And the king said"):
        assert gated.next_token(prompt).top[0][0] == gated.generate(prompt, max_new_tokens=1, do_sample=False)
    assert ensemble.generate(PROMPT, gate="safe:0.3", **given) == expected
    assert ensemble.generate(PROMPT, gate="safe:0.3", speculate=2, **given) == expected
    line = run("generate", PROMPT, "-m", "mixed", "--vocabulary", "union", "--gate", "safe:0.3", "--no-do-sample",
               "--max-new-tokens", "12")  # fmt: skip
    assert line.stdout == expected + "\n"
    with running(serving_of({"union": ensemble})) as url:
        asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "softmeet": {"gate": "safe:0.3"}}
        told = http.post(f"{url}/v1/completions", json={"model": "union", **asked}).json()
    assert told["choices"][0]["text"] == expected


def test_strings_that_a_tokenizer_joins_are_crossed(ensemble):
    space = ensemble.model.space
    joined = next(word for word in space.spellings[0].words if len(word) > 3 and word.isalpha())
    crossed = crossing([joined[:2], joined[2:], b" ", b"x"], space.spellings)
    assert crossed(0, 1)
    assert not crossed(0, 4)  # the end
    assert not crossed(3, 2)


def test_over_bytes_it_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.load_members", None)
    with pytest.raises(InvalidInputError, match="nearly always do"):
        Ensemble.from_pretrained("mixed", "prob-mean", vocabulary="bytes", gate="safe")
