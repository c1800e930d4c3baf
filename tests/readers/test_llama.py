"""GGUF files that llama.cpp runs as they are."""

import gc
import shutil
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import byte_tokenizers
import gguf_files
import pytest
import torch
import transformers as tf

from softmeet import Ensemble, Member, SoftmaxHead
from softmeet.errors import CheckpointError, InvalidInputError
from softmeet.hf.by_size import parameters
from softmeet.members import llama_library
from softmeet.members.gguf_file import fingerprint
from softmeet.members.gguf_head import gguf_head, rounded
from softmeet.members.heads import body_hash
from softmeet.members.reader_model import ReaderModel
from softmeet.readers import llama_costs
from softmeet.readers.llama_context import LlamaContext, LlamaModel, NoRoomError, RowTokens
from softmeet.readers.llama_cpp import LlamaReader
from softmeet.readers.reader import Read, finished
from softmeet.suspended import Control, StoppedError, controllable
from softmeet.testing import check_reader

TEXT = "The king, 12 days later: “é” \n\n and the other so on"
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = {
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=v, **SHAPE)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=v, **SHAPE)),
    "gemma": lambda v: tf.GemmaForCausalLM(tf.GemmaConfig(vocab_size=v, head_dim=32, **SHAPE)),
    "gpt2": lambda v: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=v, n_positions=256, n_embd=64, n_layer=2, n_head=2)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that writes a file of a kind, of so many bits, once; returns (its path, the model)."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}

    def write(kind, bits=32, seed=0):
        if (kind, bits, seed) not in found:
            tokenizer = byte_tokenizers.llama() if kind == "llama" else byte_tokenizers.byte_level()
            torch.manual_seed(seed)
            model = KINDS[kind](len(tokenizer)).eval()
            with torch.no_grad():  # so that logits tell tokens apart
                model.get_output_embeddings().weight.mul_(8)
            path = folder / f"{kind}-{bits}-{seed}.gguf"
            gguf_files.write(path, model, tokenizer, bits=bits, pre="gpt-2")
            found[kind, bits, seed] = str(path), model
        return found[kind, bits, seed]

    return write


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_file_is_read_as_transformers_reads_the_same_weights(kind, made):
    path, model = made(kind)
    reader = LlamaReader(path, own=())
    ids = reader.alphabet.encode(TEXT)
    told = reader.read_whole([ids], [range(1, len(ids) + 1)]).log_probs()
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert (told - expected).abs().max() < 1e-3
    ours = Ensemble.from_pretrained(path, "logit-mean")
    new = ours.model.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    ids = torch.tensor([ids])
    for _ in range(12):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert new.tolist() == ids.tolist()


@pytest.mark.parametrize(("kind", "bits"), [*((kind, 32) for kind in KINDS), ("llama", 8), ("qwen2", 4)])
def test_files_obey_the_laws_of_readers(kind, bits, made):
    check_reader(LlamaReader(made(kind, bits)[0]))


def test_a_file_that_cannot_be_taken_back_obeys_them_too(made, monkeypatch):
    """As of recurrent models, of which the tests write none."""

    class Recurrent(LlamaModel):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.can_crop = False

    monkeypatch.setattr("softmeet.readers.llama_costs.LlamaModel", Recurrent)
    reader = LlamaReader(made("llama")[0])
    assert not reader.traits.can_crop
    check_reader(reader)


def test_layout_and_costs_are_measured_once_on_a_machine(made, monkeypatch, tmp_path):
    path, _ = made("qwen2", 4)
    assert LlamaReader(path).traits.calls == ()  # of so small a file nothing is
    monkeypatch.setattr("softmeet.readers.llama_costs.folder_for", lambda path: tmp_path)
    measured = []
    times = {False: 2.0, True: 1.0}

    def calls(model, lengths):
        measured.append(model)
        return dict.fromkeys(lengths, times[model.repack])

    monkeypatch.setattr(llama_costs, "_calls", calls)
    first = LlamaReader(path)
    assert first._model.repack
    assert first.traits.calls == tuple((k, 1.0) for k in (1, 2, 3, 4, 6, 8, 16, 32))
    assert [model.repack for model in measured] == [False, True, True]
    # Another time they are known, as for the layout that is asked for, and nothing hangs on a clock.
    times[True] = 3.0
    assert LlamaReader(path).traits == first.traits
    assert len(measured) == 3
    Ensemble.from_pretrained([f"{path}+repack=off"], "logit-mean")
    assert [model.repack for model in measured[3:]] == [False]
    # Another processor, other threads and a damaged file have them measured anew.
    for change in ("processor", "threads", "damage"):
        with monkeypatch.context() as other:
            if change == "processor":
                other.setattr(llama_costs, "_processor", lambda: "another")
            elif change == "threads":
                other.setattr(torch, "get_num_threads", lambda: 7)
            else:
                for kept in tmp_path.iterdir():
                    kept.write_bytes(b"no costs")
            assert not LlamaReader(path)._model.repack, change


