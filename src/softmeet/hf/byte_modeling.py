"""``ByteEnsembleForCausalLM``: members whatever their vocabularies, combined over the bytes of a text."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, UnsupportedHeadError
from softmeet.heads import SoftmaxHead
from softmeet.hf.byte_cache import ByteCache, Row
from softmeet.hf.byte_tokenizer import byte_tokenizer
from softmeet.hf.combining import Asked
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.byte_member import ByteMember, Reading
from softmeet.members.covers import END, SYMBOLS
from softmeet.members.work import Work
from softmeet.rules.gates import Gate, Unsure, that_closes
from softmeet.rules.registry import all_rules
from softmeet.rules.settings import Settings

# For each row, each member's tokens before it; None for those before every text.
Prefixes = Sequence[Sequence[Sequence[int] | None]]
# The rule of byte ensembles for which none is named.
BYTE_RULE = "logit-mean"
# Of a text that is evaluated.
_WINDOW = 4096
_log = logging.getLogger("softmeet")


class ByteEnsembleForCausalLM(EnsembleForCausalLM):
    """A causal LM over 256 bytes and an end, symbol 256, from members that are read byte by byte.

    ``input_ids`` are bytes, and ``max_new_tokens`` counts bytes. Rules that read heads are refused: a byte has no row
    of a softmax matrix.

    Args:
        config: the settings; ``config.members`` names the members.
        readers: the members, in the order of the configuration.

    Raises:
        UnsupportedHeadError: the rule reads heads.
        InvalidInputError: the gate ``unsure``.
    """

    def __init__(self, config: EnsembleConfig, readers: Sequence[ByteMember]) -> None:
        require_for_bytes(config.settings)
        super().__init__(config, [reader.model for reader in readers])
        self.readers = list(readers)
        # Bytes have no rows of a softmax matrix: one column of zeros says nothing of any of them.
        self.heads = [SoftmaxHead(torch.zeros(SYMBOLS, 1)) for _ in readers]
        self.capped = False
        config.vocab_size, config.max_position_embeddings = SYMBOLS, None
        config.bos_token_id, config.eos_token_id, config.pad_token_id = END, END, END
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.generation_config, key, getattr(config, key))
        self.adopt(byte_tokenizer())

    over_bytes = True

    @property
    def member_heads(self) -> list[SoftmaxHead]:
        """The members' own output layers."""
        return [reader.head for reader in self.readers]

    @property
    def widths(self) -> list[int]:
        """Of a row of each member's :meth:`hidden_states`."""
        return [SYMBOLS + 3] * len(self.readers)

    @property
    def spent(self) -> list[Work]:
        """What each member has cost since it was loaded."""
        return [reader.spent for reader in self.readers]

    def work(self, hidden: Float[Tensor, "t 260"]) -> Float[Tensor, "t 3"]:
        """What rows of a member's :meth:`hidden_states` cost: mass estimated, calls, and tokens run in them."""
        return hidden[:, SYMBOLS:]

    def require(self, settings: Settings) -> None:
        """Check that members can be combined by these settings.

        Raises:
            UnsupportedHeadError, InvalidInputError: as :func:`require_for_bytes`.
        """
        require_for_bytes(settings)

    def require_tokens(self, what: str) -> None:
        """Refuse what is not there over bytes.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"{what} does not take ensembles over bytes: load members that share a tokenizer, with vocabulary='tokens'"
        )

    def with_changes(self, weights: Sequence[float] | None, gate: str | Gate | None) -> Settings:
        """As for tokens; refuses what has no meaning over bytes.

        Raises:
            UnsupportedHeadError, InvalidInputError: as :func:`require_for_bytes`.
        """
        settings = super().with_changes(weights, gate)
        self.require(settings)
        return settings

    @property
    def window(self) -> int:
        """Bytes that a text is read by at once, unless one says otherwise: what fits every context, 4,096 at most."""
        return min(_WINDOW, *(reader.room for reader in self.readers))

    def adopt(self, tokenizer: PreTrainedTokenizerBase, ids: frozenset[int] | None = None) -> None:
        """Take the tokenizer of bytes."""
        self.tokenizer = tokenizer

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble of some of the members, which both then share, under another configuration."""
        over_bytes: EnsembleForCausalLM = ByteEnsembleForCausalLM(config, [self.readers[k] for k in chosen]).eval()
        return over_bytes

    def find_heads_again(self) -> None:
        """Read the members' output layers where they are now."""
        for reader in self.readers:
            reader.find_head_again()

    @property
    def device(self) -> torch.device:
        """Where distributions are combined: on the processor, where bytes are counted."""
        return torch.device("cpu")

    def new_cache(self, gate: str | Gate | None = None) -> Any:
        """Make a cache in which no member has read anything of any row; gates make no difference to it."""
        return ByteCache(len(self.readers))

    def run(
        self,
        input_ids: Int[Tensor, "B t"],
        cache: Any,
        kept: slice | Int[Tensor, " k"] = slice(None),
        attention_mask: Int[Tensor, "B s"] | None = None,
        prefixes: Prefixes | None = None,
        **shared: Any,
    ) -> list[Float[Tensor, "B k 257"]]:
        """Every member's log-probabilities of what follows each of the kept symbols.

        ``prefixes`` are each member's own tokens before each row, or before each prompt of several rows.
        """
        new, wanted = input_ids.shape[1], torch.arange(input_ids.shape[1])[kept].tolist()
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
        symbols = [row[mask.bool()].tolist() for row, mask in zip(input_ids.cpu(), seen.cpu(), strict=True)]
        if prefixes is not None:
            self._require_prefixes(prefixes)
        found, full = [], set[int]()
        for i, reader in enumerate(self.readers):
            rows = cache.members[i].rows if cache is not None else []
            rows = rows or _fresh(len(symbols), None if prefixes is None else [own[i] for own in prefixes])
            rows, log_probs = _read_on(reader, rows, symbols, new, wanted)
            if cache is not None:
                cache.members[i].rows = rows
            found.append(log_probs)
            full |= {k for k, row in enumerate(rows) if row.readings and row.readings[-1].full}
            if any(row.fills_up for row in rows):
                _log.warning("a text ends because the context of %s is full", reader.spelling.name)
        for log_probs in found if full else ():
            # What one member cannot read on ends for all of them.
            log_probs[sorted(full), -1:] = torch.eye(SYMBOLS, dtype=torch.float64)[END].log()
        return found

    def _require_prefixes(self, prefixes: Prefixes) -> None:
        n = len(self.readers)
        for own in prefixes:
            each = isinstance(own, Sequence) and not isinstance(own, str) and len(own) == n
            if not each or any(
                one is not None and (isinstance(one, str) or not isinstance(one, Sequence)) for one in own
            ):
                raise InvalidInputError(
                    f"expected prefixes as a list for each prompt, with token ids or None for each of {n} members, got "
                    f"{own!r}"
                )

    def hidden_states(self, input_ids: Int[Tensor, "1 t"]) -> list[Float[Tensor, "t 260"]]:
        """Each member's log-probabilities after every byte, and what they cost.

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

    def own_logits(self, hidden: Sequence[Float[Tensor, "B _"]], asked: Asked | None = None) -> Float[Tensor, "n B v"]:
        """The members' log-probabilities, which stand in place of hidden states."""
        return torch.stack([h[:, :SYMBOLS] for h in hidden])

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The usual ones, between one that keeps a text UTF-8 and one that looks whether anything is left."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        last = len(processors) - ((model_kwargs or {}).get("row_sampler") is not None)
        return LogitsProcessorList([WholeCharacters(), *processors[:last], SomethingLeft(), *processors[last:]])


