"""What softmeet's server and ``transformers serve`` make of the same requests: the table of docs/guides/clients.md.

Both serve one bundled model, with a chat template written for it. Every row is a request to each; a server that
answers with status 200 has to show the effect, else the field counts as ignored. What is said of vLLM, which is not
run, is read from its documentation and the definitions of its requests.

    python benchmarks/api.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import typer

from servers import MEMBER, Rival
from servers import Server as Process
from softmeet.members import zoo

TEMPLATE = (
    "{% if tools %}{{ tools }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
)
PROMPT = "And the king said unto his"
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
NOT_THERE = (404, 405)
HEAD = "| request | softmeet | `transformers serve` | vLLM |\n|---|---|---|---|"


@dataclass
class Server:
    """A running server with one model, and what it answers to plain requests."""

    url: str
    model: str
    # A connection for each request: kept ones may be closed by the server just when the next request is sent.
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0))
    )

    def ask(self, path: str, **fields: Any) -> httpx.Response:
        """Send a request; to a path that generates, eight tokens at temperature 0 of the usual prompt by default."""
        usual: dict[str, dict[str, Any]] = {
            COMPLETIONS: {"prompt": PROMPT, "max_tokens": 8, "temperature": 0},
            CHAT: {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0},
            RESPONSES: {"input": PROMPT, "max_output_tokens": 8, "temperature": 0, "stream": False},
        }
        body = {"model": self.model, **usual.get(path, {}), **fields}
        return self.client.post(self.url + path, json={name: x for name, x in body.items() if x is not None})

    def text(self, **fields: Any) -> str:
        """The text of a completion."""
        return str(choices(self.ask(COMPLETIONS, **fields))[0]["text"])


def choices(answer: httpx.Response) -> list[dict[str, Any]]:
    """The choices of an answer."""
    return list(answer.json()["choices"])


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream."""
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


Shown = Callable[[Server, httpx.Response], bool]


@dataclass(frozen=True)
class Probe:
    """One row: a request, whether its answer shows that it was understood, and what vLLM's documentation says."""

    name: str
    path: str
    fields: dict[str, Any] = field(default_factory=dict)
    shows: Shown = lambda server, answer: True
    vllm: str = "yes"

    def found(self, server: Server) -> str:
        """What a server makes of the request: yes, ignored, refused, an error, or none if there is no such path."""
        get = not self.fields and self.path not in (COMPLETIONS, CHAT, RESPONSES)
        path = self.path.replace("NAME", server.model)
        answer = server.client.get(server.url + path) if get else server.ask(path, **self.fields)
        if answer.status_code in NOT_THERE:
            return "-"
        if answer.status_code >= 500:
            return "error 500"
        if answer.status_code >= 400:
            return "refused"
        try:
            return "yes" if self.shows(server, answer) else "ignored"
        except (KeyError, IndexError, TypeError, ValueError):
            return "ignored"


def _greedy(server: Server, answer: httpx.Response) -> bool:
    return bool(choices(answer)[0]["text"] == server.text() != server.text(temperature=1, seed=1))


def _not_greedy(server: Server, answer: httpx.Response) -> bool:
    return bool(choices(answer)[0]["text"] != server.text())


def _seeded(server: Server, answer: httpx.Response) -> bool:
    def drawn(seed: int) -> str:
        return server.text(temperature=1, seed=seed)

    return bool(drawn(1) == drawn(1) == choices(answer)[0]["text"] != drawn(2))


def _streamed(server: Server, answer: httpx.Response) -> bool:
    return "".join(chunk["choices"][0]["text"] or "" for chunk in chunks(answer) if chunk["choices"]) == server.text()


def _counted(server: Server, answer: httpx.Response) -> bool:
    return any(chunk.get("usage") and not chunk["choices"] for chunk in chunks(answer))


def _ids(server: Server, answer: httpx.Response) -> bool:
    return bool(answer.json()["usage"]["prompt_tokens"] == 3)


def _stopped(server: Server, answer: httpx.Response) -> bool:
    choice = choices(answer)[0]
    return choice["finish_reason"] == "stop" and len(choice["text"]) < len(server.text())


def _responded(server: Server, answer: httpx.Response) -> bool:
    return any(part["type"] == "output_text" for item in answer.json()["output"] for part in item["content"])


def _events(server: Server, answer: httpx.Response) -> bool:
    kinds = [event["type"] for event in chunks(answer)]
    return kinds[0] == "response.created" and "response.output_text.delta" in kinds