def test_drafts_by_kept_costs_need_not_be_asked_for(made, monkeypatch):
    ensemble = Ensemble.from_pretrained([made("qwen2", 4)[0], made("qwen2", 8)[0]], "logit-mean")
    text = "And the king said: " * 8
    told = dict.fromkeys(("before", "after"))
    for when in told:
        calls, read = [], LlamaContext.run

        def run(own, pieces, calls=calls, read=read):
            calls.append(len(pieces[0].tokens))
            return read(own, pieces)

        with monkeypatch.context() as noted:
            noted.setattr(LlamaContext, "run", run)
            told[when] = [ensemble.generate(text, max_new_tokens=24, seed=1, temperature=0.01) for _ in range(2)]
        told[when].append(max(calls[-40:]) > 1)
        for reader in ensemble.model.readers_of_members:
            monkeypatch.setattr(reader, "traits", replace(reader.traits, calls=((1, 1.0), (32, 1.2))))
    assert told["before"] == [told["before"][0]] * 2 + [False]
    assert told["after"] == [told["before"][0]] * 2 + [True]


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
@pytest.mark.parametrize(("noise", "is_one"), [(0.05, True), (1.0, False)])
def test_an_output_layer_that_is_stored_beside_the_same_embedding_is_counted_once(noise, is_one, engine, tmp_path):
    """Noise stands for the rounding of a type of its own."""
    tokenizer = byte_tokenizers.byte_level()
    model = KINDS["qwen2"](len(tokenizer))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    torch.manual_seed(0)
    with torch.no_grad():
        head.copy_(embedding + noise * embedding.std() * torch.randn(embedding.shape))
    gguf_files.write(tmp_path / "a.gguf", model, tokenizer, bits=8, pre="gpt-2")
    stored = sum(weight.numel() for weight in model.parameters())
    (found,) = Ensemble.from_pretrained(line := f"{tmp_path / 'a.gguf'}+engine={engine}", "logit-mean").model.members
    assert parameters(line, found) == stored - head.numel() * is_one


def test_more_rows_and_more_tokens_than_there_was_room_for(made):
    """The cache is made anew with what is in it."""
    path, _ = made("llama")
    reader = LlamaReader(path)
    ids = reader.alphabet.encode(TEXT)
    alone = reader.read_whole([ids], [[len(ids)]]).log_probs()
    first = reader.open(reuse=False)
    finished(reader.read([Read(first, ids[:-1], [])]))
    rows = [*(reader.open(reuse=False) for _ in range(100)), *reader.fork(first, 100)]
    new = [ids] * 100 + [ids[-1:]] * 100
    told = finished(reader.read([Read(row, own, [len(own)]) for row, own in zip(rows, new, strict=True)]))
    assert not told.errors
    assert (told.log_probs() - alone).abs().max() < 1e-3


def test_a_text_without_room_fails_alone(made, monkeypatch):
    path, _ = made("llama")
    reader = LlamaReader(path)
    assert reader.limit == 255  # one token is its own, before texts

    def refused(self, rows, cells):
        raise NoRoomError(f"expected memory of {reader.name}, and there is none")

    monkeypatch.setattr(LlamaContext, "grow", refused)
    rows = [reader.open(reuse=False) for _ in range(3)]
    told = finished(reader.read([Read(row, [3] * 200, [200]) for row in rows]))
    assert list(told.errors) == [2]
    assert [row.length for row in rows] == [200, 200, 0]
    reader.close(rows[0])
    assert not finished(reader.read([Read(rows[2], [3] * 200, [200])])).errors


def test_a_cache_grows_as_far_as_there_is_memory_and_a_row_that_fails_is_as_before(made, monkeypatch):
    reader = LlamaReader(made("llama")[0])
    rows = [reader.open(reuse=False) for _ in range(3)]
    finished(reader.read([Read(row, [3] * 165, []) for row in rows]))
    monkeypatch.setattr("softmeet.readers.llama_context._free_memory", lambda: 1000)
    told = finished(reader.read([Read(rows[0], [5] * 50, [0, 50])]))
    assert "MB are free: ask for fewer texts at once" in str(told.errors[0])
    assert rows[0].length == 165
    monkeypatch.undo()
    again = finished(reader.read([Read(rows[0], [5] * 50, [0, 50])]))
    alone = reader.read_whole([[3] * 165 + [5] * 50], [[165, 215]])
    assert (again.log_probs() - alone.log_probs()).abs().max() < 1e-3


