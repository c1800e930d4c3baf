"""Every kind of member in every use: the ensemble says what its members, run one by one without softmeet, add up to."""

import copy
import functools
import math
import warnings
from dataclasses import replace

import gguf_files
import pytest
import tiny
import torch
from byte_tokenizers import byte_level
from fastapi.testclient import TestClient
from serving import serving_of
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from softmeet import Ensemble, Member
from softmeet.errors import TraceError
from softmeet.evaluation.documents import Document
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.trace import record
from softmeet.server.app import create_app

TEXTS = ["the quick fox", "and then it rains in spain"]
PROMPT, QUESTION = "a long tale. ", "we ask: {prompt}, he says: "
NEW = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a base, another model, two adapters of the base, the base within a folder, and a prompt's file."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.save(folder / "base", "llama", seed=0)
    tiny.save(folder / "other", "gpt2", seed=1)
    tiny.save(folder / "whole" / "inner", "llama", seed=0)
    for seed, name in enumerate(("lora a", "lora+b")):
        tiny.save_lora(folder / name, folder / "base", seed)
    (folder / "tale.txt").write_text(PROMPT)
    (folder / "files").mkdir()
    words = byte_level()
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**tiny.SMALL, "vocab_size": len(words)})).eval()
        model.lm_head.weight.data.mul_(4)
        gguf_files.write(folder / "files" / f"{name}.gguf", model, words)
    return folder


@functools.cache
def dequantised(made, file):
    """A model of a GGUF file, as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(made / "files", gguf_file=file, dtype=torch.float64).eval()


@functools.cache
def quantised(made):
    """The base with linear layers in eight bits, as transformers and torchao make it."""
    return AutoModelForCausalLM.from_pretrained(
        made / "base", dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    ).eval()


@functools.cache
def plain(made, name="base", adapter=None):
    model = AutoModelForCausalLM.from_pretrained(made / name, dtype=torch.float64).eval()
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

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
        (Member(str(f / "base"), dtype="bfloat16"), copy.deepcopy(plain(f)).bfloat16(), str),
        (Member(str(f / "other"), dtype="float64"), plain(f, "other"), str),
    ],
    "quantised": lambda f: [
        (Member(str(f / "base"), dtype="float32", quantization="int8"), quantised(f), str),
        (
            Member(str(f / "base"), dtype="float32", quantization="int8", prompt=PROMPT), quantised(f),
            lambda text: PROMPT + text,
        ),
        (Member(str(f / "other")), plain(f, "other"), str),
    ],
    "gguf": lambda f: [
        (Member(str(f / "files"), file="a.gguf", engine="transformers"), dequantised(f, "a.gguf"), str),
        (
            Member(str(f / "files" / "b.gguf"), prompt=PROMPT, engine="transformers"), dequantised(f, "b.gguf"),
            lambda text: PROMPT + text,
        ),
    ],
    "native": lambda f: [
        (Member(str(f / "files"), file="a.gguf", engine="llama.cpp"), dequantised(f, "a.gguf"), str),
        (
            Member(str(f / "files" / "a.gguf"), prompt=PROMPT, engine="llama.cpp"), dequantised(f, "a.gguf"),
            lambda text: PROMPT + text,
        ),
        (Member(str(f / "files" / "b.gguf"), engine="transformers"), dequantised(f, "b.gguf"), str),
    ],
}  # fmt: skip
# Of members that compute in less than double precision.
ROUNDED = ("dtype", "quantised", "native")


class Kind:
    """An ensemble of members of one kind, and the same by hand."""

    def __init__(self, folder, name):
        self.folder, self.name, made = folder, name, KINDS[name](folder)
        self.members = [member for member, _, _ in made]
        self.by_hand = [(model, reads) for _, model, reads in made]
        even = [1] * len(self.members)
        self.ensemble = Ensemble.from_pretrained(self.members, "logit-mean", dtype="float64", weights=even)
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

    @functools.cache  # noqa: B019 - as long as its module
    def greedy(self, text):
        """The tokens that the mean of the members' logits finds likeliest, one after another."""
        drawn = []
        for _ in range(NEW):
            drawn.append(int(self.next_log_probs(text, drawn).mean(0).argmax()))
            if drawn[-1] == 0:
                break
        return self.tokenizer.decode(drawn, skip_special_tokens=True)


