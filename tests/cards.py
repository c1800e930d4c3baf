"""Model cards, read and checked by the Hub's own classes."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard, ModelCardData

# What the Hub's documentation lists, as far as we use it, and what has to be there.
KNOWN = {
    "base_model", "base_model_relation", "language", "library_name", "license", "model-index", "pipeline_tag", "tags",
}  # fmt: skip
NEEDED = {"library_name", "pipeline_tag", "tags"}


def checked(path):
    """Read a card by the Hub's own classes, check what it says, and return its metadata as a dictionary."""
    text = path.read_text(encoding="utf-8")
    _, block, _ = text.split("---\n", 2)
    raw, card = yaml.safe_load(block), ModelCard.load(path)
    assert ModelCardData(**raw).to_dict() == card.data.to_dict() == raw
    assert str(card) == text
    assert NEEDED <= set(raw) <= KNOWN
    assert raw["pipeline_tag"] == "text-generation"
    assert isinstance(raw.get("base_model", []), list)
    assert ("base_model_relation" in raw) == ("base_model" in raw)
    for result in card.data.eval_results or []:
        assert isinstance(result.metric_value, float)
        assert result.dataset_name
        assert result.metric_name in ("nats per token", "nats per byte")
    return raw
