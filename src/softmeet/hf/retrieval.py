"""An ensemble with retrieved passages: each member several times, each time behind another passage."""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.errors import InvalidInputError
from softmeet.hf.chat import chat_of
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.member import Member
from softmeet.members.passages import PASSAGE_RULE, Passage, passage_weights, reading
from softmeet.rules.base import Rule
from softmeet.rules.settings import Settings


def with_passages(
    model: EnsembleForCausalLM,
    passages: Sequence[Passage],
    *,
    temperature: float = 1.0,
    settings: Settings | None = None,
    rule: str | Rule | None = PASSAGE_RULE,
) -> EnsembleForCausalLM:
    """Return an ensemble of a model's members behind each passage, which shares their weights.

    Member i behind passage d has the weight w_i · λ_d, λ being the softmax of scores / temperature.

    Args:
        model: the ensemble.
        passages: at least one.
        temperature: of the passages' scores.
        settings: in place of the model's own, of :meth:`Settings.for_members`; None for these.
        rule: how the members are combined; None for the settings' own.

    Raises:
        InvalidInputError: if a setting is not valid, or a passage fills the context of a member.
    """
    if model.config.prefixes is not None:
        raise InvalidInputError("expected passages without prefixes, in whose place they stand: give prompts instead")
    own, shares = settings or model.settings, passage_weights(passages, temperature)
    chosen = [i for i in range(len(model.config.members)) for _ in passages]
    members = reading([Member.parse(name) for name in model.config.members], passages)
    given = dict(own) | {
        "weights": [weight * share for weight in own.member_weights for share in shares],
        "trust": [own.member_trust[i] for i in chosen],
    }
    if rule is not None:
        given["rule"] = rule
    config = EnsembleConfig(
        [str(member) for member in members], settings=Settings.of(given), vocabulary=model.config.vocabulary,
        prune=model.config.prune,
    )  # fmt: skip
    part = model.part(chosen, config)
    if (part.config.max_position_embeddings or 1) < 1:
        raise InvalidInputError(
            "expected passages that leave room in the shortest member's context, got one of "
            f"{max(map(len, part.contexts.prefixes))} tokens: shorten it"
        )
    part.generation_config, part.chat = model.generation_config, chat_of(model).of(chosen)
    part.claimants = model.claimants
    return part
