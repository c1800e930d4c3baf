"""Everything that generate() does for one model, for an ensemble; on tiny members of three architectures."""

from __future__ import annotations

import pytest
import tiny
import torch
from ensembles import GREEDY, MEMBERS, PROMPTS, build
from transformers import GenerationConfig, TextStreamer, pipeline

from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.hf import TokenReports


@pytest.fixture(scope="module")
def model():
    return build()


# Every rule in one of these two; caches know nothing of rules.
@pytest.mark.parametrize("rule", ["meet", "logit-mean", "one-hot"])
def test_prompt_lookup_equals_greedy(rule):
    ours = build(rule)
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    plain = ours.generate(prompt, max_new_tokens=6, **GREEDY)
    looked_up = ours.generate(prompt, max_new_tokens=6, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(plain, looked_up)


def test_beams_with_and_without_a_cache(model):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, **GREEDY}
    cached = model.generate(PROMPTS, **options)
    assert cached.shape == (4, 9)
    assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **options))
    alone = model.generate(PROMPTS[1:], **options)
    assert torch.equal(cached[2:], alone)


def test_beams_over_zeros():
    """one-hot gives -inf everywhere else; beams still return one sequence each, the greedy one first."""
    ours = build("one-hot")
    greedy = ours.generate(PROMPTS, max_new_tokens=5, **GREEDY)
    assert torch.equal(ours.generate(PROMPTS, num_beams=2, max_new_tokens=5, **GREEDY), greedy)


def test_several_ends_and_stop_strings(tmp_path):
    folders = [tiny.save(tmp_path / name.replace(" ", "-"), name, seed) for seed, name in enumerate(MEMBERS)]
    ours = Ensemble.from_pretrained(folders, trust=1.0, gate="none")
    text = ours.generate("abc", max_new_tokens=20, do_sample=False, eos_token_id=None)
    ids = ours.tokenizer(text)["input_ids"]
    ends = [ids[6], ids[9]]
    stopped = ours.generate("abc", max_new_tokens=20, do_sample=False, eos_token_id=ends)
    assert text.startswith(stopped)
    assert len(stopped) == 1 + min(ids.index(end) for end in ends)
    stop = text[4:6]
    stopped = ours.generate(
        "abc", max_new_tokens=20, do_sample=False, eos_token_id=None, stop_strings=[stop], tokenizer=ours.tokenizer
    )
    assert stopped == text[: text.index(stop) + 2]


def test_a_call_that_fails_leaves_its_cache_as_it_was(model):
    def fails(ids, scores, **_):
        if ids.shape[1] == first.shape[1] + 2:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    cache, new = model.new_cache(), model.new_cache()
    first = model.generate(PROMPTS, cache=cache, max_new_tokens=2, **GREEDY)
    for speculate in (0, 2):
        for given, ids in ((cache, first), (new, first)):
            before = given.get_seq_length()
            with pytest.raises(KeyboardInterrupt):
                model.generate(
                    ids, cache=given, max_new_tokens=4, speculate=speculate, stopping_criteria=[fails], **GREEDY
                )
            assert given.get_seq_length() == before
    whole = model.generate(PROMPTS, max_new_tokens=6, **GREEDY)
    for given in (cache, new):
        assert torch.equal(model.generate(first, cache=given, max_new_tokens=4, **GREEDY), whole)


@pytest.mark.parametrize("gate", [None, "unsure:0.5"])
def test_where_only_padding_is_kept_all_tokens_are_alike(model, gate):
    mask = torch.tensor([[1, 1, 1, 0]])
    found = model(
        input_ids=torch.tensor([[5, 6, 7, 0]]), attention_mask=mask, use_cache=True, logits_to_keep=1, gate=gate
    )
    assert torch.allclose(found.logits.exp(), torch.full_like(found.logits, 1 / found.logits.shape[-1]))


def test_the_gate_unsure_looks_at_what_is_kept_alone(model):
    """Others read a text where the first is unsure at a kept position, wherever else it is."""
    ids = torch.randint(1, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = model.members[0](input_ids=ids).logits[0].softmax(-1).amax(-1)
    threshold = float(alone[-2:].min()) * (1 - 1e-6)
    assert alone[:-2].min() < threshold
    cache = model.new_cache()
    with torch.no_grad():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=2, gate=f"unsure:{threshold!r}")
    assert [cache.texts[0].read_by(i) for i in range(2)] == [20, 0]
    assert not cache.texts[0].spent


