"""``softmeet generate``: continue prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli import options
from softmeet.cli.decoding import DecoderFlags
from softmeet.cli.flags import Flags, argument, flag, flags, optional, switch
from softmeet.cli.messages import err, say
from softmeet.cli.progress import reading, working
from softmeet.cli.sampling import SamplingFlags
from softmeet.cli.structure import StructureFlags
from softmeet.cli.tables import out, print_table
from softmeet.cli.terminal import write
from softmeet.cli.texts import argument_text, file_text
from softmeet.errors import InvalidInputError
from softmeet.members.passages import PASSAGE_RULE, Passage, passage_weights, read_passages
from softmeet.rules.endings import endings
from softmeet.structured.structure import Structure
from softmeet.suspended import Control

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf import Recorder
    from softmeet.readers.reader import Work


class PromptFlags(Flags, panel="Text"):
    """Flags for prompts in files, and for prompts that are answered as messages instead of being continued."""

    file: list[Path] | None = optional("A file that holds one prompt; it can be repeated.", "--file", "-f")
    chat: bool = switch(
        "Answer each prompt as a user's message: each member's chat template makes a prompt of it. Over bytes each "
        "member begins after its own."
    )
    system: str | None = optional("With --chat, the system's message before it.")
    plain_chat: bool = switch("With --chat, a plain template for members that have none.")

    def require(self, *, prompt_weights: bool) -> None:
        """Raise InvalidInputError, before anything is loaded, for flags that do not go together."""
        if (self.system is not None or self.plain_chat) and not self.chat:
            raise InvalidInputError("--system and --plain-chat are for conversations: say --chat as well")
        if self.chat and prompt_weights:
            raise InvalidInputError("--prompt-weights weighs by a text that members continue: leave it out, or --chat")

    def asked(self, ensemble: Ensemble, texts: list[str]) -> list[Any]:
        """Return the texts, or for a chat the conversations that they begin."""
        from softmeet.hf.chat import take_plain

        if self.plain_chat:
            take_plain(ensemble.model)
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [[*before, {"role": "user", "content": text}] for text in texts] if self.chat else list(texts)


class PassageFlags(Flags, panel="Models"):
    """Flags for retrieved passages, behind each of which every member reads the prompts."""

    passages: Path | None = optional(
        'A file of retrieved passages, one JSON object a line: {"text": "...", "score": 1.5}. Each member reads the '
        "prompts once behind each passage, and they are averaged with the softmax of the scores as weights (REPLUG), "
        "by prob-mean where --rule names no other."
    )
    passage_temperature: float = flag(1.0, "The temperature of the passages' scores in their softmax.", min=0)

    def read(self, *, prompt_weights: bool) -> list[Passage]:
        """Return the passages, none if no file is given; raise InvalidInputError before anything is loaded."""
        if self.passages is None:
            if self.passage_temperature != 1.0:
                raise InvalidInputError("--passage-temperature is for the scores of --passages: name a file of them")
            return []
        if prompt_weights:
            raise InvalidInputError("--passages weighs members by scores: leave --prompt-weights out")
        found = read_passages(self.passages)
        passage_weights(found, self.passage_temperature)
        return found

    @staticmethod
    def settings(passages: list[Passage], given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings by which members are loaded: with passages by REPLUG's rule, unless one is named."""
        return {**given, "rule": PASSAGE_RULE} if passages and given.get("rule") is None else given

    def behind(self, passages: list[Passage], ensemble: Ensemble) -> Ensemble:
        """Return the ensemble behind the passages, or itself if there are none."""
        if not passages:
            return ensemble
        return ensemble.with_passages(passages, temperature=self.passage_temperature, rule=None)