def test_memory_that_ends_while_a_cache_grows_is_no_fault_of_the_readers(made, monkeypatch):
    def short(*given):
        raise MemoryError

    context = LlamaContext(LlamaReader(made("llama")[0])._model, 100)
    monkeypatch.setattr("softmeet.readers.llama_context.np.empty", short)
    with pytest.raises(NoRoomError, match="MB to move keys and values of"):
        context.grow(16, 1024)


def test_a_row_that_is_closed_while_it_is_read_harms_no_other(made):
    reader = LlamaReader(made("llama")[0])
    row, other = reader.open(reuse=False), reader.open(reuse=False)
    work = reader.read([Read(row, [3, 4], [2]), Read(other, [3] * 250, range(1, 251))])
    next(work)
    reader.close(other)
    told = finished(work)
    assert list(told.errors) == [1]
    assert (told.log_probs() - reader.read_whole([[3, 4]], [[2]]).log_probs()).abs().max() < 1e-3


def test_a_fork_that_fails_leaves_no_rows(made):
    reader = LlamaReader(made("llama")[0])
    row = reader.open(reuse=False)
    finished(reader.read([Read(row, [3, 4], [])]))
    with pytest.raises(InvalidInputError, match="close one first"):
        reader.fork(row, 300)
    assert len(reader.fork(row, 255)) == 255


def test_a_text_is_not_longer_than_there_are_positions(made):
    path, _ = made("gpt2")
    assert LlamaReader(path, context=200, own=()).limit == 200
    with pytest.raises(InvalidInputError, match=r"at most 256 tokens of .* the positions that it has, got 400"):
        LlamaReader(path, context=400)


def test_a_reader_goes_when_nobody_has_it(made):
    reader = LlamaReader(made("llama")[0])
    gone = weakref.ref(reader)
    gc.disable()
    del reader
    gc.enable()
    assert gone() is None


def test_a_file_that_was_replaced_is_read_anew(made, tmp_path):
    file = tmp_path / "a.gguf"
    shutil.copy(made("llama")[0], file)
    first = Ensemble.from_pretrained(file, "logit-mean")
    shutil.copy(made("llama", 32, 1)[0], tmp_path / "b.gguf")
    (tmp_path / "b.gguf").replace(file)
    second = Ensemble.from_pretrained(file, "logit-mean")
    told = [one.next_token(TEXT).solution.log_probs for one in (first, second)]
    assert (told[0] - told[1]).abs().max() > 0.1


def test_what_was_read_first_is_kept_until_others_need_the_room(made, monkeypatch):
    reader = LlamaReader(made("llama")[0])
    row = reader.open()
    finished(reader.read([Read(row, [3] * 200, [200])]))
    reader.close(row)
    again = reader.open([3] * 200)
    assert again.known == 199
    reader.close(again)
    monkeypatch.setattr(LlamaContext, "grow", None)
    others = [reader.open(reuse=False) for _ in range(2)]
    assert not finished(reader.read([Read(one, [5] * 100, [100]) for one in others])).errors
    assert reader.kept_tokens
    assert not finished(reader.read([Read(one, [5] * 140, [140]) for one in others])).errors
    assert not reader.kept_tokens


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_head_that_a_rule_reads_makes_the_librarys_logits(bits, made):
    path, _ = made("qwen2", bits)
    other, _ = made("qwen2", bits, seed=1)
    ensemble = Ensemble.from_pretrained([path, other], "meet", trust=1.0)
    read = [model.reader.read_whole([[3, 4, 5]], [[1, 2, 3]]) for model in ensemble.model.members]
    for told, head in zip(read, ensemble.model.member_heads, strict=True):
        assert (head.logits(told.hidden()) - told.logits()).abs().max() < 1e-3
    solution = ensemble.next_token(TEXT).solution
    assert solution.rule.startswith("meet")
    # Hidden states that are not rounded as the library rounds them would be further off.
    if bits < 32:
        head, kind = gguf_head(LlamaReader(path).file, "it")
        hidden = torch.randn(4, head.d)
        apart = head.logits(hidden) - head.logits(torch.from_numpy(rounded(hidden.numpy(), kind)))
        assert apart.abs().max() > 1e-2


