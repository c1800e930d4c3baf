"""``softmeet methods``."""

import json

from commands import run

import softmeet
from softmeet.cli.methods import GATES, VOCABULARIES
from softmeet.hf.vocabulary import VOCABULARIES as KNOWN
from softmeet.hf.vocabulary import kind_of, require_vocabulary
from softmeet.rules.gates import GATES as ASKED


def test_all_parts_of_methods_are_listed():
    assert {kind_of(name) for name in VOCABULARIES} == {*KNOWN} - {"auto"}
    for name in VOCABULARIES:
        require_vocabulary(name, 0.01)
    assert {*GATES} == {name for name, kind in ASKED.items() if kind.__module__.startswith("softmeet.")}
    listed = json.loads(run("methods", "--json").stdout)
    names = {kind: [one["name"] for one in listed if one["kind"] == kind] for kind in ("rule", "decoder")}
    assert names == {"rule": softmeet.rule_names(), "decoder": softmeet.decoder_names()}
    plain = run("methods", columns=200).stdout
    assert all(one["name"] in plain for one in listed)
