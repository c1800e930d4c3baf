"""Write docs/reference/architectures.md from the list of what is tested: python tools/update_architectures.py.

tests/models/test_architectures.py runs one test for each cell of the columns that this list fills: it passes where
nothing stands in ``refused``, and is refused with the words that stand there where something does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"

# As many ids as the byte-level tokenizer of tests/byte_tokenizers.py has tokens.
VOCABULARY = 264
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 512, **_IDS,
}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 8}
_OLD: dict[str, Any] = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, **_IDS}
_FALCON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48,
    "max_position_embeddings": 512, **_IDS,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **_IDS}
_WINDOW = {"sliding_window": 6}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], **_WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = _SMALL | {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: the name of its test, ``test_KEY``.
        title: its head.
        meaning: what "tested" means in it.
    """

    key: str
    title: str
    meaning: str


COLUMNS = (
    Column("alone", "generates", "the ensemble of the model with itself by `logit-mean` generates, from three "
           "prompts in one batch, padded at the left, the tokens that transformers' own `generate` gives for each "
           "prompt alone"),
    Column("head", "head", "softmeet's reading of the output layer times the last hidden state gives the model's "
           "logits, with the bias, scale and soft-cap that are named"),
    Column("meet", "`meet`", "with a Llama as the other member, each row of `meet` is certified, and is what "
           "`softmeet.combine` makes of the two models' own logits and heads"),
    Column("gates", "gates", "under `unsure`, as the second member behind a Llama, some tokens are the first's alone, "
           "and all are the same with a cache that lags behind as without any cache"),
    Column("served", "served", "the server's batcher gives three sequences of unequal length that share its batch "
           "the tokens that `generate` gives each alone with the same seed"),
    Column("bytes", "over bytes", "the probability of a text, byte by byte and at once, is the sum over all its "
           "tokenizations, each run by itself"),
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why something does not work: in the page's words, and as the error says it (a regular expression)."""

    why: str
    error: str


@dataclass(frozen=True, eq=False)
class Architecture:
    """An architecture of transformers, and what is known of it.

    Attributes:
        name: as its authors write it.
        kind: its ``model_type``.
        options: of the tiny configuration that is tested.
        examples: checkpoints of it that people know.
        brings: what its head has beside W, as the tiny configuration has it.
        refused: by the key of a column, why it is refused.
        gguf: whether GGUF files of it are read: tested, untried or refused.
        real: which real weights were tried; empty for none.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    examples: str = ""
    brings: str = ""
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    gguf: str = "refused"
    real: str = ""

    def config(self) -> PreTrainedConfig:
        """Return the tiny configuration."""
        return AutoConfig.for_model(self.kind, **self.options)

    def label(self) -> str:
        """Return its name as the page's list has it, with its kind and the checkpoints that people know."""
        known = "" if self.examples in ("", self.name) else f": {self.examples}"
        return f"{self.name} (`{self.kind}`{known})"


_ALIBI = {"bytes": Refusal("ALiBi counts columns, not positions", "cannot be read by bytes")}
_RECURRENT = {
    "served": Refusal("a recurrent state cannot join a batch", "cannot join a running batch; use softmeet generate"),
    "bytes": Refusal("a recurrent state knows no trees", "cannot be read by bytes"),
}  # fmt: skip
_NO_CACHE = Refusal(
    "takes no cache of transformers'; `use_cache=False` works", "continue from a cache, but .* takes none"
)
_WITHOUT_CACHE = {
    "alone": _NO_CACHE, "gates": _NO_CACHE, "served": _NO_CACHE,
    "bytes": Refusal("takes no cache", "cannot be read by bytes.*takes none"),
}  # fmt: skip
_READ, _READ_BY_TESTS = "untried", "tested"
_OWN = "bundled models"

ARCHITECTURES = (
    Architecture("GPT-2", "gpt2", _OLD, "GPT-2, DistilGPT-2", gguf=_READ, real=_OWN),
    Architecture("GPT-BigCode", "gpt_bigcode", _OLD, "StarCoder"),
    Architecture("GPT-Neo", "gpt_neo", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 6, "max_position_embeddings": 512, **_IDS}, "GPT-Neo, TinyStories",
        refused={"bytes": Refusal("its local attention counts columns", "cannot be read by bytes.*layers of local")}),
    Architecture("GPT-J", "gptj", _OLD | {"rotary_dim": 4}, "GPT-J", "bias"),
    Architecture("CodeGen", "codegen", _OLD | {"rotary_dim": 4}, "CodeGen", "bias"),
    Architecture("GPT-NeoX", "gpt_neox", _SMALL, "Pythia", real=_OWN),
    Architecture("OPT", "opt", {
        "hidden_size": 32, "word_embed_proj_dim": 8, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "init_std": 0.2, **_IDS}, "OPT", "projection to fewer columns", real=_OWN),
    Architecture("BLOOM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}, "BLOOM, BLOOMZ",
                 refused=_ALIBI, gguf=_READ),
    Architecture("MPT", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2,
                 **_IDS}, "MPT", refused=_ALIBI),
    Architecture("Falcon", "falcon", _FALCON, "Falcon 7B, 40B", gguf=_READ),
    Architecture("Falcon with ALiBi", "falcon", _FALCON | {"alibi": True}, "Falcon-RW", refused=_ALIBI, gguf=_READ),
    Architecture("XGLM", "xglm", {
        "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 512, **_IDS},
        "XGLM"),
    Architecture("BioGPT", "biogpt", _SMALL, "BioGPT"),
    Architecture("Llama", "llama", _GROUPED, "Llama 1 to 3, SmolLM 1 and 2, TinyLlama, Yi", gguf=_READ_BY_TESTS,
                 real=f"SmolLM2-135M, {_OWN}"),
    Architecture("Llama 4, text", "llama4_text", _WIDE | _LOCAL_EXPERTS | {"intermediate_size_mlp": 48,
                 "attention_chunk_size": 8}, "Llama 4",
                 refused={"bytes": Refusal("attention in chunks", "cannot be read by bytes.*chunked_attention")}),
    Architecture("Mistral", "mistral", _GROUPED | _WINDOW, "Mistral 7B", gguf=_READ),
    Architecture("Mixtral", "mixtral", _GROUPED | _LOCAL_EXPERTS, "Mixtral 8x7B"),
    Architecture("Qwen2", "qwen2", _GROUPED, "Qwen 1.5 to 2.5, DeepSeek-R1-Distill-Qwen",
                 gguf=_READ_BY_TESTS, real="Qwen2.5-Coder 0.5B, 1.5B"),
    Architecture("Qwen2-MoE", "qwen2_moe", _GROUPED | _EXPERTS | {"moe_intermediate_size": 24,
                 "shared_expert_intermediate_size": 24}, "Qwen1.5-MoE", gguf=_READ),
    Architecture("Qwen3", "qwen3", _WIDE, "Qwen3", gguf=_READ),
    Architecture("Qwen3-MoE", "qwen3_moe", _WIDE | _EXPERTS | {"moe_intermediate_size": 24}, "Qwen3-30B-A3B",
                 gguf=_READ),
    Architecture("Qwen3-Next", "qwen3_next", _WIDE | _EXPERTS | _LINEAR | {"moe_intermediate_size": 24,
                 "shared_expert_intermediate_size": 24}, "Qwen3-Next", refused=_RECURRENT),
    Architecture("Qwen3.5, text", "qwen3_5_text", _WIDE | _LINEAR, "Qwen3.5", refused=_RECURRENT),
    Architecture("Gemma", "gemma", _WIDE, "Gemma 2B, 7B"),
    Architecture("Gemma 2", "gemma2", _WIDE | _WINDOW | {"final_logit_softcapping": 1.5}, "Gemma 2", "soft-cap",
                 gguf=_READ),
    Architecture("Gemma 3, text", "gemma3_text", _WIDE | _TWO_KINDS, "Gemma 3", gguf=_READ, real="Gemma 3 270M"),
    Architecture("Gemma 3n, text", "gemma3n_text", _WIDE | _TWO_KINDS | {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}, "Gemma 3n", "soft-cap"),
    Architecture("Phi", "phi", _SMALL, "Phi 1 to 2", "bias"),
    Architecture("Phi-3", "phi3", _GROUPED | _WINDOW, "Phi-3, Phi-4", gguf=_READ),
    Architecture("Phi-MoE", "phimoe", _GROUPED | {"num_local_experts": 4, "lm_head_bias": True}, "Phi-3.5-MoE", "bias"),
    Architecture("Granite", "granite", _GROUPED | {"logits_scaling": 3.0}, "Granite 3", "scale"),
    Architecture("Granite-MoE", "granitemoe", _GROUPED | _LOCAL_EXPERTS | {"logits_scaling": 3.0}, "Granite 3 MoE",
                 "scale"),
    Architecture("Granite 4, hybrid", "granitemoehybrid", _GROUPED | {
        "num_local_experts": 4, "logits_scaling": 3.0, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]}, "Granite 4", "scale",
        _RECURRENT),
    Architecture("Cohere", "cohere", _SMALL | {"logit_scale": 0.25}, "Command R", "scale"),
    Architecture("Cohere 2", "cohere2", _GROUPED | _WINDOW | {"logit_scale": 0.25}, "Command R7B, Command A", "scale"),
    Architecture("OLMo", "olmo", _SMALL, "OLMo"),
    Architecture("OLMo 2", "olmo2", _GROUPED, "OLMo 2"),
    Architecture("OLMo 3", "olmo3", _GROUPED | _TWO_KINDS, "OLMo 3"),
    Architecture("OLMoE", "olmoe", _GROUPED | _EXPERTS, "OLMoE"),
    Architecture("SmolLM3", "smollm3", _GROUPED, "SmolLM3"),
    Architecture("StableLM", "stablelm", _GROUPED, "StableLM 2", gguf=_READ_BY_TESTS),
    Architecture("StarCoder2", "starcoder2", _GROUPED, "StarCoder2", gguf=_READ_BY_TESTS),
    Architecture("Nemotron", "nemotron", _GROUPED, "Nemotron-4, Minitron", gguf=_READ),
    Architecture("GLM", "glm", _WIDE, "GLM-4"),
    Architecture("EXAONE 4", "exaone4", _GROUPED | _TWO_KINDS, "EXAONE 4"),
    Architecture("DeepSeek-V2", "deepseek_v2", _LATENT, "DeepSeek-V2"),
    Architecture("DeepSeek-V3", "deepseek_v3", _LATENT, "DeepSeek-V3, R1"),
    Architecture("gpt-oss", "gpt_oss", _WIDE | _LOCAL_EXPERTS | _WINDOW, "gpt-oss", gguf=_READ),
    Architecture("MiniMax-M2", "minimax_m2", _WIDE | _LOCAL_EXPERTS, "MiniMax-M2", gguf=_READ),
    Architecture("Falcon-H1", "falcon_h1", _GROUPED | {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.5},
        "Falcon-H1", "scale",
        _RECURRENT),
    Architecture("Jamba", "jamba", _GROUPED | {
        "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        "Jamba", refused=_RECURRENT),
    Architecture("LFM2", "lfm2", _GROUPED | {"layer_types": ["conv", "full_attention"]}, "LFM2", refused=_RECURRENT,
        gguf=_READ),
    Architecture("Mamba", "mamba", _MAMBA, "Mamba", refused=_RECURRENT, gguf=_READ),
    Architecture("Mamba 2", "mamba2", _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 1},
                 "Mamba 2, Codestral Mamba", refused=_RECURRENT),
    Architecture("RWKV-4", "rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 512, **_IDS}, "RWKV-4",
                 refused=_WITHOUT_CACHE),
    Architecture("GPT-1", "openai-gpt", _OLD, "OpenAI GPT", refused=_WITHOUT_CACHE),
)  # fmt: skip