@pytest.mark.parametrize("said", [{"logit_scale": "x"}, {"logit_scale": [1]}, {"final_logit_softcapping": "x"}])
def test_what_scales_logits_has_to_be_a_number(said, made):
    file = LlamaReader(made("qwen2")[0]).file
    broken = replace(file, said={**file.said, **{f"qwen2.{key}": value for key, value in said.items()}})
    with pytest.raises(CheckpointError, match="expected numbers"):
        gguf_head(broken, "it")


def test_a_file_is_known_by_what_it_holds_and_not_by_its_name(made, tmp_path, monkeypatch):
    found = {}
    for folder, kind in (("one", "qwen2"), ("other", "llama")):
        (tmp_path / folder).mkdir()
        shutil.copy(made(kind)[0], tmp_path / folder / "m.gguf")
        monkeypatch.chdir(tmp_path / folder)
        for name in ("m.gguf", str(tmp_path / folder / "m.gguf")):
            found[folder, name == "m.gguf"] = body_hash(Ensemble.from_pretrained([name], "logit-mean").model.members[0])
    assert found["one", True] == found["one", False] != found["other", True] == found["other", False]


def test_a_head_is_read_where_a_rule_that_reads_it_is_named_alone(made):
    path, _ = made("qwen2")
    ensemble = Ensemble.from_pretrained([path, path + "+name=again"])
    assert ensemble.model.config.rule == "logit-mean"
    assert not any(isinstance(head, SoftmaxHead) for head in ensemble.model.member_heads)


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        ("+engine=onnx", "expected the engine transformers, llama.cpp or vllm"),
        ("+engine=llama.cpp+dtype=bfloat16", "got +dtype"),
        ("+context=0", "expected a number up to 2,147,483,647 behind .* got +context=0"),
        ("+context=many", "got +context=many"),
        ("+gpu_layers=-1", "got +gpu_layers=-1"),
        ("+gpu_layers=99999999999", "got +gpu_layers=99999999999"),
        ("+repack=yes", "got 'yes'"),
        ("+context=2147483648", "got +context=2147483648"),
        (f"+context={'9' * 5000}", "got +context=999"),  # more digits than Python reads
        ("+context=100+engine=transformers", "expected +context of a GGUF file that llama.cpp runs alone"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(behind, said, made, monkeypatch):
    monkeypatch.setattr("softmeet.readers.llama_context.LlamaModel", None)
    path, _ = made("llama")
    with pytest.raises(InvalidInputError, match=said.replace("+", r"\+")):
        Ensemble.from_pretrained([path + behind])


def test_engines_are_for_gguf_files_and_a_folder_may_be_called_as_one(tmp_path):
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"dir\.gguf: it has no config\.json"):
        Ensemble.from_pretrained([tmp_path / "dir.gguf"])
    for behind, said in (
        ("engine=llama.cpp", "a GGUF file .* got wide/gpt2, which is none"),
        ("hash=12ab", ".hash of"),
    ):
        with pytest.raises(InvalidInputError, match=f"expected {said}"):
            Ensemble.from_pretrained([f"wide/gpt2+{behind}"])


def test_a_context_that_was_asked_for_is_the_limit(made):
    path, _ = made("llama")
    ensemble = Ensemble.from_pretrained(f"{path}+context=40", "logit-mean")
    assert ensemble.model.window == 40
    with pytest.raises(InvalidInputError, match="40"):
        ensemble.generate("the " * 40)


@pytest.mark.parametrize(
    ("how", "native"),
    [({}, True), ({"dtype": "float32"}, False), ({"device": "cpu"}, True), ({"engine": "transformers"}, False)],
)
def test_who_runs_a_file(how, native, made):
    path, _ = made("llama")
    member = Member(path, engine=how.pop("engine", None))
    (model,) = Ensemble.from_pretrained(member, "logit-mean", **how).model.members
    assert isinstance(model, ReaderModel) == native


def test_without_the_library_files_are_dequantised_and_it_is_said_how_not_to(made, monkeypatch, caplog):
    monkeypatch.setattr("softmeet.members.llama_library.BINDINGS", ("no_such_package",))
    path, _ = made("llama")
    (model,) = Ensemble.from_pretrained(path, "logit-mean").model.members
    assert not isinstance(model, ReaderModel)
    assert "to run it as it is" in caplog.text
    llama_library.library.cache_clear()
    with pytest.raises(CheckpointError, match=r"need llama.cpp: .*gguf.*; or put"):
        Ensemble.from_pretrained(f"{path}+engine=llama.cpp", "logit-mean")


