"""The members that the matrix runs: tiny random ones over tokens, bytes and invented symbols, and bundled families."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import byte_tokenizers
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from softmeet import Ensemble

# What users say is the prompt itself, so that over tokens a conversation is read as the text is.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
PIECES = ("the ", "he", "other ", "r", "\u00e9t", "Her", ", ", "k", "three ", "Z", "1", "hearth ")
# Bundled members, in the shipped precision; where none are named, the shipped family.
FAMILIES: dict[str, tuple[str, ...]] = {"family": (), "mixed": ("mixed",)}
# Letters of a script that no tokenizer here knows, one token each.
SYMBOLS = [chr(0xA000 + k) for k in range(299)]


def _symbols() -> tf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<|end|>": 0} | {c: k + 1 for k, c in enumerate(SYMBOLS)}, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end|>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _gpt2(v: int, end: int) -> tf.PreTrainedModel:
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=v, n_positions=128, n_embd=8, n_layer=2, n_head=2, **ids))


def _llama(v: int, end: int) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=v, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=128, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def _save(folder: Path, tokenizer: Any, make: Any, seed: int, *, noise: float = 0.0) -> Path:
    """Write a folder that loads as a member: a random model whose logits tell tokens apart, with noise if asked."""
    torch.manual_seed(seed)
    v = len(tokenizer)
    model = make(v, tokenizer.eos_token_id)
    with torch.no_grad():
        for own in model.parameters():
            own.add_(torch.randn(own.shape) * noise * own.std().nan_to_num(0.0))
        # Mostly plain letters come, with few others.
        texts = [tokenizer.decode([k]) for k in range(v)]
        plain = torch.tensor([text.isprintable() and "\ufffd" not in text for text in texts])
        model.get_output_embeddings().weight.mul_(torch.where(plain, 40.0, 10.0)[:, None])
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class World:
    """Members that are loaded once, and the ensembles that cases make of them."""

    name: str  # the case's vocabulary
    members: tuple[str, ...]  # what -m names; none for the shipped family
    dtype: str | None = "float64"
    files: str = ""  # the folder of files that stand beside them where a case says so

    @cached_property
    def loaded(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _made(self) -> dict[Any, Ensemble]:
        return {}

    def ensemble(self, rule: str | None = None, gate: str | None = None, files: str = "none") -> Ensemble:
        """Return the members combined by a rule and a gate, or by the shipped ones; they share their weights."""
        made, key = self._made, (rule, gate, files)
        if key not in made:
            given = {"rule": rule} | ({} if gate is None else {"gate": gate})
            given |= {"weights": self.even} | ({"vocabulary": "bytes"} if self.name == "bytes" else {})
            who = [[*self.members, *self.beside(files)]] if self.members else []
            made[key] = Ensemble.from_pretrained(*who, **given, dtype=self.dtype, loaded=self.loaded)
        return made[key]

    @property
    def even(self) -> list[int]:
        return [1] * (3 if self.name == "family" else 2)

    def beside(self, files: str) -> list[str]:
        return [] if files == "none" else [f"files:{self.files}"]

    def arguments(self, files: str) -> list[str]:
        named = [word for member in (*self.members, *self.beside(files)) for word in ("-m", member)]
        named += ["--weights", ",".join(map(str, self.even))]
        named += [] if self.dtype is None else ["--dtype", self.dtype]
        return named + (["--vocabulary", "bytes"] if self.name == "bytes" else [])

    def prompts(self, seed: int) -> list[str]:
        """Return six prompts of several lengths, none of which ends in a space."""
        chosen = random.Random(f"{self.name} {seed}")
        if self.name == "symbols":
            return ["".join(chosen.choices(SYMBOLS, k=chosen.randint(2, 12))) for _ in range(6)]
        return ["".join(chosen.choices(PIECES, k=chosen.randint(2, 6))).strip() + "t" for _ in range(6)]


def make_worlds(folder: Path) -> dict[str, World]:
    """Write the tiny members into a folder, and return all worlds by name, those of bundled families as shipped."""
    gpt2, llama = byte_tokenizers.byte_level, byte_tokenizers.llama
    members = {
        "tokens": [_save(folder / "a", gpt2(), _gpt2, 0), _save(folder / "b", gpt2(), _llama, 1)],
        "bytes": [_save(folder / "c", gpt2(), _gpt2, 2), _save(folder / "d", llama(), _llama, 3)],
        # The second is a noisy copy of the first, whose drafts are mostly right.
        "symbols": [_save(folder / "e", _symbols(), _gpt2, 4), _save(folder / "f", _symbols(), _gpt2, 4, noise=0.3)],
    }
    (folder / "files").mkdir()
    for k in range(3):
        chosen = random.Random(k)
        texts = ["".join(chosen.choices(PIECES, k=60)), "".join(chosen.choices(SYMBOLS[:20], k=200))]
        (folder / "files" / f"{k}.txt").write_text("".join(texts), encoding="utf-8")
    files = str(folder / "files")
    found = {name: World(name, tuple(map(str, own)), files=files) for name, own in members.items()}
    return found | {name: World(name, own, None) for name, own in FAMILIES.items()}
