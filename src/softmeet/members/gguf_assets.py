"""What loading a GGUF file derives from it, kept for the next time: seconds of work, of which some megabytes come.

It is in a folder of Hugging Face's for assets (``HF_ASSETS_CACHE``), which can be deleted at any time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from huggingface_hub import cached_assets_path

from softmeet.members.gguf_file import fingerprint

# To be raised when other things are derived from the same files.
_FORM = 2
# From smaller files everything is derived at once.
_SMALL = 1 << 24


def folder_for(path: Path) -> Path | None:
    """Return the folder for what is derived from a file; None if that is small, or no folder can be made.

    It is another one when the file, transformers or tokenizers has changed.
    """
    try:
        state = path.stat()
        if state.st_size < _SMALL:
            return None
        said = _FORM, fingerprint(path), state.st_mtime_ns, transformers.__version__, tokenizers.__version__
        return cached_assets_path("softmeet", "gguf", hashlib.sha256(repr(said).encode()).hexdigest()[:16])
    except (OSError, ValueError):
        return None


def folder_of(tokenizer: Any) -> Path | None:
    """Return the folder for what is derived from the GGUF file that a tokenizer was read from; None of any other."""
    _, _, folder = vars(tokenizer).get("_softmeet_file", (None, None, None))
    return folder  # type: ignore[no-any-return]
