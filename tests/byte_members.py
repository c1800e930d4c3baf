"""Tiny members over bytes, in memory and saved, and the probabilities of texts by sums over all tokenizations."""

from __future__ import annotations

import byte_tokenizers
import torch
import transformers as tf

from softmeet import Ensemble
from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.covers import Pruning
from softmeet.readers.bytes.next_tokens import END

EXACT = Pruning(0.0, None)
# Words that merge, a space before and none, a character of several bytes, a byte that is no UTF-8, an NFC composition.
TEXTS = (b" the t", b"the\n\ne", "h\u00e9".encode(), b"t\xffhe", "e\u0301r".encode())
HOSTILE = (
    b"", " \u05e9\u05dc\u05d5\u05dd \U0001f642\u200d\u2642".encode(), b"\x00\x04t\x00", b"\xf0\x9f",
    b"<|endoftext|>the</s>", b" " * 70 + b"the", b"a" * 10_000,
)  # fmt: skip


def model_of(tokenizer, seed=0, scale=6.0):
    """A random model whose logits spread."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = tf.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=10_050,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = tf.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def member_of(kind, pruning=EXACT, seed=0):
    tokenizer = byte_tokenizers.KINDS[kind]()
    return ByteMember(model_of(tokenizer, seed), spelling_of(kind, tokenizer), pruning)


def step_by_step(member, text):
    """The log-probability of a text and its end, byte by byte."""
    (reading, total) = member.begin(b""), 0.0
    for byte in text:
        total += member.log_probs([reading])[0, byte].item()
        (reading,) = member.advance([reading], [byte])
    return total + member.log_probs([reading])[0, END].item()


def at_once(member, text):
    _, log_probs, _ = member.score(text)
    return sum(log_probs[k, byte] for k, byte in enumerate(text)) + log_probs[len(text), END]


def tilings(words, text):
    if not text:
        yield []
    for length in range(1, len(text) + 1):
        for token in words.get(text[:length], ()):
            for rest in tilings(words, text[length:]):
                yield [token, *rest]


def summed(member, text, *, end):
    """The log-probability of a text by the sum over every one of its tokenizations, each run by itself."""
    spelling, words = member.spelling, {}
    for token, word in zip(spelling.tokens.tolist(), spelling.words, strict=True):
        words.setdefault(word, []).append(token)
    allowed = torch.full((member.model.config.vocab_size,), -torch.inf, dtype=torch.float64)
    allowed[[*spelling.tokens.tolist(), *member.ends]] = 0
    every = list(tilings(words, text))
    totals = []
    for tokens in every:
        with torch.inference_mode():
            logits = member.model(torch.tensor([[*member.prefix, *tokens]])).logits[0] + allowed
        log_p = logits.log_softmax(-1)[len(member.prefix) - 1 :]
        own = sum(log_p[k, token].item() for k, token in enumerate(tokens))
        totals.append(own + (log_p[-1, member.ends].logsumexp(-1).item() if end else 0.0))
    return torch.tensor(totals, dtype=torch.float64).logsumexp(0).item()


def exhaustive(member, text):
    """The log-probability of a text and its end by all tokenizations; given the space that is put before every text."""
    expected = summed(member, member.spelling.dummy + text, end=True)
    if member.spelling.dummy:
        # Of all texts, those that begin with the space: all that the first token can be.
        with torch.inference_mode():
            logits = member.model(torch.tensor([member.prefix])).logits[0, -1]
        ids = [*member.spelling.tokens.tolist(), *member.ends]
        spaced = [k for k, word in zip(*member_words(member), strict=True) if word.startswith(b" ")]
        expected -= (logits[spaced].logsumexp(-1) - logits[ids].logsumexp(-1)).item()
    return expected


def member_words(member):
    return member.spelling.tokens.tolist(), member.spelling.words


def save(folder, kind, seed):
    """Write a member with a tokenizer of its own, of a kind or as given."""
    tokenizer = byte_tokenizers.KINDS[kind]() if isinstance(kind, str) else kind
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if kind == "gpt2":
        config = tf.GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, **ids)
        model = tf.GPT2LMHeadModel(config)
    else:
        config = tf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=128, **ids,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_two(folder):
    """Folders of two members with different tokenizers."""
    return [save(folder / kind, kind, seed) for seed, kind in enumerate(("gpt2", "llama"))]


def unpruned(folders):
    """All tokenizations followed, of which short texts have few: to untrained members they make all the difference."""
    even = [1] * len(folders)
    return Ensemble.from_pretrained(folders, vocabulary="bytes", prune=0.0, dtype=torch.float64, weights=even)
