"""The likelihoods of texts behind a prompt, which every member reads once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.hf.calibrated import resolved
from softmeet.readers.reader import Read, Reader, finished


@torch.inference_mode()
def log_likelihoods(ensemble: Ensemble, prompt: str, options: Sequence[str]) -> list[float]:
    """Return the log-probability in nats of each of some texts behind a prompt.

    A text's tokens are those that prompt and text have together, behind as many as the prompt has by itself, and spaces
    at the prompt's end belong to the text, as in the lm-evaluation-harness. Over bytes they are the text's bytes.

    Args:
        ensemble: over tokens or bytes; its own settings hold.
        prompt: a text.
        options: texts, none of them empty.

    Raises:
        InvalidInputError: if prompt and text together exceed a member's context, or it is over a union of tokens.

    Example:
        >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
        >>> likely, unlikely = log_likelihoods(ensemble, "And the king", [" said", " fox"])
        >>> likely > unlikely
        True
    """
    model = ensemble.model
    model.require_likelihood("an answer by likelihood")
    pairs = [_symbols(ensemble, prompt, option) for option in options]
    # Where a text changes how the prompt's end is cut, it has a prompt of its own.
    groups = dict[tuple[int, ...], list[int]]()
    for k, (start, _) in enumerate(pairs):
        groups.setdefault(tuple(start), []).append(k)
    found = [0.0] * len(pairs)
    for before, members in groups.items():
        for k, own in zip(members, _behind(ensemble, before, [pairs[k][1] for k in members]), strict=True):
            found[k] = own
    return found


def _symbols(ensemble: Ensemble, prompt: str, option: str) -> tuple[list[int], list[int]]:
    model, kept = ensemble.model, prompt.rstrip(" ")
    whole, before = kept + prompt[len(kept) :] + option, kept or prompt
    if model.begin is not None:
        return [model.begin, *before.encode()], list(whole[len(before) :].encode())
    ids, own = (list(ensemble.tokenizer(text, verbose=False)["input_ids"]) for text in (whole, before))
    return ids[: len(own)], ids[len(own) :]


def _behind(ensemble: Ensemble, before: Sequence[int], texts: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-probabilities of texts, as symbols, behind symbols that are read once."""
    model = ensemble.model
    states = [
        _read(model.readers_of_members[i], *model.before(i, before, ()), before, texts)
        for i in range(len(model.members))
    ]
    settings, targets = resolved(model, model.settings), torch.tensor([symbol for text in texts for symbol in text])
    log_probs = [part.log_probs.cpu() for _, part in model.combiner.solve_in_chunks(states, settings)]
    each = torch.cat(log_probs).gather(-1, targets[:, None]).squeeze(-1)
    return [float(own.double().sum()) for own in each.split([len(text) for text in texts])]


def _read(
    reader: Reader, own: Sequence[int], skipped: int, before: Sequence[int], texts: Sequence[Sequence[int]]
) -> Float[Tensor, "k _"]:
    """Return what a member predicts before each symbol of some texts behind symbols, as its hidden states."""
    symbols, found = list(before)[skipped:], list[Tensor]()
    row = reader.open(symbols, own)
    try:
        first = finished(reader.read([Read(row, symbols[row.known :], [len(symbols) - row.known])]))
        for text in texts:
            more = finished(reader.read([Read(row, text[:-1], range(1, len(text)), keep=False)]))
            for error in (*first.errors.values(), *more.errors.values()):
                raise error
            found += [first.states(), *([more.states()] if len(text) > 1 else [])]
    finally:
        reader.close(row)
    return torch.cat(found)
