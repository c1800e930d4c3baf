"""The page that ``softmeet advise --html`` writes: verdict, tables and plots in one file, without a script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from io import BytesIO
from string import Template
from typing import Any

from softmeet.evaluation.judged import Judged
from softmeet.evaluation.plots import calibration_plot, gain_plot
from softmeet.evaluation.report import summary

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def page(judged: Judged, says: str, tables: Sequence[Table], cautions: Sequence[str], differences: str) -> str:
    """Return a self-contained HTML page.

    Args:
        judged: what the text says; its fitted averages and ``meet``, or its one member, are plotted beside the best.
        says: the verdict in a sentence.
        tables: (title, the columns' titles, rows of cells) of each table.
        cautions: sentences on what may mislead.
        differences: sentences on how far members differ.
    """
    plotted = [*judged.averages, *judged.meets] or judged.fitted.candidates
    choices = {own.name: judged.found.choices[own.label] for own in plotted}
    facts = summary(replace(judged.found, choices=choices), best=judged.best, baseline=judged.best)
    return Template(files("softmeet.evaluation").joinpath("advice.html").read_text(encoding="utf-8")).substitute(
        says=escape(says),
        cautions="\n".join(f'<p class="caution">{escape(caution)}</p>' for caution in cautions),
        tables="\n".join(map(_table, tables)),
        differences=escape(differences),
        gain=_png(gain_plot(facts)),
        calibration=_png(calibration_plot(facts)),
    )


def _table(table: Table) -> str:
    title, columns, rows = table
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _png(figure: Any) -> str:
    """Return a figure as a PNG file in base 64."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()
