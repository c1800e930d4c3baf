"""Assembling an ensemble's model of what was loaded: over tokens or over bytes, as its vocabulary is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.hf.chat import ChatTemplates
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.union_space import union_space
from softmeet.members.huggingface import load_tokenizers
from softmeet.members.member import Member
from softmeet.members.prompting import prefix_of
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.vocabulary import CommonVocabulary, surely_differ
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning, require_followed
from softmeet.readers.union_form import UnionForm


def assemble(
    over_tokens: type[Any],
    config: EnsembleConfig,
    models: Sequence[PreTrainedModel],
    vocabulary: CommonVocabulary | Sequence[Spelling],
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> Any:
    """Make an ensemble, over tokens or over bytes, of loaded members, in evaluation mode.

    Args:
        over_tokens: :class:`softmeet.hf.EnsembleForCausalLM`, of which the class of ensembles over bytes is a subclass.
        config: the configuration, which names the members.
        models: the members' models, loaded by :func:`softmeet.members.huggingface.load_members`, in the same order.
        vocabulary: the result of :func:`softmeet.hf.vocabulary.choose_vocabulary`: the members' common vocabulary for
            an ensemble over tokens, or each member's spelling (its tokens as byte strings) for one over bytes.
        tokenizers: the members' tokenizers, for their chat templates.

    Returns:
        an instance of ``over_tokens``.

    Raises:
        UnsupportedHeadError: if the rule needs the members' softmax matrices, as ``meet`` does, and a member's cannot
            be read, or the ensemble is over bytes.
        VocabularyMismatchError: if a member's head has no logit for one of the common tokens.
    """
    if isinstance(vocabulary, CommonVocabulary):
        model = over_tokens(config, models)
        model.adopt(vocabulary.tokenizer, vocabulary.ids)
    else:
        kinds = {kind.__name__: kind for kind in over_tokens.__subclasses__()}
        if config.vocabulary.startswith("union"):
            space = union_space(UnionForm.parse(config.vocabulary), vocabulary, tokenizers)
            model = kinds["UnionEnsembleForCausalLM"](config, models, tokenizers, space)
        else:
            model = kinds["ByteEnsembleForCausalLM"](config, readers(config, models, vocabulary, tokenizers))
    model.chat = ChatTemplates(config.members, tokenizers)
    return model.eval()


def readers(
    config: EnsembleConfig,
    models: Sequence[PreTrainedModel],
    spellings: Sequence[Spelling],
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> list[ByteMember]:
    """Make each member's reader by bytes, from its model, its tokenizer and its spelling (its tokens as bytes)."""
    pruning = Pruning(config.prune) if config.prune else Pruning(0.0, None)
    prompts = [prefix_of(Member.parse(name), own) for name, own in zip(config.members, tokenizers, strict=True)]
    prefixes = config.prefixes or prompts
    return [
        ByteMember(model, spelling, pruning, prefix)
        for model, spelling, prefix in zip(models, spellings, prefixes, strict=True)
    ]


def require_few_ways(
    names: Sequence[str], texts: Sequence[bytes], vocabulary: str, *, trust_remote_code: bool = False
) -> None:
    """Check, by tokenizers alone, that all ways to cut texts into members' tokens can be followed, as by ``prune=0``.

    Nothing is checked if the members may be combined over tokens.

    Args:
        names: the members.
        texts: those that are read.
        vocabulary: as of :func:`softmeet.hf.vocabulary.require_vocabulary`.
        trust_remote_code: whether to run code that comes with a tokenizer.

    Raises:
        InvalidInputError: if there are too many.
    """
    tokenizers = load_tokenizers(names, trust_remote_code=trust_remote_code)
    if vocabulary == "bytes" or (vocabulary == "auto" and surely_differ(tokenizers)):
        for name, own in zip(names, tokenizers, strict=True):
            for text in texts:
                require_followed(spelling_of(name, own), text)
