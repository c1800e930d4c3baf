"""The real lm-evaluation-harness, offline, on tasks that the test writes, against our own numbers."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import warnings
from functools import partial

import pytest
import torch

from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text

pytestmark = pytest.mark.slow

DOCS = [
    {"question": "And the king said unto his", "choices": [" daughter", " ships", " wrath"], "answer": 0},
    {"question": "In the beginning God created the", "choices": [" heaven", " fig"], "answer": 0},
]
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                "metric_list": [{"metric": "byte_perplexity"}]},
    "greedy": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
               "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False},
               "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-c"], trust=0.5, gate="none")


@pytest.fixture(scope="module")
def over_bytes():
    return Ensemble.from_pretrained("mixed", weights=[1, 1])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    for name, settings in TASKS.items():
        shared = {
            "task": f"softmeet_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(shared | settings))  # JSON is YAML
    return folder


def measured(model, tasks, **options):
    """What the harness made of each document, by task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from softmeet.evaluation.harness import harness_model

        found = simple_evaluate(
            model=harness_model(model, **options),
            tasks=[f"softmeet_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
    return {name: sorted(found["samples"][f"softmeet_{name}"], key=lambda s: s["doc_id"]) for name in TASKS}


@pytest.fixture(scope="module")
def samples(ensemble, tasks, tmp_path_factory):
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return measured(ensemble, tasks, batch_size=2)


@torch.inference_mode()
def log_prob(ensemble, context, continuation):
    """Of a continuation, by the ensemble's own forward pass."""
    before = ensemble.tokenizer(context)["input_ids"]
    ids = ensemble.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    log_p = ensemble.model(input_ids=ids).logits[0, :-1].gather(-1, ids[0, 1:, None])
    return log_p[len(before) - 1 :].sum().item()


def rolled(sample):
    """The log-probability of a whole text."""
    first = sample["resps"][0][0]
    return float(first[0] if isinstance(first, list | tuple) else first)


@pytest.mark.filterwarnings("ignore")
def test_the_harness_has_our_numbers(ensemble, samples):
    """Of choices, of whole texts with a token to begin, and texts."""
    for doc, choice, rolling, greedy in zip(DOCS, *(samples[name] for name in TASKS), strict=True):
        ours = [log_prob(ensemble, doc["question"], option) for option in doc["choices"]]
        assert [float(response[0][0]) for response in choice["resps"]] == pytest.approx(ours, abs=1e-5)
        positions = observe_text(ensemble, [Document("", doc["question"])], bos=True)
        scores = evaluate(ensemble, positions, [RuleChoice("own")]).choices["own"]
        assert rolled(rolling) == pytest.approx(-scores.nats.sum().item(), abs=1e-5)
        assert positions.sizes.sum().item() == len(doc["question"].encode())
        assert greedy["resps"][0][0] == ensemble.generate(doc["question"], max_new_tokens=4, do_sample=False)


def symbol_log_probs(ensemble, text):
    """The ensemble's distributions of all symbols of a text, from its members' own scores: (bytes, 257)."""
    p = torch.stack([torch.from_numpy(reader.score(text.encode())[1][:-1]) for reader in ensemble.model.readers])
    return p.mean(0).log_softmax(-1)


def byte_log_prob(ensemble, context, continuation):
    symbols = list((context + continuation).encode())
    own = symbol_log_probs(ensemble, context + continuation)[range(len(symbols)), symbols]
    return own[len(context.encode()) :].sum().item()


@pytest.mark.filterwarnings("ignore")
def test_over_bytes_the_harness_has_our_numbers(over_bytes, tasks, samples):
    """Choices and whole texts, to rounding; a continuation has as many tokens of the first member as asked for."""
    found = measured(over_bytes, tasks, batch_size="auto", max_batch_size=2)
    reader = over_bytes.model.readers[0]
    for k, doc in enumerate(DOCS):
        question, longest = doc["question"], max(map(len, doc["choices"]))
        greedy = over_bytes.generate(question, max_bytes=longest, do_sample=False)
        for choice, response in zip(doc["choices"], found["choice"][k]["resps"], strict=True):
            assert float(response[0][0]) == pytest.approx(byte_log_prob(over_bytes, question, choice), abs=1e-6)
            assert str(response[0][1]) == str(greedy.startswith(choice))
        assert rolled(found["rolling"][k]) == pytest.approx(byte_log_prob(over_bytes, "", question), abs=1e-6)
        text = found["greedy"][k]["resps"][0][0]
        assert text == over_bytes.generate(question, max_new_tokens=4, do_sample=False)
        assert 0 < len(reader.spelling.encode(text.encode())) <= 4


def test_over_bytes_long_contexts_lose_their_first_bytes_alone(over_bytes):
    from softmeet.errors import InvalidInputError
    from softmeet.evaluation.byte_harness import continuations, fitting, log_likelihoods

    text = "\u00e9 And the king said unto his daughter, " * 60
    symbols = list(text.encode())
    kept = bytes(fitting(over_bytes.model, symbols))
    assert text.encode().endswith(kept)
    kept.decode()
    room = [reader.room - len(reader.spelling.encode(kept)) for reader in over_bytes.model.readers]
    assert 0 <= min(room) <= 3
    assert len(kept) > 2 * max(reader.room for reader in over_bytes.model.readers)  # in tokens, not in bytes
    pairs = [(symbols, list(b" fig")), (list(kept)[:-4], list(kept)[-4:])]
    assert all(math.isfinite(x) for x, _ in log_likelihoods(over_bytes.model, pairs))
    with pytest.raises(InvalidInputError, match="the context of"):
        list(log_likelihoods(over_bytes.model, [([1], symbols)]))
    assert continuations(over_bytes.model, [text, ""], [" "], 3, do_sample=False)[0]
    with pytest.raises(InvalidInputError, match="expected max_gen_toks below"):
        continuations(over_bytes.model, [text], [], 1000)


def test_over_bytes_a_continuation_ends_at_a_stop_string(over_bytes):
    from softmeet.evaluation.byte_harness import continuations

    prompts = [doc["question"] for doc in DOCS]
    whole = over_bytes.generate(prompts, max_new_tokens=12, do_sample=False)
    stop = whole[0][4:7]
    found = continuations(over_bytes.model, prompts, [stop], 12, do_sample=False)
    assert found[0] == whole[0][: whole[0].index(stop) + len(stop)]
    assert found[1] != found[0]
    assert found == [continuations(over_bytes.model, [p], [stop], 12, do_sample=False)[0] for p in prompts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_the_one_liner(ensemble, over_bytes, kind, tasks, samples, tmp_path, monkeypatch):
    """Members are loaded as we load them: the bundled checkpoints are of half precision, which is seen at 1e-4."""
    model = ensemble if kind == "tokens" else over_bytes
    model.save_pretrained(tmp_path / "ensemble")
    asked = ["--model", "softmeet", "--model_args", f"pretrained={tmp_path / 'ensemble'}", "--tasks", "softmeet_choice"]
    asked += ["--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["harness", *asked])
    from lm_eval.tasks import TaskManager

    # Under its own name the module has registered its model already.
    monkeypatch.setattr("lm_eval.api.registry.register_model", lambda name: lambda model: model)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    runpy.run_module("softmeet.evaluation.harness", run_name="__main__")
    (written,) = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = map(json.loads, written.read_text().splitlines())
    for doc, sample in zip(DOCS, sorted(lines, key=lambda line: line["doc_id"]), strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        scored = byte_log_prob if kind == "bytes" else log_prob
        ours = [scored(model, doc["question"], choice) for choice in doc["choices"]]
        assert theirs == pytest.approx(ours, abs=1e-5)


def test_a_member_by_its_name_is_an_ensemble_of_one():
    from softmeet.evaluation.harness import EnsembleLM

    found, theirs = EnsembleLM(pretrained="mixed/gpt2", device="cpu"), Ensemble.from_pretrained(["mixed/gpt2"])
    assert (found.model.config.members, found.model.over_bytes) == (theirs.model.config.members, False)


@pytest.mark.filterwarnings("ignore")
def test_of_a_file_log_probabilities_are_the_harnesss_and_asked_for_where_they_are_wanted(tmp_path, monkeypatch):
    import gguf_files
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from softmeet.evaluation.harness import harness_model
    from softmeet.members.zoo import locate
    from softmeet.readers.llama_cpp import LlamaReader

    model, tokenizer = (kind.from_pretrained(locate("mixed/gpt2")) for kind in (AutoModelForCausalLM, AutoTokenizer))
    gguf_files.write(tmp_path / "a.gguf", model, tokenizer)
    ours, theirs = (Ensemble.from_pretrained([name], "logit-mean") for name in (str(tmp_path / "a.gguf"), "mixed/gpt2"))
    question = "And the king said unto his"
    asked = [(question, " daughter"), (question, " s"), ("", "In the beginning"), (question * 9, " ships and kings")]
    requests = [Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(asked)]
    expected = harness_model(theirs, max_length=40).loglikelihood(requests, disable_tqdm=True)
    places, read = [], LlamaReader.read
    monkeypatch.setattr(
        LlamaReader, "read", lambda self, some: places.extend(len(x.at) for x in some) or read(self, some)
    )
    found = harness_model(ours, max_length=40).loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=2e-3)
    assert [bool(greedy) for _, greedy in found] == [bool(greedy) for _, greedy in expected]
    wanted = [len(tokenizer(after, add_special_tokens=False)["input_ids"]) for _, after in asked]
    assert 0 < sum(places) <= sum(wanted) < 40
