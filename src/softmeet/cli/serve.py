"""``softmeet serve``: serve ensembles by an OpenAI-compatible API, with a page at /ui."""

from __future__ import annotations

import ipaddress
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli import options
from softmeet.cli.flags import Flags, argument, at_least_one, checked_settings, flag, flags, optional, switch
from softmeet.cli.listening import listening, port_of, url_to_open
from softmeet.cli.messages import say
from softmeet.cli.sampling import checked_drafts, drafts_of
from softmeet.cli.terminal import harmless
from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra
from softmeet.members.files import is_files
from softmeet.members.names import require_there
from softmeet.server.naming import named
from softmeet.startup import quick_imports, uncollected

if TYPE_CHECKING:
    from softmeet.server.security import Protection
    from softmeet.server.serving import ServerSettings

_KEYS = "SOFTMEET_API_KEYS"
_ENSEMBLES = (
    "GGUF files, by their paths or as softmeet models lists them, which are served as one; or folders of saved "
    "ensembles, or bundled families. NAME=ENSEMBLE serves one under that name, else it goes by its own."
)
_MEMBERS = (
    "One of the models that answer as one, named default; NAME=MODEL is one of those named NAME. MODEL is a hub "
    "id, a folder, a GGUF file, a bundled model or NAME:REST for a package's reader; repeat it for each member."
)
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class AccessFlags(Flags, panel="Address and access"):
    """Flags for where the server listens, who may send requests, and which settings these may change."""

    host: str = flag("127.0.0.1", "The address to listen on.")
    port: int = flag(8000, "The port to listen on; 0 takes a free one.", min=0, max=65535)
    api_key: list[str] | None = optional(
        "A key that requests then need; it can be repeated, and any of them will do. Others on this machine can see it "
        "in the list of processes, and --api-keys keeps it from them.",
        metavar="KEY",
    )
    api_keys: Path | None = optional(
        "A file of API keys, one on each line; every request then needs one.",
        shown=f"the keys in ${_KEYS}, between commas; else none is needed",
    )
    open_to_all: bool = switch(
        "Allow a --host other than this machine without API keys: anyone who reaches it can use it.", "--open"
    )
    allow: list[str] | None = optional(
        "A setting that requests may change: rule, trust, weights, pool, members, gate or none; it can be repeated.",
        shown="all",
    )
    allow_host: list[str] | None = optional(
        "Another host name to accept in requests; it can be repeated.", shown="this machine's"
    )
    cors: list[str] | None = optional(
        "An origin, such as https://example.org, whose pages may send requests; it can be repeated.", shown="none"
    )
    ui: bool = flag(True, "Serve the page at /ui.", shown="yes")
    sources: bool = switch(
        "Tell who asks where an answer stands in files:PATH: paths below that folder, and the lines.", "--sources"
    )


class LimitFlags(Flags, panel="Limits"):
    """Flags that limit the server's work: the sequences that run and wait, and the size of one request."""

    batch: int = flag(64, "The most sequences that run at once.", min=1)
    queue: int = flag(256, "The most sequences that wait; more requests get status 429.", min=0)
    keep_tokens: int = flag(
        16384, "The most tokens of past prompts to keep cached, for prompts with the same beginning.", min=0
    )
    max_tokens: int = flag(4096, "The most tokens that a request may ask for in each choice.", min=1)
    max_choices: int = flag(16, "The most choices of a request: n times its number of prompts.", min=1)
    max_trust: float = flag(
        100.0,
        "The largest trust that a request may ask for; inf is no limit, and trusts given here always work.",
        min=0,
    )
    max_body: int = flag(1 << 20, "The most bytes of a request's body.", min=1)
    body_timeout: float = flag(10.0, "The seconds in which a request's body has to arrive.", min=0.1)
    connections: int = flag(1024, "The most connections at once; more get status 503.", min=1)
    timeout: float = flag(
        600.0,
        "The seconds that an answer may take; then a stream ends with an error event, and any other with status 504.",
        min=0.1,
    )
    token_seconds: float = flag(
        1.0,
        "The seconds that the rule may work on a token; then it is drawn from the best distribution found, with the "
        "status BUDGET.",
        min=0.001,
    )
    grace: float = flag(30.0, "The seconds that running answers have to end after SIGTERM.", min=0)

    def protection(self, keys: tuple[str, ...], hosts: tuple[str, ...]) -> Protection:
        """Return what a request has to have, and how large and slow it may be."""
        from softmeet.server.security import Protection

        return Protection(
            keys=keys,
            hosts=hosts,
            max_body=self.max_body,
            body_seconds=self.body_timeout,
            connections=self.connections,
        )