@pytest.fixture(scope="module")
def kind(request, made):
    return Kind(made, request.param)


def generates(kind):
    text = TEXTS[0]
    assert kind.ensemble.generate(text, max_new_tokens=NEW, do_sample=False) == kind.greedy(text)
    assert "".join(kind.ensemble.stream(text, max_new_tokens=NEW, do_sample=False)) == kind.greedy(text)


def batches(kind):
    found = kind.ensemble.generate(TEXTS, max_new_tokens=NEW, do_sample=False)
    assert found == [kind.greedy(text) for text in TEXTS]


def predicts(kind):
    solution = kind.ensemble.next_token(TEXTS[0]).solution
    by_hand = kind.next_log_probs(TEXTS[0]).mean(0).log_softmax(-1)
    tol = 0.05 if kind.name in ROUNDED else 1e-6
    torch.testing.assert_close(solution.log_probs[0].double(), by_hand, atol=tol, rtol=0)


def beams(kind):
    """A beam search with caches, whose rows are repeated and put in other orders, finds what one without finds."""
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    found = kind.ensemble.generate(TEXTS, **options)
    assert found == kind.ensemble.generate(TEXTS, **options, use_cache=False)
    assert found[0] == kind.ensemble.generate(TEXTS[0], **options)


def saves(kind):
    folder = kind.folder / f"saved {kind.name}"
    kind.ensemble.save_pretrained(folder)
    loaded = Ensemble.from_pretrained(folder, dtype="float64")
    own = [replace(Member.parse(name), hash=None).weights for name in loaded.names]
    assert own == [member.weights for member in kind.members]
    assert loaded.generate(TEXTS[0], max_new_tokens=NEW, do_sample=False) == kind.greedy(TEXTS[0])


def evaluates(kind):
    texts = [text[:9] for text in TEXTS]
    documents = [Document(f"d{k}", text) for k, text in enumerate(texts)]
    if kind.is_template:
        with pytest.raises(Exception, match="has a template, which is for generation alone"):
            observe_text(kind.ensemble, documents)
        return
    found = evaluate(kind.ensemble, observe_text(kind.ensemble, documents), [])
    losses = []
    for text in texts:
        ids = kind.tokenizer(text)["input_ids"]
        losses += [-kind.next_log_probs(kind.tokenizer.decode(ids[:k]))[:, ids[k]] for k in range(1, len(ids))]
    tol = 0.02 if kind.name in ROUNDED else 1e-6
    for own, mean in zip(found.members.values(), torch.stack(losses).mean(0).tolist(), strict=True):
        assert math.isclose(own.mean, mean, rel_tol=tol)


def fits(kind):
    if kind.is_template:
        return
    words = "the quick brown fox jumps over a lazy dog and then it rains in spain "
    documents = [Document(f"d{k}", words[k : k + 8]) for k in range(6)]
    found = fit(kind.ensemble, observe_text(kind.ensemble, documents), Options(evaluations=2, rules=("logit-mean",)))
    weights = found.chosen.settings["weights"]
    assert len(weights) == len(kind.members)
    assert math.isclose(sum(weights), 1, rel_tol=1e-6)


