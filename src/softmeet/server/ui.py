"""The page at /ui: generate from a prompt, see token by token where members disagree, and look behind each token."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softmeet.errors import SoftmeetError
from softmeet.hf.byte_report import character_reports
from softmeet.readers.alphabet import Alphabet
from softmeet.readers.reader import Reader
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import rule_of
from softmeet.server.answer import AnswerStream
from softmeet.server.ensembles import Served
from softmeet.server.errors import RequestError, error_response
from softmeet.server.refusals import refusal
from softmeet.server.schemas import CompletionRequest, Extension
from softmeet.server.sequences import unused
from softmeet.server.serving import Serving
from softmeet.server.ui_chat import conversation, is_for_chats
from softmeet.server.ui_html import LEGEND, Report, alert, details_of, resource, text_of

_log = logging.getLogger("softmeet.server")
# Seconds between two updates of the page while texts are generated.
_FRAME = 0.1
_LISTED = 8
# How many visitors' last texts are kept, some megabytes each, and how many of their runs wait.
_SESSIONS, _RUNS = 32, 32
# An empty icon, so that browsers do not ask the server for one.
_HEAD = '<link rel="icon" href="data:,">'
_TITLE = "<h1>softmeet</h1><p>Several language models, sampled as one. Watch where they agree.</p>"
_ALONE = "nothing"
_INSIDE = (
    "<p>Type how a text begins, and press Generate: the models write on as one, token by token (a token is a piece of "
    "a word, or a byte). Colour shows where they expected different tokens. Choose one to see what each expected "
    "there, and what the mix made of it. Disagreement and surprise are in nats; one is 1.44 bits.</p>"
)
_HINT = "<p>Choose a token, with the pointer or with the arrow keys and Enter, to see what was behind it.</p>"
_EXAMPLE = "And the king said unto his daughter,"


@dataclass
class Side:
    """One of the one or two texts that the page compares.

    Args:
        rule: the rule that generates it, as text.
        members: the members' names.
        prompt: the text that it continues.
        by_character: whether the page shows characters, as its tokens are parts of these.
        files: the user's files beside the members.
        is_told: whether it is said where the text stands in them.
        reports: the reports of its tokens so far, as the batcher's events have them.
    """

    rule: str
    members: tuple[str, ...]
    prompt: str
    by_character: bool
    files: Sequence[Reader] = ()
    is_told: bool = False
    reports: list[Report] = field(default_factory=list)

    @property
    def tokens(self) -> list[Report]:
        """The reports of what the page shows one by one: its tokens, or its characters."""
        return character_reports(self.reports) if self.by_character else self.reports

    def details(self, k: int) -> str:
        """Return the details of what is shown as number k, as HTML."""
        shown = self.tokens
        found = [reader.source(self._symbols(shown[: k + 1], reader.alphabet)) for reader in self.files if self.is_told]
        sources = [one and asdict(replace(one, path=one.below)) for one in found]
        names = [reader.name for reader in self.files]
        return details_of(shown[k] | {"sources": sources}, self.members, self.rule, names)

    def _symbols(self, shown: Sequence[Report], alphabet: Alphabet) -> list[int]:
        """Return the symbols of the prompt and of the first of what is shown."""
        if self.by_character:
            return alphabet.encode(self.prompt + "".join(one["text"] for one in shown))
        return [*alphabet.encode(self.prompt), *(one["token"] for one in shown)]


def mount(app: FastAPI, serving: Serving) -> None:
    """Add the page to an application, at the path /ui.

    Args:
        app: the application.
        serving: the ensembles and the batcher that the page generates with, in this process; the batcher has to be
            started before the page is used, as the lifespan of :func:`softmeet.server.app.create_app` does.
    """
    for module in (gr.queueing, gr.route_utils, gr.routes):
        # With an error they would print what was typed, which no log is to hold.
        module.traceback = SimpleNamespace(print_exc=_note)
    # Only then does Gradio check which files it may copy; no call may name one, as the guard sees to.
    shown = page(serving)
    shown.has_launched = True
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    gr.mount_gradio_app(
        app, shown, path="/ui", theme=theme, css=resource("page.css"), head=_HEAD, footer_links=[],
        ssr_mode=False, show_error=False, run_history=False, pwa=False, enable_monitoring=False,
    )  # fmt: skip
    mounted = next(route for route in app.router.routes if isinstance(route, Mount) and route.path == "/ui")
    mounted.app = _Refusing(mounted.app)


class _Refusing:
    """An ASGI layer that answers calls which Gradio cannot make anything of by status 400 and an error object.

    Gradio answers them by 500, and raises what went wrong.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on, and its answer back unless its status is 500 or more."""
        begun = failed = False

        async def sending(message: Message) -> None:
            nonlocal begun, failed
            if message["type"] == "http.response.start":
                begun, failed = True, message["status"] >= 500
            if not failed:
                await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            _note()
            failed = failed or not begun
        if failed and scope["type"] == "http":
            error = RequestError("expected a call that the page at /ui makes: use the API, /v1/completions")
            await error_response(error)(scope, receive, send)


def _note() -> None:
    """Write to the log that the page could not do something, without what it was asked."""
    kind = sys.exc_info()[0]
    _log.warning("the page could not answer a call: %s", kind.__name__ if kind else "unknown")


def page(serving: Serving) -> gr.Blocks:
    """Return the page, as Gradio's blocks, for a server's ensembles.

    Controls of settings that requests may not change are disabled.

    Args:
        serving: the ensembles and the batcher that the page generates with, in this process; the batcher has to be
            started before the page is used, as the lifespan of :func:`softmeet.server.app.create_app` does.
    """
    with gr.Blocks(title="softmeet: look inside", analytics_enabled=False) as blocks:
        blocks.state_session_capacity = _SESSIONS
        gr.HTML(_TITLE, elem_classes="head")
        with gr.Tabs(selected="chat" if is_for_chats(serving) else "inside"):
            with gr.Tab("Chat", id="chat"):
                conversation(serving)
            with gr.Tab("Look inside", id="inside"):
                _inside(serving)
    blocks.queue(max_size=_RUNS)
    return blocks


def _inside(serving: Serving) -> None:
    """Add a text whose tokens can be looked behind to the Gradio blocks that are being built."""
    first, choose = serving.ensembles.find(None), resource("page.js")
    gr.HTML(_INSIDE)
    own = _controls(first)
    free = {name: name in serving.settings.allowed for name in own}
    with gr.Row():
        with gr.Column(scale=3):
            prompt = gr.Textbox(_EXAMPLE, label="Prompt", lines=4, max_lines=12, elem_id="prompt")
        with gr.Column(scale=2, min_width=260):
            names = [s.name for s in serving.ensembles]
            name = gr.Dropdown(names, value=first.name, label="Ensemble", elem_id="ensemble")
            members = gr.CheckboxGroup(
                own["members"], value=own["members"], label="Members", interactive=free["members"], elem_id="members"
            )
    with gr.Row():
        rules = _rules(first)
        rule = gr.Dropdown(
            rules, value=own["rule"], label="Rule: how they are mixed", interactive=free["rule"], elem_id="rule"
        )
        other = gr.Dropdown(
            [_ALONE, *rules], value=_ALONE, label="Compare with", interactive=free["rule"], elem_id="other"
        )
        most = max(min(4, serving.settings.max_trust), own["trust"])
        trust = gr.Slider(
            0, most, own["trust"], step=0.05, label="Trust: how far meet moves it", interactive=free["trust"],
            visible=_has_trust(rules),
        )  # fmt: skip
    with gr.Accordion("Sampling", open=False), gr.Row():
        contexts = [served.combination(Extension(), ()).room(0) for served in serving.ensembles]
        longest = min(200, serving.settings.max_tokens, *contexts)
        length = gr.Slider(1, longest, min(60, longest), step=1, label="Tokens", elem_id="length")
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", elem_id="temperature")
        seed = gr.Number(4, label="Seed", precision=0, minimum=0, maximum=2**53)
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="go", scale=4)
        stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
    trouble = gr.HTML(elem_id="trouble", visible=False)
    gr.HTML(LEGEND)
    with gr.Row(equal_height=True):
        left = gr.HTML(elem_id="left", elem_classes="panel", js_on_load=choose, min_height=150)
        right = gr.HTML(elem_id="right", elem_classes="panel", js_on_load=choose, visible=False)
    details = gr.HTML(_HINT, elem_id="details", elem_classes="panel")
    sides = gr.State([])

    async def run(*given: Any) -> AsyncIterator[Any]:
        async for picture in _pictures(serving, *given):
            yield picture

    inputs = [prompt, name, members, rule, other, trust, length, temperature, seed]
    outputs = [left, right, details, trouble, sides]
    started = gr.on(
        [go.click, prompt.submit], run, inputs, outputs, concurrency_limit=None, show_progress="hidden",
        trigger_mode="once",
    )  # fmt: skip
    stop.click(None, cancels=[started])
    for k, side in enumerate((left, right)):
        side.click(_choosing(k), [sides], [details], show_progress="hidden", concurrency_limit=None, queue=False)
    name.change(
        lambda chosen: _changed(serving.ensembles.find(chosen)), [name], [members, rule, other, trust], queue=False
    )


def _controls(served: Served) -> dict[str, Any]:
    """Return the controls' values for an ensemble: members and files, its rule, and its first trust, at most 4."""
    config = served.ensemble.model.config
    return {"members": [*served.names, *served.files], "rule": config.rule, "trust": min(config.trust[0], 4)}


