"""What is refused before vLLM loads its model, as it would be mixed wrongly there, or not at all."""

from __future__ import annotations

import logging
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet_vllm.asked import MEMBERS, Mixed

_log = logging.getLogger("vllm.softmeet")
# Whether vLLM's second model runner runs, as its configuration said in this process.
second_runner = False


def register() -> None:
    """Have vLLM's configurations checked when they are made, in the process that makes them."""
    from vllm.config import VllmConfig

    made = VllmConfig.__post_init__
    if getattr(made, "by_softmeet", False):
        return

    def checked(self: Any) -> None:
        made(self)
        if Mixed.of().members:
            check(self)

    checked.by_softmeet = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = checked


def check(config: Any) -> None:
    """Refuse what cannot be mixed, and set what must be.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        SoftmeetError: if vLLM would leave the mixture out, or a worker would be without the other models; or if these
            have another tokenizer.
    """
    global second_runner
    if config.model_config is None:
        return
    mixed = Mixed.of()
    mixed.settings()
    require_engine(config)
    # vLLM would not tell the newest token in time.
    config.scheduler_config.async_scheduling = False
    _require_one_tokenizer(mixed, config.model_config)
    if config.model_config.logprobs_mode.startswith("raw"):
        _log.warning(
            "log-probabilities of answers are those of %s alone: start vLLM with --logprobs-mode processed_logprobs "
            "for those of the mixture", config.model_config.model,
        )  # fmt: skip
    second_runner = bool(getattr(config, "use_v2_model_runner", False))


def require_engine(config: Any) -> None:
    """Refuse engines in which the other models would be absent, or read something else than the text.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        InvalidInputError: if the engine is such a one.
    """
    parallel, model = config.parallel_config, config.model_config
    if config.speculative_config is not None:
        raise InvalidInputError(
            f"vLLM drops the mixture where it speculates: start it without --speculative-config, or without {MEMBERS}"
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (count := getattr(parallel, name)) > 1:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidInputError(
                f"expected {flag} 1, as the other models are in one of vLLM's workers alone, got {count}: use "
                f"--data-parallel-size, which mixes in each engine, or start vLLM without {MEMBERS}"
            )
    if "ray" in (parallel.distributed_executor_backend, parallel.data_parallel_backend):
        raise InvalidInputError(
            f"expected workers that have {MEMBERS} in their environment, which vLLM does not send through Ray: use its "
            "backend mp"
        )
    if model.enable_prompt_embeds or model.is_multimodal_model:
        got = "--enable-prompt-embeds" if model.enable_prompt_embeds else "a model of images or sounds"
        raise InvalidInputError(f"expected prompts of tokens alone, which other models can read, got {got}")


def _require_one_tokenizer(mixed: Mixed, model: Any) -> None:
    from softmeet.members.huggingface import load_tokenizers
    from softmeet.members.vocabulary import common_vocabulary

    for member in mixed.members:
        common_vocabulary([model.model, member], [*load_tokenizers([model.tokenizer]), *load_tokenizers([member])])
