"""Texts as token ids and back, with vLLM's requests and replies."""

from __future__ import annotations

from typing import Any

from softmeet.server.errors import RequestError
from softmeet.server.schemas import Ids, Messages, Strict, Word
from softmeet.server.serving import Serving
from softmeet.server.texts import token_texts


class TokenizeRequest(Strict):
    """The body of ``POST /tokenize``: a prompt, or the messages of a chat; with ``return_token_strs`` texts come, too.

    Special tokens, such as a BOS, are added to a prompt unless ``add_special_tokens`` is false.
    """

    model: Word | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """The body of ``POST /detokenize``: token ids, whose text is asked for."""

    model: Word | None = None
    tokens: Ids


async def tokenize(serving: Serving, body: TokenizeRequest) -> dict[str, Any]:
    """Return the ids of a prompt's tokens, their number, the shortest member's context, and the tokens' texts if asked.

    The texts are those that answers show under ``logprobs``; else None is in their place, as it is for the context if
    no member has a limit.

    Raises:
        RequestError: if there is no such model (status 404), not one of prompt and messages is given, the prompt is too
            long for any context, or there is no chat template for the messages.
    """
    if (body.prompt is None) == (body.messages is None):
        came = "neither" if body.prompt is None else "both"
        raise RequestError(f"expected either a prompt or messages, got {came}: send one of them", param="prompt")
    served = serving.ensembles.find(body.model)
    tokens = await serving.encoded(served, body)
    texts = token_texts(served.ensemble.tokenizer)
    return {
        "count": len(tokens),
        "max_model_len": getattr(served.ensemble.model.config, "max_position_embeddings", None),
        "tokens": list(tokens),
        "token_strs": [texts.text_of(token) for token in tokens] if body.return_token_strs else None,
    }


async def detokenize(serving: Serving, body: DetokenizeRequest) -> dict[str, Any]:
    """Return the text of token ids, special tokens included.

    Raises:
        RequestError: if there is no such model (status 404), or an id is no token's.
    """
    served = serving.ensembles.find(body.model)
    vocabulary = served.ensemble.model.config.vocab_size
    if not all(0 <= token < vocabulary for token in body.tokens):
        raise RequestError(f"expected token ids from 0 to {vocabulary - 1:,}", param="tokens")
    return {"prompt": await serving.on_tokenizer(len(body.tokens), served.ensemble.tokenizer.decode, body.tokens)}
