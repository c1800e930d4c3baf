"""Run ``softmeet``, also as ``python -m softmeet``: Ctrl-C ends it at once, while it is still being loaded, too."""

from __future__ import annotations

import os
import sys

from softmeet.errors import was_interrupted
from softmeet.suspended import interrupt_came, note_interrupts

# 128 and the signal's number, as shells have it.
_STOPPED = 130


def main() -> None:
    """Run the command line, and exit with the code 130 after Ctrl-C."""
    note_interrupts()
    try:
        from softmeet.cli.main import main as run

        run()
    except (KeyboardInterrupt, Exception) as error:
        # An import that was interrupted may be begun again by another one, and fail then.
        if not (was_interrupted(error) or (interrupt_came() and isinstance(error, ImportError))):
            raise
        sys.stderr.write("stopped\n")
        os._exit(_STOPPED)  # without waiting for threads


if __name__ == "__main__":
    main()
