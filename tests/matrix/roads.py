"""The roads on which a text can be asked for: each takes a case and returns what was written."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import httpx
import torch
from cases import CASES, Case
from click.testing import CliRunner
from serving import chunks, running, serving_of
from typer.main import get_command
from worlds import FAMILIES, World

from softmeet import Ensemble, Structure
from softmeet.cli.main import app
from softmeet.engine.processors import RepeatPenalties
from softmeet.hf.prompts import encoded
from softmeet.hf.sampling import RowSampler
from softmeet.readers.bytes.next_tokens import END
from softmeet.server.answer import AnswerStream
from softmeet.server.schemas import CompletionRequest
from softmeet.server.texts import token_texts

# How limits in tokens and in bytes are said in Python and on the command line. A request says max_bytes to softmeet.
LIMITS = {"tokens": ("max_new_tokens", "--max-new-tokens"), "bytes": ("max_bytes", "--max-new-bytes")}
REGEX, CHOICE = "[a-h]{2}( the)?[0-9]{1,3}", ["hearth", "heart", "three"]
SCHEMA = {
    "type": "object", "properties": {"r": {"enum": [1, "he"]}}, "required": ["r"], "additionalProperties": False,
}  # fmt: skip
# The same structure in Python, on the command line, and in a request.
STRUCTURES: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "none": (None, [], {}),
    "regex": (Structure.regex, ["--regex", REGEX], {"structured_outputs": {"regex": REGEX}}),
    "choice": (
        Structure.choice,
        [word for text in CHOICE for word in ("--choice", text)],
        {"structured_outputs": {"choice": CHOICE}},
    ),
    "schema": (Structure.json_schema, ["--json-schema", json.dumps(SCHEMA)], {"structured_outputs": {"json": SCHEMA}}),
}
# Made once, since typer takes long to make it.
_COMMAND = get_command(app)
TEMPERED = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3}
PRESENCE, FREQUENCY, BIASED, BIAS = 0.6, 0.4, 70, 2.0


@dataclass(frozen=True)
class Asked:
    """A case over the members of its world, by a seed of draws and prompts, in a conversation or not."""

    world: World
    case: Case
    seed: int
    chat: bool = False

    @property
    def prompts(self) -> list[str]:
        return self.world.prompts(self.seed)

    @property
    def ensemble(self) -> Ensemble:
        return self.world.ensemble(self.case.rule_text, self.case.gate_text, self.case.files)

    @property
    def length(self) -> int:
        """Return the limit: what a schema needs, and else little; rules of the essay take long for a token."""
        slow = self.case.rule == "max-entropy" or self.case.vocabulary in FAMILIES
        return 5 if slow else 12 if self.case.structure == "schema" else 8

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompts[0]}]


@dataclass(frozen=True)
class Written:
    """What came of a road: texts, and of the first one its tokens and their log-probabilities, if it reports them."""

    texts: list[str]
    tokens: list[int] | None = None
    spelled: list[str] | None = None
    log_probs: list[float] | None = None


# Python


def python_options(asked: Asked, length: int) -> dict[str, Any]:
    case = asked.case
    found: dict[str, Any] = {"do_sample": case.drawn, LIMITS[asked.case.unit][0]: asked.length}
    if case.sampling == "tempered":
        found |= TEMPERED
    if case.sampling == "biased":
        found["logits_processor"] = [RepeatPenalties(length, PRESENCE, FREQUENCY)]
        found["sequence_bias"] = {(BIASED,): BIAS}
    if (make := STRUCTURES[case.structure][0]) is not None:
        found["structure"] = make({"regex": REGEX, "choice": CHOICE, "schema": SCHEMA}[case.structure])
    if case.speculation != "default":
        found["speculate"] = int(case.speculation)
    return found


def _length(asked: Asked, prompts: list[Any]) -> int:
    return encoded(asked.ensemble.model, asked.ensemble.tokenizer, prompts)["input_ids"].shape[1]


def _seeded(asked: Asked) -> dict[str, Any]:
    if asked.case.sampling == "torch":
        torch.manual_seed(asked.seed)
        return {}
    return {"seed": asked.seed} if asked.case.drawn else {}


def generate(asked: Asked, **more: Any) -> Written:
    prompt = asked.messages() if asked.chat else asked.prompts[0]
    options = python_options(asked, _length(asked, [prompt])) | more
    return Written([asked.ensemble.generate(prompt, **_seeded(asked), **options)])


def stream(asked: Asked) -> Written:
    prompt = asked.messages() if asked.chat else asked.prompts[0]
    options = python_options(asked, _length(asked, [prompt]))
    return Written(["".join(asked.ensemble.stream(prompt, **_seeded(asked), **options))])


def together(asked: Asked, **more: Any) -> Written:
    """Write all six texts in one call of ``Ensemble.generate``."""
    options = python_options(asked, _length(asked, asked.prompts)) | more
    return Written(asked.ensemble.generate(asked.prompts, **_seeded(asked), **options))


def _inputs(asked: Asked, row: int) -> tuple[Any, dict[str, Any]]:
    """Return the model of a case, and what it is called with for one prompt."""
    ensemble = asked.ensemble
    inputs = ensemble.tokenizer([asked.prompts[row]], return_tensors="pt")
    options = python_options(asked, inputs["input_ids"].shape[1])
    options |= {**inputs, "pad_token_id": ensemble.tokenizer.pad_token_id}
    if asked.case.drawn:
        options["top_k"] = 0
    if asked.case.sampling == "torch":
        torch.manual_seed(asked.seed)
    elif asked.case.drawn:
        options["row_sampler"] = RowSampler(asked.seed, [row])
    return ensemble.model, options


def transformers(asked: Asked, row: int = 0, **more: Any) -> Written:
    """Write one of the texts by the ``generate`` of a causal LM of transformers, which reports logits."""
    model, options = _inputs(asked, row)
    out = model.generate(**options | {"return_dict_in_generate": True, "output_logits": True} | more)
    return _of_transformers(asked, out, options["input_ids"].shape[1])


def resumed(asked: Asked) -> Written:
    """Write half of the text, and the rest from the keys and values that are passed on."""
    model, options = _inputs(asked, 0)
    start, limit = options["input_ids"].shape[1], LIMITS[asked.case.unit][0]
    kept = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**options | kept | {limit: asked.length // 2})
    if out.sequences.shape[1] < start + asked.length // 2:  # it has ended
        return _of_transformers(asked, out, start)
    ids = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences), "cache": out.cache}
    rest = model.generate(**options | kept | ids | {limit: asked.length - asked.length // 2})
    found = _of_transformers(asked, rest, start)
    return replace(found, log_probs=_of_transformers(asked, out, start).log_probs + found.log_probs)


def _of_transformers(asked: Asked, out: Any, start: int) -> Written:
    tokens = out.sequences[0, start:].tolist()
    text = asked.ensemble.tokenizer.decode(tokens, skip_special_tokens=True)
    found = [own[0].double().log_softmax(-1) for own in out.logits]
    drawn = tokens[len(tokens) - len(found) :]
    return Written([text], tokens, None, [own[token].item() for own, token in zip(found, drawn, strict=True)])


@torch.inference_mode()
def read_at_once(asked: Asked, tokens: list[int], *, drawn: bool = True) -> list[float]:
    """Return the log-probabilities of a text's tokens, drawn or given as the prompt is, from one call of the model."""
    model, ids = _forced(asked, tokens)
    given = {"given": ids.shape[1] - len(tokens) if drawn else None}
    log_probs = model(input_ids=ids[:, :-1], use_cache=False, **given).logits[0, -len(tokens) :].double()
    return log_probs.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1).tolist()