_BEGIN, _END = "<!-- written by tools/update_architectures.py -->\n", "<!-- end -->\n"


def page() -> str:
    """The page as it should be: as it is, with a new table between its two marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    return before + _BEGIN + table() + _END + rest.partition(_END)[2]


def table() -> str:
    """What the page says: the counts, which architectures pass everything, what the others are refused, and why."""
    counts = [sum(one.key not in a.refused for a in ARCHITECTURES) for one in COLUMNS]
    count = ", ".join(f"{one.title} {n}" for one, n in zip(COLUMNS, counts, strict=True))
    passing = "; ".join(a.label() for a in ARCHITECTURES if not a.refused)
    refused: dict[str, list[str]] = {}
    for a in ARCHITECTURES:
        if a.refused:
            refused.setdefault(_refusals(a), []).append(a.label())
    rows = [["; ".join(labels), why] for why, labels in refused.items()]
    return (
        f"Of {len(ARCHITECTURES)} architectures, so many pass: {count}.\n\n**These pass everything:** {passing}.\n\n"
        f"**These are refused in part:**\n\n{_rows(['architectures', 'refused'], rows)}\n"
        f"Heads have, beside W, {_grouped('brings')}.\n\n"
        f"GGUF files: tested for {_named(gguf='tested')}; transformers 5.24 has a reader that no test uses for "
        f"{_named(gguf='untried')}; it has none for the others.\n\n"
        f"Trained weights that were run: {_grouped('real')}.\n\n"
        f"{_rows(['column', 'what is tested'], [[one.title, one.meaning] for one in COLUMNS])}\n"
    )


def _refusals(architecture: Architecture) -> str:
    """Why an architecture is refused, and in which columns: those of one reason together."""
    titles = {one.key: one.title for one in COLUMNS}
    reasons: dict[str, list[str]] = {}
    for key, refusal in architecture.refused.items():
        reasons.setdefault(refusal.why, []).append(titles[key])
    return "; ".join(f"{', '.join(found)}: {why}" for why, found in reasons.items())


def _named(**wanted: str) -> str:
    """The names of all architectures with these attributes."""
    named = (a for a in ARCHITECTURES if all(getattr(a, key) == value for key, value in wanted.items()))
    return ", ".join(a.name.replace(",", "") for a in named)


def _grouped(attribute: str) -> str:
    """Each value of an attribute with the names of the architectures that have it."""
    values = dict.fromkeys(getattr(a, attribute) for a in ARCHITECTURES if getattr(a, attribute))
    return "; ".join(f"{value}: {_named(**{attribute: value})}" for value in values)


def _rows(heads: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