class ShownFlags(Flags, panel="Output"):
    """Flags for what is printed beside the texts, or in their place."""

    color: bool = switch(
        "On a terminal, colour the text of a single prompt by how far the members had to be corrected."
    )
    as_json: bool = switch("Print texts and numbers as one JSON document on stdout, once all is done.", "--json")
    summary: bool | None = optional(
        "Print on stderr each member's weight, how far it had to be corrected (its disagreement, KL divergence in "
        "nats), and the speed.",
        shown="on a terminal",
    )

    def wants_summary(self, sampling: SamplingFlags) -> bool:
        """Return whether a summary is printed: if it is asked for, and by default on a terminal.

        Raises:
            InvalidInputError: if figures are asked for and, by ``--one-member``, unknown.
        """
        if not sampling.one_member:
            return sys.stderr.isatty() if self.summary is None else self.summary
        if self.summary or self.as_json or self.color:
            raise InvalidInputError(
                "--one-member runs one member a token, so how far members disagree is not known: leave out --summary, "
                "--json and --color"
            )
        return False


class MixedFlags(Flags, panel="Mixing"):
    """Flags for how the members are weighed, and what a text may take and hang on."""

    prompt_weights: bool = switch("Weigh the members by how well each predicts the prompt, in place of --weights.")
    token_seconds: float | None = optional(
        "The most seconds that the rule may take for a token, of all prompts together; then the best distribution "
        "found is used, and counted as BUDGET in the summary.",
        min=0,
        shown="no limit",
    )
    reproducible: bool = switch(
        "Give each prompt the tokens that it gets alone, to the last bit: several prompts are continued one after "
        "another, and all draw from the same numbers. It needs --seed, unless nothing is drawn.",
        panel="Sampling",
    )


@flags()
def generate(
    *,
    prompts: list[str] | None = argument("The prompts. With none (and no --file), or for -, one is read from stdin."),
    written: PromptFlags,
    members: options.Members = None,
    retrieved: PassageFlags,
    sampling: SamplingFlags,
    shape: StructureFlags,
    mixed: MixedFlags,
    whole: DecoderFlags,
    loading: options.LoadingFlags,
    shown: ShownFlags,
    **settings: Any,
) -> None:
    """Continue texts by several models as one; with one text, it is printed as it comes.

    Example: softmeet generate "And the king said" -m wide/gpt2 -m wide/llama --seed 1
    """
    prompt_weights, token_seconds, reproducible = mixed.prompt_weights, mixed.token_seconds, mixed.reproducible
    texts = list(map(file_text, written.file or []))
    prompts = prompts or ([] if texts else ["-"])
    texts += [file_text(p).rstrip("\n") if p == "-" else argument_text(p) for p in prompts]
    _require_reproducible(sampling, token_seconds, is_asked=reproducible)
    summary, as_json = shown.wants_summary(sampling), shown.as_json
    written.require(prompt_weights=prompt_weights)
    structure, passages = shape.structure(), retrieved.read(prompt_weights=prompt_weights)
    against = {
        "--prompt-weights": prompt_weights, "--reproducible": reproducible, "--color": shown.color,
        "--summary": shown.summary, "--token-seconds": token_seconds is not None, "a structure": structure is not None,
    }  # fmt: skip
    settings = whole.settings(settings, sampling, [name for name, given in against.items() if given])
    rather = whole.vocabulary(loading.vocabulary)
    alone = {"--one-member": sampling.one_member, "--speculate": sampling.speculate not in (None, "0", "auto")}
    scored = ["--prompt-weights"] if prompt_weights else []
    loading.refuse_over_union(scored, [name for name, given in alone.items() if given])
    loading.refuse_exact(members or [options.DEFAULT], texts, None)
    loaded = loading.ensemble(members, retrieved.settings(passages, settings), to_write=True, rather=rather)
    ensemble = retrieved.behind(passages, loaded)
    asked = written.asked(ensemble, texts)
    if whole.decoder is not None:
        any_rule = settings.get("rule") is None and not (passages or options.is_saved(members))
        whole.write(ensemble, texts, asked, sampling, any_rule=any_rule, as_json=as_json)
        return
    each = [{"weights": ensemble.prompt_weights(text)} if prompt_weights else {} for text in texts]
    from softmeet.hf import Recorder

    # An average that nobody asks about is computed without its report, which takes longer than the average.
    plain = sampling.one_member or (ensemble.model.settings.rule.is_average and not (summary or as_json or shown.color))
    recorder = None if plain else Recorder()
    before, started = ensemble.model.spent, time.perf_counter()
    given = {"recorder": recorder, "token_seconds": token_seconds, "structure": structure, **sampling.arguments()}
    if len(texts) == 1 and not as_json:
        completions = [_stream(ensemble, asked[0], {**given, **each[0]}, color=shown.color)]
    else:
        completions = _written(ensemble, asked, each, {**given, "reproducible": reproducible})
    facts = _facts(ensemble, recorder or Recorder(), time.perf_counter() - started, each, before)
    if as_json:
        made = [{"prompt": p, "text": t, **own} for p, t, own in zip(texts, completions, each, strict=True)]
        typer.echo(json.dumps({"completions": made, **facts}, ensure_ascii=False, indent=2))
    elif len(texts) > 1:
        for prompt, text in zip(texts, completions, strict=True):
            write(out(), f"=== {prompt}\n{text}\n\n")
    if summary:
        _show(facts)
    _say_endings(structure, completions, facts)


