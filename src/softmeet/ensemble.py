"""``Ensemble``: several language models that are loaded together and continue text as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.decoders.base import Decoder, Decoding
from softmeet.decoders.registry import decoder_of
from softmeet.engine.recorder import Recorder
from softmeet.errors import InvalidInputError
from softmeet.hf.by_size import unsized, weigh
from softmeet.hf.chat import Messages, is_chat
from softmeet.hf.checkpoint import assemble, saved_config
from softmeet.hf.checkpoint import member_names as member_names
from softmeet.hf.claiming import give_claims, with_own
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.decoded import decoded
from softmeet.hf.inspected import GroupReport, next_token, reports_of
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.prompts import Prompt, arguments_of, encoded
from softmeet.hf.report import NextToken, TokenReport
from softmeet.hf.retrieval import with_passages
from softmeet.hf.sampling import require_reproducible
from softmeet.hf.streaming import PieceStreamer, by_member, streamed
from softmeet.hf.unread import reading, refuse_quantised
from softmeet.hf.vocabulary import choose_vocabulary, kind_of, require_for_bytes, require_gate, require_vocabulary
from softmeet.members import zoo
from softmeet.members.files import Files, parted
from softmeet.members.huggingface import Dtype, load_members, load_tokenizers, require_loadable, with_engines
from softmeet.members.passages import Passage
from softmeet.members.placement import Device
from softmeet.members.prompting import require_room
from softmeet.members.weighting import weights_by
from softmeet.members.zoo import Named
from softmeet.rules.base import Rule
from softmeet.rules.settings import Settings, parse_rule
from softmeet.rules.signatures import takes_settings

# The gate of new ensembles: the pool answers where text generated from it and from the rule could not be told apart.
DEFAULT_GATE: str | None = "auto"


class Ensemble:
    """Several language models, the members, that continue text as one model.

    :meth:`from_pretrained` loads members by name; the constructor takes a loaded ``model`` and its ``tokenizer``.

    Attributes:
        model: the ensemble as a causal LM of transformers.
        tokenizer: the members' common tokenizer; over bytes, one whose tokens are bytes.
        names: the members' names.
    """

    def __init__(self, model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names: list[str] = list(model.config.members)

    def __repr__(self) -> str:
        return f"Ensemble({self.names}, {self.model.config.rule!r}, over {self.model.config.vocabulary})"

    @classmethod
    @takes_settings
    def from_pretrained(
        cls,
        members: Sequence[Named | Files] | Named = zoo.DEFAULT,
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
        """Load members and combine them by a rule, or load a saved ensemble; None means the default, or what was saved.

        Args:
            members: hub ids (``org/model@revision``), folders, ``.gguf`` files or bundled names, maybe with an adapter
                and so on behind, or :class:`softmeet.Member`; one saved ensemble; the user's :class:`softmeet.Files`.
            rule: ``meet`` by default; a name, as in ``"meet:trust=1/0.3"``, or an instance of :class:`softmeet.Rule`.
            dtype: None for fp32 on CPU and the checkpoint's own dtype elsewhere; one for all members or one each.
            device: None for CPU, a device, ``"auto"`` to let accelerate decide, or a dict with a device, ``"cpu"`` or
                ``"disk"`` for each module by name; one for all or one each. Those on different devices run at once.
            trust_remote_code: run code that comes with a checkpoint.
            offload_folder: a folder for ``"disk"`` weights that cannot be read from the checkpoint unchanged.
            on_progress: called with each member's name before it is loaded, and with how far files are read.
            loaded: a dict, at first empty, to pass to several calls, which add members to it and load none twice.
            vocabulary: ``"tokens"`` for members with one tokenizer up to padding and added tokens; ``"bytes"``, by
                ``logit-mean`` unless a rule that reads no heads is named, where ``max_new_tokens`` counts the first
                member's tokens; ``"auto"``, the default, for bytes if tokenizers differ, which is logged; ``"union"``
                for the union of their tokens, to write alone, by ``prob-mean`` by default, ``"union:k=10"`` for each
                one's ten likeliest; ``"union:as=gac"`` and ``"union:k=10:as=unite"`` as their authors' code has it.
            prune: over bytes, the least share of probability mass, by default 0.01, at which another tokenization runs.
            prefixes: for each member the token ids that it reads before every text; None for its tokenizer's.
            settings: fields of :class:`softmeet.Settings`, and options of the rule; the gate is ``auto`` if not given,
                and an average without ``weights`` counts members by size, where sizes are known, which is logged.

        Raises:
            InvalidInputError: if a setting is wrong, or no member is named.
            CheckpointError: if a member cannot be loaded, or a saved ensemble from elsewhere names files.
            VocabularyMismatchError: if the tokenizers differ; over bytes, if one of them cannot be read by bytes.
            UnsupportedHeadError: if the rule reads heads, and one is quantised, or the ensemble is over bytes.

        Example:
            >>> Ensemble.from_pretrained(["wide/gpt2", "wide/llama"], trust=1.0, weights=[0.25, 0.75]).names
            ['wide/gpt2', 'wide/llama']
        """
        members, files = parted(members)
        saved = saved_config(members)
        names = with_engines(member_names(members), dtype, device)
        any_average = saved is None and rule is None
        given = {name: value for name, value in {"rule": rule, **settings}.items() if value is not None}
        if saved is None:
            gated = "gate" in given or (isinstance(rule, str) and "gate" in parse_rule(rule)[1])
            before, chosen = EnsembleConfig(names), Settings.of(given if gated else {"gate": DEFAULT_GATE, **given})
        else:
            before, chosen = saved, saved.settings.changed(**given)
        vocabulary, prune = vocabulary or before.vocabulary, before.prune if prune is None else prune
        require_vocabulary(vocabulary, prune)
        require_gate(chosen, vocabulary)  # before anything is loaded
        if kind_of(vocabulary) in ("bytes", "union") and not any_average:
            require_for_bytes(chosen, vocabulary)
        config = EnsembleConfig(
            names, settings=unsized(chosen), vocabulary=vocabulary, prune=prune,
            prefixes=before.prefixes if prefixes is None else prefixes,
            files=with_own(before.files, files, str(members), trust_remote_code),
        )  # fmt: skip
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        refuse_quantised(config, require_loadable(names, **loading), any_average=any_average)
        tokenizers = load_tokenizers(names, trust_remote_code=trust_remote_code)
        require_room(names, tokenizers, trust_remote_code=trust_remote_code)
        common = choose_vocabulary(config, tokenizers, any_average=any_average)
        models = load_members(
            names, **loading, offload_folder=offload_folder, on_progress=on_progress,
            on_loaded=reading(config, any_average=any_average), loaded=loaded,
        )  # fmt: skip
        weigh(config, models, chosen)
        model = assemble(EnsembleForCausalLM, config, models, common, tokenizers)
        give_claims(model, on_progress)
        return cls(model, model.tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder with the members' names and all settings, without weights, for :meth:`from_pretrained`.

        Example:
            >>> from tempfile import mkdtemp
            >>> folder = mkdtemp()
            >>> Ensemble.from_pretrained("wide", "prob-mean").save_pretrained(folder)
            >>> Ensemble.from_pretrained(folder).model.config.rule
            'prob-mean'
        """
        self.model.save_pretrained(folder)

    def with_passages(self, passages: Sequence[Passage], *, temperature: float = 1.0, **options: Any) -> Ensemble:
        """Return an ensemble that reads retrieved passages: each member once behind each of them, by their scores.

        By default it is combined as in REPLUG's paper: Σ_i Σ_d w_i λ_d p_i(y | d, text), w_i the members' weights, λ
        the softmax of scores / temperature. It shares this ensemble's weights in memory.

        Args:
            passages: at least one.
            temperature: of the passages' scores.
            options: ``rule`` in place of ``prob-mean``; None for this ensemble's own.

        Example:
            >>> from softmeet.members.passages import Passage
            >>> found = [Passage("The king is Saul.", 1.2), Passage("The king is David.", 0.7)]
            >>> Ensemble.from_pretrained("wide/gpt2", "prob-mean").with_passages(found).model.config.weights
            [0.62..., 0.37...]
        """
        return Ensemble(with_passages(self.model, passages, temperature=temperature, **options), self.tokenizer)

    @torch.inference_mode()
    def next_token(self, text: str, top: int = 10) -> NextToken:
        """Predict the token after the prompt ``text`` (over bytes, the byte), and list the ``top`` most probable ones.

        Raises:
            InvalidInputError: if the prompt is empty, or not shorter than the shortest member's context.

        Example:
            >>> found = Ensemble.from_pretrained("wide", "logit-mean").next_token("In the beginning", top=2)
            >>> [(token, round(probability, 2)) for token, probability in found.top]
            [(' of', 0.26), (',', 0.14)]
        """
        return next_token(self.model, self.tokenizer, text, top)

    @torch.inference_mode()
    def inspect(self, text: str, top: int = 5, given: int | None = None) -> list[TokenReport] | list[GroupReport]:
        """Report how probable the ensemble and each member found every token of ``text`` after the first one.

        Args:
            text: at least two tokens; over bytes, one byte.
            top: the number of most probable tokens to list of each distribution.
            given: beside files, how many first tokens (bytes) were given, not drawn; None for all.

        Returns:
            A report for each token, log-probabilities in nats; over bytes for each stretch of characters that begins
            and ends at token boundaries of all members, the first included.

        Raises:
            InvalidInputError: if the text is too short, or not shorter than the shortest member's context.

        Example:
            >>> reports = Ensemble.from_pretrained("wide", "logit-mean").inspect("In the beginning")
            >>> [round(report.log_prob, 2) for report in reports]
            [-2.91, -6.57, -0.17]
        """
        return reports_of(self.model, self.tokenizer, text, top, given)

    @torch.inference_mode()
    def prompt_weights(self, text: str) -> list[float]:
        """Compute a weight for each member from how well it predicts ``text``: 1 / its perplexity, scaled to sum to 1.

        Raises:
            InvalidInputError: if the text has fewer than two tokens, or not fewer than the shortest member's context.

        Example:
            >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
            >>> [round(weight, 2) for weight in ensemble.prompt_weights("In the beginning")]
            [0.35, 0.26, 0.39]
        """
        self.model.require_likelihood("weighing members by a prompt")
        ids = encoded(self.model, self.tokenizer, [text])["input_ids"]
        if ids.shape[1] < 2:
            raise InvalidInputError(f"expected a prompt of at least two tokens to weigh members by, got {text!r}")
        log_probs, _ = self.model.combiner.own_log_probs([h[:-1] for h in self.model.hidden_states(ids)])
        return weights_by(log_probs, ids[0, 1:])

    @torch.inference_mode()
    def positions(self, text: str, limit: int) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """Run the members over a text, in windows as long as the shortest context of a member.

        Args:
            text: at least two tokens.
            limit: the largest number of tokens to predict, at least 1.

        Yields:
            For each window, (the members' last hidden states, each (t, d_i); the ids that follow, (t,)).

        Raises:
            InvalidInputError: if the text has fewer than two tokens, or the ensemble is over bytes.

        Example:
            >>> (window,) = Ensemble.from_pretrained("wide", "logit-mean").positions("In the beginning", 100)
            >>> [tuple(states.shape) for states in window[0]], window[1].tolist()
            ([(3, 160), (3, 96), (3, 96)], [260, 2224, 1228])
        """
        self.model.require_tokens("evaluation")
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, : limit + 1]
        if len(ids) < 2:
            raise InvalidInputError(f"expected a text of at least two tokens, got {len(ids)}")
        ids, window = ids.to(self.model.device), getattr(self.model.config, "max_position_embeddings", None) or limit
        for start in range(0, len(ids) - 1, window):
            targets = ids[start + 1 : start + window + 1]
            yield self.model.hidden_states(ids[None, start : start + len(targets)]), targets

    @overload
    def generate(self, text: str | Messages, **options: Any) -> str: ...
    @overload
    def generate(self, text: list[str], **options: Any) -> list[str]: ...
    @torch.inference_mode()
    def generate(
        self,
        text: str | Messages | list[str],
        *,
        seed: int | None = None,
        recorder: Recorder | None = None,
        prompt_weights: bool = False,
        reproducible: bool = False,
        decoder: str | Decoder | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Continue one prompt, or several in one batch, and return the new text only.

        Args:
            text: a prompt or a list of prompts. A prompt is a text, or a conversation to answer: a list of turns, such
                as ``[{"role": "user", "content": "hello"}]``, that each member's chat template turns into a prompt.
            seed: prompt k, from 0, draws with noise of its own, determined by (seed, k), so its tokens do not depend on
                the other prompts; implies ``do_sample=True`` unless that is False. None for torch's global generator.
            recorder: a ``softmeet.hf.Recorder()``, to which the call adds its rows, head reads, fallbacks and more.
            prompt_weights: use for each prompt the weights that :meth:`prompt_weights` computes from it. Prompts are
                then continued one after another, each as if it were asked alone: all draw from (seed, 0).
            reproducible: continue prompts in this way, for the same tokens alone and beside any others, to the last bit
                on the same machine and threads. In a batch rounding differs, and with it now and then a token.
            decoder: a way to write whole texts in place of one token after another, such as ``"particles:n=16"``;
                :meth:`decode` says more of it, and returns all that it has found.
            options: options of transformers' ``generate`` (without a length text may fill the shortest context; without
                ``top_k`` tokens are drawn from the whole distribution, not from the 50 likeliest); ``max_bytes``, over
                bytes the most new bytes, where ``max_new_tokens`` counts the new text's tokens as the first member's
                tokenizer cuts it, and ``min_new_tokens`` and ``max_length`` count bytes; ``structure``, what
                the text has to be (:class:`softmeet.Structure`); ``weights`` (n numbers) and ``gate`` ("none" for none)
                for this call; ``token_seconds``, how long solvers may take for a token (:func:`softmeet.time_limit`);
                ``one_member=True``, to draw each token from one member, drawn by its weight: in plain sampling by
                ``prob-mean`` the same law at about the price of one member; ``speculate``, how many tokens the cheapest
                member drafts (0 for none, "auto", the default where seeds still repeat, for as many as save time).

        Raises:
            InvalidInputError: if options are wrong or exclude each other, or a prompt is empty or fills a context.

        Example:
            >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
            >>> ensemble.generate("In the beginning", max_new_tokens=5, do_sample=False)
            ' of the earth, and'
        """
        several = isinstance(text, list | tuple) and not is_chat(text)
        prompts: list[Any] = list(text) if several else [text]
        if decoder is not None:
            options |= {"recorder": recorder, "prompt_weights": prompt_weights, "reproducible": reproducible}
            found = [one.chosen_text() for one in self.decode(prompts, decoder, seed=seed, **options)]
            return found if several else found[0]
        if prompt_weights and "weights" in options:
            raise InvalidInputError("expected weights or prompt_weights, got both: leave one out")
        arguments = arguments_of(self.model, self.tokenizer, prompts, seed, recorder, options)
        if reproducible:
            require_reproducible(arguments["do_sample"], seed, options)
            recorder = recorder or Recorder()  # an average is then computed as where it is reported, to the last bit
        if prompt_weights or reproducible:
            shared = {"seed": seed, "recorder": recorder, **options} | ({"speculate": 0} if reproducible else {})
            own = [{"weights": self.prompt_weights(prompt)} if prompt_weights else {} for prompt in prompts]
            texts = [self.generate(prompt, **shared, **more) for prompt, more in zip(prompts, own, strict=True)]
        else:
            made = self.model.generate(**arguments)[:, arguments["input_ids"].shape[1] :]
            texts = list(self.tokenizer.batch_decode(made, skip_special_tokens=True))
        return texts if several else texts[0]

    @overload
    def decode(self, text: str | Messages, decoder: str | Decoder = ..., **options: Any) -> Decoding: ...
    @overload
    def decode(self, text: list[Any], decoder: str | Decoder = ..., **options: Any) -> list[Decoding]: ...
    @torch.inference_mode()
    def decode(
        self, text: str | Messages | list[Any], decoder: str | Decoder = "particles", **options: Any
    ) -> Decoding | list[Decoding]:
        """Have a decoder write whole texts behind one prompt, or several in one batch, and return all of them.

        Args:
            text: a prompt or a list of prompts, as of :meth:`generate`.
            decoder: a name with options, as in ``"agreement:beam=5"``, or an instance of :class:`softmeet.Decoder`.
            options: the limit, a part of what is drawn from: ``max_new_tokens`` over tokens, ``max_bytes`` over bytes,
                the end counted; ``seed`` of all draws (without it, from torch's generator); ``weights`` and ``gate``.

        Raises:
            InvalidInputError: if another option is given, the limit is missing or too large, or the decoder cannot be
                used with the rule or a member.

        Example:
            >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
            >>> found = ensemble.decode("In the beginning", "particles:n=8", max_new_tokens=5, seed=0)
            >>> len(found.texts), round(found.log_z, 1)
            (8, -0.6)
        """
        several = isinstance(text, list | tuple) and not is_chat(text)
        prompts: list[Any] = list(text) if several else [text]
        found = decoded(self.model, self.tokenizer, prompts, decoder_of(decoder), options)
        return found if several else found[0]

    def stream(
        self, text: Prompt, *, seed: int | None = None, recorder: Recorder | None = None, **options: Any
    ) -> Iterator[str]:
        """Continue one prompt as :meth:`generate` does (without ``prompt_weights``), and yield new text as it comes.

        Work begins with the first part asked for; closing the iterator stops it, and errors are raised from it.

        Example:
            >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
            >>> "".join(ensemble.stream("In the beginning", max_new_tokens=5, do_sample=False))
            ' of the earth, and'
        """
        arguments = arguments_of(self.model, self.tokenizer, [text], seed, recorder, options)
        yield from streamed(self.model, PieceStreamer(self.tokenizer), arguments)

    def stream_with_disagreement(
        self, text: Prompt, *, seed: int | None = None, recorder: Recorder | None = None, **options: Any
    ) -> Iterator[tuple[str, float]]:
        """Stream as :meth:`stream` does, and yield (new text, how far the members disagree there, in nats).

        A piece is the text of one token, or of several that make up a character. Its figure is the largest of its
        tokens' ``Solution.disagreement``, summed over the members that ran; ``softmeet.hf.report.style`` colours it.

        Example:
            >>> ensemble = Ensemble.from_pretrained("wide", "logit-mean")
            >>> next(ensemble.stream_with_disagreement("In the beginning", do_sample=False))
            (' of', 0.30...)
        """
        told = by_member(self.model, self.tokenizer, text, seed=seed, recorder=recorder, **options)
        yield from ((piece, sum(nats, 0.0)) for piece, nats, _ in told)