class WholeCharacters(LogitsProcessor):
    """Forbids bytes with which a text would not be UTF-8, and an end within a character."""

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Scores that are -inf at what is forbidden."""
        forbidden = torch.stack([_forbidden(tuple(row)) for row in input_ids[:, -3:].tolist()])
        found = scores.masked_fill(forbidden.to(scores.device), -torch.inf)
        # A text whose context is full ends within a character if it has to.
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)


class SomethingLeft(LogitsProcessor):
    """Refuses to go on where no symbol is possible any more."""

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """The scores as they are.

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
    return ~torch.tensor(_following(last))


def _following(last: Sequence[int]) -> list[bool]:
    """Which of 257 symbols may follow the last three."""
    for back in range(1, len(last) + 1):
        lead, behind = last[-back], back - 1
        if lead >= 0xC2 and lead <= 0xF4:
            length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            if behind + 1 >= length:
                break
            low, high = (_SECOND.get(lead, (0x80, 0xBF))) if not behind else (0x80, 0xBF)
            return [low <= k <= high for k in range(SYMBOLS)]
        if not 0x80 <= lead < 0xC0:
            break
    return _BEGINNINGS


# What the second byte may be where a longer spelling, a surrogate or a number past the last character would begin.
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
_BEGINNINGS = [k < 0x80 or 0xC2 <= k <= 0xF4 or k == END for k in range(SYMBOLS)]


