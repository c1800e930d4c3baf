"""The flag for texts by a decoder, and what is printed of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli.flags import Flags, checked_settings, optional
from softmeet.cli.progress import working
from softmeet.cli.sampling import SamplingFlags
from softmeet.cli.tables import out
from softmeet.cli.terminal import write
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

# The rule where none is named: the one that most people mean by combining texts.
_RULE = "logit-mean"


class DecoderFlags(Flags, panel="Sampling"):
    """The flag for texts that are written by a decoder."""

    decoder: str | None = optional(
        "Write whole texts by a decoder, such as particles:n=16 or agreement:beam=5, in place of one token after "
        "another; by logit-mean where --rule names no other, of at most --max-new-tokens, or over bytes "
        "--max-new-bytes. With --json all its texts are printed, with their weights."
    )

    def settings(self, given: dict[str, Any], sampling: SamplingFlags, against: list[str]) -> dict[str, Any]:
        """Return the settings by which members are loaded, once it is clear that the decoder can be used with all else.

        Args:
            given: those of the flags.
            sampling: how tokens are drawn.
            against: other flags that are given, and mean nothing for whole texts.

        Raises:
            InvalidInputError: if there is no such decoder, or it cannot be used with something.
        """
        if self.decoder is None:
            return given
        from softmeet.decoders.base import require_plain
        from softmeet.decoders.registry import decoder_of
        from softmeet.rules.settings import Settings

        found = decoder_of(self.decoder)
        if against:
            raise InvalidInputError(f"--decoder cannot be used with {', '.join(against)}: leave it out")
        require_plain(found, sampling.arguments())
        found.require(Settings.of(checked_settings({**given, "rule": given.get("rule") or _RULE})))
        return given

    def vocabulary(self, named: str | None) -> str | None:
        """Return over what members are to be loaded where nothing says it: a union, if each writes in its own tokens.

        Args:
            named: the value of ``--vocabulary``.

        Raises:
            InvalidInputError: if members have no tokens of their own over the vocabulary that is named.
        """
        if self.decoder is None:
            return None
        from softmeet.decoders.registry import decoder_of

        found = decoder_of(self.decoder)
        found.require_vocabulary(named)
        return "union" if found.own_tokens else None

    def write(
        self,
        ensemble: Ensemble,
        prompts: list[str],
        asked: list[Any],
        sampling: SamplingFlags,
        *,
        any_rule: bool,
        as_json: bool,
    ) -> None:
        """Have the decoder write behind each prompt, and print what was drawn, or all of it as JSON.

        Args:
            ensemble: the ensemble.
            prompts: the prompts, as they were given.
            asked: the same, or conversations that they begin.
            sampling: the limit and the seed.
            any_rule: whether nobody has chosen the ensemble's rule.
            as_json: whether to print JSON.
        """
        from softmeet.decoders.registry import decoder_of

        decoder = decoder_of(str(self.decoder))
        decoder.require_vocabulary(ensemble.model.config.vocabulary)
        if any_rule and (decoder.own_tokens or not ensemble.model.settings.rule.is_average):
            ensemble.model.config.rule = _RULE
        options, own = sampling.arguments(), ensemble.model.limit_of_symbols
        if own not in options:
            flag = "--max-new-bytes" if own == "max_bytes" else "--max-new-tokens"
            raise InvalidInputError(f"expected {flag}, which limits the texts of these members")
        with working(f"writing behind {len(asked)} prompts"):
            found = ensemble.decode(asked, str(self.decoder), **options)
        if as_json:
            each = [
                {"prompt": prompt, **_finite({**asdict(one), "text": one.text})}
                for prompt, one in zip(prompts, found, strict=True)
            ]
            facts = {"decoder": self.decoder, "rule": ensemble.model.config.rule, "members": ensemble.names}
            typer.echo(json.dumps({"completions": each, **facts}, ensure_ascii=False, indent=2))
            return
        for prompt, one in zip(prompts, found, strict=True):
            text = one.chosen_text()
            write(out(), f"{text}\n" if len(prompts) == 1 else f"=== {prompt}\n{text}\n\n")


def _finite(value: Any) -> Any:
    """Return a value as JSON has it, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
