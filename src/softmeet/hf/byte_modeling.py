"""``ByteEnsembleForCausalLM``: members with any vocabularies, combined over the bytes of a text.

A *symbol* is one of 257: a byte, 0 to 255, or 256, the end of a text.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from softmeet.errors import InvalidInputError
from softmeet.hf import assembly, checkpoint
from softmeet.hf.answer_length import within_limits
from softmeet.hf.byte_rows import ByteCache, fresh_rows, read_on
from softmeet.hf.byte_tokenizer import byte_tokenizer
from softmeet.hf.call_options import CallOptions, Prefixes
from softmeet.hf.chat import chat_of
from softmeet.hf.combining import Combiner
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.contexts import Contexts
from softmeet.hf.deferral import Deferral
from softmeet.hf.masking import SomethingLeft
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.vocabulary import require_for_bytes
from softmeet.members.huggingface import load_tokenizers
from softmeet.members.member import Member
from softmeet.members.opaque import Head, NoHead
from softmeet.members.prompting import prefix_of
from softmeet.readers.byte_alphabet import begun, continuing
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import END, SYMBOLS
from softmeet.readers.reader import Work
from softmeet.rules.gates import Gate

# The most bytes that evaluation reads at once by default.
_WINDOW = 4096
_NO_END = (
    "a text has to end, as the context of a member is full, but an option forbids its end: lower min_new_tokens, or "
    "take symbol 256 out of suppress_tokens"
)
_log = logging.getLogger("softmeet")


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

    def __init__(self, config: EnsembleConfig, readers: Sequence[ByteMember] | None = None) -> None:
        require_for_bytes(config.settings)
        if readers is None:
            models, spellings = checkpoint.random_members(config, over_bytes=True)
            readers = assembly.readers(config, models, spellings, load_tokenizers(config.members))
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

    @property
    def widths(self) -> list[int]:
        """The number of columns of each member's :meth:`hidden_states`, 260 each: 257 symbols and three costs."""
        return [SYMBOLS + 3] * len(self.readers)

    @property
    def window(self) -> int:
        """The bytes that evaluation reads at once by default: those that fit every member's context, at most 4,096."""
        return min(_WINDOW, *(reader.room for reader in self.readers))

    @property
    def spent(self) -> list[Work]:
        """Each member's :class:`softmeet.readers.reader.Work` since it was loaded, summed over all texts."""
        return [reader.spent for reader in self.readers]

    def work(self, hidden: Float[Tensor, "t 260"]) -> Float[Tensor, "t 3"]:
        """Return the last three columns, the costs, of one member's :meth:`hidden_states`, which describes them."""
        return hidden[:, SYMBOLS:]

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
        for reader in self.readers:
            reader.find_head_again()

    def new_cache(
        self, gate: str | Gate | None = None, *, own_prompts: Any = None, one_member: bool = False
    ) -> ByteCache:
        """Make an empty cache for every member; ``gate`` and ``own_prompts`` are unused over bytes."""
        return ByteCache(len(self.readers))

    def before(self, i: int, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return the tokens that member i reads before a text; it reads all of the text's symbols."""
        mine = own[i] if own else None
        return self.readers[i].prefix if mine is None else mine, 0

    def run(
        self,
        input_ids: Int[Tensor, "B t"],
        cache: Any,
        kept: slice | Int[Tensor, " k"] = slice(None),
        options: CallOptions | None = None,
        attention_mask: Int[Tensor, "B s"] | None = None,
        **shared: Any,
    ) -> tuple[list[Float[Tensor, "B k 257"]], Deferral | None]:
        """Have the members read new symbols, and return their log-probabilities of the symbols that follow.

        Under the gate ``unsure`` members after the first read the sequences of which the first is unsure at a kept
        position, and there all symbols that they have not read. After a sequence that fills the context of one member,
        the end is the only possible symbol for all of them.

        Args:
            input_ids: (B, t), the new symbols, padded on the left.
            cache: the :class:`ByteCache` of the symbols before them, which is updated; None if there are none.
            kept: the k positions among the new symbols at which the members are to be combined.
            options: the call's options, of which the gate and ``prefixes`` are used: the token ids that each member
                reads before the text, as :class:`CallOptions` describes them. None for the members' default prefixes.
            attention_mask: (B, s), 0 at padding, over all symbols so far; None if there is no padding.
            shared: unused.

        Returns:
            (for each member the log-probabilities, in nats, fp64, of the symbol after each kept position, (B, k, 257),
            index 256 being the end, uniform in sequences that it did not read; the :class:`Deferral`: at which of the
            B · k positions all members were asked, None if at all of them).

        Raises:
            InvalidInputError: if the prefixes are malformed, are not token ids of their members, or their number does
                not divide the number of sequences; or if a text that is read from its beginning exceeds a context.
        """
        new, wanted = input_ids.shape[1], torch.arange(input_ids.shape[1])[kept].tolist()
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        symbols = [row[mask.bool()].tolist() for row, mask in zip(input_ids.cpu(), real.cpu(), strict=True)]
        prefixes = None if options is None else options.prefixes
        if prefixes is not None:
            self._require_prefixes(prefixes)
        found, full, asked, deferral = list[Float[Tensor, "B k 257"]](), set[int](), None, None
        started = time.perf_counter()
        for i, reader in enumerate(self.readers):
            rows = cache.members[i].rows if cache is not None else []
            rows = rows or fresh_rows(len(symbols), None if prefixes is None else [own[i] for own in prefixes])
            rows, log_probs = read_on(reader, rows, symbols, new, wanted, asked)
            if cache is not None:
                cache.members[i].rows = rows
            found.append(log_probs)
            full |= {k for k, row in enumerate(rows) if row.is_full}
            if any(row.fills_up for row in rows):
                _log.warning("a text ends because the context of %s is full", reader.spelling.name)
            if not i and options is not None and options.unsure is not None:
                deferral = self.combiner.deferral(options.unsure, log_probs.flatten(0, 1))
                deferral.rows &= real[:, kept].bool().flatten().to(deferral.rows.device)
                asked = set(deferral.rows.view(log_probs.shape[:2]).any(-1).nonzero().flatten().tolist())
                started = time.perf_counter()
        if deferral is not None and asked:
            deferral.seconds = time.perf_counter() - started
        for log_probs in found if full else ():
            # If one member's context is full, the sequence has to end for all of them.
            log_probs[sorted(full), -1:] = torch.eye(SYMBOLS, dtype=torch.float64)[END].log()
        return found, deferral

    def _require_prefixes(self, prefixes: Prefixes) -> None:
        """Raise InvalidInputError unless each entry of ``prefixes`` has token ids or None for every member."""
        n = len(self.readers)
        for own in prefixes:
            if not _is_list(own) or len(own) != n or not all(one is None or _is_list(one) for one in own):
                raise InvalidInputError(
                    f"expected prefixes as a list for each prompt, with token ids or None for each of {n} members, got "
                    f"{own!r}"
                )

    def hidden_states(self, input_ids: Int[Tensor, "1 t"]) -> list[Float[Tensor, "t 260"]]:
        """Compute each member's predictions after every symbol of one text of t symbols, and their costs.

        Args:
            input_ids: (1, t), the text's bytes; a first symbol 256 stands for the start of the text, so that row 0
                predicts its first byte.

        Returns:
            For each member (t, 260), fp64. Row k has in columns 0 to 256 the log-probabilities, in nats, of the symbol
            after symbol k; in column 257 the share of their probability mass that was estimated instead of asked of the
            model; in column 258 the number of calls of the model and in column 259 that of tokens run in them. The last
            two columns are 0 but in the last row, which has the numbers of the whole text.

        Raises:
            InvalidInputError: if the text exceeds a member's context.
        """
        self.contexts.require_no_template()
        symbols, found = input_ids[0].tolist(), []
        # An end symbol at the start begins a text: then its first byte is predicted, too.
        begun = symbols[:1] == [END]
        for reader in self.readers:
            reading, log_probs, unasked = reader.score(bytes(symbols[begun:]))
            costs = np.zeros((len(log_probs), 3))
            costs[:, 0] = unasked
            costs[-1, 1:] = reading.work.calls, reading.work.tokens
            found.append(torch.from_numpy(np.hstack([log_probs, costs])[not begun :]))
        return found

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate symbols as an ensemble over tokens does tokens, and end texts as :func:`within_limits` does."""
        spelling, usual = self.readers[0].spelling, self.generation_config
        return within_limits(super().generate, spelling, usual, inputs, generation_config, kwargs)

    def _get_logits_processor(self, generation_config: Any, input_ids_seq_length: int, **kwargs: Any) -> Any:
        """Put :class:`WholeCharacters` before transformers' processors, :class:`SomethingLeft` after them."""
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        last = len(processors) - (kwargs["model_kwargs"]["call_options"].row_sampler is not None)
        return LogitsProcessorList([WholeCharacters(), *processors[:last], SomethingLeft(_NO_END), *processors[last:]])


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


class WholeCharacters(LogitsProcessor):
    """A logits processor that forbids bytes that cannot continue the text as UTF-8, and an end within a character."""

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return ``scores`` with -inf at forbidden symbols; a row in which all others already have -inf is unchanged.

        Args:
            input_ids: (B, t), the symbols so far.
            scores: (B, 257), scores of the next symbol.
        """
        allowed = torch.stack([continuing(begun(row)) for row in input_ids[:, -3:].tolist()])
        found = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        # A text whose context is full ends within a character if it has to.
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)
