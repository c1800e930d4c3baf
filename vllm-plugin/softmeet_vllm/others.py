"""The models beside vLLM's own: softmeet's readers, each text in rows of its own, and the mixture."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import Ensemble
from softmeet.engine.combine import Combiner
from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.members.opaque import NoHead
from softmeet.members.vocabulary import common_vocabulary, token_support
from softmeet.readers.reader import Read, Reader, Row, finished
from softmeet.rules.settings import Settings
from softmeet_vllm.asked import is_alone

_log = logging.getLogger("vllm.softmeet")
# The most tokens of earlier prompts that each model keeps for prompts that begin alike.
_KEPT = 8192


@dataclass(eq=False)
class Text:
    """A text that vLLM writes.

    Attributes:
        settings: how it is mixed.
        bias: vLLM's ``logit_bias``, which is added to the logits of vLLM's model before they are mixed.
        rows: each other model's row; empty until it is read.
        is_over: whether it ends, as a model could not read it.
    """

    settings: Settings
    bias: dict[int, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    is_over: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether vLLM's own model has all the weight, so that no other one need read."""
        return is_alone(self.settings)


class Others:
    """The models beside vLLM's own, loaded, and what they have read of vLLM's texts.

    Args:
        members: their names.
        own: the name of vLLM's own model, for messages.
        tokenizer: the tokenizer of that, one of transformers.
        v: the number of its logits.
        texts, tokens: how many texts vLLM writes at once, of how many tokens at the most.

    Raises:
        SoftmeetError: if a model cannot be loaded, or cannot be mixed with vLLM's.
    """

    def __init__(self, members: Sequence[str], own: str, tokenizer: Any, v: int, texts: int, tokens: int) -> None:
        ensemble = Ensemble.from_pretrained(list(members), vocabulary="tokens")
        made = dict[Any, Reader]()
        for i, name in enumerate(members):
            key = ensemble.model.key_of(i)
            made[key] = made[key] if key in made else ensemble.model.new_reader(i, name, _KEPT)
        self.readers = [made[ensemble.model.key_of(i)] for i in range(len(members))]
        names, heads = [own, *members], [NoHead(v), *(NoHead(reader.alphabet.size) for reader in self.readers)]
        common = common_vocabulary(names[:2], [tokenizer, ensemble.tokenizer])
        self._combiner = Combiner(names, heads, token_support(common.ids, names, heads))
        self._v, self._end = v, tokenizer.eos_token_id or 0
        for name, reader in zip(members, self.readers, strict=True):
            if reader.traits.known is not None:
                raise InvalidInputError(f"expected models that tell all their tokens beside vLLM's, got {name}")
            if reader.limit < tokens:
                raise InvalidInputError(
                    f"expected texts within the context of {name}, {reader.limit:,} tokens, but vLLM writes "
                    f"{tokens:,}: start it with --max-model-len {reader.limit}"
                )
            if (rows := reader.traits.rows) is not None and rows < texts:
                raise InvalidInputError(
                    f"expected at most {rows} texts at once, for which {name} has rows, but vLLM writes {texts}: start "
                    f"it with --max-num-seqs {rows}"
                )

    def close(self, text: Text) -> None:
        """Give up the rows of a text."""
        for reader, row in zip(self.readers, text.rows, strict=False):
            reader.close(row)
        text.rows.clear()

    @torch.inference_mode()
    def mix(
        self, logits: Float[Tensor, "k v"], texts: Sequence[Text], tokens: Sequence[Sequence[int]]
    ) -> Float[Tensor, "k v"]:
        """Return the mixture's logits of what follows each of k texts, in nats, fp32, on the logits' device.

        They have the sum of vLLM's model, whose penalties look at signs. Tokens that vLLM has forbidden, whose logits
        are -inf, stay so, and biases are added to the mixture. A text that a model cannot read ends, and the log says
        why: whatever was raised here would end all texts.

        Args:
            logits: those of vLLM's own model, (k, v), fp32.
            texts: the texts.
            tokens: all tokens of each, prompt and answer.
        """
        own = logits.to("cpu", torch.float32)
        biased = [(k, torch.tensor([*one.bias]), torch.tensor([*one.bias.values()])) for k, one in enumerate(texts)]
        for k, ids, bias in biased:
            own[k, ids.long()] -= bias
        found = torch.stack([_tempered(own[k], one.settings.rule_temperature) for k, one in enumerate(texts)])
        mixed = [k for k, one in enumerate(texts) if not one.is_alone and not one.is_over]
        told, errors = self._read({k: (texts[k], tokens[k]) for k in mixed})
        alike = defaultdict[Settings, list[int]](list)
        for k in told:
            alike[texts[k].settings].append(k)
        for settings, some in alike.items():
            if self._combined(own, told, some, settings, found) is not None:
                each = {k: self._combined(own, told, [k], settings, found) for k in some}
                errors |= {k: error for k, error in each.items() if error is not None}
        found.masked_fill_(own.isneginf(), -torch.inf)
        for k, ids, bias in biased:
            found[k, ids.long()] += bias
        for k, error in errors.items():
            _log.error("a text ends, as it cannot be mixed: %s", error)
            self.close(texts[k])
            texts[k].is_over = True
        over = [k for k, one in enumerate(texts) if one.is_over]
        found[over] = -torch.inf
        found[over, self._end] = 0.0
        return found.to(logits.device)

    def _combined(
        self, own: Tensor, told: Mapping[int, Sequence[Tensor]], some: Sequence[int], settings: Settings, found: Tensor
    ) -> SoftmeetError | None:
        """Combine the models behind some texts, into ``found``; return why that cannot be."""
        states = [own[list(some)], *(torch.stack(one) for one in zip(*(told[k] for k in some), strict=True))]
        try:
            mixture = torch.cat(
                [one.ours for one in self._combiner.combined(states, settings, quickly=True, proved=False)]
            )
        except SoftmeetError as error:
            return error
        found[list(some)] = (mixture[:, : self._v] + states[0].logsumexp(-1, keepdim=True)).to(found.dtype)
        return None

    def _read(
        self, asked: Mapping[int, tuple[Text, Sequence[int]]]
    ) -> tuple[dict[int, list[Tensor]], dict[int, SoftmeetError]]:
        """Have each model read what is new to it, of all texts in one call.

        Returns:
            (by the text's number, what each model says follows it, its logits; why other texts cannot be read).
        """
        found, errors = dict[int, list[Tensor]](), dict[int, SoftmeetError]()
        for k, (one, ids) in asked.items():
            try:
                one.rows = one.rows or [reader.open(ids) for reader in self.readers]
                found[k] = []
            except SoftmeetError as error:
                errors[k] = error
        for i, reader in enumerate(self.readers):
            new = {k: list(ids[one.rows[i].length :]) for k, (one, ids) in asked.items() if k in found}
            numbers = [*new]
            told = finished(reader.read([Read(asked[k][0].rows[i], new[k], [len(new[k])]) for k in numbers]))
            errors |= {numbers[j]: error for j, error in told.errors.items()}
            logits = iter(told.logits().float())
            for j, k in enumerate(numbers):
                if j in told.errors:
                    del found[k]
                else:
                    found[k].append(next(logits))
        return found, errors


def _tempered(logits: Float[Tensor, " v"], temperature: float) -> Float[Tensor, " v"]:
    """Return one model's logits at a temperature, up to a constant; at 1, as they are."""
    if temperature == 1:
        return logits.clone()
    return ((logits - logits.amax()).double() / temperature).to(logits.dtype)
