"""What anybody may rely on in the source: every class has a name of its own, and a file is as long as its idea."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

FILES = sorted((Path(__file__).parents[2] / "src" / "softmeet").rglob("*.py"))


def test_no_class_name_stands_twice():
    homes = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(file))
    assert len(homes) > 200
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_no_file_is_longer_than_400_lines():
    assert not [file.name for file in FILES if len(file.read_text().splitlines()) > 400]


def _is_overload(node):
    return any(getattr(decorator, "id", "") == "overload" for decorator in node.decorator_list)


def test_public_functions_and_classes_say_what_they_do():
    silent = []
    for file in FILES:
        for node in ast.parse(file.read_text()).body if not file.name.startswith("_") else ():
            inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
            for one in (node, *inner):
                named = isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not _is_overload(one)
                if named and not one.name.startswith("_") and len((ast.get_docstring(one) or "").split()) < 3:
                    silent.append(f"{file.name}: {one.name}")
    assert silent == []
