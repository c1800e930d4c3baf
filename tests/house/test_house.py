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
