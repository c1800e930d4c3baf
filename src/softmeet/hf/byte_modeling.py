"""``ByteEnsembleForCausalLM``: members with any vocabularies, combined over the bytes of a text.

A *symbol* is one of 257: a byte, 0 to 255, or 256, the end of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from softmeet.engine.combine import Combiner
from softmeet.engine.processors import SomethingLeft, following
from softmeet.errors import InvalidInputError
from softmeet.hf import checkpoint
from softmeet.hf.answer_length import within_limits
from softmeet.hf.chat import chat_of
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.contexts import Contexts
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.vocabulary import require_for_bytes
from softmeet.members.huggingface import load_tokenizers
from softmeet.members.member import Member
from softmeet.members.opaque import Head, NoHead
from softmeet.members.prompting import prefix_of
from softmeet.readers.byte_reader import ByteReader
from softmeet.readers.byte_tokenizer import byte_tokenizer
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.next_tokens import END, SYMBOLS
from softmeet.readers.reader import Reader, Work
from softmeet.rules.settings import Settings

# The most bytes that evaluation reads at once by default.
_WINDOW = 4096
_NO_END = (
    "a text has to end, as the context of a member is full, but an option forbids its end: lower min_new_tokens, or "
    "take symbol 256 out of suppress_tokens"
)


def _behind(reader: ByteMember, prefix: list[int]) -> ByteMember:
    """Return a reader of the same model with another prefix, which counts its own work."""
    found = copy.copy(reader)
    found.prefix, found.spent = prefix, Work()
    return found


class ByteEnsembleForCausalLM(EnsembleForCausalLM):
    """A causal LM over 257 symbols, the bytes and the end of a text (256), whose members are read byte by byte.

    Each member's token probabilities are turned into the next byte's, which the rule then combines. ``input_ids`` are
    symbols. Rules that need softmax matrices, such as ``meet``, are refused, as these matrices have no rows for bytes.

    Args:
        config: the settings; ``config.members`` names the members.
        readers: the members, a :class:`softmeet.readers.bytes.byte_member.ByteMember` each (a model with its
            tokenizer's spelling), in the order of ``config.members``; None to build each from its own configuration,
            with random weights.

    Raises:
        UnsupportedHeadError: if the rule needs softmax matrices.
        InvalidInputError: if ``readers`` is None and ``config`` describes an ensemble over tokens.
        CheckpointError: if ``readers`` is None and a member's configuration or tokenizer cannot be read.
        VocabularyMismatchError: if ``readers`` is None and a member's tokenizer cannot be used over bytes.
    """

    over_bytes = True
    begin = END
    symbols_of_token = 4
    limit_of_symbols = "max_bytes"

    def __init__(self, config: EnsembleConfig, readers: Sequence[ByteMember] | None = None) -> None:
        require_for_bytes(config.settings)
        if readers is None:
            models, spellings = checkpoint.random_members(config, over_bytes=True)
            readers = checkpoint.byte_members(config, models, spellings, load_tokenizers(config.members))
        heads = {id(reader.model): reader.head for reader in readers}
        super().__init__(config, [reader.model for reader in readers], heads=heads)
        self.readers = list(readers)
        own = [None if one.prefix == list(one.spelling.start) else one.prefix for one in readers]
        self.contexts = Contexts(config.members, [reader.model for reader in readers], own)
        config.vocab_size, config.max_position_embeddings = SYMBOLS, None
        for own in (config, self.generation_config):
            own.bos_token_id, own.eos_token_id, own.pad_token_id = END, END, END
        # Bytes have no rows of a softmax matrix.
        self.combiner = Combiner(config.members, [NoHead(SYMBOLS) for _ in readers])
        self.tokenizer = byte_tokenizer()

    @property
    def member_heads(self) -> list[Head]:
        """The members' own output layers, each over the member's own tokens, in the members' order."""
        return [reader.head for reader in self.readers]

    def room(self, length: int) -> int | None:
        """Return how many tokens may be written: no more than fit into the shortest context of a member."""
        return min(reader.limit for reader in self.readers)

    @property
    def window(self) -> int:
        """The bytes that evaluation reads at once by default: those that fit every member's context, at most 4,096."""
        return min(_WINDOW, *(reader.room for reader in self.readers))

    @property
    def spent(self) -> list[Work]:
        """Each member's :class:`softmeet.readers.reader.Work` since it was loaded, summed over all texts."""
        return [reader.spent for reader in self.readers]

    @property
    def pruning(self) -> dict[str, float]:
        """The least share of probability mass at which a member follows a tokenization of the text, as ``prune``."""
        return {"prune": self.config.prune}

    def own_tokens(self, text: str) -> list[list[int]]:
        """Return for each member the tokens that it reads before every text, and those of this text."""
        return [[*reader.prefix, *reader.spelling.encode(text.encode())] for reader in self.readers]

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble, configured by ``config``, of the members numbered ``chosen``; it shares their weights."""
        tokenizers, readers = chat_of(self).tokenizers, list[ByteMember]()
        for k, name in zip(chosen, config.members, strict=True):
            prefix = prefix_of(Member.parse(name), tokenizers[k])
            readers.append(self.readers[k] if prefix is None else _behind(self.readers[k], prefix))
        over_bytes: EnsembleForCausalLM = ByteEnsembleForCausalLM(config, readers).eval()
        return over_bytes

    def find_heads_again(self) -> None:
        """Take each member's output layer anew from its model, after the model has been moved or cast."""
        self.forget_readers()
        for reader in self.readers:
            reader.find_head_again()

    def key_of(self, i: int) -> Any:
        """Return what members share if one reader reads for both: the model and how its tokens are spelled."""
        return self.readers[i].model, self.readers[i].spelling

    def new_reader(self, i: int, name: str, kept_tokens: int | None) -> Reader:
        """Make a reader of member i; nothing is kept of earlier texts."""
        return ByteReader(self.readers[i], name)

    def before(self, i: int, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return the tokens that member i reads before a text; it reads all of the text's symbols."""
        mine = own[i] if own else None
        if mine is not None and not len(mine):
            raise InvalidInputError("expected a prefix of at least one token, such as the one that begins a text")
        return self.readers[i].prefix if mine is None else mine, 0

    def before_claims(self, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return the bytes of what the first member reads in place of its prefix, such as a conversation."""
        return list(self.readers[0].spelling.spelled(own[0])) if own and own[0] else (), int(list(prompt[:1]) == [END])

    def require(self, settings: Settings) -> None:
        """Raise the errors of :func:`softmeet.hf.vocabulary.require_for_bytes`."""
        require_for_bytes(settings)

    def require_tokens(self, what: str) -> None:
        """Raise InvalidInputError, which says that ``what``, such as "evaluation", is for ensembles over tokens."""
        advice = "load members that share a tokenizer, with vocabulary='tokens'"
        raise InvalidInputError(f"{what} does not take ensembles over bytes: {advice}")

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate symbols as an ensemble over tokens does tokens, and end texts as :func:`within_limits` does."""
        usual = self.generation_config
        return within_limits(super().generate, self.alphabet, usual, inputs, generation_config, kwargs)

    def _get_logits_processor(self, generation_config: Any, input_ids_seq_length: int, **kwargs: Any) -> Any:
        """Put what keeps texts to UTF-8 before transformers' processors, :class:`SomethingLeft` after them."""
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        last = len(processors) - (kwargs["model_kwargs"]["call_options"].row_sampler is not None)
        allowed, end = following(self.alphabet), SomethingLeft(_NO_END)
        return LogitsProcessorList([*allowed, *processors[:last], end, *processors[last:]])
