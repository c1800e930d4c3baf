"""The FastAPI application: its routes, and the answers to errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from softmeet import __version__
from softmeet.errors import SoftmeetError
from softmeet.hf.chat import chat_of
from softmeet.server.answer import AnswerStream
from softmeet.server.asgi import unless_left
from softmeet.server.ensembles import Served
from softmeet.server.envelope import guarded
from softmeet.server.errors import ErrorBody, RequestError, absent, error_response
from softmeet.server.events import dumps
from softmeet.server.ollama import (
    ErrorLine,
    OllamaChat,
    OllamaGenerate,
    OllamaReply,
    ShowRequest,
    in_its_words,
    listed,
    loaded,
    shown,
)
from softmeet.server.refusals import refusal
from softmeet.server.replies import ChatReply, CompletionReply, Reply
from softmeet.server.responses import ResponsesReply, ResponsesRequest, checked
from softmeet.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Extension,
    Generation,
    TokenizeRequest,
)
from softmeet.server.sequences import GenerationRequest
from softmeet.server.serving import Serving
from softmeet.server.strict import PASSED_OVER
from softmeet.server.texts import token_texts
from softmeet.server.turns_at_lock import TURNS_AT_LOCK

_STATUSES = (400, 401, 404, 405, 408, 413, 415, 421, 422, 429, 500, 503, 504)
# /v1/embeddings and the like are other things than /v1/completions, however alike they are spelled.
_LIKE = 0.75
# Over bytes, seconds between two chunks of a choice in a stream.
_PAUSE = 0.05
_NO_PAGE = "none: the server was started with --no-ui"
T = TypeVar("T")


async def _passing_over(request: Request) -> None:
    """Have unknown fields of this request passed over, unless they are refused."""
    passed_over = _serving(request).passed_over
    PASSED_OVER.set(None if passed_over is None else passed_over.field)


router, ollama = (
    APIRouter(responses={status: {"model": body} for status in _STATUSES}, dependencies=[Depends(_passing_over)])
    for body in (ErrorBody, ErrorLine)
)


def create_app(serving: Serving) -> FastAPI:
    """Return the ASGI application of a server; its lifespan events start and end the batcher.

    Args:
        serving: the ensembles, their batcher, not yet started, and the server's settings; the application keeps it as
            ``state.serving``. When the lifespan ends, answers that have not ended fail with ClosingError at once.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(serving.start)
        yield
        serving.batcher.close(grace=0)
        await asyncio.to_thread(serving.batcher.join)

    app = _App(title="softmeet", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.serving = serving
    app.include_router(router)
    app.include_router(ollama)
    for kind in (SoftmeetError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _on_error)
    if serving.settings.ui:
        # Relative, as no proxy before the server need know its name; Starlette's own has that of the Host header.
        app.add_route("/ui", lambda request: RedirectResponse("ui/"), include_in_schema=False)
        app.mount("/ui", StaticFiles(packages=[("softmeet.server", "page")], html=True))
    return app


class _App(FastAPI):
    """An application whose every answer passes the envelope and the guard, those to a defect (500) too."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return all layers of the application, the outermost first to be called."""
        # Middleware that is added in the ordinary way is inside of the layer that answers defects.
        serving = self.state.serving
        settings = serving.settings
        return guarded(super().build_middleware_stack(), settings.protection, serving.metrics, settings.cors)


def _serving(request: Request) -> Serving:
    return cast(Serving, request.app.state.serving)


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """Show what the server answers; browsers are sent on to the page, where there is one."""
    ui = _serving(request).settings.ui
    document = {
        "name": "softmeet",
        "version": __version__,
        "page": "/ui" if ui else _NO_PAGE,
        "openapi": "/openapi.json",
        **{path: route.description for path, route in _paths().items()},
    }
    # The list is in both answers: curl shows it where a browser follows to the page.
    headers = {"Location": "ui/"} if ui else {}
    return Response(json.dumps(document, indent=2) + "\n", 307 if ui else 200, headers, "application/json")


def _paths() -> dict[str, APIRoute]:
    """Return the API's routes by their paths, as they are shown to clients."""
    every = (*router.routes, *ollama.routes)
    routes = (route for route in every if isinstance(route, APIRoute) and route.include_in_schema)
    return {route.path.replace("{name:path}", "NAME"): route for route in routes}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the served ensembles: members, the settings that each one's rule uses, gate and context length in tokens."""
    serving = _serving(request)
    return {"object": "list", "data": [_model(serving, served) for served in serving.ensembles]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """Show one served ensemble: members, the settings that its rule uses, gate and context length in tokens."""
    serving = _serving(request)
    return _model(serving, serving.ensembles.find(name))


def _model(serving: Serving, served: Served) -> dict[str, Any]:
    whole, chat = served.combination(Extension(), ()), chat_of(served.ensemble.model)
    facts = {
        "members": list(served.names),
        **({"files": list(served.files)} if served.files else {}),
        **whole.shown(),
        "vocabulary": served.ensemble.model.config.vocabulary,
        "context": getattr(served.ensemble.model.config, "max_position_embeddings", None),
        "max_tokens": serving.settings.max_tokens,
        "chat": not chat.missing,
        "sources": serving.settings.sources and bool(served.files),
        "may_change": list(serving.settings.allowed),
        "rules": whole.rules,
    }
    facts.setdefault("gate", None)
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "softmeet", "softmeet": facts}


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt, text or token ids, by n choices, as one JSON document or a stream of server-sent events."""
    return await _respond(request, CompletionReply(await _prepared(request, body), body))


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the messages, joined to a prompt by the tokenizer's chat template, as one JSON document or as a stream."""
    return await _respond(request, ChatReply(await _prepared(request, body), body))


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer a text or messages as a chat does, in the form of OpenAI's Responses API; nothing is stored."""
    asked = checked(body)
    return await _respond(request, ResponsesReply(await _prepared(request, asked), asked))


@ollama.post("/api/chat")
async def ollama_chat(body: OllamaChat, request: Request) -> Response:
    """Answer messages as ollama does: a stream of lines of JSON, or one with stream false."""
    return await _as_ollama(request, body)


@ollama.post("/api/generate")
async def ollama_generate(body: OllamaGenerate, request: Request) -> Response:
    """Answer a prompt as ollama does, as a user's message or, if it is raw, by going on with it."""
    return await _as_ollama(request, body)


async def _as_ollama(request: Request, body: OllamaChat | OllamaGenerate) -> Response:
    generates = isinstance(body, OllamaGenerate)
    if (asked := body.asked()) is None:
        return JSONResponse(loaded(body.model, generates=generates))
    return await _respond(request, OllamaReply(await _prepared(request, asked), asked, generates=generates))


@ollama.get("/api/tags")
@ollama.get("/api/ps")
async def tags(request: Request) -> dict[str, Any]:
    """List the served ensembles as ollama lists models; all are loaded."""
    return {"models": [listed(served) for served in _serving(request).ensembles]}


@ollama.post("/api/show")
async def show(body: ShowRequest, request: Request) -> dict[str, Any]:
    """Show one served ensemble as ollama shows a model: its context, and whether it can call functions."""
    name = body.model or body.name
    return shown(_serving(request).ensembles.find(name and name.removesuffix(":latest")))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Show the token ids of a prompt, or of messages in the tokenizer's chat template, and how many they are."""
    if (body.prompt is None) == (body.messages is None):
        came = "neither" if body.prompt is None else "both"
        raise RequestError(f"expected either a prompt or messages, got {came}: send one of them", param="prompt")
    serving = _serving(request)
    served = serving.ensembles.find(body.model, serving.passed_over)
    tokens = await _unless_left(request, serving.encoded(served, body))
    # Texts are those that answers show under logprobs.
    texts = token_texts(served.ensemble.tokenizer)
    return {
        "count": len(tokens),
        "max_model_len": getattr(served.ensemble.model.config, "max_position_embeddings", None),
        "tokens": list(tokens),
        "token_strs": [texts.text_of(token) for token in tokens] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """Show the text of token ids, special tokens included."""
    serving = _serving(request)
    served = serving.ensembles.find(body.model, serving.passed_over)
    vocabulary = served.ensemble.model.config.vocab_size
    if not all(0 <= token < vocabulary for token in body.tokens):
        raise RequestError(f"expected token ids from 0 to {vocabulary - 1:,}", param="tokens")
    work = serving.on_tokenizer(len(body.tokens), served.ensemble.tokenizer.decode, body.tokens)
    return {"prompt": await _unless_left(request, work)}


@router.get("/version")
@ollama.get("/api/version")
async def version() -> dict[str, Any]:
    """Return the version of softmeet that serves, as vLLM's endpoint does for its own."""
    return {"version": __version__}


@router.get("/health")
async def health(request: Request) -> Response:
    """Answer 200 while the batcher runs, else 503; loading keeps probes waiting, and SIGTERM closes the port."""
    return _state(_serving(request).batcher.alive)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Answer 200 if one more sequence would be accepted now, 503 if the server is full; else as /health."""
    return _state(_serving(request).batcher.has_room)


def _state(good: bool) -> Response:
    retry = {} if good else {"Retry-After": "1"}
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503, retry)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the server's counters and histograms in Prometheus' text format."""
    return Response(generate_latest(_serving(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns; if the client leaves before, cancel it and raise ClientDisconnect."""
    if (found := await unless_left(work, request.receive)) is None:
        raise ClientDisconnect
    return found


async def _prepared(request: Request, body: Generation) -> GenerationRequest:
    return await _unless_left(request, _serving(request).prepare(body))


async def _respond(request: Request, reply: Reply) -> Response:
    """Submit a prepared request, and return its answer: a stream of events, or one document after the last token."""
    request.state.model = reply.asked.model
    answer = request.state.answer = AnswerStream(_serving(request).batcher, reply.asked)
    if reply.body.stream:
        headers = {"Cache-Control": "no-store"}
        return _Events(_events(answer, reply), media_type=reply.media_type, headers=headers)
    choices = await _unless_left(request, answer.whole())
    document = await TURNS_AT_LOCK.written(lambda: dumps(reply.document(choices, answer.completion_tokens)))
    return Response(document, media_type="application/json")


async def _events(answer: AnswerStream, reply: Reply) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, up to the last; a SoftmeetError becomes an event as well."""
    try:
        if first := reply.begun():
            yield first
        asked = answer.request.combination
        async for delta in answer.parts(0.0 if asked.symbols_are_tokens else _PAUSE):
            # A prompt's scores may be long, and so may all log-probabilities together, or a look into files.
            write, sought = partial(reply.written, delta), answer.request.sources and delta.finish is not None
            is_long = sought or delta.scored is not None
            if text := await TURNS_AT_LOCK.written(write) if is_long else write():
                yield text
        write = partial(reply.ended, answer.completion_tokens)
        last = write() if reply.body.listed is None else await TURNS_AT_LOCK.written(write)
    except SoftmeetError as error:
        # The status 200 has been sent already, so the error can only be sent as an event.
        last = reply.failed(error)
    finally:
        answer.cancel()
    yield last


class _Events(StreamingResponse):
    """A response of server-sent events that stops at once when the client leaves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last one, or until the client has left, and close the iterator of events."""
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            with contextlib.suppress(OSError):
                await unless_left(self.stream_response(send), receive)


async def _on_error(request: Request, error: Exception) -> Response:
    """Return the response to an exception of a route, in the form of OpenAI's error object."""
    headers: Mapping[str, str] | None = None
    match error:
        case ClientDisconnect():
            return Response(status_code=499)  # nobody reads it
        case RequestValidationError():
            error = refusal(error.errors(), request.url.path)
        case HTTPException(status_code=404 | 405 as status):
            headers = error.headers
            error = RequestError(_astray(request, error), status=status)
        case HTTPException():
            error = RequestError(str(error.detail), status=error.status_code)
        case RequestError() if request.url.path.startswith("/api/"):
            error = in_its_words(error)
    return error_response(error, headers, request.url.path)


def _astray(request: Request, error: HTTPException) -> str:
    """Return the message to a request for a path that there is not (404), or by a wrong method (405)."""
    path = request.url.path[:100]
    if error.status_code == 404:
        page = ["/ui"] if _serving(request).settings.ui else []
        return absent(f"there is nothing at {path}", path, [*_paths(), "/openapi.json", *page], _LIKE)
    allowed = (error.headers or {}).get("Allow", "")
    advice = ", with the request as JSON (curl -H 'content-type: application/json' -d '{…}')"
    return f"expected {allowed} at {path}{advice if allowed == 'POST' else ''}, got {request.method}"