def test_unequal_dtypes():
    ours = build(dtypes=(torch.float32, torch.bfloat16, torch.float64))
    options = {"max_new_tokens": 6, **GREEDY}
    cached = ours.generate(PROMPTS, **options)
    assert torch.equal(cached, ours.generate(PROMPTS, use_cache=False, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha is not supported for an ensemble: contrastive search"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"output_hidden_states": True}, r"model\.hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "pass input_ids"),
        ({"generation_config": GenerationConfig(output_attentions=True, return_dict_in_generate=True)}, "attentions"),
    ],
)
def test_what_an_ensemble_cannot_do_is_refused_by_name(model, options, message):
    with pytest.raises(InvalidInputError, match=message):
        model.generate(PROMPTS[:1], **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_assisted_decoding_on_either_side(model):
    other = tiny.build("llama", 1).double()
    options = {"max_new_tokens": 8, **GREEDY}
    for main, assistant in ((model, other), (other, model)):
        plain = main.generate(PROMPTS[:1], **options)
        assert torch.equal(plain, main.generate(PROMPTS[:1], assistant_model=assistant, **options))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_assistant_is_not_given_the_options_of_the_call(model):
    options = {"max_new_tokens": 5, "weights": [0.8, 0.1, 0.1], **GREEDY}
    plain, reports = model.generate(PROMPTS[:1], **options), TokenReports()
    for assistant in (tiny.build("llama", 1).double(), build("prob-mean")):
        helped = model.generate(PROMPTS[:1], assistant_model=assistant, recorder=reports, **options)
        assert torch.equal(plain, helped)
    assert reports.rows >= 5


def test_a_call_of_the_model_itself_takes_the_same_options(model):
    weights, reports = [0.8, 0.1, 0.1], TokenReports()
    changed = build()
    changed.config.weights = weights
    with torch.inference_mode():
        expected = changed(PROMPTS).logits
        found = model(PROMPTS, weights=weights, gate="none", recorder=reports).logits
        by_settings = model(PROMPTS, settings=changed.settings).logits
    assert torch.equal(found, expected)
    assert torch.equal(by_settings, expected)
    assert reports.rows == PROMPTS.numel()
    with pytest.raises(InvalidInputError, match="as over tokens members share"):
        model(PROMPTS, prefixes=[[None] * 3] * 2)


def test_a_streamer_sees_every_token(model, capsys):
    model.generate(PROMPTS[:1], max_new_tokens=5, streamer=TextStreamer(tiny.tokenizer()), **GREEDY)
    assert len(capsys.readouterr().out.strip()) == 9


def test_a_transformers_script_with_a_pipeline(narrow):
    narrow.model.config.rule = "meet"
    generator = pipeline("text-generation", model=narrow.model, tokenizer=narrow.tokenizer)
    (out,) = generator("And the king said", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert out["generated_text"] == narrow.generate("And the king said", max_new_tokens=5, do_sample=False)


@torch.no_grad()
def test_a_transformers_script_that_evaluates_with_labels_and_generates_in_batches(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    Ensemble.from_pretrained("narrow", "logit-mean").save_pretrained(tmp_path / "a")
    # From here on, nothing but transformers.
    tokenizer, total = AutoTokenizer.from_pretrained(tmp_path / "a"), {}
    for rule in ("logit-mean", "meet"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", rule=rule)
        ids = tokenizer("And the LORD spake unto Moses, saying,", return_tensors="pt")["input_ids"]
        total[rule] = model(input_ids=ids, labels=ids).loss.item()
        log_p = torch.stack([m(input_ids=ids).logits.log_softmax(-1) for m in model.members]).mean(0).log_softmax(-1)
        if rule == "logit-mean":
            by_hand = -log_p[0, :-1].gather(-1, ids[0, 1:, None]).mean().item()
            assert total[rule] == pytest.approx(by_hand, abs=1e-4)
    assert total["meet"] != total["logit-mean"]
    batch = tokenizer(["In the beginning", "And it came to pass in those days"], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert texts[0].startswith("In the beginning")
    assert len(texts) == 2
