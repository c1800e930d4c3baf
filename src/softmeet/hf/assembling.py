"""From loaded members to the ensemble of tokens, or of bytes, that they make."""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.errors import InvalidInputError
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.huggingface import Member
from softmeet.members.vocabulary import require_same_vocabulary

VOCABULARIES = ("tokens", "bytes")


def require_vocabulary(name: str, prune: float) -> None:
    """Check what an ensemble is combined over, and the share of mass that is followed there.

    Raises:
        InvalidInputError: there is no such vocabulary, or the share is none.
    """
    if not 0 <= prune < 1:
        raise InvalidInputError(f"expected prune to be a share of mass from 0 to below 1, got {prune}")
    if name not in VOCABULARIES:
        raise InvalidInputError(f"expected a vocabulary, {' or '.join(VOCABULARIES)}, got {name!r}")


def assemble(config: EnsembleConfig, members: Sequence[Member]) -> EnsembleForCausalLM:
    """Make the ensemble that a configuration asks for, in evaluation mode.

    Raises:
        VocabularyMismatchError: the tokenizers differ; or, over bytes, one of them cannot be read.
        UnsupportedHeadError: a member's output layer is not a plain softmax head; or, over bytes, the rule reads heads.
    """
    models, tokenizers = [member.model for member in members], [member.tokenizer for member in members]
    if config.vocabulary == "bytes":
        over_bytes: EnsembleForCausalLM = ByteEnsembleForCausalLM(config, models, tokenizers).eval()
        return over_bytes
    require_same_vocabulary([member.name for member in members], tokenizers)
    tokenizer = tokenizers[0]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: EnsembleForCausalLM = EnsembleForCausalLM(config, models).eval()
    model.adopt(tokenizer)
    return model