def _has(name: str) -> Shown:
    return lambda server, answer: choices(answer)[0].get(name) is not None


def _several(count: int) -> Shown:
    return lambda server, answer: len(choices(answer)) == count


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
JSON = {"type": "json_object"}
DRAWN = {"temperature": 1}
KING, COMMA, END = 499, 12, 0  # tokens of the model


def probes() -> Iterator[Probe]:
    """Yield every row."""
    bias = {"logit_bias": {str(KING): 100.0}}
    yield Probe("`/v1/completions`", COMPLETIONS)
    yield Probe("`prompt`: several", COMPLETIONS, {"prompt": [PROMPT, "And he"]}, _several(2))
    yield Probe("`prompt`: token ids", COMPLETIONS, {"prompt": [KING] * 3}, _ids)
    yield Probe("`stream`", COMPLETIONS, {"stream": True}, _streamed)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    yield Probe("`stream_options.include_usage`", COMPLETIONS, usage, _counted)
    yield Probe("`n`", COMPLETIONS, {"n": 2, **DRAWN}, _several(2))
    counted: Shown = lambda server, answer: answer.json()["usage"]["completion_tokens"] == 16  # noqa: E731
    yield Probe("`best_of`", COMPLETIONS, {"best_of": 2}, counted, "ignored")
    begins: Shown = lambda server, answer: choices(answer)[0]["text"].startswith(PROMPT)  # noqa: E731
    yield Probe("`echo`", COMPLETIONS, {"echo": True}, begins)
    yield Probe("`logprobs`", COMPLETIONS, {"logprobs": 2}, _has("logprobs"))
    yield Probe("`prompt_logprobs`", COMPLETIONS, {"prompt_logprobs": 1}, _has("prompt_logprobs"))
    yield Probe("`seed`", COMPLETIONS, {"seed": 1, **DRAWN}, _seeded)
    yield Probe("`top_p`", COMPLETIONS, {"top_p": 1e-6, "seed": 1, **DRAWN}, _greedy)
    yield Probe("`top_k`", COMPLETIONS, {"top_k": 1, "seed": 1, **DRAWN}, _greedy)
    yield Probe("`min_p`", COMPLETIONS, {"min_p": 1.0, "seed": 1, **DRAWN}, _greedy)
    yield Probe("`repetition_penalty`", COMPLETIONS, {"repetition_penalty": 9.0, "max_tokens": 24}, _repeats_less)
    yield Probe("`presence_penalty`", COMPLETIONS, {"presence_penalty": 2, "max_tokens": 24}, _repeats_less)
    yield Probe("`frequency_penalty`", COMPLETIONS, {"frequency_penalty": 2, "max_tokens": 24}, _repeats_less)
    forced: Shown = lambda server, answer: choices(answer)[0]["text"] == " king" * 8  # noqa: E731
    yield Probe("`logit_bias`", COMPLETIONS, bias, forced)
    yield Probe("`stop`", COMPLETIONS, {"stop": ","}, _stopped)
    late = {"stop": ",", "min_tokens": 8}
    whole: Shown = lambda server, answer: choices(answer)[0]["text"] == server.text()  # noqa: E731
    yield Probe("`min_tokens`", COMPLETIONS, late, whole)
    yield Probe("`stop_token_ids`", COMPLETIONS, {"stop_token_ids": [COMMA]}, _stopped)
    comma: Shown = lambda server, answer: choices(answer)[0]["text"].endswith(",")  # noqa: E731
    yield Probe("`include_stop_str_in_output`", COMPLETIONS, {"stop": ",", "include_stop_str_in_output": True}, comma)
    ends = {"logit_bias": {str(END): 100.0}, "ignore_eos": True}
    length: Shown = lambda server, answer: choices(answer)[0]["finish_reason"] == "length"  # noqa: E731
    yield Probe("`ignore_eos`", COMPLETIONS, ends, length)
    special: Shown = lambda server, answer: "<|" in choices(answer)[0]["text"]  # noqa: E731
    yield Probe("`skip_special_tokens`", COMPLETIONS, ends | {"skip_special_tokens": False}, special)
    cut: Shown = lambda server, answer: answer.json()["usage"]["prompt_tokens"] == 2  # noqa: E731
    yield Probe("`truncate_prompt_tokens`", COMPLETIONS, {"truncate_prompt_tokens": 2}, cut)
    yield Probe("a misspelt field", COMPLETIONS, {"max_token": 1}, lambda *_: False, "ignored")
    ours = {"softmeet": {"rule": "prob-mean", "report": 1}}
    yield Probe("`softmeet`: rule, trust, members, reports", COMPLETIONS, ours, _has("softmeet"), "ignored")
    yield Probe("`/v1/chat/completions`", CHAT)
    yield Probe("chat: `stream`", CHAT, {"stream": True}, lambda s, answer: "delta" in chunks(answer)[0]["choices"][0])
    yield Probe("chat: `n`", CHAT, {"n": 2, **DRAWN}, _several(2))
    shorter = {"max_tokens": None, "max_completion_tokens": 2}
    two: Shown = lambda server, answer: answer.json()["usage"]["completion_tokens"] == 2  # noqa: E731
    yield Probe("chat: `max_completion_tokens`", CHAT, shorter, two)
    king: Shown = lambda server, answer: choices(answer)[0]["message"]["content"] == " king" * 8  # noqa: E731
    yield Probe("chat: `logit_bias`", CHAT, bias, king)
    yield Probe("chat: `logprobs`, `top_logprobs`", CHAT, {"logprobs": True, "top_logprobs": 2}, _has("logprobs"))
    yield Probe("chat: `tools`", CHAT, {"tools": [TOOL]})
    yield Probe("chat: `response_format`: JSON", CHAT, {"response_format": JSON}, _is_json)
    yield Probe("`/v1/responses`", RESPONSES, {}, _responded)
    yield Probe("responses: `stream`", RESPONSES, {"stream": True}, _events)
    briefly: Shown = lambda s, answer: answer.json()["usage"]["input_tokens"] > _input(s)  # noqa: E731
    yield Probe("responses: `instructions`", RESPONSES, {"instructions": "Be brief."}, briefly)
    earlier = {"previous_response_id": "resp_1"}
    yield Probe("responses: `previous_response_id`", RESPONSES, earlier, lambda *_: False, "if started with a store")
    listed: Shown = lambda s, answer: bool(answer.json()["data"])  # noqa: E731
    yield Probe("`/v1/models`", "/v1/models", {}, listed)
    yield Probe("`/tokenize`", "/tokenize", {"prompt": PROMPT}, lambda s, answer: bool(answer.json()["tokens"]))
    yield Probe(
        "`/detokenize`", "/detokenize", {"tokens": [KING]}, lambda s, answer: answer.json()["prompt"] == " king"
    )
    yield Probe("`/version`", "/version")
    yield Probe("`/health`", "/health")
    yield Probe("`/ready`", "/ready", vllm="-")
    yield Probe("`/metrics`", "/metrics")
    yield Probe("`/v1/embeddings`", "/v1/embeddings", {"input": PROMPT}, vllm="with a model for it")


