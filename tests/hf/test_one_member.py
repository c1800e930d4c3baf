"""A token drawn from one member, itself drawn by its weight: the probability mean's law, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf
from scipy.stats import chisquare

from softmeet import Ensemble, Structure
from softmeet.engine.combine import Combiner
from softmeet.engine.recorder import Recorder
from softmeet.errors import InvalidInputError

SAID = "Zorblax the quick went to Quixby, and Zorblax the slow went home. "
WEIGHTS = [0.3, 0.7]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    names = [tiny.save(folder / name, name, seed=k) for k, name in enumerate(("gpt2", "llama"))]
    return Ensemble.from_pretrained(names, "prob-mean", weights=WEIGHTS, dtype="float64")


@torch.inference_mode()
def own(ensemble, i, ids):
    """A member's log-probabilities behind some tokens, by transformers alone."""
    return ensemble.model.members[i](input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn at every step, and with which probabilities."""
    found, original = [], Combiner.of_drawn

    def of_drawn(self, states, chosen):
        log_probs = original(self, states, chosen)
        found.append((list(chosen), log_probs))
        return log_probs

    monkeypatch.setattr(Combiner, "of_drawn", of_drawn)
    return found


def test_every_step_has_the_drawn_members_own_distribution(ensemble, drawn):
    """Members that were not drawn for a while catch up, whatever the lengths of prompts in a batch are."""
    prompts = [[5, 9, 11, 3], [7], [4, 4]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(own)) + own for own in prompts])
    mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])
    torch.manual_seed(0)
    made = ensemble.model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=14, one_member=True, pad_token_id=0
    )
    assert len(drawn) == 14
    assert {i for members, _ in drawn for i in members} == {0, 1}
    for step, (members, log_probs) in enumerate(drawn):
        for row, (i, prompt) in enumerate(zip(members, prompts, strict=True)):
            before = [*prompt, *made[row, longest : longest + step].tolist()]
            if ensemble.model.generation_config.eos_token_id in before[len(prompt) :]:
                continue
            assert torch.allclose(log_probs[row].double(), own(ensemble, i, before), atol=1e-9)


def test_tokens_follow_the_mean(ensemble):
    torch.manual_seed(1)
    prompt, count = [5, 9], 2000
    made = ensemble.model.generate(
        torch.tensor([prompt] * count), do_sample=True, top_k=0, max_new_tokens=2, one_member=True, pad_token_id=0,
        attention_mask=torch.ones(count, 2, dtype=torch.int64),
    )[:, 2:]  # fmt: skip
    likeliest = made[:, 0].mode().values.item()
    for before, tokens in ((prompt, made[:, 0]), ([*prompt, likeliest], made[made[:, 0] == likeliest, 1])):
        mean = sum(w * own(ensemble, i, before).exp() for i, w in enumerate(WEIGHTS))
        assert fits(tokens, mean) > 1e-3
    # One member alone is another law.
    assert fits(made[:, 0], own(ensemble, 0, prompt).exp()) < 1e-6


def test_files_are_drawn_without_a_model(tmp_path):
    (tmp_path / "a.txt").write_text(SAID * 3)
    beside = Ensemble.from_pretrained(["wide/gpt2", f"files:{tmp_path}+weight=0.6+relevance=1"], "prob-mean")
    ids = beside.tokenizer([SAID[:33]], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        wanted = beside.model(input_ids=ids).logits[0, -1].double().softmax(-1)
    read = []
    hook = beside.model.members[0].base_model.register_forward_hook(lambda *_: read.append(1))
    torch.manual_seed(1)
    many = ids.repeat(2000, 1)
    drawn = beside.model.generate(
        many, attention_mask=torch.ones_like(many), do_sample=True, top_k=0, max_new_tokens=1, one_member=True
    )[:, -1]
    assert fits(drawn, wanted) > 1e-3
    read.clear()
    beside.generate(SAID[:33], do_sample=True, top_k=0, max_new_tokens=24, one_member=True)
    hook.remove()
    assert len(read) < 20


def fits(tokens, p):
    """The p-value of tokens under some probabilities; those of fewer than five expected tokens are one cell."""
    expected, seen = p * len(tokens), torch.bincount(tokens, minlength=len(p)).double()
    rare = expected < 5
    cells = [torch.cat([x[~rare], *([x[rare].sum()[None]] if rare.any() else [])]).numpy() for x in (seen, expected)]
    return chisquare(*cells).pvalue


def test_a_member_without_weight_is_never_run(ensemble, drawn):
    ensemble.generate("ab", do_sample=True, max_new_tokens=10, weights=[0.0, 1.0], one_member=True)
    assert {i for members, _ in drawn for i in members} == {1}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": False}, "greedy"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9, "top_k": 5}, "top_k, top_p"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_new_tokens": 3}, "min_new_tokens"),
        ({"num_beams": 2}, "num_beams"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"seed": 3}, "a seed"),
        ({"recorder": Recorder()}, "a recorder or report"),
        ({"gate": "unsure:0.5"}, "a gate"),
        ({"structure": Structure.choice(["a", "b"])}, "structure"),
        ({"use_cache": False}, "use_cache"),
    ],
    ids=str,
)
def test_what_needs_the_mean_itself_is_refused_by_name(ensemble, options, named):
    with pytest.raises(InvalidInputError, match=f"one_member.*{named}"):
        ensemble.generate("ab", max_new_tokens=3, one_member=True, **{"do_sample": True, **options})


def test_other_rules_are_refused_and_recurrent_members_are_not(ensemble, tmp_path):
    other = Ensemble.from_pretrained(ensemble.names, "logit-mean")
    with pytest.raises(InvalidInputError, match="the rule logit-mean"):
        other.generate("ab", do_sample=True, max_new_tokens=3, one_member=True)
    config = tf.MambaConfig(vocab_size=tiny.V, hidden_size=16, num_hidden_layers=1, state_size=4, **tiny.IDS)
    tf.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    recurrent = Ensemble.from_pretrained([tiny.save(tmp_path / "gpt2", "gpt2"), tmp_path / "mamba"], "prob-mean")
    assert recurrent.generate("ab", do_sample=True, max_new_tokens=3, one_member=True)
