"""GGUF files as they are before anything of llama.cpp sees them, and their tokenizers."""

import errno
import gc
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import byte_tokenizers
import gguf
import pytest
from gguf_files import written
from huggingface_hub import cached_assets_path
from hypothesis import given
from hypothesis import strategies as st

from softmeet import Ensemble
from softmeet.derived import derived
from softmeet.errors import CheckpointError, SoftmeetError
from softmeet.hf.chat import PLAIN
from softmeet.members import gguf_tokenizer
from softmeet.members.gguf_file import GgufFile, begins_as_gguf, fingerprint, read_gguf
from softmeet.members.gguf_tokenizer import known_file
from softmeet.members.member import Member
from softmeet.members.reader_model import ReaderModel
from softmeet.members.spelling import spelling_of
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.llama_context import LlamaModel
from softmeet.startup import few_spins

# Tokenizers by what is said of how they split texts, which llama.cpp knows.
TOKENIZERS = {
    "gpt-2": byte_tokenizers.byte_level, "llama-bpe": byte_tokenizers.byte_level, "qwen2": byte_tokenizers.byte_level,
    "llama": byte_tokenizers.llama, "llama without a space before": lambda: byte_tokenizers.llama(dummy=False),
}  # fmt: skip
HOSTILE = [
    "the king", " the  there   ", "\n\n\n", "\t\r\n x", "12345 6 789", "they'll THEY'LL I'm", "é日本🙂", "a\u200bb",
    "<|endoftext|>", "</s>", "(the)[er]{he}", "\u00a0the\u3000er", "don't", "1.5e-3", "x" * 50, "  \n  the",
]  # fmt: skip


def changed(raw, name, kind):
    """A file in which a tensor is said to be of another type."""
    (one,) = (own for own in gguf.GGUFReader(raw).tensors if own.name == name)
    raw, said = raw.read_bytes(), _text(name)
    at = raw.index(said) + len(said) + 4 + 8 * len(one.shape)
    return raw[:at] + kind.to_bytes(4, "little") + raw[at + 4 :]


def _text(word):
    """A text as files have it."""
    return len(word).to_bytes(8, "little") + word.encode()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / "a.gguf", byte_tokenizers.byte_level())


def test_what_a_file_says_is_what_the_package_of_ggml_reads(file):
    found, theirs = read_gguf(file), gguf.GGUFReader(file)
    own = {name: (one.start, one.size) for name, one in found.tensors.items()}
    assert own == {one.name: (one.data_offset, one.n_bytes) for one in theirs.tensors}
    assert found.said["tokenizer.ggml.tokens"] == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert (found.context, found.is_quantised, found.size) == (64, True, file.stat().st_size)
    assert found.bytes_a_token == 2 * 2 * 16  # keys and values of one layer and one head
    assert "tokenizer.ggml.tokens" in found.said


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.999])
def test_a_file_that_ends_early_is_refused_in_a_sentence(share, file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cannot load .*cut\.gguf: .*fetch it again"):
        read_gguf(cut)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_is_changed_ends_in_an_error_of_softmeets(file, tmp_path_factory, changes):
    begins = min(one.start for one in read_gguf(file).tensors.values())
    whole, other = bytearray(file.read_bytes()), tmp_path_factory.getbasetemp() / "other.gguf"
    for place, byte in changes:
        whole[place % begins] = byte
    other.write_bytes(whole)
    try:
        known_file(other, "other")
    except SoftmeetError as error:
        assert "other" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: b"GGML" + raw[4:], "magic invalid"),
        (lambda raw: raw[:4] + b"\x01" + raw[5:], "version 1"),
        (lambda raw: raw[:4] + b"\x00\x00\x00\x03" + raw[8:], "broken, or ends early"),
        (lambda raw: raw.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "duplicated tensor"),
    ],
    ids=["magic", "version", "byte order", "tensors"],
)  # fmt: skip
def test_broken_beginnings(change, said, file, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=said):
        read_gguf(broken)


def test_what_llama_cpp_would_end_the_process_for_is_refused(file, tmp_path):
    raw, broken = file.read_bytes(), tmp_path / "broken.gguf"
    at = raw.index(b".block_count") + len(b".block_count") + 4
    for layers in (0, 513):
        broken.write_bytes(raw[:at] + layers.to_bytes(4, "little") + raw[at + 4 :])
        with pytest.raises(CheckpointError, match=f"says that it has {layers} layers"):
            read_gguf(broken)
    broken.write_bytes(raw.replace(_text("er"), _text("he")))
    # To llama.cpp a text ends at a zero.
    for word, other in (("er", "he"), ("the", "he\0")):
        broken.write_bytes(raw.replace(_text(word), _text(other)))
        with pytest.raises(CheckpointError, match="two of its tokens have the same text"):
            read_gguf(broken)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"expert_count": 8}, "uses 0 of 8 experts"),
        ({"expert_used_count": 1}, "uses 1 of 0 experts"),
        ({"expert_count": 8, "expert_used_count": [2, 9]}, "uses 9 of 8 experts"),
        ({"expert_count": 1025, "expert_used_count": 2}, "uses 2 of 1,025 experts"),
        ({"nextn_predict_layers": 2}, "2 of its 1 layers predict further tokens"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1"),
        ({"rope.scaling.type": "xx"}, "rope.scaling.type is 'xx': expected none, linear"),
    ],
)
def test_numbers_that_llama_cpp_would_end_the_process_for_are_refused(said, why, tmp_path):
    own = {f"llama.{key}": value for key, value in said.items()}
    path = written(tmp_path / "a.gguf", byte_tokenizers.byte_level(), said=own)
    with pytest.raises(CheckpointError, match=why):
        read_gguf(path)


