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
    return Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-c"], trust=0.5)


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


@pytest.fixture(scope="module")
def samples(ensemble, tasks, tmp_path_factory):
    """What the harness made of each document, by task."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from softmeet.evaluation.harness import harness_model

        found = simple_evaluate(
            model=harness_model(ensemble, batch_size=2),
            tasks=[f"softmeet_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
    return {name: sorted(found["samples"][f"softmeet_{name}"], key=lambda s: s["doc_id"]) for name in TASKS}


@torch.inference_mode()
def log_prob(ensemble, context, continuation):
    """Of a continuation, by the ensemble's own forward pass."""
    before = ensemble.tokenizer(context)["input_ids"]
    ids = ensemble.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    log_p = ensemble.model(input_ids=ids).logits[0, :-1].gather(-1, ids[0, 1:, None])
    return log_p[len(before) - 1 :].sum().item()


@pytest.mark.filterwarnings("ignore")
def test_choices_have_our_log_probabilities(ensemble, samples):
    for doc, sample in zip(DOCS, samples["choice"], strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        ours = [log_prob(ensemble, doc["question"], choice) for choice in doc["choices"]]
        assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_rolling_is_our_evaluation_with_a_token_to_begin(ensemble, samples):
    from softmeet.evaluation.choices import RuleChoice
    from softmeet.evaluation.documents import Document
    from softmeet.evaluation.perplexity import evaluate
    from softmeet.evaluation.positions import observe_text

    for doc, sample in zip(DOCS, samples["rolling"], strict=True):
        positions = observe_text(ensemble, [Document("", doc["question"])], bos=True)
        scores = evaluate(ensemble, positions, [RuleChoice("own")]).choices["own"]
        first = sample["resps"][0][0]
        theirs = float(first[0] if isinstance(first, list | tuple) else first)
        assert theirs == pytest.approx(-scores.nats.sum().item(), abs=1e-5)
        assert positions.sizes.sum().item() == len(doc["question"].encode())
        assert math.isfinite(theirs)


@pytest.mark.filterwarnings("ignore")
def test_generation_is_ours(ensemble, samples):
    for doc, sample in zip(DOCS, samples["greedy"], strict=True):
        ours = ensemble.generate(doc["question"], max_new_tokens=4, do_sample=False)
        assert sample["resps"][0][0] == ours


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore")
def test_the_one_liner(ensemble, tasks, samples, tmp_path, monkeypatch):
    """Members are loaded as we load them: the bundled checkpoints are of half precision, which is seen at 1e-4."""
    ensemble.save_pretrained(tmp_path / "ensemble")
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
        ours = [log_prob(ensemble, doc["question"], choice) for choice in doc["choices"]]
        assert theirs == pytest.approx(ours, abs=1e-5)
