"""The ensemble as a causal LM, and the everyday face: text in, text out."""

from __future__ import annotations

import pytest
import tiny
import torch
from ensembles import Asking
from transformers import DynamicCache, GenerationConfig

from softmeet import Ensemble, time_is_over, time_limit
from softmeet.errors import InvalidInputError, NonFiniteError, VocabularyMismatchError
from softmeet.hf import EnsembleCache, EnsembleConfig, EnsembleForCausalLM, Recorder
from softmeet.hf.sampling import RowSampler
from softmeet.simplex import total_variation

MEMBERS = ("gpt2", "llama", "opt projected")


def ensemble(**settings):
    models = [tiny.build(name, seed) for seed, name in enumerate(MEMBERS)]
    config = EnsembleConfig(members=list(MEMBERS), **{"tol": 1e-10, **settings})
    return EnsembleForCausalLM(config, models).eval()


def ids(rows=2, length=7):
    return torch.randint(1, tiny.V, (rows, length), generator=torch.Generator().manual_seed(3))


# The other rules: test_generation.
@pytest.mark.parametrize("rule", ["meet", "prob-mean", "one-hot"])
@torch.inference_mode()
def test_cached_equals_uncached_and_batched_equals_single(rule):
    model = ensemble(rule=rule, trust=1.0)
    tokens = ids()
    full = model(input_ids=tokens, use_cache=False).logits
    cache = model.new_cache()
    pieces = [model(input_ids=tokens[:, a:b], cache=cache, use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 7))]
    assert total_variation(torch.cat(pieces, dim=1), full).max() < 1e-4
    assert cache.get_seq_length() == 7
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(tokens, **options)
    for row in range(2):
        alone = model.generate(tokens[row : row + 1], **options)
        assert torch.equal(alone[0], together[row, : alone.shape[1]])
    assert torch.equal(together, model.generate(tokens, use_cache=False, **options))


