"""An evaluation as a table for a paper: LaTeX, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from softmeet.evaluation.labels import labels_of

FORMS = ("latex", "csv", "markdown")
# What LaTeX reads as something else.
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def paper_table(facts: dict[str, Any], form: str) -> str:
    """Return the figures of an evaluation as a table.

    Args:
        facts: those of :func:`softmeet.evaluation.report.summary`.
        form: one of ``FORMS``. CSV has numbers in full, in columns of their own; the others are rounded for print.
    """
    labels, rows = labels_of(facts["members"], facts["rules"]), {**facts["members"], **facts["rules"]}
    if form == "csv":
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(
            ["name", "nats", "bits_per_byte", "top1", "delta", "low", "high", "weights", "temperature", "order"]
        )
        writer.writerows([labels[name], *_in_full(row)] for name, row in rows.items())
        return written.getvalue()
    fitted = any("fitted" in row for row in rows.values())
    head = ["", f"nats/{facts['vocabulary'][:-1]}", "bits/byte", "top-1", f"against {labels[facts['baseline']]}"]
    head += ["weights", "temperature"] if fitted else []
    cells = [
        [labels[name], *_rounded(row, is_baseline=name == facts["baseline"], fitted=fitted)]
        for name, row in rows.items()
    ]
    return _latex(head, cells, len(facts["members"])) if form == "latex" else _markdown(head, cells)


def _in_full(row: dict[str, Any]) -> list[Any]:
    low, high = row["against"]["ci95"]
    own = row.get("fitted", {})
    weights = " ".join(map(repr, own.get("weights", ())))
    return [
        row["nll"], row["bits_per_byte"], row["top1"], row["against"]["delta"], low, high, weights,
        own.get("rule_temperature", ""), own.get("order", ""),
    ]  # fmt: skip


def _rounded(row: dict[str, Any], *, is_baseline: bool, fitted: bool) -> list[str]:
    low, high = row["against"]["ci95"]
    half = f" ± {(high - low) / 2:.4f}" if math.isfinite(high - low) else ""
    against = "0" if is_baseline else f"{row['against']['delta']:+.4f}{half}"
    bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    found = [f"{row['nll']:.4f}", bits, f"{row['top1']:.3f}", against]
    if fitted:
        own = row.get("fitted", {})
        found.append(" / ".join(f"{x:.2f}" for x in own.get("weights", ())))
        found.append(f"{own['rule_temperature']:.2f}" if "rule_temperature" in own else "")
    return found


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]], members: int) -> str:
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        _line(head),
    ]
    for k, row in enumerate(rows):
        lines += [r"\midrule"] if k in (0, members) else []
        lines.append(_line(row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    plain = "".join(_SPECIAL.get(sign, sign) for sign in text)
    number = plain.replace("±", r"$\pm$")
    return number.replace("-", r"$-$", 1) if number[:1] == "-" and number[1:2].isdigit() else number


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in (head, rule, *rows))
