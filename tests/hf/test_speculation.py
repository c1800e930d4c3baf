"""Speculation: the tokens of plain decoding, in fewer calls of the members."""

from __future__ import annotations

import functools
from dataclasses import replace
from inspect import signature

import byte_tokenizers
import gguf_files
import pytest
import tiny
import torch
import transformers as tf
from scipy.stats import chisquare
from typer.testing import CliRunner

from softmeet import Ensemble, Structure
from softmeet.cli.main import app
from softmeet.engine.combine import Combiner
from softmeet.engine.pace import Pace
from softmeet.engine.recorder import Recorder
from softmeet.engine.repeats import Repeats
from softmeet.errors import InvalidInputError
from softmeet.hf.sampling import RowSampler

IDS = torch.tensor([[5, 9, 11, 3], [0, 0, 7, 2], [0, 4, 4, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return {
        "near": tiny.save_near(folder / "near", 3),
        "same": tiny.save_near(folder / "same", 2, noise=0.0),
        "far": [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama", "neox"))],
    }


@functools.cache
def loaded(members, rule, **settings):
    return Ensemble.from_pretrained(list(members), rule, dtype="float64", **settings)


def ensemble(names, kind="far", count=2, rule="logit-mean", **settings):
    """An ensemble that other tests have too, so that none may change it."""
    return loaded(tuple(names[kind][:count]), rule, **settings)


def made(model, speculate, rows=3, *, sample=True, count=20, ids=IDS, mask=MASK, **options):
    drawing = {"do_sample": True, "top_k": 0, "row_sampler": RowSampler(5, range(rows))} if sample else {}
    given = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": count} | drawing | options
    return model.generate(ids[:rows], attention_mask=mask[:rows], speculate=speculate, **given)


class Calls:
    """Counts the calls of each member, and the tokens that it reads."""

    def __init__(self, model, monkeypatch):
        self.lengths = [[] for _ in model.members]
        for i, member in enumerate(model.members):
            monkeypatch.setattr(member.base_model, "forward", self.noted(i, member.base_model.forward))

    def noted(self, i, original):
        def forward(*args, **options):
            self.lengths[i].append(options["input_ids"].shape[1])
            return original(*args, **options)

        forward.__signature__ = signature(original)
        return forward


def test_members_read_in_chunks_and_take_back_what_was_wrong(names, monkeypatch):
    model = ensemble(names, "near").model
    calls, options = Calls(model, monkeypatch), {"count": 40, "suppress_tokens": [0]}
    plain = made(model, 0, 1, **options)
    assert [len(own) for own in calls.lengths] == [40, 40]
    for own in calls.lengths:
        own.clear()
    assert made(model, 4, 1, **options).equal(plain)
    # Of copies that are near, most drafts are right: one member reads several tokens in a call, and few in vain.
    assert min(map(len, calls.lengths)) < 20
    assert all(sum(own) < 60 for own in calls.lengths)


def test_processors_and_ends(names):
    model = ensemble(names, "near").model
    plain = made(model, 0, 1, sample=False, count=15)[0, 4:].tolist()
    ends = [plain[6], plain[9]]
    greedy = [
        {"eos_token_id": ends},
        {"eos_token_id": plain[5], "min_new_tokens": 9},
        {"no_repeat_ngram_size": 2},
        {"num_return_sequences": 1},
    ]
    drawn = [
        {"eos_token_id": ends, "min_new_tokens": 9},
        {"repetition_penalty": 1.3, "temperature": 0.7},
        {"suppress_tokens": plain[:3], "top_p": 0.8},
        {"top_k": 5},
        {"max_time": 1000.0, "min_p": 0.1},
    ]
    for rows, sample, options in ((1, False, greedy), (3, True, drawn)):
        for own in options:
            more = own | {"rows": rows, "sample": sample, "count": 11}
            assert made(model, 4, **more).equal(made(model, 0, **more)), own


def test_a_context_that_ends_within_a_draft(names):
    model = ensemble(names, "near").model
    limit = model.config.max_position_embeddings
    with pytest.warns(UserWarning, match="cut to"):
        found = made(model, 6, 1, sample=False, count=10 * limit)
    assert found.shape[1] == limit
    with pytest.warns(UserWarning, match="cut to"):
        assert found.equal(made(model, 0, 1, sample=False, count=10 * limit))


def test_scores_are_those_of_plain_decoding(names):
    model = ensemble(names, "near").model
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "sample": False}
    one, two = (made(model, speculate, 1, **options) for speculate in (0, 4))
    for name in ("scores", "logits"):
        assert torch.allclose(torch.stack(one[name]), torch.stack(two[name]), atol=1e-6)
        assert len(one[name]) == 20


@pytest.mark.parametrize(
    ("rows", "options"), [(1, {}), (2, {}), (3, {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3})]
)
def test_torchs_seed_gives_one_text_with_drafts_and_without(names, rows, options):
    model, texts = ensemble(names, "near").model, []
    for more in ({"speculate": 0}, {"speculate": 3}, {"speculate": 0, "output_scores": True}):
        torch.manual_seed(7)
        scored = {"return_dict_in_generate": True, **more}
        out = model.generate(
            IDS[:rows], attention_mask=MASK[:rows], pad_token_id=0, max_new_tokens=12, do_sample=True,
            **{"top_k": 0} | options | scored,
        )  # fmt: skip
        texts.append(out.sequences)
    assert texts[0].equal(texts[1])
    assert texts[0].equal(texts[2])


def test_stopping_criteria_see_the_scores_that_tokens_are_drawn_from(names):
    seen = []

    class Stop(tf.StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            seen.append(scores)
            return torch.full((len(input_ids),), len(scores) == 5)

    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": True}
    found = made(
        ensemble(names).model, 0, 1, sample=False, temperature=0.5, top_k=0, stopping_criteria=[Stop()], **options
    )
    assert [len(own) for own in seen] == [1, 2, 3, 4, 5] == [k + 1 for k in range(len(found.scores))]
    for k, (own, logits) in enumerate(zip(found.scores, found.logits, strict=True)):
        assert torch.allclose(own, logits / 0.5)
        assert all(scores[k] is own for scores in seen[k:])


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("score", [-torch.inf, torch.nan, torch.inf])
def test_no_token_is_drawn_where_none_is_left(names, speculate, seeded, score):
    def nothing(input_ids, scores):
        return torch.full_like(scores, score) if input_ids.shape[1] > 8 else scores

    torch.manual_seed(0)  # no text ends before its ninth token
    with pytest.raises(InvalidInputError, match="processors of scores left none; allow more tokens"):
        made(ensemble(names).model, speculate, 1, sample=seeded, do_sample=True, top_k=0, logits_processor=[nothing])


def test_a_recorder_counts_the_positions_of_the_text_alone(names):
    for kind in ("far", "near"):
        model = ensemble(names, kind, rule="meet").model
        one, two = Recorder(), Recorder()
        assert made(model, 0, 1, recorder=one).equal(made(model, 4, 1, recorder=two))
        assert (one.rows, one.statuses) == (two.rows, two.statuses)


def test_unseeded_tokens_follow_the_rule(names):
    """The second token, which a draft and the rule's answer to it decide, over many texts."""
    model = ensemble(names, "near", rule="prob-mean").model
    torch.manual_seed(3)
    prompts = torch.tensor([[5, 9]] * 20)
    options = {"do_sample": True, "top_k": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    kept = {"max_new_tokens": 3, "suppress_tokens": [0], "speculate": 2}
    found = torch.cat([model.generate(prompts, **kept, **options) for _ in range(30)])
    first, counts = found[:, 2].unique(return_counts=True)
    before = torch.tensor([[5, 9, first[counts.argmax()].item()]])
    second = found[(found[:, :3] == before).all(-1), 3]
    with torch.inference_mode():
        scores = model(before).logits[0, -1]
    scores = scores.index_fill(0, torch.tensor([0]), -torch.inf)
    kept = scores.topk(3).indices
    expected = scores[kept].softmax(-1).double()
    seen = torch.stack([(second == token).sum() for token in kept])
    assert seen.sum() == len(second) > 50
    assert chisquare(seen, (expected / expected.sum() * len(second)).numpy()).pvalue > 1e-3


def test_a_draft_that_leads_to_a_dead_end_is_none():
    whole = Ensemble.from_pretrained("wide", "logit-mean", weights=[1, 1, 1])
    forbidden = [k for k in range(len(whole.tokenizer)) if "#" in whole.tokenizer.decode([k])]
    options = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": forbidden}
    structure = Structure.choice([" the the#", " the man and"])
    plain, fast = (whole.generate("In the", structure=structure, speculate=k, **options) for k in (0, 4))
    assert plain == fast == " the man and"


def test_an_error_that_is_no_drafts_fault_is_raised(names):
    model = ensemble(names, "near").model

    def never(row, ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made(model, 4, 1, prefix_allowed_tokens_fn=never)


def test_positions_have_to_count_tokens(names):
    model = ensemble(names, "near").model
    for speculate in (0, 4):
        counted = made(model, speculate, 1, position_ids=torch.tensor([[0, 1, 2, 3]]))
        assert counted.equal(made(model, speculate, 1))
        with pytest.raises(InvalidInputError, match="position_ids that count"):
            made(model, speculate, 1, position_ids=torch.tensor([[3, 4, 5, 9]]))


def test_a_given_cache_cannot_go_past_the_context(names):
    model = ensemble(names, "near").model
    long = torch.randint(1, tiny.V, (1, 40), generator=torch.Generator().manual_seed(0))
    for speculate in (0, 6):
        cache = model.new_cache()
        with torch.inference_mode():
            model(long, cache=cache, use_cache=True)
        with pytest.raises(InvalidInputError, match="the shortest member's context"):
            model.generate(
                long[:, :3], cache=cache, attention_mask=torch.ones(1, 43, dtype=torch.int64), max_new_tokens=40,
                do_sample=False, pad_token_id=0, eos_token_id=None, speculate=speculate,
            )  # fmt: skip


@pytest.mark.parametrize("rule", ["logit-mean", "logit-mean:plausibility=0.1", "prob-mean"])
def test_rules_in_half_precision(names, rule):
    """Rounding depends on how many tokens are read at once; these short texts have no near ties."""
    model = Ensemble.from_pretrained(names["near"][:2], rule, dtype="bfloat16").model
    assert made(model, 3, 1, sample=False, count=8).equal(made(model, 0, 1, sample=False, count=8))


def test_one_member_twice(names):
    model = Ensemble.from_pretrained([names["far"][0]] * 2, "meet", dtype="float64").model
    assert made(model, 3).equal(made(model, 0))


def test_what_cannot_be_speculated_is_refused_by_name(names):
    whole = ensemble(names, "near")
    model = whole.model
    for options, name in [
        ({"gate": "unsure:0.5"}, "unsure"),
        ({"token_seconds": 1.0}, "token_seconds"),
        ({"use_cache": False}, "use_cache"),
        ({"num_beams": 2, "sample": False}, "num_beams"),
        ({"assistant_model": model, "rows": 1, "sample": False}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3, "rows": 1, "sample": False}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.7}, "ClassifierFreeGuidance"),
    ]:
        with pytest.raises(InvalidInputError, match=name):
            made(model, 2, **options)
    with pytest.raises(InvalidInputError, match="one_member"):
        ensemble(names, rule="prob-mean").model.generate(
            IDS, do_sample=True, top_k=0, max_new_tokens=2, one_member=True, speculate=2
        )
    for wrong in (-1, 1.5, "fast", True):
        with pytest.raises(InvalidInputError, match="speculate"):
            made(model, wrong)
    with pytest.raises(InvalidInputError, match="speculation"):
        whole.generate("ab", seed=1, reproducible=True, speculate="auto", max_new_tokens=3)
    # What is automatic leaves it out instead.
    assert made(model, "auto", gate="unsure:0.5").equal(made(model, 0, gate="unsure:0.5"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_text_that_repeats_itself_drafts(names, count, monkeypatch):
    model = ensemble(names, "near", count, "prob-mean").model
    for reader in model.readers_of_members:
        # So that no member drafts: each of its calls takes as long as one of many tokens.
        monkeypatch.setattr(reader, "traits", replace(reader.traits, calls=((1, 1.0), (32, 1.5))))
    ids = torch.tensor([[5, 9, 11, 3, 8, 14, 2, 6] * 3])
    options = {"ids": ids, "mask": torch.ones_like(ids)}
    options["sequence_bias"] = [[[a, b], 50.0] for a, b in zip(ids[0, :8].tolist(), ids[0, 1:9].tolist(), strict=True)]
    calls = Calls(model, monkeypatch)
    plain = made(model, 0, 1, sample=False, count=32, **options)
    assert [len(own) for own in calls.lengths] == [32] * count
    for own in calls.lengths:
        own.clear()
    assert made(model, None, 1, sample=False, count=32, **options).equal(plain)
    assert all(len(own) <= 4 for own in calls.lengths)


def test_what_is_repeated_goes_on_behind_a_token_that_was_replaced():
    text, repeats = [*range(10, 30)], Repeats()
    written, right = list(text), []
    for token in [*text[:6], 99, *text[7:12], 99, *text[13:]]:
        right.append(repeats.next(written)[0] == token)
        written.append(token)
    assert [k for k, own in enumerate(right) if not own] == [0, 1, 6, 12]
    # What was never right is not likely to be so.
    drawn, unlike = Repeats(), [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 6, 1, 2, 7, 1, 2]
    assert [drawn.next(unlike[:k])[1] for k in (5, 17)] == [0.4, pytest.approx(0.1, abs=0.05)]


def test_members_whose_cache_cannot_be_cut(tmp_path, names):
    config = tf.MambaConfig(vocab_size=tiny.V, hidden_size=16, num_hidden_layers=1, state_size=4, **tiny.IDS)
    tf.MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = Ensemble.from_pretrained([names["far"][0], str(tmp_path)], "logit-mean").model
    with pytest.raises(InvalidInputError, match="member 1"):
        made(model, 2, 1)
    assert made(model, "auto", 1).equal(made(model, 0, 1))


def observed(pace, single, each, accepted, rounds=40):
    for k in range(rounds):
        for i in range(pace.n):
            for length in (1, 3):
                pace.calls[i].add(length, single[i] * (1 + each * (length - 1)))
            pace.shares[i].add(k % 10 < 10 * accepted)


@pytest.mark.parametrize(
    ("single", "accepted", "drafts"), [((1, 4), 0.9, True), ((1, 1), 0.8, True), ((1, 4), 0.0, False)]
)
def test_the_pace_follows_what_pays(single, accepted, drafts):
    pace = Pace(2, 0)
    observed(pace, single, 0.05, accepted)
    pace.choose()
    assert (pace.choose() > 0) == drafts
    # What no member has to draft pays as long as it adds tokens at a higher rate than they come without it.
    likely, unlikely = [1.0, 1.9, 2.7, 3.4], [1.0, 1.04, 1.05]
    assert [pace.worth(tokens, 0) for tokens in (likely, unlikely)] == [3, 0]
    assert pace.worth([1.0, 1.9, 1.95], 1) == 0  # a member's draft stays
    # Where calls of several tokens take as long as so many calls, only the order of work changes.
    slow = Pace(2, 0)
    observed(slow, single, 1.0, accepted)
    slow.choose()
    assert slow.choose() == 0
    assert slow.worth([1.0, 1.9, 2.7], 0) == 0
    assert not Pace(1, 0).worth([1.0, 2.0], 0)  # nothing is known yet


def test_a_pace_of_kept_costs_hangs_on_no_clock():
    def chosen(noise):
        pace, found = Pace(2, 0, kept=[((1, 1.0), (4, 1.2)), ((1, 4.0), (4, 4.5))], v=10), []
        for k in range(40):
            for own in (*pace.calls, pace.rule, pace.drafting):
                own.add(1 + k % 3, noise * k)
            pace.shares[0].add(k % 7 != 0)
            found.append((pace.choose(), pace.worth([1.0, 1.8, 2.4], 0)))
        return found

    assert chosen(0.0) == chosen(100.0)
    assert all(count > 0 for count, _ in chosen(1.0))
    # A call of two tokens that is dear does not stand against one of eight that is not.
    steps = Pace(1, 0, kept=[((1, 1.0), (2, 3.0), (8, 3.5))], v=10)
    assert [steps.worth([0.95 * k + 1 for k in range(n)], 0) for n in (2, 9)] == [0, 8]


def test_a_pace_that_has_stopped_tries_again_now_and_then():
    pace = Pace(2, 0)
    observed(pace, (1, 4), 0.05, 0.0)
    chosen = [pace.choose() for _ in range(200)]
    assert 3 <= sum(map(bool, chosen)) <= 10


def generated(*options):
    words = ["generate", "And the king", "-m", "wide", "--rule", "prob-mean", "--max-new-tokens", "12", *options]
    return CliRunner().invoke(app, words)


def test_the_command_draws_from_one_member(monkeypatch):
    drawn, original = [], Combiner.of_drawn
    monkeypatch.setattr(Combiner, "of_drawn", lambda *given: (drawn.append(1), original(*given))[1])
    done = generated("--one-member")
    assert done.exit_code == 0, done.output
    assert len(drawn) == 12
    for options, name in [(("--json",), "--json"), (("--summary",), "--summary"), (("--seed", "1"), "a seed")]:
        refused = generated("--one-member", *options)
        assert isinstance(refused.exception, InvalidInputError)
        assert name in str(refused.exception)
    wrong = generated("--speculate", "fast")
    assert "neither a number of tokens from 0 to 64 nor auto" in " ".join(wrong.output.replace("│", " ").split())


class Remembers(tf.LogitsProcessor):
    """A processor of the caller's own, which may depend on what it was called with before."""

    def __call__(self, input_ids, scores):
        return scores


def test_by_default_calls_draft_where_only_the_time_is_noticed(names, monkeypatch):
    def chunks(model, **options):
        calls = Calls(model, monkeypatch)
        made(model, None, 1, count=20, suppress_tokens=[0], **options)
        return max(length for own in calls.lengths for length in own[1:])

    model = ensemble(names, "same").model
    assert chunks(model) > 1
    assert chunks(model, sample=False) > 1
    assert chunks(model, logits_processor=[Remembers()]) == 1
    assert chunks(model, prefix_allowed_tokens_fn=lambda row, ids: list(range(tiny.V))) == 1
    with pytest.raises(ValueError, match="process group"):  # transformers' loop asks the other processes
        chunks(model, synced_gpus=True)
    half = Ensemble.from_pretrained(names["same"], "logit-mean", dtype="bfloat16").model
    assert chunks(half) == 1
    monkeypatch.setattr(model.members[1], "quantization_method", "bitsandbytes", raising=False)
    assert chunks(model) == 1


@pytest.mark.filterwarnings("ignore")
def test_members_that_were_dequantised_on_loading_draft_as_any_in_single_precision(tmp_path, monkeypatch):
    files, tokenizer = [str(tmp_path / f"{k}.gguf") for k in range(2)], byte_tokenizers.byte_level()
    torch.manual_seed(0)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny.SMALL, "vocab_size": len(tokenizer)}))
    for file in files:
        gguf_files.write(file, llama, tokenizer, bits=8)
    model = Ensemble.from_pretrained([f"{file}+engine=transformers" for file in files], "logit-mean").model
    assert {own.dtype for own in model.parameters()} == {torch.float32}
    calls = Calls(model, monkeypatch)
    made(model, None, 1, count=20, suppress_tokens=[0])
    assert max(length for own in calls.lengths for length in own[1:]) > 1


@pytest.mark.parametrize(("speculate", "chunked"), [("auto", False), (None, False), (2, True)])
def test_auto_drafts_for_few_sequences(names, monkeypatch, speculate, chunked):
    model = ensemble(names, "same").model
    calls, ids = Calls(model, monkeypatch), IDS[:1].expand(3, -1)
    made(model, speculate, 3, ids=ids, mask=torch.ones_like(ids), sample=False, suppress_tokens=[0])
    assert (max(length for own in calls.lengths for length in own[1:]) > 1) == chunked
