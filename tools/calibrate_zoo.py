"""Find what the gate ``movement`` has to know of the bundled families: python tools/calibrate_zoo.py

Writes softmeet_zoo/movement.json, at some trusts of each family, so that nobody who generates with them waits for it.
"""

from __future__ import annotations

import json

import torch
import typer

from softmeet import Ensemble
from softmeet.hf.calibrated import calibrate, key_of
from softmeet.hf.remembered import members_hash
from softmeet.members import zoo

TRUSTS = (0.1, 0.3, 1.0, 2.0)


def main() -> None:
    """Calibrate, print and write."""
    torch.set_num_threads(2)
    found: dict[str, dict[str, float]] = {}
    for family in ("narrow", "wide"):
        ensemble = Ensemble.from_pretrained(family, "meet")
        for trust in TRUSTS:
            settings = ensemble.model.settings.changed(trust=trust)
            factor = calibrate(ensemble.model, settings)
            assert factor is not None
            found.setdefault(members_hash(ensemble.model), {})[key_of(settings)] = factor
            typer.echo(f"{family}, trust {trust:g}: {factor:.4f}")
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    (zoo.folder() / "movement.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