def _written(ensemble: Ensemble, asked: list[Any], each: list[dict[str, Any]], given: dict[str, Any]) -> list[str]:
    """Continue prompts, together if none has weights of its own, and show progress."""
    doing = f"generating from {len(asked)} prompts"
    found: list[str]
    with working(doing) as told, _told_of_reading(told, doing).over():
        if not any(each):
            found = ensemble.generate(asked, **given)
        else:
            found = [ensemble.generate(text, **given, **own) for text, own in zip(asked, each, strict=True)]
    return found


def _say_endings(structure: Structure | None, texts: list[str], facts: dict[str, Any]) -> None:
    """Say on stderr how many texts ended before their structure was complete, and where the rule was not solved."""
    if structure and (cut := sum(not structure.allows(text) for text in texts)):
        say(f"{cut} of {len(texts)} texts ended before the structure was complete: raise --max-new-tokens")
    for line in endings(facts["statuses"], facts["fallbacks"], _unit(facts)[:-1]):
        say(line)


def _require_reproducible(sampling: SamplingFlags, token_seconds: float | None, *, is_asked: bool) -> None:
    """Raise InvalidInputError, before anything is loaded, for flags that ``--reproducible`` does not go with."""
    if not is_asked:
        return
    if sampling.seed is None and sampling.arguments()["do_sample"]:
        raise InvalidInputError("--reproducible needs --seed N, or --no-do-sample: else each run draws anew")
    if sampling.speculate not in ("0", None):
        raise InvalidInputError("leave out --speculate: rounding depends on how many tokens a member reads at once")
    if token_seconds is not None:
        raise InvalidInputError("leave out --token-seconds: how far a rule gets in time is not reproducible")


def _told_of_reading(tell: Callable[[str], None], doing: str) -> Control:
    """Return a control that tells how much of long prompts is read, and what is done besides."""
    return Control(lambda done, total: tell(doing if done == total else f"reading: {done / total:.0%}"))


def _stream(ensemble: Ensemble, prompt: Any, arguments: dict[str, Any], *, color: bool) -> str:
    """Print a prompt's continuation on stdout as it comes, if asked with the colours of ``inspect``, and return it."""
    from softmeet.hf.report import style

    console, text = out(), ""
    plain = ((piece, 0.0) for piece in ensemble.stream(prompt, **arguments))
    with reading() as own, own.over():
        for piece, nats in ensemble.stream_with_disagreement(prompt, **arguments) if color else plain:
            write(console, piece, style(nats) if color else "")
            text += piece
    sys.stdout.write("\n")
    return text