def test_weights_that_llama_cpp_cannot_map_are_refused(tmp_path):
    """It takes any alignment with which the first tensor begins at a multiple of 32 bytes."""
    found = []
    for pad in range(0, 32, 8):
        said = {"general.alignment": 8, "x.pad": "p" * pad}
        path = written(tmp_path / f"{pad}.gguf", byte_tokenizers.byte_level(), said=said)
        try:
            found.append(LlamaModel(read_gguf(path), "it").v)
        except CheckpointError as error:
            found.append("do not begin at a multiple of 32 bytes" in str(error))
    assert sorted(found) == [True, True, True, len(byte_tokenizers.byte_level())]


@pytest.mark.parametrize(
    ("name", "kind"), [("output_norm.weight", 26), ("output_norm.weight", 1), ("blk.0.attn_q.weight", 24)]
)
def test_types_of_weights_that_llama_cpp_would_end_the_process_for_are_refused(name, kind, file, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(changed(file, name, kind))
    with pytest.raises(CheckpointError, match=f"cannot compute with its {name}, which is stored as type {kind}"):
        LlamaModel(read_gguf(broken), "it")


def test_what_is_no_regular_file_is_not_waited_for(file, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)  # so that a reader finds what would pass for a GGUF file
    os.write(held, b"GGUF")
    assert begins_as_gguf(file)
    assert not begins_as_gguf(fifo)
    for read in (read_gguf, fingerprint):
        with pytest.raises(CheckpointError, match="it is no regular file"):
            read(fifo)
    with pytest.raises(CheckpointError, match="it is a file: expected a"):
        Ensemble.from_pretrained([fifo])
    os.close(held)


@pytest.mark.parametrize(
    ("said", "wide"),
    [
        ({}, 2 * 2 * 16), ({"attention.head_count": "x"}, 0), ({"attention.head_count": [0]}, 0),
        ({"attention.head_count": ["x"], "attention.key_length": 8, "attention.value_length": 8}, 32),
        ({"attention.key_length": "x"}, 2 * 2 * 16), ({"attention.head_count_kv": [0, 1]}, 2 * 2 * 16),
        ({"attention.head_count_kv": "x"}, 0), ({"block_count": "x"}, 0), ({"embedding_length": [1.5]}, 0),
    ],
)  # fmt: skip
def test_bytes_of_a_token_whatever_is_said(said, wide):
    own = {"block_count": 1, "embedding_length": 32, "attention.head_count": 2, "attention.head_count_kv": 1} | said
    said = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in own.items()}
    assert GgufFile(Path("a.gguf"), said, {}, 0).bytes_a_token == wide


def test_a_chat_template_that_is_no_text_is_none(tmp_path):
    path = written(tmp_path / "a.gguf", byte_tokenizers.byte_level(), said={"tokenizer.chat_template": [1, 2]})
    file, tokenizer = known_file(path, "it")
    assert file.template is tokenizer.chat_template is None


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<\uff5cend\u2581of\u2581text\uff5c>"], ids=["Llama 3", "DeepSeek"])
def test_a_vocabulary_without_gpt2s_token_is_as_the_file_has_it(end, tmp_path, monkeypatch):
    """Nothing is behind it; what is found whole in a text is, though no bytes are spelled so."""
    monkeypatch.setattr(byte_tokenizers, "END", end)
    tokenizer = byte_tokenizers.byte_level()
    path = written(tmp_path / "a.gguf", tokenizer, "llama-bpe", said={"tokenizer.chat_template": PLAIN})
    file, found = known_file(path, "it")
    model = LlamaModel(file, "it")
    assert (len(found), found.eos_token_id, found.decode([0])) == (len(tokenizer), 0, end)
    assert found.encode(f"the{end}", add_special_tokens=False) == [*found.encode("the", add_special_tokens=False), 0]
    for text in (*HOSTILE, f"the{end}er"):
        assert found.encode(text, add_special_tokens=False, split_special_tokens=True) == model.tokens(text), text
    told = [{"role": "user", "content": f"the <|endoftext|> {end}"}]
    for line, how in ((f"{path}", "tokens"), (f"{path}+engine=transformers", "tokens"), (f"{path}", "bytes")):
        ensemble = Ensemble.from_pretrained([line] * 2, "logit-mean", vocabulary=how)
        assert isinstance(ensemble.generate(told, max_new_tokens=2, seed=1), str)