class RunFlags(Flags, panel="Engine"):
    """Flags for how members run, and for replicas on a Ray cluster: their number and their resources."""

    threads: int | None = at_least_one("PyTorch threads of each process.", shown="torch's choice")
    parallel: bool | None = optional(
        "Run members that share a device in parallel threads, each on its share of --threads; members on separate "
        "devices always run in parallel.",
        shown="where it is measured to be faster",
    )
    reproducible: bool = switch(
        "Run and solve every sequence by itself: a seeded request gets the same tokens alone and in any company, to "
        "the last bit. Costs the speed that batches give.",
    )
    speculate: str = flag(
        "auto",
        "While a single sequence runs, let the cheapest member, files or what the text repeats draft N tokens, which "
        "members read at once: the same tokens in less time where drafts are mostly right. N may be auto, for as many "
        "as pay where answers still repeat, or 0.",
        metavar="N",
        callback=checked_drafts,
    )
    one_member: bool = flag(
        True,
        "While a single sequence runs, draw each token of an unseeded request for plain sampling by prob-mean from one "
        "member, itself drawn by its weight: the same law at about the price of one member.",
    )
    replicas: str | None = optional(
        "Processes on a Ray cluster that share the work, each with all models; FEWEST:MOST has Ray add some while each "
        "has a full batch.",
        metavar="N",
        shown="all in this process",
    )
    ray_address: str | None = optional("With --replicas: the Ray cluster's address.", shown=options.DEFAULT_CLUSTER)
    gpus: float = flag(0.0, "With --replicas: the GPUs of each, a fraction such as 0.5, or a whole number.", min=0)


@flags()
def serve(
    *,
    ensembles: list[str] | None = argument(_ENSEMBLES, metavar="MODELS...", shown="small bundled models"),
    members: list[str] | None = optional(
        _MEMBERS, "--member", "-m", shown=False, metavar="[NAME=]MODEL", panel="Models"
    ),
    access: AccessFlags,
    limits: LimitFlags,
    access_log: bool = flag(
        True,
        "Log a line for every request, and how much of a long prompt is read; never keys or texts.",
        panel="Output",
    ),
    strict: bool = switch(
        "Refuse requests with unknown fields or for an unknown model, which else are answered by the first ensemble.",
        panel="Address and access",
    ),
    plain_chat: bool = switch("Chat by a plain template with members that have none of their own.", panel="Models"),
    running: RunFlags,
    loading: options.LoadingFlags,
    **settings: Any,
) -> None:
    """Serve models as one behind an OpenAI-compatible API, with a page at /ui for chats and for what each one expects.

    Example: softmeet serve a.gguf b.gguf --port 8000
    """
    require_extra("serving", "server", "fastapi", "uvicorn", "prometheus_client")
    host, keys, local = access.host, (*_keys(access.api_keys), *(access.api_key or ())), _is_local(access.host)
    if not (keys or local or access.open_to_all):
        raise InvalidInputError(
            f"refused to listen on {host} without keys: give --api-key KEY, --api-keys FILE or ${_KEYS}, or say --open"
        )
    replicas = _replicas(running)
    allowed, asked = _allowed(access.allow), named(ensembles or [], members or [])
    require_there([line for own in asked.values() for line in own])
    if access.sources and not any(options.is_saved(own) or any(map(is_files, own)) for own in asked.values()):
        raise InvalidInputError("--sources tells places in files: name them beside the models, as in files:~/project")
    with listening(host, access.port) as sockets:
        # Imported only now, since it takes seconds, in which nobody should wait to hear that the port is in use.
        with uncollected(), quick_imports():
            from softmeet.hf.chat import chat_of
            from softmeet.server.ensembles import load
            from softmeet.server.serving import Serving

        given = checked_settings(settings)
        protocol = _settings(access, limits, running, allowed, keys, plain_chat=plain_chat, strict=strict)
        if replicas:
            from softmeet.server import ray

            threads, port = running.threads or 1, port_of(sockets)
            made = ray.application(
                asked, {**loading.arguments(), **given}, protocol, replicas, threads=threads,
                gpus=running.gpus, grace=limits.grace,
            )  # fmt: skip
            for each in sockets:  # Ray's own processes listen there
                each.close()
            what = f"{', '.join(asked)} by {running.replicas} replicas"
            announce = partial(_announce, what, url_to_open(host, port), page=protocol.ui)
            ray.run(made, replicas[1] * threads, running.ray_address, host, port, announce)
            return
        if running.threads is not None:
            import torch

            torch.set_num_threads(running.threads)
        served = load(asked, partial(loading.ensemble, settings=settings, to_write=True))
        _note_single([s.name for s in served if len(s.names) == 1], asked)
        _note_plain({s.name: chat_of(s.ensemble.model).missing for s in served}, plain=plain_chat)
        from softmeet.server.process import run

        url, names = url_to_open(host, port_of(sockets)), ", ".join(s.name for s in served)
        announce = partial(_announce, names, url, page=protocol.ui)
        run(Serving(served, protocol), sockets, limits.grace, announce, access_log=access_log)


