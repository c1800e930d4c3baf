"""What a request's answer has to be (``response_format``, ``structured_outputs``), compiled beside all other work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from softmeet.engine.masking import Mask, mask_of
from softmeet.errors import InvalidInputError
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.server.errors import BusyError, RequestError
from softmeet.server.schemas import ChatRequest, Generation, ResponseFormat, StructuredOutputs, ToolName
from softmeet.structured.compilers import BusyCompilingError
from softmeet.structured.structure import Structure

# The most requests whose structures are compiled, or wait for that, at once.
_MOST = 16
# The fields of ``structured_outputs``, and what makes a structure of each.
_MADE_BY: dict[str, Callable[[Any], Structure]] = {
    "json_": Structure.json_schema,
    "regex": Structure.regex,
    "choice": Structure.choice,
    "grammar": Structure.grammar,
    "json_object": lambda asked: Structure.json_object(),
}


class Structures:
    """The compiling of requests' structures, in threads of its own.

    Args:
        models: the ensembles whose tokens are read once now, so that no request waits for it.
    """

    def __init__(self, models: Iterable[EnsembleForCausalLM]) -> None:
        self._threads = ThreadPoolExecutor(_MOST, thread_name_prefix="softmeet-structure")
        self._free = asyncio.Semaphore(_MOST)
        for model in models:
            # Members that cannot write structures serve everything else.
            with contextlib.suppress(InvalidInputError):
                _compiled(Structure.json_object, model)

    async def mask(self, body: Generation, model: EnsembleForCausalLM) -> Mask | None:
        """Return what a request's texts have to be, over an ensemble's tokens; None if they may be anything.

        Raises:
            RequestError: if it cannot be used (:class:`softmeet.Structure` says what can), or two are asked for.
            BusyError: if too many others are being compiled.
        """
        if (asked := _asked(body)) is None:
            return None
        param, make = asked
        if self._free.locked():
            raise BusyError("too many other structures are being compiled: ask again later")
        try:
            async with self._free:
                return await asyncio.get_running_loop().run_in_executor(self._threads, _compiled, make, model)
        except BusyCompilingError as error:
            raise BusyError(str(error)) from None
        except InvalidInputError as error:
            raise RequestError(str(error), param=param) from None


def _compiled(make: Callable[[], Structure], model: EnsembleForCausalLM) -> Mask:
    """Make a structure, and compile it over an ensemble's tokens."""
    return mask_of(make(), model, model.generation_config)


def _asked(body: Generation) -> tuple[str, Callable[[], Structure]] | None:
    """Return the field in which a request asks for a structure, and what makes it; None if it asks for none."""
    form: ResponseFormat | None = getattr(body, "response_format", None)
    outputs = body.structured_outputs
    if isinstance(body, ChatRequest) and body.tool_choice not in (None, "none", "auto"):
        return "tool_choice", _of_calls(body, form)
    if form is None or form.type == "text":
        return None if outputs is None else ("structured_outputs", _of_outputs(outputs))
    if outputs is not None:
        raise RequestError(
            "expected response_format or structured_outputs, got both: leave one out", param="structured_outputs"
        )
    return "response_format", _of_form(form)


def _of_calls(body: ChatRequest, form: ResponseFormat | None) -> Callable[[], Structure]:
    """Return what makes the structure of the calls that an answer has to be.

    Raises:
        RequestError: if there is no such function, or the answer has to be something else, too.
    """
    schemas = {one.name: one.parameters or {"type": "object"} for one in body.functions}
    several = body.tool_choice == "required"
    if isinstance(body.tool_choice, ToolName):
        schemas = {name: own for name, own in schemas.items() if name == body.tool_choice.function.name}
    if not schemas:
        raise RequestError("expected tool_choice as a function of tools, of which there is none", param="tool_choice")
    if body.structured_outputs is not None or (form is not None and form.type != "text"):
        raise RequestError(
            "the answer cannot be a call and keep to a structure: leave tool_choice or the structure out",
            param="tool_choice",
        )
    return lambda: Structure.calls(schemas, several=several and body.parallel_tool_calls is not False)


def _of_form(form: ResponseFormat) -> Callable[[], Structure]:
    if form.type == "json_object":
        return Structure.json_object
    if form.json_schema is None:
        raise RequestError(
            'expected response_format.json_schema, which is missing: add it, as {"name": "…", "schema": {…}}',
            param="response_format",
        )
    schema = form.json_schema.schema_
    return lambda: Structure.json_schema(schema)


def _of_outputs(outputs: StructuredOutputs) -> Callable[[], Structure]:
    given = {name: value for name, value in outputs if value not in (None, False)}
    if len(given) != 1:
        names = ", ".join(name.rstrip("_") for name in _MADE_BY)
        got = " and ".join(name.rstrip("_") for name in given) or "none"
        raise RequestError(f"expected one of {names} in structured_outputs, got {got}", param="structured_outputs")
    ((name, value),) = given.items()
    return lambda: _MADE_BY[name](value)
