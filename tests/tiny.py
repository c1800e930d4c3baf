"""Tiny random models of many architectures, built in memory or saved with a tiny tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from string import ascii_letters

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

V = 64
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, **IDS,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 8}

BUILDERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, **IDS)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
    "opt projected": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=V, hidden_size=32, word_embed_proj_dim=8, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, init_std=0.2, **IDS,
        )
    ),
    "gemma2 soft-cap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, **GQA, final_logit_softcapping=1.5)),
    "cohere scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.25)),
    "granite scale": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "phi bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL)),
    "gptj bias": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **IDS)
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, scale: float = 4.0) -> tf.PreTrainedModel:
    """A random model whose logits spread enough to tell tokens apart."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        layer = model.get_output_embeddings()
        layer.weight.mul_(scale)
        if layer.bias is not None:
            layer.bias.normal_()
    return model


def tokenizer(words: int = V) -> tf.PreTrainedTokenizerFast:
    """One token per character, from id 1 on; 0 is <|end|>."""
    vocab = {"<|end|>": 0} | {c: k + 1 for k, c in enumerate((ascii_letters + " .,-'<>&!?:")[: words - 1])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end|>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def save(folder: Path, name: str, seed: int = 0, words: int = V) -> Path:
    """A folder that loads as a member."""
    build(name, seed).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


def save_near(folder, count, noise=0.02):
    """Folders of one tiny model and of copies with noise, whose drafts are mostly right."""
    names = [save(folder / "0", "gpt2", seed=0)]
    for k in range(1, count):
        model = tf.AutoModelForCausalLM.from_pretrained(names[0])
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for own in model.parameters():
                own.add_(torch.randn(own.shape, generator=generator) * noise * own.std().nan_to_num(0.0))
        names.append(str(folder / str(k)))
        model.save_pretrained(names[-1])
        tf.AutoTokenizer.from_pretrained(names[0]).save_pretrained(names[-1])
    return names


def save_lora(folder, base, seed):
    """Write an adapter of random weights for the model in a folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            tf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder)
    return folder


def each(option: str, values: Iterable[object]) -> list[str]:
    """An option, repeated for each value, as commands take lists."""
    return [word for value in values for word in (option, str(value))]
