"""The guide's table of what each server supports: softmeet's column is what this server answers."""

from pathlib import Path

import pytest
from serving import running, serving_of

import api
from softmeet import Ensemble

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "clients.md"


@pytest.mark.filterwarnings("ignore")
def test_the_guides_table_is_what_the_server_answers():
    _, _, table = PAGE.read_text().partition(api.HEAD + "\n")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n\n")[0].splitlines()]
    with api.model() as folder, running(serving_of({"model": Ensemble.from_pretrained([folder])})) as url:
        answers = api.rows(api.Server(url, "model"))
    told = [(name, ours, vllm) for name, ours, _, vllm in found]
    assert told == [(probe.name, ours, probe.vllm) for probe, ours in zip(api.probes(), answers, strict=True)]
    assert {theirs for _, _, theirs, _ in found} <= {"yes", "ignored", "refused", "-", "error 500"}
