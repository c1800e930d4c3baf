"""How sure answers are: of options by the definition, of texts against another reading of them."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from softmeet import Ensemble
from softmeet.answers.asking import Asker, Writing
from softmeet.answers.doubt import Watch, of_options
from softmeet.answers.questions import Form, Question
from softmeet.evaluation.likelihoods import likelihoods
from softmeet.evaluation.scores import disagreement


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, "prob-mean")


def test_doubt_of_options_by_the_definition():
    ours, members = [-1.0, -2.0, -4.0], [[-1.0, -3.0, -4.0], [-2.0, -1.0, -4.0]]
    found = of_options(ours, members)
    p, own = torch.tensor(ours).double().softmax(-1), torch.tensor(members).double().softmax(-1)
    mean = own.mean(0)
    assert found.log_prob == pytest.approx(float(p.max().log()))
    assert found.entropy == pytest.approx(float(-(p * p.log()).sum()))
    assert found.disagreement == pytest.approx(float((own * (own / mean).log()).sum(-1).mean()))
    assert of_options(ours, members[:1]).disagreement is None
    assert found.measures()["log-probability"] == -found.log_prob


@pytest.mark.parametrize("drawn", [{"do_sample": False}, {"seed": 3}, {"do_sample": False, "speculate": 2}])
def test_doubt_of_texts_in_a_batch_is_that_of_reading_each_again(ensemble, drawn):
    prompts, watch = ["the quick brown", "a lazy dog jumps over"], Watch()
    width = ensemble.tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"].shape[1]

    def first_ends(ids, scores, **more):
        return torch.tensor([ids.shape[1] >= width + 3, False])

    found = ensemble.generate(
        prompts, max_new_tokens=7, recorder=watch, logits_processor=LogitsProcessorList([watch.scores]),
        stopping_criteria=StoppingCriteriaList([watch.tokens, first_ends]), **drawn,
    )  # fmt: skip
    assert [len(ensemble.tokenizer(text)["input_ids"]) for text in found] == [3, 7]
    for prompt, text, doubt in zip(prompts, found, watch.doubts(), strict=True):
        before = ensemble.tokenizer(prompt)["input_ids"]
        ids = ensemble.tokenizer(text, add_special_tokens=False)["input_ids"]
        (again,) = likelihoods(ensemble.model, [(before, ids)])
        assert doubt.log_prob == pytest.approx(again.log_prob / len(ids), abs=1e-4)
        hidden = [own[len(before) - 1 :] for own in ensemble.model.hidden_states(torch.tensor([[*before, *ids[:-1]]]))]
        log_probs, _ = ensemble.model.combiner.own_log_probs(hidden)
        assert doubt.disagreement == pytest.approx(float(disagreement(log_probs).mean()), abs=1e-4)
        p = torch.tensordot(torch.tensor(ensemble.model.config.weights).to(log_probs), log_probs.exp(), 1)
        assert doubt.entropy == pytest.approx(float(torch.special.entr(p).sum(-1).mean()), abs=1e-4)


def test_averages_are_watched_without_being_solved_for(ensemble, monkeypatch):
    given = {"max_new_tokens": 3, "do_sample": False, "speculate": 0}
    monkeypatch.setattr("softmeet.engine.combine.Combiner.solve_rows", None)
    for one in (ensemble, Ensemble.from_pretrained(ensemble.names[0], "prob-mean")):
        watch = Watch()
        more = {"recorder": watch, "stopping_criteria": StoppingCriteriaList([watch.tokens])}
        one.generate(["the quick brown"], logits_processor=LogitsProcessorList([watch.scores]), **given, **more)
        (doubt,) = watch.doubts()
        assert (watch.rows, doubt.entropy > 0) == (3, True)
        assert (doubt.disagreement is None) == (one is not ensemble)


def test_answers_have_their_doubt(ensemble):
    choice = Question("1", "the dog", ("A",), ("the fox", "a dog jumps"))
    (one,) = Asker(ensemble, Form("option"), Writing()).ask([choice], 0)
    assert one.doubt == of_options(
        one.scores, [[own.members[i] for own in _likely(ensemble, choice)] for i in range(2)]
    )
    (told,) = Asker(ensemble, Form("match"), Writing(tokens=4)).ask([Question("1", "the dog", ("fox",))], 0)
    assert told.doubt.disagreement > 0
    (own,) = Asker(ensemble, Form("match"), Writing(tokens=4), {"decoder": "particles:n=2"}).ask(
        [Question("1", "the dog", ("fox",))], 0
    )
    assert own.doubt is None


def _likely(ensemble, question):
    from softmeet.answers.asking import text_likelihoods

    form = Form("option")
    return text_likelihoods(ensemble, form.prompt(question), form.options(question))