@torch.inference_mode()
def test_each_member_has_a_cache_of_its_own():
    model = ensemble()
    cache = model.new_cache()
    model(input_ids=ids(), cache=cache, use_cache=True)
    assert isinstance(cache, EnsembleCache)
    rows = {id(row) for one in cache.texts for row in one.rows}
    assert len(rows) == 3 * len(ids())
    assert cache.get_seq_length() == 7
    cache.crop(-3)
    assert {row.length for one in cache.texts for row in one.rows} == {4}
    cache.reorder_cache(torch.tensor([1, 1]))
    one, other = cache.texts
    assert one.tokens == other.tokens
    assert not {id(row) for row in one.rows} & {id(row) for row in other.rows}
    del one, other
    assert all(reader.bytes for reader in model.readers_of_members)
    cache.reset()
    assert model.reading
    assert not any(reader.bytes for reader in model.readers_of_members)
    model.generate(ids(), max_new_tokens=3, pad_token_id=0)
    assert not any(reader.bytes for reader in model.readers_of_members), "of texts that were written"
    with pytest.raises(InvalidInputError, match=r"expected an EnsembleCache, as model\.new_cache"):
        model.generate(ids(), max_new_tokens=2, cache=DynamicCache())
    with pytest.raises(InvalidInputError, match="cache_implementation='static' is not supported"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")


@torch.inference_mode()
def test_chunks_of_positions_change_nothing(monkeypatch):
    model = ensemble(trust=1.0)
    whole = model(input_ids=ids()).logits
    monkeypatch.setattr("softmeet.engine.combine._ELEMENTS", 1)
    assert total_variation(model(input_ids=ids()).logits, whole).max() < 1e-5


def test_a_members_nan_is_named():
    model = ensemble()
    with torch.no_grad():
        model.members[1].get_output_embeddings().weight[5] = torch.nan
        with pytest.raises(NonFiniteError, match=r"NaN from member 1 .*Members, from 0: gpt2, llama, opt projected"):
            model(input_ids=ids())


def test_settings_are_checked_before_anything_is_loaded():
    for bad in ({"trust": -1.0}, {"weights": [0.5]}, {"rule": "vote"}, {"pool": "x"}, {"tol": 0.0}):
        with pytest.raises(InvalidInputError):
            Ensemble.from_pretrained(["/absent/a", "/absent/b"], **bad)


def test_unequal_padding_of_the_members_heads():
    models = [tiny.build("gpt2"), tiny.build("llama")]
    models[1].resize_token_embeddings(70)
    support = torch.arange(70) < 64
    model = EnsembleForCausalLM(EnsembleConfig(members=["a", "b"], trust=1.0), models, support).eval()
    with torch.inference_mode():
        logits = model(input_ids=ids()).logits
    assert logits.shape[-1] == 70
    assert logits[..., 64:].isneginf().all()
    assert logits[..., :64].isfinite().all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [tiny.save(folder / name.replace(" ", "-"), name, seed) for seed, name in enumerate(MEMBERS)]


@pytest.fixture(scope="module")
def average(folders):
    return Ensemble.from_pretrained(folders, "logit-mean")


def test_text_in_text_out(folders):
    ours = Ensemble.from_pretrained(folders, trust=1.0, weights=[0.5, 0.25, 0.25], gate="none")
    options = {"seed": 5, "max_new_tokens": 5, "do_sample": True}
    text = ours.generate("hello", **options)
    assert isinstance(text, str)
    assert "".join(ours.stream("hello", **options)) == text
    assert ours.generate(["hello"], **options) == [text]
    for wrong in (-1, 1.5, "a"):
        with pytest.raises(InvalidInputError, match="expected top as a number of tokens above 0"):
            ours.next_token("hello", top=wrong)
    report = ours.next_token("hello", top=3)
    assert len(report.top) == 3
    assert len(report.members) == 3
    assert report.solution.status.item() == 0


def test_the_row_sampler_draws_from_the_distribution():
    p = torch.tensor([0.5, 0.2, 0.0, 0.3])
    sampler = RowSampler(0, range(4000))
    out = sampler(torch.zeros(4000, 1, dtype=torch.long), p.log().expand(4000, 4))
    counts = out.argmax(-1).bincount(minlength=4) / 4000
    assert (counts - p).abs().max() < 0.03
    assert counts[2] == 0
    assert (out.isfinite().sum(-1) == 1).all()


def test_bad_prompts(folders):
    ours = Ensemble.from_pretrained(folders)
    for call in (ours.generate, ours.next_token, lambda text: list(ours.stream(text))):
        with pytest.raises(InvalidInputError, match="at least one token, got"):
            call("")
    with pytest.raises(InvalidInputError, match="context of 64 tokens, got 80"):
        ours.generate("x" * 80)
    with pytest.warns(UserWarning, match="past the shortest member's context: cut to 64 tokens"):
        assert len(ours.generate("x" * 60, max_new_tokens=50, do_sample=False, eos_token_id=None)) <= 4
    with pytest.raises(InvalidInputError, match="expected at most 64 tokens, the shortest member's context, got 65"):
        ours.model(input_ids=torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="inputs_embeds is refused"):
        ours.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_members_of_different_tokenizers(folders, tmp_path):
    other = tiny.save(tmp_path / "other", "llama", words=60)
    with pytest.raises(VocabularyMismatchError, match="differ in 4 ids"):
        Ensemble.from_pretrained([folders[0], other], vocabulary="tokens")
    with pytest.raises(VocabularyMismatchError, match="over bytes: it has a WordLevel vocabulary without bytes"):
        Ensemble.from_pretrained([folders[0], other])


def test_a_seed_samples_from_the_whole_distribution_and_greedy_stays_greedy():
    ours = Ensemble.from_pretrained("narrow", "logit-mean")
    greedy = ours.generate("And the king said", max_new_tokens=6, do_sample=False)
    assert ours.generate("And the king said", max_new_tokens=6, do_sample=False, seed=1) == greedy
    assert "".join(ours.stream("And the king said", max_new_tokens=6, do_sample=False, seed=1)) == greedy
    drawn = ours.generate("And the king said", max_new_tokens=6, seed=1)
    assert drawn != ours.generate("And the king said", max_new_tokens=6, seed=1, temperature=0.5)
    assert drawn == ours.generate("And the king said", max_new_tokens=6, seed=1, do_sample=True, top_k=0)
    assert drawn != ours.generate("And the king said", max_new_tokens=6, seed=1, top_k=2)
    given = GenerationConfig(do_sample=True, top_k=2)
    few = ours.generate("And the king said", max_new_tokens=6, seed=1, generation_config=given)
    assert few == ours.generate("And the king said", max_new_tokens=6, seed=1, top_k=2)


def test_a_text_that_utf8_cannot_hold_is_refused(average):
    over_bytes = Ensemble.from_pretrained("mixed")
    for function in (average.generate, average.inspect, average.next_token, over_bytes.generate, over_bytes.inspect):
        with pytest.raises(InvalidInputError, match=r"expected text that UTF-8 can hold, got '\\udcff' at character 1"):
            function("a\udcff")


class Kept(Recorder):
    """Keeps every log-probability that was drawn from."""

    def __init__(self):
        super().__init__()
        self.rows_of_prompts = []

    def add(self, solution, log_probs):
        super().add(solution, log_probs)
        self.rows_of_prompts += list(solution.log_probs)


@pytest.mark.parametrize(
    ("family", "rule"),
    [("narrow", "meet"), ("wide", "prob-mean"), ("mixed", "logit-mean")],
)
def test_reproducible_prompts_get_the_same_bits_alone_and_beside_others(family, rule):
    ours = Ensemble.from_pretrained(family, rule)
    prompts = ["In the beginning", "O", "And the king said unto his daughter, and to all that were in the house,", "O"]
    how = {"seed": 5, "max_new_tokens": 2}
    alone = [Kept() for _ in prompts]
    texts = [ours.generate(p, **how, speculate=0, recorder=kept) for p, kept in zip(prompts, alone, strict=True)]
    together, batch = Kept(), Kept()
    assert ours.generate(prompts, **how, reproducible=True, recorder=together) == texts
    assert texts[1] == texts[3]
    expected = torch.stack([row for kept in alone for row in kept.rows_of_prompts])
    assert torch.equal(torch.stack(together.rows_of_prompts), expected)
    # A batch draws from a generator for each prompt, so that its tokens are others; and so are the bits.
    assert ours.generate(prompts, **how, recorder=batch)[0] == texts[0]
    assert not torch.equal(torch.stack(batch.rows_of_prompts[:: len(prompts)]), expected[: len(expected) // 4])


def test_reproducible_needs_a_seed_and_no_clock(average):
    assert len(average.generate(["a", "b"], reproducible=True, max_new_tokens=2)) == 2
    with pytest.raises(InvalidInputError, match="expected a seed"):
        average.generate(["a", "b"], reproducible=True, do_sample=True)
    with pytest.raises(InvalidInputError, match="expected no limit on a token's seconds"):
        average.generate(["a", "b"], reproducible=True, token_seconds=1.0)
    for seconds in (-1, "1", [1], float("nan")):
        with pytest.raises(InvalidInputError, match="expected token_seconds as a number from 0, got "):
            average.generate("a", token_seconds=seconds)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, {}, "expected a text, got NoneType"),
        ([1], {}, "expected a text, got int"),
        ("a", {"seed": "b"}, "expected a seed that is an integer, got 'b'"),
        ("a", {"seed": 1.5}, "expected a seed that is an integer, got 1.5"),
        ("a", {"prompt_weights": True, "weights": [1, 0]}, "expected weights or prompt_weights, got both"),
    ],
)
def test_wrong_prompts_and_options_are_named(average, text, options, said):
    with pytest.raises(InvalidInputError, match=said):
        average.generate(text, **options, max_new_tokens=2)


def test_a_stream_keeps_the_callers_limit_of_time(folders):
    ours, recorder = Ensemble.from_pretrained(folders, "meet", trust=1.0, gate="none"), Recorder()
    with time_limit(0):
        "".join(ours.stream("ab", max_new_tokens=3, recorder=recorder))
    assert recorder.statuses == {"BUDGET": 3}


def test_a_token_takes_no_longer_than_it_may(folders):
    ours = Ensemble.from_pretrained(folders, Asking())
    for seconds, status in ((None, "OPTIMAL"), (0.0, "BUDGET"), (1e6, "OPTIMAL")):
        recorder = Recorder()
        ours.generate(["hello", "world"], max_new_tokens=3, token_seconds=seconds, recorder=recorder)
        assert recorder.statuses == {status: recorder.rows}
    assert not time_is_over()
