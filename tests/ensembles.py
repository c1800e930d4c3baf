"""An ensemble of tiny members of three architectures, and a rule for tests."""

from __future__ import annotations

from dataclasses import replace

import tiny
import torch

from softmeet import Rule, Status, time_is_over
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.rules.answer import closed_form

MEMBERS = ("gpt2", "llama", "opt projected")
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def build(rule="meet", dtypes=(torch.float64,) * 3):
    models = [tiny.build(name, seed).to(dtype) for (seed, name), dtype in zip(enumerate(MEMBERS), dtypes, strict=True)]
    return EnsembleForCausalLM(EnsembleConfig(members=list(MEMBERS), rule=rule, trust=1.0, tol=1e-10), models).eval()


class Asking(Rule):
    """The average; its rows are out of time where the time for a token is over."""

    name = "test-asking"
    summary = "for tests"

    def solve(self, problem):
        answer = closed_form(problem, problem.log_pool)
        late = int(Status.BUDGET if time_is_over() else Status.OPTIMAL)
        return replace(answer, status=torch.full_like(answer.status, late))