def _rules(served: Served) -> list[str]:
    """Return the names of the rules that can combine an ensemble's members, its own among them."""
    # Only tokens have rows in heads.
    any_rule = served.combination(Extension(), ()).symbols_are_tokens
    every = [name for name in rule_names() if any_rule or not rule_of(name).reads_heads]
    return list(dict.fromkeys([*every, served.ensemble.model.config.rule]))


def _has_trust(rules: list[str]) -> bool:
    return any("trust" not in unused(rule_of(name)) for name in rules)


def _changed(served: Served) -> tuple[Any, Any, Any, Any]:
    """Return the new values of the controls for members, both rules and trust after an ensemble was chosen."""
    new, rules = _controls(served), _rules(served)
    return (
        gr.CheckboxGroup(new["members"], value=new["members"]),
        gr.Dropdown(rules, value=new["rule"]),
        gr.Dropdown([_ALONE, *rules], value=_ALONE),
        gr.Slider(value=new["trust"], visible=_has_trust(rules)),
    )


def _choosing(k: int) -> Any:
    """Return the handler of a click on a token of text ``k`` (0 left, 1 right), which returns its details as HTML."""

    def choose(sides: list[Side], event: gr.EventData) -> str:
        side, index = sides[k], int(event.k)
        return side.details(index) if index < len(side.tokens) else _HINT

    return choose