def require_for_bytes(settings: Settings) -> None:
    """Check that a rule and a gate can be used over bytes.

    Raises:
        UnsupportedHeadError: the rule reads heads.
        InvalidInputError: the gate is ``unsure``.
    """
    if isinstance(that_closes(settings.gate), Unsure):
        raise InvalidInputError(
            "the gate 'unsure' is not for byte ensembles, whose members are never behind each other: leave it out"
        )
    rule = settings.rule
    if rule.reads_heads:
        averages = " or ".join(one.name for one in all_rules() if one.is_average)
        raise UnsupportedHeadError(
            f"the rule {rule.name} reads the rows of softmax matrices, and bytes have none: choose {averages}, or "
            "members that share a tokenizer"
        )


def _nothing_known(*shape: int) -> Float[Tensor, "... 257"]:
    """What stands at padding: all symbols alike."""
    return torch.full((*shape, SYMBOLS), -math.log(SYMBOLS), dtype=torch.float64)


def _fresh(count: int, prefixes: Sequence[Sequence[int] | None] | None) -> list[Row]:
    """So many rows of which nothing was read.

    Raises:
        InvalidInputError: they cannot be dealt out to so many prefixes.
    """
    if prefixes is None:
        return [Row()] * count
    if not prefixes or count % len(prefixes):
        raise InvalidInputError(f"expected prefixes for each of {count} prompts, got {len(prefixes)}")
    own = [None if prefix is None else tuple(prefix) for prefix in prefixes]
    return [Row(prefix=prefix) for prefix in own for _ in range(count // len(prefixes))]


def _read_on(
    reader: ByteMember, rows: Sequence[Row], symbols: Sequence[Sequence[int]], new: int, wanted: Sequence[int]
) -> tuple[list[Row], Float[Tensor, "B k 257"]]:
    """Each row with its new symbols, and the log-probabilities after those that are wanted."""
    out = _nothing_known(len(rows), len(wanted))
    found = list(rows)
    going = {k for k, row in enumerate(rows) if row.readings}
    for k, own in enumerate(symbols):
        if k not in going:
            row = replace(rows[k], symbols=(*rows[k].symbols, *own))
            found[k], log_probs = _read(reader, row, len(own), new, wanted)
            out[k] = log_probs
    for column in range(new):
        # A row's new symbols stand at the end of the columns.
        now = [k for k in sorted(going) if column >= new - len(symbols[k])]
        if not now:
            continue
        given = [symbols[k][column - new + len(symbols[k])] for k in now]
        readings = reader.advance([found[k].readings[-1] for k in now], given)
        for k, symbol, reading in zip(now, given, readings, strict=True):
            found[k] = found[k].longer(symbol, reading)
        if column in wanted:
            out[now, list(wanted).index(column)] = reader.log_probs(readings)
    return found, out


def _read(
    reader: ByteMember, row: Row, count: int, new: int, wanted: Sequence[int]
) -> tuple[Row, Float[Tensor, "k 257"]]:
    """A row from its beginning; what comes after the end is another text."""
    symbols = row.symbols
    ends = [k for k, symbol in enumerate(symbols) if symbol == END]
    text = bytes(symbols[ends[-1] + 1 if ends else 0 :])
    out = _nothing_known(len(wanted))
    if list(wanted) in ([new - 1], []):
        reading: Reading = reader.begin(text, row.prefix)
        if wanted:
            out[0] = reader.log_probs([reading])[0]
        return replace(row, readings=(reading,)), out
    reading, log_probs, _ = reader.score(text, row.prefix)
    for place, column in enumerate(wanted):
        # Column new - 1 is the last symbol, after which the last row of the scores comes.
        behind = new - 1 - column
        if behind < min(count, len(text)):
            out[place] = torch.from_numpy(log_probs[len(text) - behind])
    return replace(row, readings=(reading,)), out