def _replicas(running: RunFlags) -> tuple[int, int] | None:
    """Return the fewest replicas and the most, as ``--replicas`` has them; None without it.

    Raises:
        InvalidInputError: if they are no numbers from 1 on in this order, or a flag was given that does not go with
            what is asked.
    """
    if running.replicas is None:
        if running.gpus or running.ray_address:
            raise InvalidInputError("--gpus and --ray-address are options of --replicas")
        return None
    if not re.fullmatch(r"\d{1,4}(:\d{1,4})?", running.replicas, re.ASCII):
        raise InvalidInputError(f"expected --replicas as a number, or FEWEST:MOST as in 1:4, got {running.replicas!r}")
    found = [int(x) for x in running.replicas.split(":")]
    if not 1 <= found[0] <= found[-1]:
        raise InvalidInputError(f"expected --replicas as 1 or more, in order as in 1:4, got {running.replicas}")
    require_extra("--replicas", "ray", "ray")
    return found[0], found[-1]


def _settings(
    access: AccessFlags,
    limits: LimitFlags,
    running: RunFlags,
    allowed: tuple[str, ...],
    keys: tuple[str, ...],
    **more: Any,
) -> ServerSettings:
    """Return the server's settings, as the flags have them."""
    from softmeet.server.limits import Limits
    from softmeet.server.serving import ServerSettings

    host, local = access.host, _is_local(access.host)
    hosts = (*((*_LOCAL, host) if local else ()), *(access.allow_host or ()))
    return ServerSettings(
        limits=Limits(limits.batch, limits.queue, limits.keep_tokens, limits.token_seconds),
        protection=limits.protection(keys, hosts),
        max_tokens=limits.max_tokens,
        max_choices=limits.max_choices,
        seconds=limits.timeout,
        allowed=allowed,
        max_trust=limits.max_trust,
        parallel="auto" if running.parallel is None else running.parallel,
        reproducible=running.reproducible,
        speculate=drafts_of(running.speculate),
        one_member=running.one_member,
        sources=access.sources,
        cors=access.cors or (),
        ui=access.ui,
        **more,
    )


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys in a file, one a line; without a file those in ``$SOFTMEET_API_KEYS``, between commas.

    Raises:
        InvalidInputError: if the file cannot be read or holds no key, or the variable holds the path of a file. What
            was given is not repeated where it may be a key.
    """
    in_variable = os.environ.get(_KEYS, "")
    # Path.is_file would raise, and say the keys, where they are longer than a path may be.
    if path is None and os.path.isfile(in_variable):  # noqa: PTH113
        raise InvalidInputError(
            f"expected the keys themselves in ${_KEYS}, between commas, got the path of a file: give it as --api-keys"
        )
    try:
        text = in_variable.replace(",", "\n") if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InvalidInputError(
            f"expected --api-keys as the path of a file with one key on each line, got one that cannot be read "
            f"({reason}): give the file, or the keys themselves in ${_KEYS}"
        ) from None
    found = tuple(line.strip() for line in text.split("\n") if line.strip())
    if path is not None and not found:
        raise InvalidInputError(f"expected API keys in {path}, one a line, found none")
    return found


def _is_local(host: str) -> bool:
    """Return whether a host name or address to listen on is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _allowed(given: list[str] | None) -> tuple[str, ...]:
    """Return the settings that requests may change, from the values of ``--allow``; all if it was not given.

    Raises:
        InvalidInputError: if a value is no setting that requests can change, and not ``none``.
    """
    from softmeet.server.schemas import CHANGES

    if given is None:
        return CHANGES
    names = tuple(name for name in given if name != "none")
    if unknown := sorted(set(names) - set(CHANGES)):
        raise InvalidInputError(f"expected --allow as some of {', '.join(CHANGES)}, or none, got {unknown[0]!r}")
    return names


def _note_single(names: list[str], asked: dict[str, list[str]]) -> None:
    """Say on stderr that several ensembles are of one model each, and how to combine these models into one ensemble.

    Args:
        names: the names of the ensembles that have a single member.
        asked: for each ensemble's name, what it was loaded from.
    """
    if len(names) > 1:
        together = " ".join(f"-m {asked[name][0]}" for name in names)
        say(f"{' and '.join(names)} are single models, each served alone: to combine them into one, say {together}")


def _note_plain(missing: dict[str, list[str]], *, plain: bool) -> None:
    """Say on stderr, of each ensemble by name, which members have no chat template, unless they take a plain one."""
    for name, members in missing.items():
        if members and not plain:
            who = ", ".join(map(options.short, members))
            say(f"{name} answers no chats, as there is no chat template of {who}: --plain-chat gives a plain one")


def _announce(what: str, url: str, *, page: bool) -> None:
    """Print on stderr what is served, where, and where the page and the metrics are."""
    links = ([f"page: {url}/ui"] if page else []) + [f"metrics: {url}/metrics", f"OpenAI clients: base_url={url}/v1"]
    typer.echo(f"serving {harmless(what)}, running on {url} (Ctrl-C ends it)\n{', '.join(links)}", err=True)