async def _pictures(serving: Serving, *inputs: Any) -> AsyncIterator[Any]:
    """Yield the page's outputs (left, right, details, trouble, sides), ten times a second while texts are generated.

    Args:
        serving: the ensembles and the batcher.
        inputs: the values of the page's controls, in the order of ``inputs`` in :func:`page`.
    """
    prompt, name, members, rule, other, trust, length, temperature, seed = inputs
    given = {
        "model": name, "prompt": prompt, "max_tokens": int(length), "temperature": float(temperature),
        "seed": secrets.randbits(32) if seed is None else int(seed),
    }  # fmt: skip
    answers: list[AnswerStream] = []
    feeds: list[asyncio.Task[str]] = []
    try:
        for chosen in [rule] if other == _ALONE else [rule, other]:
            asked = _asked(serving, name, members, chosen, trust)
            request = await serving.prepare(CompletionRequest.model_validate(given | {"softmeet": asked}))
            answers.append(AnswerStream(serving.batcher, request))
        hows = [answer.request.combination for answer in answers]
        sides = [
            Side(str(how.settings.rule), how.names, prompt, not how.symbols_are_tokens, how.model.claimants,
                 is_told=serving.settings.sources)
            for how in hows
        ]  # fmt: skip
        feeds = [asyncio.create_task(_feed(a, side)) for a, side in zip(answers, sides, strict=True)]
        while not all(feed.done() for feed in feeds):
            yield *_texts(sides, done=False), _HINT, _trouble(""), sides
            await asyncio.wait(feeds, timeout=_FRAME)
        said = " ".join(filter(None, (feed.result() for feed in feeds)))
        yield *_texts(sides, done=True), _HINT, _trouble(said), sides
    except (SoftmeetError, ValidationError) as error:
        found = refusal(error.errors()) if isinstance(error, ValidationError) else error
        yield gr.skip(), gr.skip(), gr.skip(), _trouble(str(found)), gr.skip()
    finally:
        for answer in answers:
            answer.cancel()
        for feed in feeds:
            feed.cancel()


def _asked(serving: Serving, name: str, members: list[str], rule: str, trust: float) -> Extension:
    """Return the request's field ``softmeet``: the controls that differ from the ensemble's own settings, and a report.

    Without a difference nothing is asked to change, so that servers which allow no changes accept the request.
    """
    own = _controls(serving.ensembles.find(name))
    asked = {"members": list(members), "rule": rule, "trust": float(trust)}
    idle = unused(rule_of(rule))
    given = {name: value for name, value in asked.items() if value != own[name] and name not in idle}
    return Extension.model_validate(given | {"report": _LISTED})


async def _feed(answer: AnswerStream, side: Side) -> str:
    """Append the reports of an answer's tokens to a side until the answer ends; return the error's message, or ""."""
    try:
        async for delta in answer.deltas():
            side.reports += [t.report for t in delta.tokens if t.report is not None]
    except SoftmeetError as error:
        return str(error)
    return ""


def _texts(sides: list[Side], *, done: bool) -> tuple[Any, Any]:
    """Return the one or two texts as the outputs (left, right); with one text the right panel is hidden."""
    left, *right = [text_of(side.tokens, side.prompt, side.rule, done=done) for side in sides]
    return left, gr.HTML("".join(right), visible=bool(right))


def _trouble(message: str) -> Any:
    """Return the output that shows an error's message; hidden if the message is empty."""
    return gr.HTML(alert(message), visible=bool(message))
