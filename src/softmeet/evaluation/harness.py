"""An ensemble as a model of EleutherAI's lm-evaluation-harness, through the harness's own wrapper for transformers.

From a shell, with the harness's own options::

    python -m softmeet.evaluation.harness --model softmeet --model_args pretrained=my-ensemble --tasks hellaswag

This runs ``lm_eval`` in a process in which ensembles are known. In Python, use :func:`harness_model`. The ensemble
solves every position, padding included, in chunks of bounded memory, but the harness holds the log-probabilities of a
whole batch, (B, t, v) floats.
"""

from __future__ import annotations

from typing import Any

import softmeet.hf  # noqa: F401 - so that the Auto classes know ensembles
from softmeet.ensemble import Ensemble
from softmeet.extras import install_line
from softmeet.members import zoo

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError(f"the evaluation harness is the package lm-eval: {install_line('lm-eval')}") from error


@register_model("softmeet")
class EnsembleLM(HFLM):  # type: ignore[misc]
    """The harness's model ``softmeet``: its ``hf`` model for ensembles, with another default dtype.

    Unless ``dtype`` is given, members are loaded as :meth:`Ensemble.from_pretrained` does (in fp32 on CPU); ``hf``
    keeps their checkpoints' own dtype.

    Args:
        pretrained: a saved ensemble's folder or hub id, a bundled family's name, or the model of an ensemble in memory.
        dtype: the weights' dtype; None as said above.
        options: options of the harness's ``HFLM``.

    Raises:
        InvalidInputError: if the ensemble is over bytes.
    """

    def __init__(self, pretrained: Any, *, dtype: Any = None, **options: Any) -> None:
        if isinstance(pretrained, str) and zoo.expand(pretrained) != [pretrained]:
            ensemble = Ensemble.from_pretrained(pretrained, dtype=dtype)
            pretrained, options = ensemble.model, _options(ensemble, options)
        super().__init__(pretrained, dtype=dtype, **options)
        self.model.require_tokens("lm-eval")


def harness_model(ensemble: Ensemble, **options: Any) -> EnsembleLM:
    """Wrap an ensemble in memory as an ``lm_eval`` model, for ``lm_eval.simple_evaluate(model=…, tasks=…)``.

    Args:
        ensemble: the ensemble, over tokens.
        options: options of the harness's ``HFLM``, such as ``batch_size``; by default ``max_length`` is the shortest
            member's context, and ``device`` the ensemble's.

    Raises:
        InvalidInputError: if the ensemble is over bytes.
    """
    return EnsembleLM(pretrained=ensemble.model, **_options(ensemble, options))


def _options(ensemble: Ensemble, options: dict[str, Any]) -> dict[str, Any]:
    """Return ``HFLM``'s options for an ensemble in memory: ``options``, and its own for those that are not given."""
    limit, device = getattr(ensemble.model.config, "max_position_embeddings", None), str(ensemble.model.device)
    return {"max_length": limit, "device": device, "tokenizer": ensemble.tokenizer, "backend": "causal", **options}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