def test_a_part_that_is_missing_is_named(tmp_path):
    first = tmp_path / "big-00001-of-00002.gguf"
    out = gguf.GGUFWriter(first, "llama")
    out.add_uint16("split.count", 2)
    out.add_uint16("split.no", 0)
    out.add_block_count(1)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    with pytest.raises(CheckpointError, match=r"in 2 parts, of which big-00002-of-00002\.gguf is missing"):
        read_gguf(first)
    other = tmp_path / "other.gguf"
    other.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="name the first"):
        read_gguf(other)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_files_tokenizer_cuts_texts_as_llama_cpp_does(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    path = written(tmp_path / "a.gguf", tokenizer, kind if "llama w" not in kind and kind != "llama" else None)
    file, found = known_file(path, "it")
    model = LlamaModel(file, "it")
    for text in HOSTILE:
        ours = found.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours == model.tokens(text), text


def test_files_that_say_the_same_of_their_tokenizers_share_them_but_for_templates(tmp_path):
    said = [{"tokenizer.chat_template": text} for text in ("{{ messages }}", "{{ messages[0] }}")]
    tokenizer = byte_tokenizers.byte_level()
    found = [known_file(written(tmp_path / f"{k}.gguf", tokenizer, said=own), "it")[1] for k, own in enumerate(said)]
    assert [own.chat_template for own in found] == ["{{ messages }}", "{{ messages[0] }}"]
    assert found[0].backend_tokenizer is found[1].backend_tokenizer


def test_an_assertion_of_the_library_ends_with_a_sentence(file, tmp_path):
    """The file has two tokens of one text, which softmeet would have refused."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes().replace(_text("er"), _text("he")))
    code = (
        "import sys; from pathlib import Path; from softmeet.members import gguf_file as f\n"
        "f._what_llama_cpp_asserts = lambda file: ()\n"
        "from softmeet.readers.llama_context import LlamaModel\n"
        "LlamaModel(f.read_gguf(Path(sys.argv[1])), 'it')"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(broken)], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGABRT
    assert "softmeet: llama.cpp ends this process, as an assertion of its own failed: " in ended.stderr


@pytest.mark.parametrize(
    ("said", "system", "found"),
    [
        ({}, "linux", ("1000", "active")), ({}, "darwin", (None, None)),
        ({"GOMP_SPINCOUNT": "7"}, "linux", ("7", None)), ({"OMP_WAIT_POLICY": "passive"}, "linux", (None, "passive")),
    ],
)  # fmt: skip
def test_threads_give_way_unless_the_environment_says_how_long_they_wait(said, system, found, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    few_spins()
    assert tuple(map(os.environ.get, names)) == found


def test_what_a_files_loading_derives_is_kept_for_the_next_time(tmp_path, monkeypatch):
    path, kept = written(tmp_path / "a.gguf", byte_tokenizers.byte_level()), tmp_path / "kept"
    monkeypatch.setattr(gguf_tokenizer, "cached_assets_path", partial(cached_assets_path, assets_dir=kept))

    def loaded():
        gc.collect()  # models of this file
        # Other tests' tokenizers, which may be in use, say the same.
        monkeypatch.setattr("softmeet.members.gguf_tokenizer._made", WeakValueDictionary())
        model = ReaderModel(Member(str(path)))
        spelling = spelling_of("it", model.reader.alphabet.tokenizer)
        cut = [spelling.encode(text.encode()) for text in HOSTILE]
        return ByteMember(model, spelling).spelling.typical.tolist(), cut

    plain = loaded()
    assert not kept.exists()  # of small files nothing is kept
    monkeypatch.setattr(gguf_tokenizer, "_SMALL", 0)
    assert loaded() == plain
    with monkeypatch.context() as patched:
        patched.setattr("softmeet.members.gguf_tokenizer.convert_gguf_tokenizer", None)
        patched.setattr("softmeet.readers.bytes.typical.typical", None)
        patched.setattr("softmeet.members.spelling._words", None)
        assert loaded() == plain
    files = [file for file in kept.rglob("*") if file.is_file()]
    assert len(files) == 4
    for damaged in (lambda raw: raw[:100], lambda raw: raw[: len(raw) // 2] + b"\xff" + raw[len(raw) // 2 + 1 :]):
        for file in files:
            file.write_bytes(damaged(file.read_bytes()))
        assert loaded() == plain
    os.utime(path, ns=(0, 0))
    assert loaded() == plain
    assert len(list(kept.rglob("tokenizer.json"))) == 2


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self, given):
        with self.open("wb") as held:
            held.write(given[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert derived(tmp_path, "it", lambda: "found", str.encode, bytes.decode) == "found"
    assert not list(tmp_path.iterdir())
