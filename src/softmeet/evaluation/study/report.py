"""What a study says at the end: tables, sentences that the numbers bear out or not, and plots; Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from softmeet.evaluation.files import write_text
from softmeet.evaluation.study.plots import Plot, draw


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Write the rows as a Markdown table."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"### {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@dataclass(frozen=True)
class Report:
    """``claims`` are sentences with their verdicts; ``texts`` are passages by heading."""

    title: str
    command: str
    claims: Sequence[str]
    tables: Sequence[Table]
    plots: Sequence[Plot] = ()
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """``report.md`` and the plots; the path of the former."""
        parts = [f"# {self.title}", f"`{self.command}`", "\n".join(f"- {claim}" for claim in self.claims)]
        parts += [table.markdown() for table in self.tables]
        for plot in self.plots:
            draw(plot, folder / f"{plot.name}.png")
            parts.append(f"![{plot.title}]({plot.name}.png)")
        parts += [f"### {heading}\n\n{text}" for heading, text in self.texts.items()]
        path = folder / "report.md"
        write_text(path, "\n\n".join(parts) + "\n")
        return path

    def json(self) -> dict[str, Any]:
        """Give the title, the claims and the tables as JSON has them."""
        return {"title": self.title, "claims": list(self.claims), "tables": [asdict(table) for table in self.tables]}


def mean_text(values: Sequence[float | None]) -> str:
    """The mean; where some are infinite (None), their share as well: ``∞ (40 %)``."""
    if not values:
        return "-"
    infinite = sum(x is None for x in values)
    if infinite:
        return f"∞ ({100 * infinite / len(values):.0f} %)"
    return number(fmean(x for x in values if x is not None))


def number(x: float) -> str:
    """Four decimals, or an exponent where those would show nothing."""
    return f"{x:.1e}" if x and abs(x) < 5e-4 else f"{x:.4f}" if math.isfinite(x) else "∞"
