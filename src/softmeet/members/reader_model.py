"""A reader as a causal language model of transformers, as which an ensemble holds every member."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from softmeet.errors import InvalidInputError
from softmeet.members.member import Member
from softmeet.members.native import identity_of, is_native, reader_of
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.members.placement import LOGITS, let_give_logits

# Why a head cannot be read, for messages.
_READER = ("is not there: it is a reader, which tells logits alone", "")
_LLAMA = (
    "is a GGUF file's, which is read only if a rule that reads it is named on loading",
    "load the ensemble by such a rule",
)


class ReaderModel(PreTrainedModel, GenerationMixin):
    """A reader as a causal language model, which reads each text anew; decoding uses the reader itself.

    Its one parameter tells it from other members, as weights tell models: it is made of a GGUF file's contents, or of
    the member's line of text.

    Args:
        member: the member, of which :func:`softmeet.members.native.has_reader` is true.
        reader: its reader; None for what :func:`softmeet.members.native.reader_of` returns.
        head: the output layer, if the reader tells hidden states; None if it does not.

    Attributes:
        reader: the reader.
        assets: the folder for what is derived from a GGUF file; None of others.
        head: the output layer, which is not read: the reader tells logits.

    Example:
        >>> from softmeet.testing import Uniform
        >>> import softmeet
        >>> softmeet.register_reader("uniform", Uniform)
        >>> ReaderModel(Member("uniform:bytes"))(torch.tensor([[104, 105]])).logits.shape
        torch.Size([1, 2, 257])
    """

    config_class = PreTrainedConfig

    def __init__(self, member: Member, reader: Any = None, head: Head | None = None) -> None:
        reader = reader or reader_of(member)
        tokenizer, v = reader.alphabet.tokenizer, reader.alphabet.size
        config = PreTrainedConfig(
            vocab_size=v, max_position_embeddings=reader.limit if reader.limit < 1 << 30 else None,
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(reader.alphabet.ends) or None,
        )  # fmt: skip
        super().__init__(config)
        mark = hashlib.sha256(identity_of(member).encode()).digest()
        self.mark = nn.Parameter(torch.tensor(list(mark), dtype=torch.float32), requires_grad=False)
        self.reader, self._member = reader, member.base
        self.assets: Path | None = getattr(reader, "assets", None)
        let_give_logits(self)
        why, remedy = _LLAMA if is_native(member) else _READER
        self.head: Head = OpaqueHead(self, v, v, why, remedy, known=reader.traits.known)
        if head is not None:
            self._open(head)

    def open_head(self) -> None:
        """Have the head be read, and the reader tell hidden states, if it is a GGUF file's and that was not done.

        Raises:
            UnsupportedHeadError: if the head is not what makes the reader's logits.
        """
        opens = getattr(self.reader, "open_head", None)
        if opens is not None and isinstance(self.head, OpaqueHead):
            self._open(opens())

    def _open(self, head: Head) -> None:
        self.head = head
        self.__dict__.pop(LOGITS, None)
        self.model = _Trunk(self.reader)

    def __reduce__(self) -> Any:
        """Have a copy in another process make its reader there."""
        head = None if isinstance(self.head, OpaqueHead) else self.head
        return ReaderModel, (self._member, self.reader if is_native(self._member) else None, head)

    def get_input_embeddings(self) -> nn.Module:
        """Return a layer without width, which tells how many tokens there are."""
        return nn.Embedding(self.head.v, 0)

    def get_output_embeddings(self) -> None:
        """Return None: logits come from the reader."""
        return

    def forward(
        self,
        input_ids: Int[Tensor, "B t"],
        attention_mask: Int[Tensor, "B t"] | None = None,
        cache: Any = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Read texts from their beginnings.

        Args:
            input_ids: their tokens.
            attention_mask: 0 at padding, which is not read; None if there is none.
            cache: is refused, as rows of the reader take its place.
            options: those of other models, which make no difference here.

        Raises:
            InvalidInputError: if a cache is given, or a text is longer than the reader's limit.
        """
        return CausalLMOutput(logits=_told(self.reader, "logits", input_ids, attention_mask, cache))


class _Trunk(nn.Module):
    """What of a reader gives hidden states."""

    def __init__(self, reader: Any) -> None:
        super().__init__()
        self._reader = reader

    def forward(
        self,
        input_ids: Int[Tensor, "B t"],
        attention_mask: Int[Tensor, "B t"] | None = None,
        cache: Any = None,
        **options: Any,
    ) -> BaseModelOutput:
        return BaseModelOutput(_told(self._reader, "hidden", input_ids, attention_mask, cache))


def _told(
    reader: Any, what: str, input_ids: Int[Tensor, "B t"], attention_mask: Int[Tensor, "B t"] | None, cache: Any
) -> Float[Tensor, "B t w"]:
    """Read texts from their beginnings; returns their ``logits`` or ``hidden`` states, zeros at padding."""
    if cache is not None:
        raise InvalidInputError(f"expected no cache for {reader.name}, which is read by its reader's rows")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    texts = [row[mask].tolist() for row, mask in zip(input_ids, real.bool(), strict=True)]
    told = getattr(reader.read_whole(texts, [range(1, len(text) + 1) for text in texts]), what)()
    found: Float[Tensor, "B t w"] = told.new_zeros(*input_ids.shape, told.shape[-1])
    found[real.bool()] = told
    return found.to(input_ids.device)
