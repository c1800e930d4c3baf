"""What a model's cache holds: keys and values, which readers keep in blocks, or something else."""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softmeet.errors import InvalidInputError

_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def others_than_keys_and_values(config: PreTrainedConfig) -> list[str]:
    """Return the kinds of layers of a model's cache that hold something else, such as a recurrent layer's state."""
    layers = DynamicCache(config=config).layers
    return sorted({type(one).__name__ for one in layers if type(one) not in _KEYS_AND_VALUES})


def require_keys_and_values(name: str, config: PreTrainedConfig, what: str) -> None:
    """Check that the layers of a member's cache hold nothing but keys and values.

    Args:
        name: the member's, for the message.
        config: the member's configuration.
        what: the end of the message, a clause that names the consequence or gives advice.

    Raises:
        InvalidInputError: if a layer of the cache holds something else, such as the state of a recurrent layer.
    """
    if other := others_than_keys_and_values(config):
        raise InvalidInputError(
            f"expected members whose cache holds keys and values, but {name} has {', '.join(other)}: {what}"
        )
