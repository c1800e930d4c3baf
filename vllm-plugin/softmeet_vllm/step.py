"""The logits processor by which vLLM runs a member: it tells what follows each text, and is told which token is taken.

vLLM's batch stands still in between. Whoever takes tokens is :class:`softmeet_vllm.reader.VllmReader`, in another
process; each message is a list of texts by their numbers.
"""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Client
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

# Where the reader listens, as JSON of its address and its key; and the number of a text among a request's own.
ADDRESS, NUMBER = "SOFTMEET_STEP", "step_of_softmeet"


class Step(LogitsProcessor):
    """Hands out the logits behind every text of the batch, and has vLLM take the token that comes back for it.

    vLLM makes it, in the process that runs the model.
    """

    def __init__(self, config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._texts = dict[int, int]()  # by the place in the batch, the text's number
        where, key = json.loads(os.environ[ADDRESS])
        self._reader = Client(where, authkey=bytes.fromhex(key))

    def is_argmax_invariant(self) -> bool:
        """Return False: another token becomes the likeliest one."""
        return False

    def update_state(self, update: BatchUpdate | None) -> None:
        """Follow the texts of vLLM's batch."""
        process_dict_updates(self._texts, update, lambda params, prompt, answer: (params.extra_args or {}).get(NUMBER))

    def apply(self, logits: Tensor) -> Tensor:
        """Return logits of which one in each row is possible: the token that is to be taken."""
        places = [place for place in sorted(self._texts) if place < len(logits)]
        if not places:
            return logits
        try:
            self._reader.send([self._texts[place] for place in places])
            self._reader.send_bytes(logits[places].float().cpu().numpy().tobytes())
            taken = self._reader.recv()
        except (EOFError, OSError):  # the reader has gone, and vLLM is about to be ended
            taken = [0] * len(places)
        logits[places] = -torch.inf
        logits[places, taken] = 0.0
        return logits
