"""Draw docs/images/chat.svg, a conversation in a terminal: python tools/picture_of_chat.py A.gguf B.gguf 'a question'

Each word has the colour of the member that is nearest to what both make of it, as by ``softmeet chat --colors``.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from softmeet import Ensemble
from softmeet.cli.chat import COLORS, Conversation, written
from softmeet.members.member import short

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "chat.svg"
WIDTH = 92


def main(members: list[str], questions: list[str]) -> None:
    """Ask the questions one after the other, greedily, and draw what is said."""
    names = [short(member).rpartition("/")[2] for member in members]
    ensemble = Ensemble.from_pretrained(members)
    talk = Conversation(partial(written, ensemble, {"do_sample": False, "max_new_tokens": 90}, True))
    console = Console(record=True, width=WIDTH, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ softmeet chat --colors {' '.join(names)}", style="bold"))
    console.print(Text.assemble(*((f"{name}  ", color) for color, name in zip(COLORS, names, strict=False))))
    for question in questions:
        console.print(Text(f"> {question}", style="bold"))
        told = [
            Text(piece, style=COLORS[nats.index(min(nats))] if nats else "") for piece, nats in talk.answer(question)
        ]
        console.print(Text.assemble(*told))
    # Without rich's fonts, which a reader's browser would fetch.
    drawn = re.sub(r"@font-face \{.*?\}\n", "", console.export_svg(title="softmeet", clear=False), flags=re.DOTALL)
    PICTURE.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if word.endswith(".gguf")]
    main(files, [word for word in sys.argv[1:] if word not in files])
