"""Every kind of member in every use: the ensemble says what its members, run one by one without softmeet, add up to."""

from __future__ import annotations

import math
import warnings

import pytest
import tiny
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from serving import serving_of
from transformers import AutoModelForCausalLM

from softmeet import Ensemble, Member
from softmeet.evaluation.documents import Document
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.server.app import create_app

TEXTS = ["the quick fox", "and then it rains in spain"]
PROMPT, QUESTION = "a long tale. ", "we ask: {prompt}, he says: "
NEW = 6


def lora(folder, base, seed):
    """Write an adapter of random weights for the model in a folder."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a base, another model, two adapters of the base, the base within a folder, and a prompt's file."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.save(folder / "base", "llama", seed=0)
    tiny.save(folder / "other", "gpt2", seed=1)
    tiny.save(folder / "whole" / "inner", "llama", seed=0)
    for seed, name in enumerate(("lora a", "lora+b")):
        lora(folder / name, folder / "base", seed)
    (folder / "tale.txt").write_text(PROMPT)
    return folder


def plain(made, name="base", adapter=None):
    model = AutoModelForCausalLM.from_pretrained(made / name, dtype=torch.float64).eval()
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, made / adapter).merge_and_unload()


# For each kind: its members, and for each of these the model that says the same and what it reads for a text.
KINDS = {
    "plain": lambda f: [(Member(str(f / "base")), plain(f), str), (Member(str(f / "other")), plain(f, "other"), str)],
    "adapter": lambda f: [
        (Member(str(f / "base")), plain(f), str),
        (Member(str(f / "base"), adapter=str(f / "lora a")), plain(f, adapter="lora a"), str),
        (Member(str(f / "base"), adapter=str(f / "lora+b")), plain(f, adapter="lora+b"), str),
    ],
    "prompt": lambda f: [
        (Member(str(f / "base")), plain(f), str),
        (Member(str(f / "base"), prompt=PROMPT), plain(f), lambda text: PROMPT + text),
        (Member(str(f / "base"), prompt="so. "), plain(f), lambda text: "so. " + text),
    ],
    "file": lambda f: [
        (Member(str(f / "base"), prompt=str(f / "tale.txt")), plain(f), lambda text: PROMPT + text),
        (Member(str(f / "other")), plain(f, "other"), str),
    ],
    "template": lambda f: [
        (Member(str(f / "other")), plain(f, "other"), str),
        (Member(str(f / "base"), prompt=QUESTION), plain(f), lambda text: QUESTION.replace("{prompt}", text)),
    ],
    "prompt and adapter": lambda f: [
        (Member(str(f / "base"), prompt=PROMPT), plain(f), lambda text: PROMPT + text),
        (
            Member(str(f / "base"), prompt=PROMPT, adapter=str(f / "lora a")), plain(f, adapter="lora a"),
            lambda text: PROMPT + text,
        ),
    ],
    "subfolder": lambda f: [
        (Member(str(f / "whole"), subfolder="inner"), plain(f), str),
        (Member(str(f / "other")), plain(f, "other"), str),
    ],
    "dtype": lambda f: [
        (Member(str(f / "base"), dtype="bfloat16"), plain(f).bfloat16(), str),
        (Member(str(f / "other"), dtype="float64"), plain(f, "other"), str),
    ],
}  # fmt: skip


class Kind:
    """An ensemble of members of one kind, and the same by hand."""

    def __init__(self, folder, name):
        self.folder, self.name, made = folder, name, KINDS[name](folder)
        self.members = [member for member, _, _ in made]
        self.by_hand = [(model, reads) for _, model, reads in made]
        self.ensemble = Ensemble.from_pretrained(self.members, "logit-mean", dtype="float64")
        self.tokenizer = self.ensemble.tokenizer

    @property
    def is_template(self):
        return any(member.is_template for member in self.members)

    def next_log_probs(self, text, drawn=()):
        """Each member's log-probabilities behind what it reads for a text and the tokens drawn, (n, v)."""
        found = []
        for model, reads in self.by_hand:
            ids = [*self.tokenizer(reads(text))["input_ids"], *drawn]
            with torch.no_grad():
                found.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1))
        return torch.stack(found)

    def greedy(self, text, count=NEW):
        """The tokens that the mean of the members' logits finds likeliest, one after another."""
        drawn = []
        for _ in range(count):
            drawn.append(int(self.next_log_probs(text, drawn).mean(0).argmax()))
            if drawn[-1] == 0:
                break
        return self.tokenizer.decode(drawn, skip_special_tokens=True)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, made):
    return Kind(made, request.param)


