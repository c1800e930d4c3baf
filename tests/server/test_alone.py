"""A sequence that runs alone in the server: the same tokens in fewer calls of the members, until another one comes."""

from dataclasses import replace
from inspect import signature

import pytest
import tiny
import torch
from batches import ensemble_of, generated, prompt, sequence

from softmeet import Ensemble
from softmeet.errors import InvalidInputError, NonFiniteError
from softmeet.server.sequences import Combination, Failed, Finished, Sequence


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    return tiny.save_near(tmp_path_factory.mktemp("members"), 3)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama", "neox"))]


@pytest.fixture
def model(alike):
    found = Ensemble.from_pretrained(alike[:2], "logit-mean", dtype="float64", gate="none").model
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture
def lengths(model, monkeypatch):
    """The number of tokens of every call of each member."""
    found = [[] for _ in model.members]
    for own, member in zip(found, model.members, strict=True):
        original = member.base_model.forward

        def forward(*args, own=own, original=original, **options):
            own.append(options["input_ids"].shape[1])
            return original(*args, **options)

        forward.__signature__ = signature(original)
        monkeypatch.setattr(member.base_model, "forward", forward)
    return found


def test_members_read_in_chunks(serve, model, lengths):
    one, listener = sequence(model, prompt(3, 9), max_tokens=50)
    serve(model, speculate=4).submit([one])
    assert len(listener.tokens()) == 50
    # Of copies that are near, most drafts are right: one member reads several tokens in a call, and few in vain.
    assert min(map(len, lengths)) < 25
    assert all(sum(own) < 9 + 75 for own in lengths)


@pytest.mark.parametrize("rule", ["logit-mean", "meet"])
def test_others_join_and_leave(serve, model, lengths, rule):
    model.config.settings = model.settings.changed(rule=rule)
    asked = [(prompt(0, 5), 1, 40), (prompt(1, 12), 2, 4), (prompt(2, 21), 3, 4)]
    expected = [generated(model, ids, seed=seed, max_tokens=count) for ids, seed, count in asked]
    (first, told), *others = [sequence(model, ids, seed=seed, max_tokens=count) for ids, seed, count in asked]
    engine, waiting = serve(model, speculate=4), dict(zip((8, 20), others, strict=True))

    def emit(event):
        told.put(event)
        if (other := waiting.pop(first.drawn, None)) is not None:
            engine.submit([other[0]])

    first.emit = emit
    for own in lengths:
        own.clear()
    engine.submit([first])
    assert [listener.tokens() for _, listener in [(first, told), *others]] == expected
    read = lengths[1]
    company = [read.index(12), read.index(21)]
    for start, stop in zip([1, *company], [*company, None], strict=True):
        assert 1 in read[start:stop]
        assert max(read[start:stop][1:]) > 1, "alone again, texts are read in chunks again"


def test_ends_and_limits_within_drafts(serve, model):
    whole = generated(model, prompt(3, 9), max_tokens=30)
    for ends in ((whole[7],), (whole[12], whole[20])):
        engine = serve(model, speculate=6)
        one, listener = sequence(model, prompt(3, 9), max_tokens=30, stop_token_ids=ends)
        engine.submit([one])
        *events, last = listener.all()
        stop = min(whole.index(end) for end in ends)
        assert [e.token for e in events] == whole[: stop + 1]
        assert last == Finished("stop")
    room = model.config.max_position_embeddings - 4
    one, listener = sequence(model, prompt(3, room), max_tokens=100)
    engine.submit([one])
    assert listener.tokens() == generated(model, one.prompt, max_tokens=4)


class ForbidsDrafts:
    """A processor of scores that fails where a text has come to a draft, at every third token."""

    def __init__(self, one):
        self.one, self.failed = one, 0

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > len(self.one.tokens) and not input_ids.shape[1] % 3:
            self.failed += 1
            raise InvalidInputError("expected a text that can go on")
        return scores


def test_a_draft_that_leads_to_a_dead_end_is_none(serve, model):
    one, listener = sequence(model, prompt(3, 9), max_tokens=40)
    forbids = ForbidsDrafts(one)
    one.draw._processors, one.draw._looks = [forbids], None
    serve(model, speculate=4).submit([one])
    assert listener.tokens() == generated(model, one.prompt, max_tokens=40)
    assert forbids.failed > 3


def test_a_member_that_returns_nan_is_named(serve, model):
    engine = serve(model, speculate=4)
    one, listener = sequence(model, prompt(3, 9), max_tokens=60)
    engine.submit([one])
    for _ in range(8):
        listener.get(timeout=300)
    with torch.no_grad():
        model.members[1].base_model.ln_f.weight.fill_(torch.nan)
    error = listener.all()[-1]
    assert isinstance(error, Failed)
    assert isinstance(error.error, NonFiniteError)
    assert "member 1" in str(error.error)


