"""What words that are gone, and those of other programs, are here, for a user who types one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_OF_A_RULE = "it is an option of a rule, --rule NAME:{}=…"
_OF_A_FILE = "it is said behind a GGUF file: file.gguf+{}=N"
_MEMBER, _TOKENS = "members are named by -m, or --member", "it is --max-new-tokens"
# By an option's name, without its dashes. Words are those of ollama, llama.cpp, vLLM, llm and lm-eval.
_OPTIONS = {
    **dict.fromkeys(
        ("rank", "free-radial", "bands"), "rules read whole heads since 0.3.0; a smaller --trust asks for less"
    ),
    **{name: _OF_A_RULE.format(name) for name in ("metric", "slack", "vertex")},
    **dict.fromkeys(("model", "models", "hf-repo", "hf", "model-path", "pretrained"), _MEMBER),
    **dict.fromkeys(("n", "n-predict", "predict", "num-predict", "max-tokens", "max-gen-toks", "tokens"), _TOKENS),
    **dict.fromkeys(("temp", "t"), "it is --temperature"),
    **dict.fromkeys(("p", "prompt"), "the prompt is an argument: softmeet generate 'And the king said' -m A"),
    **dict.fromkeys(("sys", "system-prompt", "system-prompt-file"), "it is --system, with --chat"),
    **dict.fromkeys(("c", "ctx-size", "num-ctx", "max-model-len", "n-ctx"), _OF_A_FILE.format("context")),
    **dict.fromkeys(("ngl", "n-gpu-layers", "gpu-layers", "num-gpu"), _OF_A_FILE.format("gpu_layers")),
    **dict.fromkeys(("i", "interactive", "cnv", "conversation"), "conversations are softmeet chat A B"),
    **dict.fromkeys(("tensor-parallel-size", "tp", "gpu", "main-gpu"), "where members go is --device"),
    **dict.fromkeys(("repeat-penalty", "presence-penalty"), "it is --repetition-penalty"),
    **dict.fromkeys(("num-fewshot",), "it is --count"),
    **dict.fromkeys(("tasks",), "it is --task"),
    **dict.fromkeys(("output-path", "output", "o"), "results are written by --json FILE"),
    **dict.fromkeys(
        ("header-timeout", "send-timeout"),
        "a reverse proxy bounds slow clients: docs/guides/serve.md has the configuration",
    ),
    "shard": "a trace has one file a document",
    # Flags of serve until Ray Serve took their place.
    **dict.fromkeys(
        ("engine", "fronts"), "softmeet serve has --replicas N, which Ray's own proxies share the work out to"
    ),
    **dict.fromkeys(("max-replicas", "target-streams"), "it is --replicas FEWEST:MOST"),
    **dict.fromkeys(("samples",), "so many of several things are asked for by --limit"),
}
_COMMANDS = {
    "study": "it is python benchmarks/study.py in a clone of softmeet",
    **dict.fromkeys(("list", "ls", "ps"), "the models of this machine are listed by softmeet models"),
    **dict.fromkeys(("pull", "download"), "a model of the hub is fetched when it is first named by -m"),
    **dict.fromkeys(("complete", "completion", "prompt"), "it is softmeet generate"),
    **dict.fromkeys(("server", "start"), "it is softmeet serve"),
    **dict.fromkeys(
        ("eval", "lm-eval", "lm_eval", "benchmark", "bench"),
        "texts are judged by softmeet evaluate, answers to questions by softmeet answer",
    ),
    **dict.fromkeys(("show", "info"), "what members are is shown by softmeet check"),
}  # fmt: skip
_EXTRA = "members are named by -m, and an option is repeated for each value, -m A -m B"


def today(message: str) -> str:
    """Return what a word that is none here is called, as the end of the message that it gets; empty if nobody knows.

    Args:
        message: what was wrong with the words of a command, as click says it, without a capital at its beginning.

    >>> today("no such command 'study'")
    ': it is python benchmarks/study.py in a clone of softmeet'
    >>> today("no such option: --temp (Possible options: --gate)")
    ': it is --temperature'
    """
    if message.startswith("got unexpected extra argument"):
        return f": {_EXTRA}"
    found = re.match(r"no such (?:option: --?|command ')([\w-]+)", message)
    meant = (_COMMANDS if message.startswith("no such command") else _OPTIONS).get(found[1]) if found else None
    return f": {meant}" if meant else ""


def said(message: str, words: Sequence[str] = ()) -> str:
    """Return what was wrong with the words of a command, with what is meant in place of words that look alike.

    Args:
        message: as of :func:`today`.
        words: those of the command line.
    """
    # Of -ngl click says that there is no -n.
    if short := re.match(r"no such option: (-\w)$", message):
        message = next((f"no such option: {x}" for x in words if x.startswith(short[1]) and x[1:] in _OPTIONS), message)
    meant = today(message)
    # Behind the word stand those that click finds like it, which may mean anything.
    return f"{re.split(r' [(]Possible options|[.] Did you mean', message)[0] if meant else message}{meant}"
