"""What texts have to be, in the tests of structured output."""

from __future__ import annotations

import json

import jsonschema

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["king", "queen"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
CLOCK = r"(\d{1,2}:[0-5]\d|noon|é{2,4})"
WORDS = ["yea", "nay, my lord", "日本 é"]
SUMS = 'start: product ("+" product)*\nproduct: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'


def is_json(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True
