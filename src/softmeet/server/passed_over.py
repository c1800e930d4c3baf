"""What requests ask for that there is not here and that is passed over, as llama.cpp's server does: told in the log."""

from __future__ import annotations

import logging
import re

_log = logging.getLogger("softmeet.server")
# The most lines, so that no client fills the log; and which names are shown, as others may hold what nobody should log.
_LINES = 100
_SHOWN = re.compile(r"[\w.:/@-]{1,64}", re.ASCII)


class PassedOver:
    """The fields and models that are passed over, each of which is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def field(self, name: str) -> None:
        """Take note of a field that a request has, and that is ignored."""
        self._tell(name, f"requests have the field {name}, which is unknown here and ignored; --strict refuses it")

    def model(self, name: str, answering: str) -> None:
        """Take note of a model that is not served, and of the one that answers in its place."""
        self._tell(name, f"requests ask for the model {name}, and {answering} answers; --strict refuses them")

    def _tell(self, name: str, line: str) -> None:
        if _SHOWN.fullmatch(name) and line not in self._told and len(self._told) < _LINES:
            self._told.add(line)
            _log.warning(line)
