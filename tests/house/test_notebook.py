"""The notebook runs from top to bottom, and its cells show what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "fit.ipynb"


def shown(code, namespace):
    """Run a cell; what its last line would show."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        before, last = [*before, last], None
    exec(compile(ast.Module(before, []), str(NOTEBOOK), "exec"), namespace)
    return last and eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook, namespace = nbformat.read(NOTEBOOK, as_version=4), {}
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept: clear them"
    found = [shown(cell.source, namespace) for cell in notebook.cells if cell.cell_type == "code"]
    assert found[-2].startswith(("Uses", "Falls back"))
    assert isinstance(found[-1], str)