def test_a_saved_ensemble_names_the_engine_and_one_that_names_none_is_transformers(made, tmp_path):
    path, _ = made("llama")
    Ensemble.from_pretrained(path, "logit-mean").save_pretrained(tmp_path / "saved")
    (model,) = Ensemble.from_pretrained(tmp_path / "saved").model.members
    assert isinstance(model, ReaderModel)
    config = tmp_path / "saved" / "config.json"
    assert f"+hash={fingerprint(Path(path))}" in config.read_text()
    config.write_text(config.read_text().replace("+engine=llama.cpp", ""))
    (model,) = Ensemble.from_pretrained(tmp_path / "saved").model.members
    assert not isinstance(model, ReaderModel)


def test_a_saved_ensemble_refuses_another_file(made, tmp_path):
    file = tmp_path / "a.gguf"
    shutil.copy(made("llama")[0], file)
    Ensemble.from_pretrained(file, "logit-mean").save_pretrained(tmp_path / "saved")
    file.unlink()
    shutil.copy(made("llama", 32, 1)[0], file)
    with pytest.raises(CheckpointError, match=r"it is another file than the one that was saved"):
        Ensemble.from_pretrained(tmp_path / "saved")


def test_files_are_combined_over_bytes(made):
    """Covers are forks; one that is native and one that transformers runs, of other tokenizers."""
    llama, qwen = made("llama")[0], made("qwen2")[0]
    found = [
        Ensemble.from_pretrained([llama + one, qwen + other], "logit-mean", vocabulary="bytes", prune=0.001)
        for one, other in (
            ("+engine=llama.cpp", "+engine=llama.cpp"), ("+engine=llama.cpp", "+engine=transformers"),
            ("+engine=transformers", "+engine=transformers"),
        )
    ]  # fmt: skip
    made_ = [one.generate("the other", max_bytes=20, do_sample=False) for one in found]
    assert made_[0] == made_[1] == made_[2]
    told = [one.next_token("the th").solution.log_probs for one in found]
    for own in told[1:]:
        assert (own - told[0]).abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@torch.inference_mode()
def test_a_call_that_was_stopped_leaves_nothing(kind, made):
    reader = LlamaReader(made(kind)[0], own=())
    row, fresh = reader.open(), reader.open(reuse=False)
    finished(reader.read([Read(row, [1, 2, 3], [])]))
    cells, control = reader._cells, Control()
    control.stop()
    with control.over(), pytest.raises(StoppedError):  # by llama.cpp itself, which looks before its first step
        cells.run([RowTokens(row.number, 3, [4] * 40, [39])])
    # One that was left without a word, as by Ctrl-C where none is awaited.
    cells.run([RowTokens(row.number, 3, [4] * 40, [39])])
    row.unsure = True
    for one in (row, fresh):
        told = finished(reader.read([Read(one, [5, 6] if one is row else [1, 2, 3, 5, 6], [2 if one is row else 5])]))
        assert told.errors == {}
        found = told.log_probs() if one is row else found - told.log_probs()
    assert found.abs().max() < 1e-5


@torch.inference_mode()
def test_a_text_that_was_stopped_leaves_nothing(made):
    ensemble = Ensemble.from_pretrained([made("llama")[0], made("llama", seed=1)[0]], "logit-mean")
    readers = [model.reader for model in ensemble.model.members]
    greedy = {"max_new_tokens": 8, "do_sample": False}
    wanted, heard = ensemble.generate("a king", **greedy), []
    opened = [len(reader._rows) for reader in readers]
    control = Control(lambda done, total: (heard.append((done, total)), control.stop() if done else None))
    for reader in readers:
        reader._model._most = 16
    with control.over(), pytest.raises(StoppedError):
        "".join(ensemble.stream("ab" * 60, **greedy))
    total = heard[0][1]
    assert heard == [(0, total), (32, total)]
    assert ensemble.generate("a king", **greedy) == wanted
    assert [len(reader._rows) for reader in readers] == opened


def test_ctrl_c_is_awaited_where_a_call_is_long(made, interruptible, monkeypatch):
    reader, threads = LlamaReader(made("llama")[0], own=()), []

    def decode(self):
        threads.append(threading.current_thread())
        if len(threads) > 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            while not controllable()[0].stopped:
                time.sleep(0.01)
        return true(self)

    true = LlamaContext._decode
    monkeypatch.setattr(LlamaContext, "_decode", decode)
    row = reader.open()
    finished(reader.read([Read(row, [1], [1])]))
    with pytest.raises(KeyboardInterrupt):
        finished(reader.read([Read(row, [2] * 40, [40])]))
    assert threads[0] is threading.main_thread() is not threads[1]
    assert row.length == 1
