"""The version is the same wherever it stands, the changelog has its form, and what older versions saved still loads."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import yaml
from packaging.version import Version

import softmeet
from softmeet import Ensemble

ROOT = Path(__file__).parents[2]
SECTIONS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
# The configuration of an ensemble that 0.1.0 saved, with a rule's option that it kept of every rule.
OF_0_1 = {
    "architectures": ["EnsembleForCausalLM"], "bands": 1, "bos_token_id": 0, "eos_token_id": 0, "free_radial": False,
    "free_weights": False, "gate": None, "max_position_embeddings": 256, "max_steps": 50, "metric": "raw",
    "members": ["narrow/opt-a", "narrow/opt-b"], "model_type": "softmeet", "on_infeasible": "meet", "pad_token_id": 0,
    "pool": "logit-mean", "rank": None, "rule": "meet", "rule_temperature": 1.0, "tol": 0.0001,
    "transformers_version": "5.24.0", "trust": [1.0, "inf"], "vocab_size": 4096, "weights": [0.25, 0.75],
}  # fmt: skip


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert unreleased == "Unreleased"
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) — (\d{4}-\d{2}-\d{2})", heading) for heading in releases]
    assert all(found), releases
    numbers = [tuple(map(int, match[1].split("."))) for match in found]
    assert numbers == sorted(set(numbers), reverse=True)
    assert found[0][1] == softmeet.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == softmeet.__version__
    assert citation["date-released"] == datetime.date.fromisoformat(found[0][2])


def test_each_version_has_each_section_once_and_in_order():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for part in text.split("\n## ")[1:]:
        sections = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert sections == [name for name in SECTIONS if name in sections]


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"authors", "message", "title", "version", "date-released", "license", "type"} <= set(citation)
    for work in (citation, *citation["references"]):
        assert all(set(person) & {"name", "family-names"} for person in work["authors"])
        assert work["title"]


def test_old_forms_end_with_the_next_version_at_the_earliest():
    ends = {
        (file.name, number)
        for file in (ROOT / "src").rglob("*.py")
        for number in re.findall(r"(?:ends?|goes) with (\d+\.\d+\.\d+)", file.read_text(encoding="utf-8"))
    }
    assert not {end for end in ends if Version(end[1]) <= Version(softmeet.__version__)}


def test_an_ensemble_that_0_1_saved_loads_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(OF_0_1))
    settings = Ensemble.from_pretrained(tmp_path).model.settings
    assert (str(settings.rule), settings.tol, settings.gate) == ("meet", 1e-4, None)
    assert settings.trust == (1.0, float("inf"))
    assert settings.weights == (0.25, 0.75)