def _facts(
    ensemble: Ensemble, recorder: Recorder, seconds: float, each: list[dict[str, list[float]]], before: list[Work]
) -> dict[str, Any]:
    """Return a run's figures: each member's, the rule's, the gate's, and the speed, as JSON has them.

    Args:
        ensemble: the ensemble that generated.
        recorder: was passed to ``generate``, and has summed over all tokens (over bytes, all bytes).
        seconds: the time that generation took.
        each: each prompt's own ``weights`` of the members, whose mean is then shown; {} if all used the ensemble's.
        before: over bytes, each member's work before the run, which is subtracted.
    """
    from softmeet.members.opaque import width_of

    config, rows, asked = ensemble.model.config, max(recorder.rows, 1), max(recorder.asked, 1)
    own = [weights for prompt in each for weights in prompt.values()]
    used = list(map(fmean, zip(*own, strict=True))) or config.weights
    disagreement, trusts = recorder.disagreement.tolist() or [0.0] * len(ensemble.names), config.settings.member_trust
    trusts = trusts if config.settings.rule.uses_trust else [None] * len(ensemble.names)
    members: list[dict[str, Any]] = [
        {
            "name": options.short(name),
            "width": width_of(head),
            "weight": w,
            "trust": None if t is None else f"{t:g}",
        }
        for name, head, w, t in zip(ensemble.names, ensemble.model.member_heads, used, trusts, strict=True)
    ]  # fmt: skip
    for member, nats in zip(members, disagreement, strict=True):
        member["disagreement"] = nats / asked
    # Only members that are read byte by byte count their work.
    for member, old, new in zip(members, before, ensemble.model.spent, strict=False):
        member["forward_steps"] = (new.calls - old.calls) / rows
        member["tokens_run"] = (new.tokens - old.tokens) / rows
        member["dropped"] = (new.dropped - old.dropped) / rows
    shares = zip(ensemble.model.claimants, (recorder.claims / rows).tolist(), strict=False)
    return {
        "members": members,
        "claims": {reader.name: share for reader, share in shares},
        "rule": config.rule,
        "vocabulary": config.vocabulary,
        "tokens": recorder.rows,
        "tokens_per_second": recorder.rows / seconds,
        "head_passes_per_token": recorder.passes / rows,
        "fallbacks": recorder.fallbacks,
        "statuses": dict(recorder.statuses),
        "largest_gap": recorder.largest_gap,
        "gate": ensemble.model.combiner.resolved(ensemble.model.settings).plain()["gate"],
        "gated": recorder.gate.share,
        "seconds_saved": recorder.gate.saved,
    }


def _unit(facts: dict[str, Any]) -> str:
    """Return what a text's symbols are called; the strings of a union are tokens of some member."""
    return "bytes" if facts["vocabulary"] == "bytes" else "tokens"


def _show(facts: dict[str, Any]) -> None:
    """Print a summary on stderr: a table of the members, the speed, and how often the gate was closed, if any."""
    members, unit = facts["members"], _unit(facts)
    title, speed = f"rule: {facts['rule']}", f"{facts['tokens']} {unit}, {facts['tokens_per_second']:.1f} {unit}/s"
    if unit == "bytes":
        columns = ["member", "weight", "disagreement (nats)", "model calls", "tokens run", "probability dropped"]
        costs = ("disagreement", "forward_steps", "tokens_run", "dropped")
        rows = [(m["name"], f"{m['weight']:.3g}", *(f"{m[key]:.4f}" for key in costs)) for m in members]
        title += ", over bytes; means per byte"
    else:
        trusted = [] if members[0]["trust"] is None else ["trust"]
        columns = ["member", "head width", "weight", *trusted, "disagreement (nats a token)"]
        rows = [
            (
                m["name"],
                str(m["width"] or "unread"),
                f"{m['weight']:.3g}",
                *(m[key] for key in trusted),
                f"{m['disagreement']:.4f}",
            )
            for m in members
        ]  # fmt: skip
        passes = f"{facts['head_passes_per_token']:.1f} head passes a token"
        speed += f", {passes}, largest gap {facts['largest_gap']:.1e} nats"
    print_table(err, columns, [rows], title=title)
    err.print(speed, soft_wrap=True)
    for files, share in facts["claims"].items():
        err.print(f"{files} claimed {share:.1%} of the answers, in the mean")
    if facts["gate"]:
        saved = "" if facts["seconds_saved"] is None else f", which saved about {facts['seconds_saved']:.1f} s"
        err.print(f"gate {facts['gate']}: closed at {facts['gated']:.1%} of the {unit}{saved}")