@pytest.mark.parametrize(
    ("speculate", "dtype", "options", "drafts"),
    [
        ("auto", "float64", {}, True),
        ("auto", "float64", {"top": 1}, False),
        ("auto", "float64", {"report": 1}, False),
        (2, "bfloat16", {"top": 1}, True),
        ("auto", "bfloat16", {}, False),
        ("auto", "bfloat16", {"sampling": {"temperature": 0.0, "is_seeded": False}}, False),
        ("auto", "bfloat16", {"sampling": {"is_seeded": False}}, True),
    ],
)
def test_by_itself_a_server_drafts_where_answers_repeat(serve, alike, speculate, dtype, options, drafts):
    model = Ensemble.from_pretrained(alike[:2], "logit-mean", dtype=dtype).model
    model.generation_config.eos_token_id = None
    one, listener = sequence(model, prompt(3, 9), max_tokens=25, **options)
    engine = serve(model, speculate=speculate)
    engine.submit([one])
    assert len(listener.tokens()) == 25
    assert (engine.metrics.registry.get_sample_value("softmeet_draft_tokens_total") > 0) == drafts


def test_gated_tokens_are_those_that_were_given(serve, unlike):
    model = Ensemble.from_pretrained(unlike[:2], "meet", dtype="float64", gate="disagreement:1000").model
    model.generation_config.eos_token_id = None
    engine = serve(model, speculate=4)
    one, listener = sequence(model, prompt(3, 9), max_tokens=40)
    engine.submit([one])
    assert len(listener.tokens()) == 40
    value = engine.metrics.registry.get_sample_value
    assert value("softmeet_gated_tokens_total", {"gate": "disagreement"}) == 40
    accepted, drafted = value("softmeet_accepted_draft_tokens_total"), value("softmeet_draft_tokens_total")
    assert 0 < accepted < drafted


def drawn_plainly(model, tokens, weights=(0.3, 0.7), **options):
    """A sequence by prob-mean whose request gives no seed, and its listener."""
    one, listener = sequence(model, tokens, **options)
    combination = Combination(model, model.settings.changed(rule="prob-mean", weights=weights))
    request = replace(one.request, combination=combination, sampling=replace(one.request.sampling, is_seeded=False))
    return Sequence(request, tokens, 0, listener.put), listener


def test_a_token_comes_from_one_member(serve, model, lengths):
    one, listener = drawn_plainly(model, prompt(3, 9), max_tokens=50)
    engine = serve(model, one_member=True)
    engine.submit([one])
    assert len(listener.tokens()) == 50
    calls = [len(own) - 1 for own in lengths]
    # The first token follows the prompt, which all members read.
    assert sum(calls) == 49
    assert min(calls) > 5
    assert all(9 + 30 < sum(own) <= 9 + 49 for own in lengths)


@pytest.mark.parametrize("options", [{"top": 0}, {"report": 1}, {"sampling": {"temperature": 0.5}}])
def test_members_all_run_where_the_mean_itself_is_needed(serve, model, lengths, options):
    one, listener = drawn_plainly(model, prompt(3, 9), max_tokens=10, **options)
    serve(model, one_member=True).submit([one])
    assert len(listener.tokens()) == 10
    assert lengths == [[9, *[1] * 9]] * 2


def test_one_member_a_token_follows_the_mean_whoever_comes(serve):
    """The tokens of a sequence that is alone, in company and alone again, against the mean behind what came before.

    Tokens that the first member finds likelier than the second come as often as the mean says: this tells members apart
    far better than counts of single tokens do.
    """
    far, weights, texts = ensemble_of(("gpt2", "llama")), (0.3, 0.7), []
    engine = serve(far, one_member=True)
    for k in range(40):
        one, listener = drawn_plainly(far, (5, 9), weights, seed=k, max_tokens=16)
        other, beside = drawn_plainly(far, (5, 9), weights, seed=5000 + k, max_tokens=2)
        engine.submit([one])
        events = [listener.get(timeout=300), listener.get(timeout=300)]
        engine.submit([other])
        beside.all()
        texts.append([5, 9, *(e.token for e in events), *listener.tokens()])
    ids = torch.tensor(texts)
    with torch.inference_mode():
        own = [member(input_ids=ids).logits[:, 1:-1].softmax(-1).double() for member in far.members]
    mean, firsts = sum(w * p for w, p in zip(weights, own, strict=True)), own[0] > own[1]
    expected = (mean * firsts).sum(-1)
    seen = firsts.gather(-1, ids[:, 2:, None])[..., 0].double()
    for some in (slice(0, 2), slice(2, 6), slice(6, None)):
        apart, error = (seen - expected)[:, some].sum(), (expected * (1 - expected))[:, some].sum().sqrt()
        assert apart.abs() < 4 * error