@torch.inference_mode()
def read_one_by_one(asked: Asked, tokens: list[int]) -> list[float]:
    """Return the log-probabilities of a text's tokens from a call for each of them, with a cache."""
    model, ids = _forced(asked, tokens)
    found, cache, new = [], model.new_cache(model.settings.gate), ids[:, : -len(tokens)]
    for token in tokens:
        out = model(input_ids=new, cache=cache, use_cache=True)
        found.append(out.logits[0, -1, token].item())
        cache, new = out.cache, torch.tensor([[token]])
    return found


def _forced(asked: Asked, tokens: list[int]) -> tuple[Any, torch.Tensor]:
    prompt = asked.ensemble.tokenizer(asked.prompts[0])["input_ids"]
    return asked.ensemble.model, torch.tensor([prompt + tokens])


# The command


def command(asked: Asked, *prompts: str) -> Any:
    """Run ``softmeet generate``, and return typer's result."""
    case = asked.case
    words = ["generate", *prompts, *asked.world.arguments(case.files)]
    words += [LIMITS[asked.case.unit][1], str(asked.length), "--no-summary"]
    words += [] if case.rule_text is None else ["--rule", case.rule_text]
    words += [] if case.gate_text is None else ["--gate", case.gate_text]
    words += STRUCTURES[case.structure][1]
    words += ["--seed", str(asked.seed)] if case.drawn else ["--no-do-sample"]
    if case.sampling == "tempered":
        words += [word for name, x in TEMPERED.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    words += [] if case.speculation == "default" else ["--speculate", case.speculation]
    words += ["--chat"] * asked.chat + ["--json"] * (len(prompts) > 1)
    # The members of the world are loaded already; all else the command makes by itself.
    with patch.object(Ensemble, "from_pretrained", partial(Ensemble.from_pretrained, loaded=asked.world.loaded)):
        return CliRunner().invoke(_COMMAND, words)


def printed(asked: Asked) -> Written:
    done = command(asked, asked.prompts[0])
    assert done.exit_code == 0, done.output
    return Written([done.stdout_bytes.decode().removesuffix("\n")])


def printed_together(asked: Asked) -> Written:
    """Write all six texts by one command, as JSON."""
    done = command(asked, *asked.prompts)
    assert done.exit_code == 0, done.output
    return Written([one["text"] for one in json.loads(done.stdout)["completions"]])


# The server


class Servers:
    """A server for each way to speculate, of the worlds that it is for; each is started when it is first asked for."""

    def __init__(self, worlds: dict[str, World]) -> None:
        self._worlds, self._stack = worlds, contextlib.ExitStack()
        self._client = httpx.Client(timeout=300)
        self._started: dict[str, tuple[Any, str]] = {}

    def of(self, case: Case) -> tuple[Any, str]:
        if case.speculation not in self._started:
            how = {} if case.speculation == "default" else {"speculate": int(case.speculation)}
            asked = {(own.served, own.vocabulary, own.files) for own in CASES if own.speculation == case.speculation}
            every = {name: self._worlds[own].ensemble(files=files) for name, own, files in sorted(asked)}
            serving = serving_of(every, **how)
            self._started[case.speculation] = serving, self._stack.enter_context(running(serving))
        return self._started[case.speculation]

    def post(self, asked: Asked, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._client.post(f"{self.of(asked.case)[1]}/v1/{path}", json=body)

    def whole(self, asked: Asked, path: str, body: dict[str, Any]) -> Any:
        answer = self.post(asked, path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def streamed(self, asked: Asked, path: str, body: dict[str, Any]) -> list[Any]:
        return chunks(f"{self.of(asked.case)[1]}/v1/{path}", body)

    def close(self) -> None:
        self._client.close()
        self._stack.close()


def body(asked: Asked, limit: str = "max_tokens") -> dict[str, Any]:
    """Return the fields of a request that all endpoints have; ``limit`` is the endpoint's name of a limit in tokens."""
    case = asked.case
    ours = {"rule": case.rule_text, "gate": case.gate_text}
    found = {"model": case.served, limit: asked.length, **STRUCTURES[case.structure][2]}
    if case.unit == "bytes":
        ours["max_bytes"] = asked.length  # which is no more than so many tokens
    found |= {"softmeet": {name: own for name, own in ours.items() if own is not None}}
    # Chats and responses have a temperature of their own where none is named, and completions 1.
    found |= {"seed": asked.seed, "temperature": 1} if case.drawn else {"temperature": 0}
    if case.sampling == "tempered":
        found |= TEMPERED
    if case.sampling == "biased":
        found |= {
            "presence_penalty": PRESENCE, "frequency_penalty": FREQUENCY, "logit_bias": {str(BIASED): BIAS},
        }  # fmt: skip
    return found


def served(servers: Servers, asked: Asked) -> Written:
    answer = servers.whole(asked, "completions", body(asked) | {"prompt": asked.prompts[0]})
    return Written([answer["choices"][0]["text"]])


def listed(servers: Servers, asked: Asked) -> Written:
    answer = servers.whole(asked, "completions", body(asked) | {"prompt": asked.prompts[0], "logprobs": 0})
    (choice,) = answer["choices"]
    return Written([choice["text"]], None, choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"])


def served_stream(servers: Servers, asked: Asked) -> Written:
    chunks = servers.streamed(asked, "completions", body(asked) | {"prompt": asked.prompts[0]})
    return Written(["".join(c["text"] for chunk in chunks for c in chunk["choices"])])


def listed_stream(servers: Servers, asked: Asked) -> Written:
    """Write by a streamed completion with log-probabilities, of a prompt that the server remembers."""
    reused = servers.of(asked.case)[0].metrics.registry.get_sample_value
    before = reused("softmeet_reused_tokens_total")
    chunks = servers.streamed(asked, "completions", body(asked) | {"prompt": asked.prompts[0], "logprobs": 0})
    assert reused("softmeet_reused_tokens_total") > before or asked.ensemble.model.over_bytes
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return Written(
        ["".join(choice["text"] for choice in choices)],
        None,
        [token for one in told for token in one["tokens"]],
        [nats for one in told for nats in one["token_logprobs"]],
    )


def served_together(servers: Servers, asked: Asked) -> Written:
    """Write all six texts by one completion."""
    answer = servers.whole(asked, "completions", body(asked) | {"prompt": asked.prompts})
    return Written([choice["text"] for choice in answer["choices"]])


def chat(servers: Servers, asked: Asked) -> Written:
    answer = servers.whole(asked, "chat/completions", body(asked) | {"messages": asked.messages()})
    return Written([answer["choices"][0]["message"]["content"]])


def chat_stream(servers: Servers, asked: Asked) -> Written:
    chunks = servers.streamed(asked, "chat/completions", body(asked) | {"messages": asked.messages()})
    return Written(["".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])])


def response(servers: Servers, asked: Asked) -> Written:
    """Write by the endpoint of responses, streamed."""
    events = servers.streamed(asked, "responses", body(asked, "max_output_tokens") | {"input": asked.prompts[0]})
    return Written(["".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")])


def scored(servers: Servers, asked: Asked, tokens: list[int]) -> list[float]:
    """Return the log-probabilities of a text's tokens, which the server scores as part of a prompt: no end of bytes."""
    tokens = [token for token in tokens if token != END or not asked.ensemble.model.over_bytes]
    prompt = asked.ensemble.tokenizer(asked.prompts[0])["input_ids"]
    given = body(asked) | {"prompt": prompt + tokens, "echo": True, "logprobs": 0, "max_tokens": 0}
    given.pop("structured_outputs", None)
    (choice,) = servers.whole(asked, "completions", given)["choices"]
    return choice["logprobs"]["token_logprobs"][-len(tokens) :]


def in_company(servers: Servers, every: list[Asked]) -> list[str]:
    """Return the texts of several requests of one server, whose sequences begin in one batch."""
    serving = servers.of(every[0].case)[0]

    class Gathered:
        metrics, sequences = serving.batcher.metrics, []

        @classmethod
        def submit(cls, sequences: list[Any]) -> None:
            cls.sequences += sequences

    async def texts() -> list[str]:
        requests = [CompletionRequest(**body(asked), prompt=asked.prompts[0]) for asked in every]
        streams = [AnswerStream(Gathered, await serving.prepare(one)) for one in requests]
        serving.batcher.submit(Gathered.sequences)
        return [choice.text for stream in streams for choice in await stream.whole()]

    return asyncio.run(texts())


def spell(asked: Asked, tokens: list[int]) -> list[str]:
    return [token_texts(asked.ensemble.tokenizer).text_of(token) for token in tokens]
