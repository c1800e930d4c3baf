"""``ByteEnsembleForCausalLM``: members whatever their vocabularies, combined over the bytes of a text."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.hf import checkpoint
from softmeet.hf.byte_rows import ByteCache, fresh_rows, read_on
from softmeet.hf.byte_tokenizer import byte_tokenizer
from softmeet.hf.call_options import CallOptions, Prefixes
from softmeet.hf.combining import Combiner, Deferral
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.vocabulary import require_for_bytes
from softmeet.members.byte_member import ByteMember
from softmeet.members.covers import END, SYMBOLS, Pruning
from softmeet.members.reading import Work
from softmeet.members.spelling import Spelling
from softmeet.members.vocabulary import CommonVocabulary
from softmeet.rules.gates import Gate

# Of a text that is evaluated.
_WINDOW = 4096
_log = logging.getLogger("softmeet")


def assemble(
    config: EnsembleConfig, models: Sequence[PreTrainedModel], vocabulary: CommonVocabulary | Sequence[Spelling]
) -> EnsembleForCausalLM:
    """Make the ensemble, over tokens or over bytes, of loaded members, in evaluation mode.

    Args:
        config: names them.
        models: the members.
        vocabulary: as :func:`softmeet.hf.vocabulary.choose_vocabulary` found it.

    Raises:
        UnsupportedHeadError: a member's output layer is not a plain softmax head.
        VocabularyMismatchError: a head has no row for a token.
    """
    model: EnsembleForCausalLM
    if isinstance(vocabulary, CommonVocabulary):
        model = EnsembleForCausalLM(config, models)
        model.adopt(vocabulary.tokenizer, vocabulary.ids)
    else:
        model = ByteEnsembleForCausalLM(config, _readers(config, models, vocabulary))
    model.eval()
    return model


def _readers(
    config: EnsembleConfig, models: Sequence[PreTrainedModel], spellings: Sequence[Spelling]
) -> list[ByteMember]:
    """Make byte members of models and of how their tokenizers spell."""
    pruning = Pruning(config.prune) if config.prune else Pruning(0.0, None)
    prefixes = config.prefixes or [None] * len(models)
    return [
        ByteMember(model, spelling, pruning, prefix)
        for model, spelling, prefix in zip(models, spellings, prefixes, strict=True)
    ]


class _ByteCombiner(Combiner):
    """Combines members whose log-probabilities of the next symbol stand in place of hidden states."""

    def own_logits(
        self, hidden: Sequence[Float[Tensor, "B _"]], deferral: Deferral | None = None
    ) -> Float[Tensor, "n B v"]:
        """Return the members' log-probabilities, in nats."""
        return torch.stack([h[:, :SYMBOLS] for h in hidden])


