"""Writing an ensemble: a folder that names its members, and holds none of their weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.hf.loading import CARD, relative


class Saving:
    """What of a model writes it."""

    config: Any
    generation_config: Any
    tokenizer: Any

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write a configuration that names the members, a generation configuration, the tokenizer and a card.

        No member's weights are written: local folders are named by their path relative to ``save_directory``.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.members = relative(config.members, folder)
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        rows = zip(config.members, config.weights, config.settings.trusts(), strict=True)
        table = "\n".join(
            f"| `{name}` | {weight:g} | {', '.join(f'{rho:g}' for rho in own)} |" for name, weight, own in rows
        )
        shown = {"rule": config.rule, "pool": config.pool, "tol": config.tol}
        source = f" (of the {config.rule_source}, which has to be here)" if config.rule_source else ""
        card = CARD.format(n=len(config.members), rows=table, source=source, **shown)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(**kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', for an ensemble whose members are on the hub.

        Raises:
            InvalidInputError: a member is a local folder, which nobody else could load.
        """
        local = [name for name in self.config.members if Path(name).exists()]
        if local:
            raise InvalidInputError(
                f"expected members on the hub, got local folders {local}: push them first, then build the ensemble "
                "from their hub ids"
            )
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
