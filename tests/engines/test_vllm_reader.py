"""The reader of a member that vLLM runs, by a stub of vLLM that runs batches as it does: late, and all at once."""

import asyncio
import random
import sys
import threading
import time
from multiprocessing import Pipe
from types import ModuleType, SimpleNamespace

import pytest
import torch
from softmeet_vllm.reader import VllmReader, vllm_reader

from softmeet import Ensemble
from softmeet.errors import CheckpointError, InvalidInputError, ReaderError
from softmeet.members import zoo
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader

OWN, V = "wide/gpt2", 4096


def told(tokens):
    """Some logits, which are those of a text and of no other one."""
    return torch.randn(V, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % (1 << 60)))


class Engine:
    """An engine that takes its time to begin and to end texts, and goes on with all that it has at once."""

    def __init__(self, seed, late):
        self.model_config = SimpleNamespace(
            tokenizer=str(zoo.locate(OWN)), dtype=torch.float32, max_model_len=48, get_vocab_size=lambda: V,
            try_get_generation_config=dict,
        )  # fmt: skip
        self.errored, self.coming, self.over, self.running = False, {}, set(), {}
        self.steps = self.begun = 0
        self.reader, self.processor = Pipe()
        self._draw, self._late = random.Random(seed), late
        threading.Thread(target=self._run, daemon=True).start()

    async def generate(self, prompt, params, name):
        if params["extra_args"]["step_of_softmeet"] != int(name) or self.errored:
            raise RuntimeError("no such request")
        self.coming[int(name)] = list(prompt["prompt_token_ids"])
        while int(name) not in self.over:
            await asyncio.sleep(0.01)
        yield None

    async def abort(self, names):
        self.over |= {int(name) for name in names}

    def shutdown(self):
        self.errored = True

    def _run(self):
        while not self.errored:
            for number in [number for number in self.coming if self._draw.random() >= self._late]:
                self.running[number] = self.coming.pop(number)
                self.begun += 1
            # A text that is to end may be run once more.
            for number in [
                number for number in self.running if number in self.over and self._draw.random() >= self._late
            ]:
                del self.running[number]
            if not self.running:
                time.sleep(0.001)
                continue
            numbers = self._draw.sample(sorted(self.running), len(self.running))
            try:
                self.processor.send(numbers)
                self.processor.send_bytes(torch.stack([told(self.running[n]) for n in numbers]).numpy().tobytes())
                taken = self.processor.recv()
            except (EOFError, OSError):
                return
            for number, token in zip(numbers, taken, strict=True):
                self.running[number].append(token)
            self.steps += 1


@pytest.fixture
def vllm(monkeypatch):
    """A stub of the modules of vLLM that the reader imports."""
    names = ("vllm", "vllm.inputs", "vllm.sampling_params", "vllm.v1", "vllm.v1.sample")
    for name in (*names, "vllm.v1.sample.logits_processor", "vllm.v1.sample.logits_processor.builtin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].SamplingParams = sys.modules["vllm.inputs"].TokensPrompt = dict
    sys.modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY=None)
    step = sys.modules["vllm.v1.sample.logits_processor"]
    step.LogitsProcessor, step.BatchUpdate = type("V1", (), {}), None
    sys.modules["vllm.v1.sample.logits_processor.builtin"].process_dict_updates = None
    sys.modules.pop("softmeet_vllm.step", None)
    yield
    sys.modules.pop("softmeet_vllm.step", None)


@pytest.fixture
def started(vllm, monkeypatch):
    """A function that returns a reader with its engine, of a seed and of how often that is late."""

    def start(seed=0, late=0.3):
        engine = Engine(seed, late)
        monkeypatch.setattr(VllmReader, "_started", lambda self, *_: (engine, engine.reader))
        found = VllmReader(OWN)
        made.append(found)
        return found, engine

    made = []
    yield start
    for one in made:
        one.shut_down()


@pytest.mark.parametrize("seed", range(3))
def test_it_obeys_a_readers_laws(started, seed):
    check_reader(started(seed)[0])


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_come_go_on_wait_and_end(started, seed):
    reader, _ = started(seed)
    draw, rows = random.Random(seed), {}
    for _ in range(40):
        if len(rows) < 6 and draw.random() < 0.5:
            rows[reader.open()] = []
        for row in [row for row in rows if draw.random() < 0.1]:
            reader.close(row)
            del rows[row]
        some = [row for row in rows if draw.random() < 0.8 and len(rows[row]) < 40]
        # Texts may be alike, and one may be told twice.
        new = [[draw.randrange(2)] if rows[row] and draw.random() < 0.8 else [7, draw.randrange(2)] for row in some]
        new = [[] if rows[row] and draw.random() < 0.2 else ids for row, ids in zip(some, new, strict=True)]
        found = finished(reader.read([Read(row, ids, [len(ids)]) for row, ids in zip(some, new, strict=True)]))
        for k, (row, ids) in enumerate(zip(some, new, strict=True)):
            rows[row] += ids
            assert torch.equal(found.logits()[k], told(rows[row])), rows[row]


def test_texts_that_go_on_together_stay_in_the_batch(started):
    reader, engine = started(late=0)
    rows = [reader.open() for _ in range(4)]
    finished(reader.read([Read(row, [k, 5], [2]) for k, row in enumerate(rows)]))
    finished(reader.read([Read(row, [6], [1]) for row in rows]))
    begun, steps = engine.begun, engine.steps
    for token in range(20):
        finished(reader.read([Read(row, [token], [1]) for row in rows]))
    finished(reader.read([Read(row, [], [0]) for row in rows]))  # which is known
    assert (engine.begun, engine.steps) == (begun, steps + 20)
    for row in rows:
        reader.close(row)
    deadline = time.monotonic() + 10
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.running, "vLLM stands still though nobody reads"


def test_an_engine_that_ends_fails_its_texts(started):
    reader, engine = started()
    engine.shutdown()
    with pytest.raises(ReaderError, match=f"{OWN} failed in vLLM"):
        reader.read_whole([[1, 2]], [[2]])


def test_what_cannot_be_is_refused(started, monkeypatch):
    reader, _ = started()
    with pytest.raises(InvalidInputError, match="expected a token to predict from"):
        reader.read_whole([[]], [[0]])
    with pytest.raises(InvalidInputError, match="expected a number of tokens above 1 as"):
        vllm_reader("x", context="many")
    monkeypatch.setattr("softmeet.members.registered._installed", dict)
    with pytest.raises(CheckpointError, match="vLLM does not run here: install softmeet-vllm"):
        Ensemble.from_pretrained(f"{OWN}+engine=vllm")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="vLLM is not installed beside softmeet-vllm"):
        vllm_reader("x")
