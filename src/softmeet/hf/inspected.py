"""What an ensemble and its members predict: behind a prompt, and at each token of a text."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.hf.byte_report import GroupReport, group_reports
from softmeet.hf.calibrated import resolved
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.prompts import encoded, states_behind
from softmeet.hf.report import NextToken, TokenReport, TokenReports
from softmeet.hf.vocabulary import require_unicode
from softmeet.readers.byte_alphabet import shown_byte
from softmeet.rules.problem import TokensBefore


def next_token(model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, top: int) -> NextToken:
    """Predict what follows a text, as :meth:`softmeet.Ensemble.next_token` does."""
    if type(top) is not int or top < 1:
        raise InvalidInputError(f"expected top as a number of tokens above 0, got {top!r}")

    def likeliest(log_probs: torch.Tensor) -> list[tuple[str, float]]:
        best = log_probs.exp().topk(min(top, len(log_probs)))
        named = shown_byte if model.over_bytes else lambda i: tokenizer.decode([i])
        return [(named(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    inputs = encoded(model, tokenizer, [text])
    hidden = states_behind(model, inputs)
    before = TokensBefore.of(inputs["input_ids"][:, -1], tokenizer)
    log_probs, solution = model.combiner.solve_rows(hidden, resolved(model, model.settings), before=before)
    members = {name: likeliest(own[0]) for name, own in zip(model.config.members, log_probs, strict=True)}
    symbols = inputs["input_ids"][0].tolist()
    sources = [reader.source(symbols) for reader in model.claimants]
    return NextToken(likeliest(solution.log_probs[0]), members, solution, sources)


def reports_of(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, top: int, given: int | None = None
) -> list[TokenReport] | list[GroupReport]:
    """Report on every token of a text, as :meth:`softmeet.Ensemble.inspect` does."""
    if isinstance(model, ByteEnsembleForCausalLM):
        require_unicode(text)
        if not text:
            raise InvalidInputError("expected a text of at least one byte, got an empty one")
        return group_reports(model, text.encode(), top, given)
    model.require_likelihood("a report on a text")
    inputs = encoded(model, tokenizer, [text])
    tokens = inputs["input_ids"][0, 1:]
    if not len(tokens):
        raise InvalidInputError(f"expected a text of at least two tokens, got {text!r}")
    reports = TokenReports(top)
    # All members run at every position, so that they can be reported, also where a gate is closed.
    hidden = [states[:-1] for states in model.hidden_states(inputs["input_ids"], given)]
    for log_probs, solution in model.combiner.solve_in_chunks(hidden, resolved(model, model.settings)):
        reports.add(solution, log_probs)
    found = [reports.at(row, token) for row, token in enumerate(tokens.tolist())]
    ids = inputs["input_ids"][0].tolist()
    if not model.claimants:
        return found
    each = ([reader.source(ids[: row + 2]) for reader in model.claimants] for row in range(len(found)))
    return [replace(one, sources=own) for one, own in zip(found, each, strict=True)]
