"""An ensemble as a model of EleutherAI's lm-evaluation-harness, through the harness's own wrapper for transformers.

From a shell, with the harness's own options::

    python -m softmeet.evaluation.harness --model softmeet --model_args pretrained=my-ensemble --tasks hellaswag

This runs ``lm_eval`` in a process in which ensembles are known. In Python, use :func:`harness_model`. Over tokens the
ensemble solves every position, padding included, in chunks of bounded memory, but the harness holds the
log-probabilities of a whole batch, (B, t, v) floats. Over bytes, and where a member is a GGUF file or another reader,
each text is read by itself, and only the positions of its continuation are solved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import softmeet.hf  # noqa: F401 - so that the Auto classes know ensembles
from softmeet.ensemble import Ensemble
from softmeet.evaluation import byte_harness
from softmeet.evaluation.likelihoods import likelihoods
from softmeet.extras import install_line
from softmeet.hf.checkpoint import saved_config
from softmeet.members.reader_model import ReaderModel

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from tqdm import tqdm
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError(f"the evaluation harness is the package lm-eval: {install_line('lm-eval')}") from error


@register_model("softmeet")
class EnsembleLM(HFLM):  # type: ignore[misc]
    """The harness's model ``softmeet``: its ``hf`` model for ensembles, with another default dtype.

    Unless ``dtype`` is given, members are loaded as :meth:`Ensemble.from_pretrained` does (in fp32 on CPU); ``hf``
    keeps their checkpoints' own dtype.

    Over bytes the harness's tokens are bytes, with two exceptions: a context is shortened only if it has more tokens
    than a member's context, and ``max_gen_toks`` of a task counts tokens of the first member.

    Args:
        pretrained: a saved ensemble's folder or hub id, a member's or a bundled family's name, or the model of an
            ensemble in memory.
        dtype: the weights' dtype; None as said above.
        options: options of the harness's ``HFLM``. Over bytes ``max_length`` is the number of bytes that rolling
            log-likelihoods read at once (by default :attr:`ByteEnsembleForCausalLM.window`), ``batch_size`` that of
            texts that are generated at once, ``"auto"`` being ``max_batch_size``.
    """

    def __init__(self, pretrained: Any, *, dtype: Any = None, **options: Any) -> None:
        if isinstance(pretrained, str) and saved_config(pretrained) is None:
            ensemble = Ensemble.from_pretrained(pretrained, dtype=dtype)
            pretrained, options = ensemble.model, _options(ensemble, options)
        super().__init__(pretrained, dtype=dtype, **options)
        # The harness takes symbols for tokens: where a token has several, they are counted here.
        if self.model.symbols_of_token > 1:
            self._max_length = options.get("max_length") or self.model.window

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Score requests, (cache key or None, context, continuation) each: (log-probability, whether greedy)."""
        found: Iterator[tuple[float, bool]]
        if self.model.symbols_of_token > 1:
            found = byte_harness.log_likelihoods(self.model, [(before, after) for _, before, after in requests])
        elif self.model.claimants or any(isinstance(member, ReaderModel) for member in self.model.members):
            # A reader tells logits where it is asked alone, and the harness would ask it everywhere. To readers that
            # claim, the context alone is given.
            each = likelihoods(self.model, (self._fitting(before, after) for _, before, after in requests))
            found = ((one.log_prob, one.greedy) for one in each)
        else:
            return super()._loglikelihood_tokens(requests, disable_tqdm, **options)  # type: ignore[no-any-return]
        shown, answers = tqdm(found, total=len(requests), disable=disable_tqdm or self.rank != 0), []
        for (key, _, _), answer in zip(requests, shown, strict=True):
            answers.append(answer)
            if key is not None:  # a window of a rolling log-likelihood has none
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _fitting(self, before: Sequence[int], after: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Leave out as many of a context's first tokens as do not fit with its continuation, as the harness does."""
        over = len(before) + len(after) - 1 - self.max_length
        return before[max(0, min(over, len(before) - 1)) :], after

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue the context of each request, in batches of those with the same options."""
        if self.model.symbols_of_token == 1:
            return super().generate_until(requests, disable_tqdm)  # type: ignore[no-any-return]
        asked = Collator(
            [request.args for request in requests], lambda one: (-len(one[0]), one[0]),
            group_fn=lambda one: one[1], group_by="gen_kwargs",
        )  # fmt: skip
        size = self.max_batch_size if self.batch_size == "auto" else self.batch_size
        batches, answers = list(asked.get_batched(n=size)), []
        think = self.think_end_token if isinstance(self.think_end_token, str) else None
        for batch in tqdm(batches, disable=disable_tqdm or self.rank != 0):
            contexts, given = [context for context, _ in batch], batch[0][1]
            options: dict[str, Any] = normalize_gen_kwargs(given, self.max_gen_toks)
            stop, most = handle_stop_sequences(options.pop("until"), eos=None), options.pop("max_gen_toks")
            if not options["do_sample"]:
                options.pop("temperature", None)
            texts = byte_harness.continuations(self.model, contexts, stop, most, **options)
            for context, text in zip(contexts, texts, strict=True):
                answers.append(postprocess_generated_text(text, stop, think))
                self.cache_hook.add_partial("generate_until", (context, given), answers[-1])
        return asked.get_original(answers)  # type: ignore[no-any-return]


def harness_model(ensemble: Ensemble, **options: Any) -> EnsembleLM:
    """Wrap an ensemble in memory as an ``lm_eval`` model, for ``lm_eval.simple_evaluate(model=…, tasks=…)``.

    Args:
        ensemble: the ensemble.
        options: options of the harness's ``HFLM``, such as ``batch_size``; by default ``max_length`` is the shortest
            member's context (over bytes see :class:`EnsembleLM`), and ``device`` the ensemble's.
    """
    return EnsembleLM(pretrained=ensemble.model, **_options(ensemble, options))


def _options(ensemble: Ensemble, options: dict[str, Any]) -> dict[str, Any]:
    """Return ``HFLM``'s options for an ensemble in memory: ``options``, and its own for those that are not given."""
    limit, device = getattr(ensemble.model.config, "max_position_embeddings", None), str(ensemble.model.device)
    return {"max_length": limit, "device": device, "tokenizer": ensemble.tokenizer, "backend": "causal", **options}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