def _repeats_less(server: Server, answer: httpx.Response) -> bool:
    return bool(choices(answer)[0]["text"] != server.text(max_tokens=24))


def _is_json(server: Server, answer: httpx.Response) -> bool:
    return isinstance(json.loads(choices(answer)[0]["message"]["content"]), dict)


def _input(server: Server) -> int:
    return int(server.ask(RESPONSES).json()["usage"]["input_tokens"])


@contextmanager
def model() -> Iterator[str]:
    """The folder of a bundled model with a chat template, while this lasts; it says that tokens are to be drawn."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(zoo.locate(MEMBER), copy)
        (copy / "chat_template.jinja").write_text(TEMPLATE)
        # Without it transformers serve takes the most probable token, whatever a request says.
        generation = copy / "generation_config.json"
        generation.write_text(json.dumps(json.loads(generation.read_text()) | {"do_sample": True}))
        yield str(copy)


def rows(server: Server) -> list[str]:
    """What a server makes of every request."""
    return [probe.found(server) for probe in probes()]


def main() -> None:
    """Print the table."""
    with model() as folder:
        process = Process("-m", f"model={folder}")
        try:
            ours = rows(Server(process.url, "model"))
        finally:
            process.end()
        rival = Rival(folder)
        try:
            theirs = rows(Server(rival.url, rival.model))
        finally:
            rival.end()
    print(HEAD)
    for probe, *found in zip(probes(), ours, theirs, strict=True):
        print(f"| {probe.name} | {' | '.join(found)} | {probe.vllm} |")


if __name__ == "__main__":
    typer.run(main)
