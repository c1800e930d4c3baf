"""Draw docs/images/chat.svg, a conversation in a terminal: python tools/picture_of_chat.py A.gguf B.gguf 'a question'

A word has the colour of the member that finds it likelier than the other does, as by ``softmeet chat --colors``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from softmeet import Ensemble
from softmeet.cli.conversation import Conversation
from softmeet.cli.talk import COLORS, color_of
from softmeet.hf.streaming import by_member
from softmeet.members.member import short

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "chat.svg"
WIDTH = 92


def main(members: list[str], questions: list[str]) -> None:
    """Ask the questions one after the other, greedily, and draw what is said."""
    names = [short(member).rpartition("/")[2] for member in members]
    ensemble = Ensemble.from_pretrained(members)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 90}
    talk = Conversation(
        lambda turns: (
            (piece, log_probs)
            for piece, _, log_probs in by_member(ensemble.model, ensemble.tokenizer, list(turns), **how)
        )
    )
    console = Console(record=True, width=WIDTH, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ softmeet chat --colors {' '.join(names)}", style="bold"))
    console.print(Text.assemble(*((f"{name}  ", color) for color, name in zip(COLORS, names, strict=False))))
    for question in questions:
        console.print(Text(f"> {question}", style="bold"))
        told = (Text(piece, style=color_of(log_probs)) for piece, log_probs in talk.answer(question))
        console.print(Text.assemble(*told))
    # Without rich's fonts, which a reader's browser would fetch.
    drawn = re.sub(r"@font-face \{.*?\}\n", "", console.export_svg(title="softmeet", clear=False), flags=re.DOTALL)
    PICTURE.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if word.endswith(".gguf")]
    main(files, [word for word in sys.argv[1:] if word not in files])
