"""Flags that most commands share, and the ensemble and the engine that are made from them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softmeet.cli.flags import Flags, at_least_one, checked_settings, flag, optional, switch
from softmeet.cli.messages import say, stoppable
from softmeet.cli.progress import working
from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra
from softmeet.members.files import parted
from softmeet.members.member import short as short
from softmeet.members.names import require_there
from softmeet.members.zoo import DEFAULT as DEFAULT
from softmeet.rules.frozen import unknown
from softmeet.startup import quick_imports, uncollected
from softmeet.suspended import check_interrupted

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.scaling.base import Engine

# The value of --prune where predictions are measured: 0.01 leaves a bias that is larger than many differences.
MEASURED = 0.001
DEFAULT_CLUSTER = "$RAY_ADDRESS, else a new one on this machine"
_MEMBERS = (
    "A file, folder or name of the Hugging Face Hub: a GGUF file, by its path or as softmeet models lists it, a "
    "checkpoint, or a bundled model such as wide/gpt2; repeat it for each member. NAME:REST is a reader that a package "
    "brings. Behind it, +key=value may say how it is loaded and what it reads: prompt (a text or a file), adapter, "
    "quantization, dtype, device, of a GGUF file engine, context, gpu_layers, repack and hash, of a model behind a "
    "server (http://HOST:PORT/v1#MODEL) tokenizer and top, subfolder, file, name. Or, alone, a bundled family (wide, "
    "the default; narrow, with very narrow heads; mixed, with two tokenizers) or the folder of a saved ensemble, whose "
    "settings then take the place of the defaults shown here."
)
Members = Annotated[
    list[str] | None,
    typer.Option(
        "--member",
        "-m",
        help=_MEMBERS,
        show_default="small bundled models",
        metavar="NAME",
        rich_help_panel="Models",
    ),
]


def named(members: list[str] | None) -> list[str]:
    """Return the members' names; if there are none, the default family's, and say on stderr that it is measured."""
    if not members:
        say(f"no member is named by -m: this measures the bundled family {DEFAULT}")
    return members or [DEFAULT]


def require_models(lines: Iterable[str], advice: str) -> None:
    """Raise InvalidInputError with advice, ``{}`` in it for the word, if one of these has spaces and is no path."""
    if said := next((line for line in lines if " " in line and "+" not in line and not Path(line).exists()), None):
        raise InvalidInputError(f"expected models alone, got {said!r}: {advice.format(shlex.quote(said))}")


def placement(given: list[str] | None) -> Any:
    """Return the device or devices that ``--device`` names.

    Args:
        given: the option's values, or None if it was not given.

    Returns:
        None if no value is given; one value, for all members; or a list of several values, one for each member. A
        single value that ends with .yaml, .yml or .json is a file; the map or list in it is returned.

    Raises:
        InvalidInputError: if the file is not valid YAML or JSON, or holds neither a map nor a list.
        OSError: if the file cannot be read.
    """
    device = given[0] if given and len(given) == 1 else given or None
    if not isinstance(device, str) or not device.endswith((".yaml", ".yml", ".json")):
        return device
    import yaml

    from softmeet.cli.texts import file_text

    try:
        found = yaml.safe_load(file_text(device))
    except yaml.YAMLError as error:
        raise InvalidInputError(f"expected YAML or JSON in {device}: {error}") from None
    if not isinstance(found, dict | list):
        raise InvalidInputError(
            f"expected {device} to hold a device for each module, or a list with one entry per member, got {found!r}"
        )
    return found


class LoadingFlags(Flags, panel="Models"):
    """Flags for how and where members are loaded, and whether they are combined over tokens or bytes."""

    dtype: str | None = optional(
        "The type of the weights: float32, bfloat16, float16, float64, or auto for the checkpoint's own.",
        shown="float32 on a CPU, else auto",
    )
    device: list[str] | None = optional(
        "Where the weights go: cpu, cuda, cuda:1, disk, or auto (spread by accelerate). One value serves all members; "
        "or repeat it, once for each member in order. The path of a YAML or JSON file that maps the names of modules "
        "to devices also serves.",
        shown="cpu",
    )
    trust_remote_code: bool = switch(
        "Run the Python code that comes with a checkpoint; only for checkpoints that you trust."
    )
    vocabulary: str | None = optional(
        "Mix models by tokens, bytes or union. tokens: they must share a tokenizer. bytes: any tokenizers, averages "
        "only. union: the union of their tokens, to write alone; union:k=10: of the ten likeliest "
        "of each. auto: bytes where tokenizers differ, else tokens.",
        shown="auto",
    )
    prune: float | None = optional(
        "Over bytes, ignore ways to tokenize the text that hold less than this share of a member's probability. A "
        "larger X is faster and less exact; 0 ignores none.",
        shown="0.01; to evaluate and trace 0.001",
        panel="Advanced",
        min=0,
    )

    def arguments(self) -> dict[str, Any]:
        """Return the flags as keyword arguments of ``Ensemble.from_pretrained``, ``device`` as :func:`placement` does.

        Raises:
            InvalidInputError, OSError: as by :func:`placement`.
        """
        return {**vars(self), "device": placement(self.device)}

    def refuse_exact(self, members: list[str], texts: Sequence[str], most: int | None) -> None:
        """Check, before members are loaded, that ``--prune 0`` can follow all ways to cut texts into their tokens.

        Args:
            members: their names.
            texts: those that are read.
            most: the most bytes that are read of one; None for whole ones.

        Raises:
            InvalidInputError: if there are too many.
        """
        if self.prune != 0 or self.vocabulary == "tokens" or is_saved(members):
            return
        require_there(members)
        from softmeet.ensemble import member_names
        from softmeet.hf.checkpoint import require_few_ways

        models, _ = parted(members)
        own = member_names(models[0] if isinstance(models, list) and len(models) == 1 else models)
        code = self.trust_remote_code
        require_few_ways(
            own, [text.encode()[:most] for text in texts], self.vocabulary or "auto", trust_remote_code=code
        )

    def refuse_over_union(self, scored: Sequence[str], alone: Sequence[str]) -> None:
        """Check that flags can be used over the union that ``--vocabulary`` may name.

        Args:
            scored: those given that need a text's likelihood.
            alone: those by which a member answers alone.

        Raises:
            InvalidInputError: if one cannot.
        """
        if not (self.vocabulary or "").startswith("union"):
            return
        from softmeet.readers.union_form import UnionForm

        if scored:
            raise InvalidInputError(
                f"{scored[0]} needs a text's likelihood, and over a union of tokens a text can be written in many "
                "ways: say --vocabulary bytes"
            )
        if alone and UnionForm.parse(str(self.vocabulary)).is_joint:
            raise InvalidInputError(
                f"{alone[0]} has one member answer alone, and {self.vocabulary} is made of what all members say at a "
                "step: leave it out, or say --vocabulary union"
            )

    @stoppable("members were being loaded, and nothing is changed")
    def ensemble(
        self,
        members: list[str] | None,
        settings: Mapping[str, Any] | None = None,
        *,
        to_write: bool = False,
        rather: str | None = None,
        shown: bool = True,
        prune: float | None = None,
        **more: Any,
    ) -> Ensemble:
        """Load an ensemble, with progress on stderr and without transformers' own messages.

        Args:
            members: the members' names, or one saved ensemble or bundled family; the default family if None or empty.
            settings: values of settings' flags by name, as typer parsed them (:func:`checked_settings`), None if a
                flag was not given; None in place of the dict for no settings.
            to_write: whether it only writes texts, and scores none.
            rather: the vocabulary where it is to be chosen, by no flag and no saved ensemble; None to let the members'
                tokenizers choose.
            shown: whether progress is shown.
            prune: the value of ``--prune`` where it is not given, by no saved ensemble either; None for the usual one.
            more: further keyword arguments of ``Ensemble.from_pretrained``, except ``on_progress``.

        Raises:
            InvalidInputError: if a setting or the placement is invalid.
            typer.Exit: with the code 130 after Ctrl-C.
            CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as ``Ensemble.from_pretrained`` raises them.
        """
        if (self.vocabulary or "").startswith("union") and not to_write:
            raise InvalidInputError(
                "--vocabulary union is for generate and serve: over it a text can be written in many ways, so that "
                "none can be scored; say --vocabulary bytes"
            )
        require_there(members or ())
        with working("loading softmeet", shown=shown), uncollected():
            given = checked_settings(settings or {})
            with quick_imports():
                from transformers.utils import logging

                from softmeet.ensemble import Ensemble
                from softmeet.hf.by_size import untold

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        arguments = self.arguments()
        if rather and (self.vocabulary == "auto" or (self.vocabulary is None and not is_saved(members))):
            arguments["vocabulary"] = rather
        if self.prune is None and not is_saved(members):
            arguments["prune"] = prune
        with working("loading", shown=shown) as show, nullcontext() if "weights" in (settings or ()) else untold():
            found = Ensemble.from_pretrained(
                members[0] if members and len(members) == 1 else members or DEFAULT,
                on_progress=lambda name: show(f"loading {short(name)}"),
                **arguments,
                **given,
                **more,
            )
        check_interrupted()
        if not to_write:
            found.model.require_likelihood("what this command does")
        return found


def is_saved(members: list[str] | None) -> bool:
    """Return whether the members are one saved ensemble."""
    from softmeet.hf.checkpoint import saved_config

    return members is not None and len(members) == 1 and saved_config(members[0]) is not None


class EngineFlags(Flags, panel="Engine"):
    """Flags for where a command does its work: in threads of its own process, or in workers of a Ray cluster."""

    engine: str = flag(
        "local", "Where the work is done: local (threads of this process), or ray (workers of a Ray cluster)."
    )
    workers: int | None = at_least_one(
        "The number of threads or Ray workers. Threads share the members; each Ray worker loads them.",
        shown="one for each core",
    )
    threads: int = flag(
        1, "PyTorch threads of each worker; results may differ in the last digits when it changes.", min=1
    )
    ray_address: str | None = optional("The Ray cluster's address.", shown=DEFAULT_CLUSTER)
    gpus: float = flag(
        0.0, "GPUs of each Ray worker: a fraction such as 0.5, or several, over which its members are spread.", min=0
    )

    def __post_init__(self) -> None:
        """Check the engine's name, its flags and its packages, before anything is loaded."""
        if self.engine not in ("local", "ray"):
            raise unknown(f"unknown engine {self.engine!r}", self.engine, ["local", "ray"])
        if self.engine == "local" and (self.ray_address is not None or self.gpus):
            raise InvalidInputError("--ray-address and --gpus are options of --engine ray")
        if self.engine == "ray":
            require_extra("--engine ray", "ray", "ray")

    def start(self, ensemble: Ensemble | None) -> Engine:
        """Return the engine that the flags ask for: a context manager with a parallel ``map``.

        Args:
            ensemble: the ensemble whose members the work runs; None if the work runs no members.

        Raises:
            InvalidInputError: if a device is named for members that Ray's workers place.
        """
        on_processor = ensemble is None or all(x.device.type == "cpu" for x in ensemble.model.parameters())
        if self.engine == "local":
            from softmeet.scaling.local import LocalEngine, cores

            many = max(1, cores() // self.threads) if on_processor else 1
            return LocalEngine(self.workers or many, self.threads, on_stop=say)
        if not on_processor:
            raise InvalidInputError("Ray's workers place the members themselves: leave out --device, and give --gpus")
        from softmeet.scaling.ray_engine import RayEngine

        return RayEngine(ensemble, self.workers, self.threads, gpus=self.gpus, address=self.ray_address)
