"""``Ensemble``: text in, text out; the everyday face of the library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from softmeet.errors import InvalidInputError
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM, assemble
from softmeet.hf.byte_report import GroupReport, group_reports, shown_byte
from softmeet.hf.calibrated import resolved
from softmeet.hf.checkpoint import absolute
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.recorder import Recorder
from softmeet.hf.report import TokenReport, TokenReports
from softmeet.hf.sampling import RowSampler
from softmeet.hf.vocabulary import choose_vocabulary, require_for_bytes, require_vocabulary
from softmeet.members import zoo
from softmeet.members.huggingface import Dtype, load_members, load_tokenizers
from softmeet.members.placement import Device
from softmeet.members.weighting import perplexity_weights
from softmeet.rules.base import Rule
from softmeet.rules.settings import Settings, parse_rule
from softmeet.rules.signatures import takes_settings
from softmeet.rules.solution import Solution


def _is_ensemble(name: str | Path) -> bool:
    """Whether a folder or hub id holds an ensemble rather than a model; a name that leads nowhere does not."""
    if zoo.expand(name) != [str(name)] or zoo.locate(str(name)) != str(name) or Path(name).suffix == ".gguf":
        return False
    repository, _, revision = str(name).partition("@")
    try:
        found = PreTrainedConfig.get_config_dict(repository, revision=revision or None)[0]
    except (OSError, ValueError):
        return False
    return bool(found.get("model_type") == EnsembleConfig.model_type)


def _saved_config(name: str | Path) -> EnsembleConfig:
    repository, _, revision = str(name).partition("@")
    return EnsembleConfig.from_pretrained(repository, revision=revision or "main")  # type: ignore[no-any-return]


def member_names(members: Sequence[str | Path] | str | Path) -> list[str]:
    """The members that a saved ensemble, a bundled family or a list of names stands for.

    Raises:
        CheckpointError: a saved ensemble names a member that is not there.
    """
    if isinstance(members, str | Path) and _is_ensemble(members):
        return absolute(_saved_config(members).members, Path(members))
    named = [members] if isinstance(members, str | Path) else list(members)
    return [name for entry in named for name in zoo.expand(entry)]


# Of new ensembles, where none is named: the pool answers where no text could tell it from the rule.
DEFAULT_GATE: str | None = "auto"


@dataclass(frozen=True)
class NextToken:
    """The distribution after a prompt.

    ``top`` and each of ``members`` hold (token text, probability), the most probable first; ``solution`` holds all.
    """

    top: list[tuple[str, float]]
    members: dict[str, list[tuple[str, float]]]
    solution: Solution


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Stops every row once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


class Ensemble:
    """Several language models that sample as one.

    Attributes:
        model: an :class:`softmeet.hf.EnsembleForCausalLM`, for everything transformers can do.
        tokenizer: the members' common tokenizer.
        names: the members' names.
    """

    def __init__(self, model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names: list[str] = list(model.config.members)

    @classmethod
    @takes_settings
    def from_pretrained(
        cls,
        members: Sequence[str | Path] | str | Path = zoo.DEFAULT,
        rule: str | Rule | None = None,
        *,
        dtype: Dtype | Sequence[Dtype] = None,
        device: Device | Sequence[Device] = None,
        trust_remote_code: bool = False,
        offload_folder: str | Path | None = None,
        on_progress: Callable[[str], None] = lambda name: None,
        loaded: dict[Any, PreTrainedModel] | None = None,
        vocabulary: str | None = None,
        prune: float | None = None,
        prefixes: Sequence[Sequence[int] | None] | None = None,
        **settings: Any,
    ) -> Ensemble:
        """Load members and combine them by a rule, or load a saved ensemble.

        Args:
            members: hub ids (``org/model@revision``), folders, ``.gguf`` files or bundled names, or one saved ensemble;
                the bundled wide family by default.
            rule: a name, with options as in ``"meet:trust=1/0.3"``, or an instance of :class:`softmeet.Rule`; if None
                ``meet``, or what a saved ensemble has.
            dtype: None for fp32 on CPU and the checkpoints' own elsewhere; one for all members or one each.
            device: None for CPU, ``"auto"`` to leave it to accelerate, or a dict with a device, ``"cpu"`` or ``"disk"``
                for each module by name; one for all members or one each. Members in different places run at the same
                time.
            trust_remote_code: run code that comes with a checkpoint.
            offload_folder: for weights on disk that cannot be read from the checkpoint as they are.
            on_progress: called with each member's name before it is loaded.
            loaded: what earlier calls loaded; members that are there already are shared, new ones are added.
            vocabulary: what members are combined over: ``"tokens"``, for which their tokenizers have to be the same up
                to padding and added tokens; ``"bytes"``, for which they may differ; or ``"auto"``, bytes where they do
                differ, which is logged. Over bytes the rule is an average, ``logit-mean`` if none is given, and
                ``max_new_tokens`` counts bytes. None for ``"auto"``, or for what a saved ensemble has.
            prune: over bytes, the share of mass from which a tokenization of the text is followed; 0 for all of them.
                None for 0.01, or for what a saved ensemble has.
            prefixes: over bytes, for each member its own tokens before every text, such as a prompt that it alone has;
                None for what its tokenizer puts there, or for what a saved ensemble has.
            settings: the fields of :class:`softmeet.Settings`, listed below, and options of the rule itself; None for
                the default, or for what a saved ensemble has. The gate of a new ensemble is ``auto``, which is for
                generation and serving.

        Raises:
            InvalidInputError: a setting is wrong, or no member is named.
            CheckpointError: a member cannot be loaded.
            VocabularyMismatchError: the tokenizers differ; over bytes, one of them cannot be read.
            UnsupportedHeadError: a member's output layer is not a plain softmax head; over bytes, the rule reads heads.
        """
        saved = members if isinstance(members, str | Path) and _is_ensemble(members) else None
        given = {name: value for name, value in {"rule": rule, **settings}.items() if value is not None}
        names = member_names(members)
        given = given if saved is not None or _names_a_gate(given) else {"gate": DEFAULT_GATE, **given}
        chosen = Settings.of(given) if saved is None else _saved_config(saved).settings.changed(**given)
        over = EnsembleConfig(names) if saved is None else _saved_config(saved)
        vocabulary, prune = vocabulary or over.vocabulary, over.prune if prune is None else prune
        require_vocabulary(vocabulary, prune)
        prefixes = over.prefixes if prefixes is None else prefixes
        config = EnsembleConfig(
            names, settings=chosen, vocabulary=vocabulary, prune=prune, prefixes=prefixes, movement=over.movement
        )
        any_average = saved is None and rule is None
        if vocabulary == "bytes" and not any_average:
            require_for_bytes(config.settings)
        tokenizers = load_tokenizers(names, trust_remote_code=trust_remote_code)
        common = choose_vocabulary(config, tokenizers, any_average=any_average)
        models = load_members(
            names, dtype=dtype, device=device, trust_remote_code=trust_remote_code, offload_folder=offload_folder,
            on_progress=on_progress, loaded=loaded,
        )  # fmt: skip
        model = assemble(config, models, common)
        return cls(model, model.tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ensemble directory: it names the members and the rule, and holds no weights."""
        self.model.save_pretrained(folder)

    @torch.inference_mode()
    def next_token(self, text: str, top: int = 10) -> NextToken:
        """The next-token distribution after ``text``.

        Raises:
            InvalidInputError: the prompt is empty or longer than the shortest context.
        """
        hidden = [h[-1:] for h in self.model.hidden_states(self._encode([text])["input_ids"])]
        log_probs, solution = self.model.combiner.solve_rows(hidden, resolved(self.model, self.model.settings))
        members = {name: self._top(own[0], top) for name, own in zip(self.names, log_probs, strict=True)}
        return NextToken(self._top(solution.log_probs[0], top), members, solution)

    @torch.inference_mode()
    def inspect(self, text: str, top: int = 5) -> list[TokenReport] | list[GroupReport]:
        """A report for every token of ``text`` but the first, at which nobody could be asked.

        Over bytes, one for every stretch of characters that all members read as whole tokens, from the first on.

        Raises:
            InvalidInputError: the text has fewer than two tokens, or more than the shortest context.
        """
        if isinstance(self.model, ByteEnsembleForCausalLM):
            if not text:
                raise InvalidInputError("expected a text of at least one byte, got an empty one")
            return group_reports(self.model, text.encode(), top)
        inputs = self._encode([text])
        tokens = inputs["input_ids"][0, 1:]
        if not len(tokens):
            raise InvalidInputError(f"expected a text of at least two tokens, got {text!r}")
        reports = TokenReports(top)
        # Every member is asked everywhere, to be seen; a gate says where its answer would not have counted.
        hidden = [states[:-1] for states in self.model.hidden_states(inputs["input_ids"])]
        settings = resolved(self.model, self.model.settings)
        for log_probs, solution in self.model.combiner.solve_in_chunks(hidden, settings):
            reports.add(solution, log_probs)
        return [reports.at(row, token) for row, token in enumerate(tokens.tolist())]

    @torch.inference_mode()
    def prompt_weights(self, text: str) -> list[float]:
        """Weights that sum to one, from each member's perplexity on ``text`` (``members/weighting.py``).

        Raises:
            InvalidInputError: the text has fewer than two tokens, or more than the shortest context.
        """
        ids = self._encode([text])["input_ids"]
        if ids.shape[1] < 2:
            raise InvalidInputError(f"expected a prompt of at least two tokens to weigh members by, got {text!r}")
        log_probs, _ = self.model.combiner.own_log_probs([h[:-1] for h in self.model.hidden_states(ids)])
        targets = ids[0, 1:].to(log_probs.device).expand(len(log_probs), -1)
        return perplexity_weights((-log_probs.gather(-1, targets[..., None])).squeeze(-1).mean(-1).tolist())

    @torch.inference_mode()
    def positions(self, text: str, limit: int) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """The first ``limit`` predictions over a text, in windows of the shortest context.

        Yields:
            (hidden states of each member, (t, d_i); the tokens that came, (t,)).

        Raises:
            InvalidInputError: the text has fewer than two tokens, or the ensemble is over bytes.
        """
        self.model.require_tokens("evaluation")
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, : limit + 1]
        if len(ids) < 2:
            raise InvalidInputError(f"expected a text of at least two tokens, got {len(ids)}")
        ids, window = ids.to(self.model.device), self.model.config.max_position_embeddings or limit
        for start in range(0, len(ids) - 1, window):
            targets = ids[start + 1 : start + window + 1]
            yield self.model.hidden_states(ids[None, start : start + len(targets)]), targets

    def _top(self, log_probs: torch.Tensor, count: int) -> list[tuple[str, float]]:
        best = log_probs.exp().topk(min(count, len(log_probs)))
        named = shown_byte if self.model.over_bytes else lambda i: self.tokenizer.decode([i])
        return [(named(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    @overload
    def generate(self, text: str, **options: Any) -> str: ...
    @overload
    def generate(self, text: list[str], **options: Any) -> list[str]: ...
    @torch.inference_mode()
    def generate(
        self,
        text: str | list[str],
        *,
        seed: int | None = None,
        recorder: Recorder | None = None,
        prompt_weights: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Continue one prompt, or several in one batch; returns the new text only.

        Args:
            text: a prompt or a list of prompts.
            seed: prompt k draws from its own generator (seed, k), so its tokens do not depend on the others. None for
                torch's global generator.
            recorder: sums up what the rule did.
            prompt_weights: weigh the members by how well each predicts the prompt (:meth:`prompt_weights`); prompts are
                then continued one after another.
            options: of transformers' ``generate``, under their own names; ``weights`` are the pool's and ``gate`` is
                the gate, for this call.

        Raises:
            InvalidInputError: a prompt is empty, which it may be over bytes alone, or leaves no room in the shortest
                context.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if prompt_weights:
            shared = {"seed": seed, "recorder": recorder, **options}
            own = [self.generate(prompt, **shared, weights=self.prompt_weights(prompt)) for prompt in prompts]
            return own[0] if isinstance(text, str) else own
        inputs = self._encode(prompts)
        out = self.model.generate(**inputs, **self._options(inputs, seed, recorder, options))
        texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts[0] if isinstance(text, str) else list(texts)

    def stream(
        self, text: str, *, seed: int | None = None, recorder: Recorder | None = None, **options: Any
    ) -> Iterator[str]:
        """As :meth:`generate` for one prompt, yielding text as it comes; an error in generation is raised here."""
        inputs = self._encode([text])
        arguments = {**inputs, **self._options(inputs, seed, recorder, options)}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []
        cancelled = threading.Event()
        criteria = StoppingCriteriaList([_Cancelled(cancelled), *arguments.pop("stopping_criteria", [])])

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            # A caller that stops listening also stops the generation.
            cancelled.set()
            worker.join()
        if failures:
            raise failures[0]

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        over_bytes = self.model.over_bytes
        if not prompts or not (all(prompts) or over_bytes):
            raise InvalidInputError("expected a prompt of at least one token, got an empty one")
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, verbose=False)
        if inputs["input_ids"].shape[1] == 0 and over_bytes:
            # Behind the end begins a text.
            begun = torch.full((len(prompts), 1), self.model.config.bos_token_id)
            inputs = {"input_ids": begun, "attention_mask": torch.ones_like(begun)}
        if inputs["input_ids"].shape[1] == 0:
            raise InvalidInputError(f"expected a prompt of at least one token, got {prompts!r}")
        found = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        length, limit = found["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise InvalidInputError(
                f"expected a prompt shorter than the shortest member's context of {limit} tokens, got {length}: "
                "shorten the prompt"
            )
        return found

    def _options(
        self, inputs: dict[str, torch.Tensor], seed: int | None, recorder: Recorder | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        found = {"pad_token_id": self.tokenizer.pad_token_id, **options}
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and "max_new_tokens" not in found and "max_length" not in found:
            found["max_new_tokens"] = limit - inputs["input_ids"].shape[1]
        if recorder is not None:
            found["recorder"] = recorder
        if seed is not None:
            found["row_sampler"] = RowSampler(seed, range(len(inputs["input_ids"])))
        return found


def _names_a_gate(given: Mapping[str, Any]) -> bool:
    """Whether arguments say which gate, by themselves or in the text of the rule."""
    rule = given.get("rule")
    return "gate" in given or (isinstance(rule, str) and "gate" in parse_rule(rule)[1])
