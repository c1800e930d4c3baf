"""The likelihoods of texts behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.ensemble import Ensemble
from softmeet.evaluation.likelihoods import Likelihood, likelihoods


def text_likelihoods(ensemble: Ensemble, prompt: str, options: Sequence[str]) -> list[Likelihood]:
    """Return the likelihood of each of some texts behind a prompt, which every member reads once.

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
        >>> likely, unlikely = text_likelihoods(ensemble, "And the king", [" said", " fox"])
        >>> likely.log_prob > unlikely.log_prob, len(likely.members)
        (True, 3)
    """
    ensemble.model.require_likelihood("an answer by likelihood")
    pairs = [_symbols(ensemble, prompt, option) for option in options]
    # Where a text changes how the prompt's end is cut, it has a prompt of its own: those with one prompt go together.
    order = sorted(range(len(pairs)), key=lambda k: pairs[k][0])
    found = dict(zip(order, likelihoods(ensemble.model, (pairs[k] for k in order)), strict=True))
    return [found[k] for k in range(len(pairs))]


def _symbols(ensemble: Ensemble, prompt: str, option: str) -> tuple[list[int], list[int]]:
    model, kept = ensemble.model, prompt.rstrip(" ")
    whole, before = kept + prompt[len(kept) :] + option, kept or prompt
    if model.begin is not None:
        return [model.begin, *before.encode()], list(whole[len(before) :].encode())
    ids, own = (list(ensemble.tokenizer(text, verbose=False)["input_ids"]) for text in (whole, before))
    return ids[: len(own)], ids[len(own) :]