def serves(kind):
    with TestClient(create_app(serving_of({"it": kind.ensemble})), base_url="http://localhost") as client:
        for text in TEXTS:
            body = {"prompt": text, "max_tokens": NEW, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["choices"][0]["text"] == kind.greedy(text), answer


USES = (generates, batches, predicts, beams, saves, evaluates, fits, serves)
# A fit is made of what evaluates reads, and beams work on the rows of the cache that batches fills.
FEWER = {fits: ("plain", "adapter", "prompt", "native"), beams: ("prompt", "template")}
PAIRS = [(kind, use) for kind in KINDS for use in USES if kind in FEWER.get(use, KINDS)]


@pytest.mark.parametrize(
    ("kind", "use"), PAIRS, indirect=["kind"], ids=lambda own: getattr(own, "__name__", own), scope="module"
)
def test_every_kind_in_its_uses(kind, use):
    use(kind)


@pytest.fixture(scope="module")
def over_bytes():
    """A model alone, behind a prompt, and within a template; and each one's reader over bytes."""
    return ["mixed/gpt2", "mixed/llama+prompt=In the beginning ", "mixed/llama+prompt=Hear: {prompt} And he said"]


def test_prompts_over_bytes(over_bytes):
    """A prompt is the prefix of its member; with a template all members begin after their own readings of the text."""
    ensemble = Ensemble.from_pretrained(over_bytes[:2], "logit-mean")
    prompt = ensemble.model.chat.tokenizers[1]("In the beginning ")["input_ids"]
    plain = Ensemble.from_pretrained(["mixed/gpt2", "mixed/llama"], "logit-mean", prefixes=[None, prompt])
    options = {"max_new_tokens": 5, "do_sample": False}
    first = ensemble.generate("the king", **options)
    assert first == plain.generate("the king", **options)
    assert ensemble.model.members[1] is not ensemble.model.members[0]
    both = Ensemble.from_pretrained([over_bytes[0], over_bytes[2]], "logit-mean")
    tokenizers = both.model.chat.tokenizers
    own = [tokenizers[0]("the king")["input_ids"], tokenizers[1]("Hear: the king And he said")["input_ids"]]
    wanted = plain.model.generate(
        torch.tensor([[256]]), prefixes=[own], max_new_tokens=5, do_sample=False, pad_token_id=256
    )
    text = both.generate("the king", **options)
    assert text == plain.tokenizer.decode(wanted[0, 1:], skip_special_tokens=True)
    with TestClient(create_app(serving_of({"it": both, "two": ensemble})), base_url="http://localhost") as client:
        for name, known in (("it", text), ("two", first)):
            body = {"model": name, "prompt": "the king", "max_tokens": 5, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["choices"][0]["text"] == known


def test_members_of_one_model_over_bytes_share_it(over_bytes):
    ensemble = Ensemble.from_pretrained(["mixed/llama", over_bytes[1]], "prob-mean", vocabulary="bytes")
    assert ensemble.model.members[0] is ensemble.model.members[1]
    assert isinstance(ensemble.generate("the king", max_new_tokens=4, seed=1), str)


def test_conversations_by_own_prompts(made):
    """A prompt is the system's words; a template goes around the user's last ones."""
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}!{% endfor %}a:"
    members = [Member(str(made / "base")), Member(str(made / "base"), prompt="so"),
               Member(str(made / "base"), prompt="he asks {prompt}")]  # fmt: skip
    ensemble = Ensemble.from_pretrained(members, "logit-mean", dtype="float64")
    for tokenizer in ensemble.model.chat.tokenizers:
        tokenizer.chat_template = template
    text = ensemble.generate([{"role": "user", "content": "why"}], max_new_tokens=NEW, do_sample=False)
    drawn, model = [], plain(made)
    read = [ensemble.tokenizer(one)["input_ids"] for one in ("u:why!a:", "s:so!u:why!a:", "u:he asks why!a:")]
    for _ in range(NEW):
        with torch.no_grad():
            each = [model(torch.tensor([[*ids, *drawn]])).logits[0, -1].log_softmax(-1) for ids in read]
        drawn.append(int(torch.stack(each).mean(0).argmax()))
        if drawn[-1] == 0:
            break
    assert text == ensemble.tokenizer.decode(drawn, skip_special_tokens=True)


def test_a_trace_is_of_the_prompts_that_members_read(made, tmp_path):
    lines = [str(made / "base"), f"{made / 'base'}+prompt={PROMPT}"]
    documents = [Document("d", TEXTS[0])]
    trace = record(Ensemble.from_pretrained(lines, "logit-mean"), documents, tmp_path / "trace")
    trace.require(Ensemble.from_pretrained(lines, "logit-mean"))
    for other in ([lines[0]] * 2, [lines[0], lines[1] + "so"]):
        with pytest.raises(TraceError, match="with other prefixes"):
            trace.require(Ensemble.from_pretrained(other, "logit-mean"))


def test_evaluations_and_predictions_name_members_by_their_titles(made):
    lines = [str(made / "base"), f"{made / 'base'}+prompt={PROMPT}", f"{made / 'base'}+prompt=so"]
    ensemble = Ensemble.from_pretrained(lines, "logit-mean")
    title = Member(lines[0]).title
    found = evaluate(ensemble, observe_text(ensemble, [Document("d", TEXTS[0])]), [])
    assert list(found.members) == [lines[0], f"{title}+prompt", f"{title}+prompt#2"]
