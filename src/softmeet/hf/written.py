"""``Written``: the sequences of a call of ``generate``, and how their tokens are chosen."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.engine.draw import Draw, Noise, choose


class Written:
    """The sequences of a call of ``generate`` as transformers' loop has them, and how their tokens are chosen.

    Args:
        ids: (B, t), the prompts.
        processors: the call's, with its row sampler if it has one.
        noise: to draw tokens by; None to take the one of the largest score.
        stopping, config, streamer: those of the call.

    Attributes:
        ids: (B, T), the sequences so far.
        limit: the most columns.
        unfinished: (B,), which of them go on.
        finished: whether none does.
        ends: the ids that end a sequence.
        padding: the id behind a sequence's end.
        scores, logits: of every token, if the call asks for them; else None.
    """

    def __init__(
        self,
        ids: Int[Tensor, "B t"],
        processors: Any,
        noise: Noise | None,
        stopping: Any,
        config: Any,
        streamer: Any,
    ) -> None:
        self.ids, self.limit = ids, config.max_length
        self._draw, self._stopping, self._streamer = Draw(processors, noise), stopping, streamer
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.finished = False
        pad, ends = config._pad_token_tensor, config._eos_token_tensor
        self.padding, self.ends = 0 if pad is None else int(pad), [] if ends is None else ends.tolist()
        self._padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping)
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if asked and config.output_logits else None

    def settle(self, log_probs: Float[Tensor, "B v"]) -> list[int]:
        """Choose the next token of each sequence by the rule's log-probabilities in nats, and return the tokens."""
        chosen, scores = self.chosen(self.ids, log_probs, self.unfinished)
        self.ids = torch.cat([self.ids, chosen[:, None]], -1)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (log_probs.float(),)
        if self._streamer is not None:
            self._streamer.put(chosen.cpu())
        self.unfinished = self.unfinished & ~self._stopping(self.ids, self.scores)
        self.finished = not bool(self.unfinished.any())
        return chosen.tolist()

    def chosen(
        self, ids: Int[Tensor, "B T"], log_probs: Float[Tensor, "B v"], unfinished: Bool[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B v"]]:
        """Return (the token that follows, padding in sequences that are finished; the processed scores)."""
        scores = self._draw.scores(ids, log_probs.to(torch.float32, copy=True).to(ids.device))
        chosen = choose(scores, self._draw.noise(ids.shape[1]))
        if self._padded:
            chosen = torch.where(unfinished, chosen, torch.full_like(chosen, self.padding))
        return chosen, scores
