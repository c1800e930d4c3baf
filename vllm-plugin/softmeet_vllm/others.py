"""The models beside vLLM's own: softmeet's readers, each text in rows of its own, and the mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import Ensemble
from softmeet.engine.combine import Combiner
from softmeet.errors import InvalidInputError
from softmeet.members.opaque import NoHead
from softmeet.members.vocabulary import common_vocabulary, token_support
from softmeet.readers.reader import Read, Reader, Row, finished
from softmeet.rules.settings import Settings

# The most tokens of earlier prompts that each model keeps for prompts that begin alike.
_KEPT = 8192


@dataclass(eq=False)
class Text:
    """A text that vLLM writes.

    Attributes:
        settings: how it is mixed.
        bias: vLLM's ``logit_bias``, which is added to the logits of vLLM's model before they are mixed.
        rows: each other model's row; empty until it is read.
    """

    settings: Settings
    bias: dict[int, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def is_alone(self) -> bool:
        """Whether vLLM's own model has all the weight, so that no other one need read."""
        weights = self.settings.weights
        return self.settings.rule.is_average and isinstance(weights, tuple) and not any(weights[1:])


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
        self._v = v
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
        """Return the mixture's log-probabilities of what follows each of k texts, in nats, fp32, on the logits' device.

        Tokens that vLLM has forbidden, whose logits are -inf, stay so, and biases are added to the mixture.

        Args:
            logits: those of vLLM's own model, (k, v), fp32.
            texts: the texts.
            tokens: all tokens of each, prompt and answer.

        Raises:
            SoftmeetError: if a model cannot read a text.
        """
        own = logits.to("cpu", torch.float32)
        biased = [(k, torch.tensor([*one.bias]), torch.tensor([*one.bias.values()])) for k, one in enumerate(texts)]
        for k, ids, bias in biased:
            own[k, ids.long()] -= bias
        alike, mixed = defaultdict[Settings, list[int]](list), list[int]()
        found = own.clone()
        for k, one in enumerate(texts):
            if one.is_alone:
                found[k] = (own[k] / one.settings.rule_temperature).log_softmax(-1)
            else:
                alike[one.settings].append(len(mixed))
                mixed.append(k)
        others = self._read([texts[k] for k in mixed], [tokens[k] for k in mixed]) if mixed else []
        for settings, few in alike.items():
            some = [mixed[k] for k in few]
            states = [own[some], *(one[few] for one in others)]
            told = self._combiner.quickly(states, settings)
            if told is None:
                told = self._combiner.solve_rows(states, settings, proved=False)[1].log_probs
            found[some] = told[:, : self._v].to(found.dtype)
        found.masked_fill_(own.isneginf(), -torch.inf)
        for k, ids, bias in biased:
            found[k, ids.long()] += bias
        return found.to(logits.device)

    def _read(self, texts: Sequence[Text], tokens: Sequence[Sequence[int]]) -> list[Float[Tensor, "k _"]]:
        """Have each model read what is new to it, of all texts in one call, and return its logits behind each."""
        for one, ids in zip(texts, tokens, strict=True):
            if not one.rows:
                one.rows = [reader.open(ids) for reader in self.readers]
        found = []
        for i, reader in enumerate(self.readers):
            asked = []
            for one, ids in zip(texts, tokens, strict=True):
                new = list(ids[one.rows[i].length :])
                asked.append(Read(one.rows[i], new, [len(new)]))
            told = finished(reader.read(asked))
            for error in told.errors.values():
                raise error
            found.append(told.logits().float())
        return found