def generates(kind):
    for text in TEXTS:
        assert kind.ensemble.generate(text, max_new_tokens=NEW, do_sample=False) == kind.greedy(text)
        assert "".join(kind.ensemble.stream(text, max_new_tokens=NEW, do_sample=False)) == kind.greedy(text)


def runs_without_a_cache(kind):
    text = TEXTS[0]
    assert kind.ensemble.generate(text, max_new_tokens=NEW, do_sample=False, use_cache=False) == kind.greedy(text)


def batches(kind):
    found = kind.ensemble.generate(TEXTS, max_new_tokens=NEW, do_sample=False)
    assert found == [kind.greedy(text) for text in TEXTS]


def predicts(kind):
    solution = kind.ensemble.next_token(TEXTS[0]).solution
    by_hand = kind.next_log_probs(TEXTS[0]).mean(0).log_softmax(-1)
    tol = 0.05 if kind.name == "dtype" else 1e-6
    torch.testing.assert_close(solution.log_probs[0].double(), by_hand, atol=tol, rtol=0)


def beams(kind):
    """A beam search with caches, whose rows are repeated and put in other orders, finds what one without finds."""
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    found = kind.ensemble.generate(TEXTS, **options)
    assert found == kind.ensemble.generate(TEXTS, **options, use_cache=False)
    assert found == [kind.ensemble.generate(text, **options) for text in TEXTS]


def seeds(kind):
    options = {"max_new_tokens": NEW, "seed": 3}
    assert kind.ensemble.generate(TEXTS, **options)[0] == kind.ensemble.generate(TEXTS[0], **options)
    assert kind.ensemble.generate(TEXTS[0], max_new_tokens=NEW, seed=4) != kind.ensemble.generate(TEXTS[0], **options)


def guards(kind):
    """Under a gate that asks the other members at every token, the answer is the same."""
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert kind.ensemble.generate(TEXTS, **options, gate="unsure:1") == [kind.greedy(text) for text in TEXTS]


def saves(kind):
    folder = kind.folder / f"saved {kind.name}"
    kind.ensemble.save_pretrained(folder)
    loaded = Ensemble.from_pretrained(folder, dtype="float64")
    assert [Member.parse(name).weights for name in loaded.names] == [member.weights for member in kind.members]
    assert loaded.generate(TEXTS[0], max_new_tokens=NEW, do_sample=False) == kind.greedy(TEXTS[0])


def evaluates(kind):
    documents = [Document(f"d{k}", text) for k, text in enumerate(TEXTS)]
    if kind.is_template:
        with pytest.raises(Exception, match="has a template, which is for generation alone"):
            observe_text(kind.ensemble, documents)
        return
    found = evaluate(kind.ensemble, observe_text(kind.ensemble, documents), [])
    for i, name in enumerate(found.members):
        losses = []
        for text in TEXTS:
            ids = kind.tokenizer(text)["input_ids"]
            for k in range(1, len(ids)):
                before = kind.tokenizer.decode(ids[:k])
                losses.append(-kind.next_log_probs(before)[i, ids[k]].item())
        tol = 0.02 if kind.name == "dtype" else 1e-6
        assert math.isclose(found.members[name].mean, sum(losses) / len(losses), rel_tol=tol)


def fits(kind):
    if kind.is_template:
        return
    words = "the quick brown fox jumps over a lazy dog and then it rains in spain "
    documents = [Document(f"d{k}", words[k : k + 40]) for k in range(9)]
    found = fit(kind.ensemble, observe_text(kind.ensemble, documents), Options(evaluations=3, rules=("logit-mean",)))
    weights = found.chosen.settings["weights"]
    assert len(weights) == len(kind.members)
    assert math.isclose(sum(weights), 1, rel_tol=1e-6)


def serves(kind):
    with TestClient(create_app(serving_of({"it": kind.ensemble})), base_url="http://localhost") as client:
        for text in TEXTS:
            body = {"prompt": text, "max_tokens": NEW, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["choices"][0]["text"] == kind.greedy(text), answer


USES = (
    generates, runs_without_a_cache, batches, predicts, beams, seeds, guards, saves, evaluates, fits, serves,
)  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_every_kind_in_every_use(kind, use):
    use(kind)
