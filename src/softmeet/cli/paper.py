"""An evaluation as a table for a paper: LaTeX, CSV or Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from softmeet.cli.tables import counted, difference, number
from softmeet.evaluation.labels import labels_of

FORMS = ("latex", "csv", "markdown")
# What LaTeX reads as something else.
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "∞": r"$\infty$",
}  # fmt: skip
# Columns of what was fitted, by its names in the figures.
_FITTED = {"weights": "weights", "rule_temperature": "temperature", "order": "order"}


def paper_table(facts: dict[str, Any], form: str) -> str:
    """Return the figures of an evaluation as a table, and all pairs, if they were compared, as a second one.

    Args:
        facts: those of :func:`softmeet.evaluation.report.summary`.
        form: one of ``FORMS``. CSV has numbers in full, in columns of their own, and no pairs, as programs that read it
            expect one table; the others are rounded for print.
    """
    labels, rows = labels_of(facts["members"], facts["rules"]), {**facts["members"], **facts["rules"]}
    if form == "csv":
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(["name", "nats", "bits_per_byte", "top1", "delta", "low", "high", *_FITTED.values()])
        writer.writerows([labels[name], *_in_full(row)] for name, row in rows.items())
        return written.getvalue()
    made = _latex if form == "latex" else _markdown
    said = _notes(facts) if form == "latex" else ""
    fitted = [key for key in _FITTED if any(key in row.get("fitted", ()) for row in rows.values())]
    nats, baseline = f"nats/{facts['vocabulary'][:-1]}", facts["baseline"]
    head = ["", nats, "bits/byte", "top-1", f"against {labels[baseline]}", *(_FITTED[key] for key in fitted)]
    cells = [[labels[name], *_rounded(row, fitted, is_baseline=name == baseline)] for name, row in rows.items()]
    found = said + made(head, cells, 1, len(facts["members"]))
    if "pairs" in facts:
        found += "\n" + made(["", "against", nats, "p", "p (Holm)"], [_pair(own, labels) for own in facts["pairs"]], 2)
    return found


def _notes(facts: dict[str, Any]) -> str:
    """Return comments of LaTeX on what the figures are."""
    unit, spread = facts["vocabulary"], f"{facts['clusters']['count']} {facts['clusters']['kind']}"
    said = [
        f"{facts['tokens']:,} {unit} of {counted(facts['documents'], 'document')}; losses in nats, less is better",
        f"differences with half their 95 % intervals: paired, clustered by {spread}; below 0 is better",
    ]
    if any("fitted" in row for row in facts["rules"].values()):
        said.append(
            "fitted: losses by folds that took no part; weights, temperature and order as fitted on all of them"
        )
    if "pairs" in facts:
        said.append("p: of the paired t statistic, clustered likewise; all pairs are in Holm's correction")
    said += _made_by(facts) if "run" in facts else []
    return "".join(f"% {line}\n" for line in said)


def _made_by(facts: dict[str, Any]) -> list[str]:
    """Return sentences on how members were read, on all settings of rules, and on versions and machine."""
    run, said = facts["run"], list[str]()
    over = f", prune {run['prune']:g}" if "prune" in run else ""
    for label, row, own in zip(facts["members"], facts["members"].values(), run["members"], strict=True):
        how = own.get("quantization") or own.get("dtype")
        left = f"{over}: {row['dropped']:.2%} of its mass was estimated" if "dropped" in row else over
        said.append(f"{label}: read by {' '.join(filter(None, (own['engine'], how)))}{left}")
    for own in run["rules"]["choices"]:
        given = {**own["settings"], **own["options"]}
        said.append(f"{own['name']}: {', '.join(f'{key}={value}' for key, value in given.items())}")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    commit = f" (commit {run['commit']})" if run["commit"] else ""
    said += [f"softmeet {run['softmeet']}{commit}, {versions}; {run['processor']}, {run['threads']} threads"]
    return [" ".join(line.split()) for line in [*said, run["command"]]]


def _in_full(row: dict[str, Any]) -> list[Any]:
    low, high = row["against"]["ci95"]
    own = row.get("fitted", {})
    weights = " ".join(map(repr, own.get("weights", ())))
    return [
        row["nll"], row["bits_per_byte"], row["top1"], row["against"]["delta"], low, high, weights,
        own.get("rule_temperature", ""), own.get("order", ""),
    ]  # fmt: skip


def _rounded(row: dict[str, Any], fitted: Sequence[str], *, is_baseline: bool) -> list[str]:
    against = "0" if is_baseline else difference(row["against"]["delta"], row["against"]["ci95"])
    bits = "" if row["bits_per_byte"] is None else number(row["bits_per_byte"], ".4f")
    own = [row.get("fitted", {}).get(key, []) for key in fitted]
    settings = [" / ".join(f"{x:.2f}" for x in (values if isinstance(values, list) else [values])) for values in own]
    return [number(row["nll"], ".4f"), bits, f"{row['top1']:.3f}", against, *settings]


def _pair(own: dict[str, Any], labels: dict[str, str]) -> list[str]:
    names = [labels[own[key]] for key in ("first", "second")]
    return [*names, difference(own["delta"], own["ci95"]), *(number(own[key], ".2g") for key in ("p", "p_holm"))]


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int, members: int = 0) -> str:
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{'l' * texts}{'r' * (len(head) - texts)}}}",
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
    power = re.sub(r"^([\d.]+)e-0*(\d+)$", r"$\1 \\times 10^{-\2}$", plain)
    return re.sub(r"^-(?=[\d$])", r"$-$", power)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int, _: int = 0) -> str:
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in (head, rule, *rows))