class ByteEnsembleForCausalLM(EnsembleForCausalLM):
    """A causal LM over 256 bytes and an end, symbol 256, from members that are read byte by byte.

    ``input_ids`` are bytes, and ``max_new_tokens`` counts bytes. Rules that read heads are refused: a byte has no row
    of a softmax matrix.

    Args:
        config: the settings; ``config.members`` names the members.
        readers: the members, in the order of the configuration; None to build them of their own configurations, with
            random weights.

    Raises:
        UnsupportedHeadError: the rule reads heads.
        InvalidInputError: the gate is ``unsure``; or, without ``readers``, the configuration is of one over tokens.
        CheckpointError: without ``readers``, a configuration or a tokenizer of theirs cannot be read.
        VocabularyMismatchError: without ``readers``, a tokenizer of theirs cannot be read over bytes.
    """

    over_bytes = True

    def __init__(self, config: EnsembleConfig, readers: Sequence[ByteMember] | None = None) -> None:
        require_for_bytes(config.settings)
        if readers is None:
            models, spellings = checkpoint.random_members(config, over_bytes=True)
            readers = _readers(config, models, spellings)
        super().__init__(config, [reader.model for reader in readers])
        self.readers = list(readers)
        config.vocab_size, config.max_position_embeddings = SYMBOLS, None
        for own in (config, self.generation_config):
            own.bos_token_id, own.eos_token_id, own.pad_token_id = END, END, END
        # Bytes have no rows of a softmax matrix: one column of zeros says nothing of any of them.
        self.combiner = _ByteCombiner(config.members, [SoftmaxHead(torch.zeros(SYMBOLS, 1)) for _ in readers])
        self.tokenizer = byte_tokenizer()

    @property
    def member_heads(self) -> list[SoftmaxHead]:
        """The members' own output layers."""
        return [reader.head for reader in self.readers]

    @property
    def widths(self) -> list[int]:
        """The width of each member's :meth:`hidden_states`: the symbols, and three columns of costs."""
        return [SYMBOLS + 3] * len(self.readers)

    @property
    def window(self) -> int:
        """Bytes that a text is read by at once, unless one says otherwise: what fits every context, 4,096 at most."""
        return min(_WINDOW, *(reader.room for reader in self.readers))

    @property
    def spent(self) -> list[Work]:
        """What each member has cost since it was loaded."""
        return [reader.spent for reader in self.readers]

    def work(self, hidden: Float[Tensor, "t 260"]) -> Float[Tensor, "t 3"]:
        """Return what rows of a member's :meth:`hidden_states` cost: mass estimated, calls, and tokens run in them."""
        return hidden[:, SYMBOLS:]

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble of some of the members, which both then share, under another configuration."""
        over_bytes: EnsembleForCausalLM = ByteEnsembleForCausalLM(config, [self.readers[k] for k in chosen]).eval()
        return over_bytes

    def find_heads_again(self) -> None:
        """Read the members' output layers where they are now."""
        for reader in self.readers:
            reader.find_head_again()

    def new_cache(self, gate: str | Gate | None = None) -> ByteCache:
        """Make a cache in which no member has read anything of any row; gates make no difference to it."""
        return ByteCache(len(self.readers))

    def run(
        self,
        input_ids: Int[Tensor, "B t"],
        cache: Any,
        kept: slice | Int[Tensor, " k"] = slice(None),
        options: CallOptions | None = None,
        attention_mask: Int[Tensor, "B s"] | None = None,
        **shared: Any,
    ) -> tuple[list[Float[Tensor, "B k 257"]], None]:
        """Have every member read new symbols.

        Args:
            input_ids: the new symbols.
            cache: what the members have read before; None for nothing.
            kept: the positions among the new symbols that are to be combined.
            options: of the call, with each member's tokens before each row, or before each prompt of several rows.
            attention_mask: of all symbols so far; None where there is no padding.
            shared: not used here.

        Returns:
            (every member's log-probabilities in nats of what follows each of the kept symbols, None).
        """
        new, wanted = input_ids.shape[1], torch.arange(input_ids.shape[1])[kept].tolist()
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        symbols = [row[mask.bool()].tolist() for row, mask in zip(input_ids.cpu(), real.cpu(), strict=True)]
        prefixes = None if options is None else options.prefixes
        if prefixes is not None:
            self._require_prefixes(prefixes)
        found, full = [], set[int]()
        for i, reader in enumerate(self.readers):
            rows = cache.members[i].rows if cache is not None else []
            rows = rows or fresh_rows(len(symbols), None if prefixes is None else [own[i] for own in prefixes])
            rows, log_probs = read_on(reader, rows, symbols, new, wanted)
            if cache is not None:
                cache.members[i].rows = rows
            found.append(log_probs)
            full |= {k for k, row in enumerate(rows) if row.readings and row.readings[-1].full}
            if any(row.fills_up for row in rows):
                _log.warning("a text ends because the context of %s is full", reader.spelling.name)
        for log_probs in found if full else ():
            # What one member cannot read on ends for all of them.
            log_probs[sorted(full), -1:] = torch.eye(SYMBOLS, dtype=torch.float64)[END].log()
        return found, None

    def _require_prefixes(self, prefixes: Prefixes) -> None:
        n = len(self.readers)
        for own in prefixes:
            if not _is_list(own) or len(own) != n or not all(one is None or _is_list(one) for one in own):
                raise InvalidInputError(
                    f"expected prefixes as a list for each prompt, with token ids or None for each of {n} members, got "
                    f"{own!r}"
                )

    def hidden_states(self, input_ids: Int[Tensor, "1 t"]) -> list[Float[Tensor, "t 260"]]:
        """Compute each member's log-probabilities in nats after every byte of one text, and what they cost.

        The three columns behind the 257 of the symbols are the share of mass that was estimated, the calls of the model
        and the tokens run in them; these two are in the last row.
        """
        symbols, found = input_ids[0].tolist(), []
        # Behind the end begins a text, whose first byte is then predicted, too.
        begun = symbols[:1] == [END]
        for reader in self.readers:
            reading, log_probs, unasked = reader.score(bytes(symbols[begun:]))
            costs = np.zeros((len(log_probs), 3))
            costs[:, 0] = unasked
            costs[-1, 1:] = reading.work.calls, reading.work.tokens
            found.append(torch.from_numpy(np.hstack([log_probs, costs])[not begun :]))
        return found

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Put the usual ones between one that keeps a text UTF-8 and one that looks whether anything is left."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        last = len(processors) - (model_kwargs["call_options"].row_sampler is not None)
        return LogitsProcessorList([WholeCharacters(), *processors[:last], SomethingLeft(), *processors[last:]])


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


class WholeCharacters(LogitsProcessor):
    """Forbids bytes with which a text would not be UTF-8, and an end within a character."""

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Set the scores of what is forbidden to -inf."""
        forbidden = torch.stack([_forbidden(tuple(row)) for row in input_ids[:, -3:].tolist()])
        found = scores.masked_fill(forbidden.to(scores.device), -torch.inf)
        # A text whose context is full ends within a character if it has to.
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)


class SomethingLeft(LogitsProcessor):
    """Refuses to go on where no symbol is possible any more."""

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores as they are.

        Raises:
            InvalidInputError: a row has none above -inf.
        """
        if bool(scores.isneginf().all(-1).any()):
            raise InvalidInputError(
                "a text has to end, as the context of a member is full, but an option forbids its end: lower "
                "min_new_tokens, or take symbol 256 out of suppress_tokens"
            )
        return scores


@lru_cache(maxsize=4096)
def _forbidden(last: tuple[int, ...]) -> Bool[Tensor, " v"]:
    """Mark the symbols that may not follow the last three."""
    text = bytes(symbol % END for symbol in last)  # after the end a text begins, as after any whole character
    begun = text[codecs.utf_8_decode(text, "replace", False)[1] :]

    def fits(byte: int) -> bool:
        try:
            codecs.utf_8_decode(begun + bytes([byte]), "strict", False)
        except UnicodeDecodeError:
            return False
        # Whether a character is a surrogate the decoder tells by its third byte, too late.
        return begun != b"\xed" or byte < 0xA0

    return ~torch.tensor([*map(fits, range(END)), not begun])
