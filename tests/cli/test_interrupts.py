"""Ctrl-C at random moments of a chat in a terminal: the next line can be typed at once, and nothing is left of it."""

import os
import random
import select
import sys
import time

import byte_tokenizers
import gguf_files
import pytest
import torch
import transformers as tf

pty = pytest.importorskip("pty", reason="there are no terminals like these on Windows")
PROMPT, QUESTION = b"\x1b[0m>\x08\x1b[2C\x1b[?7h\x1b[0m\x1b[?12l\x1b[?25h", b"And the king said\n"
TERM = {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
LONG = b"In the year of the flood many people went to the hills with all they had. " * 100


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of models that take a second or more to read LONG."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), byte_tokenizers.byte_level()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 16384}
    for seed in range(2):
        torch.manual_seed(seed)
        config = tf.Qwen2Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **shape)
        gguf_files.write(folder / f"{seed}.gguf", tf.Qwen2ForCausalLM(config).eval(), tokenizer, pre="gpt-2")
    return [str(folder / f"{seed}.gguf") for seed in range(2)]


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *arguments):
        self._process, self._end = pty.fork()
        if not self._process:
            program = [sys.executable, "-m", "softmeet", "chat", *arguments]
            os.execve(sys.executable, program, {**os.environ, **TERM})
        self._shown = b""

    def read(self, seconds):
        """Read what is shown in so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._end], [], [], left)[0]:
                self._shown += os.read(self._end, 65536)

    def type(self, keys):
        """Type keys, as fast as they are taken."""
        for k in range(0, len(keys), 1000):
            os.write(self._end, keys[k : k + 1000])
            self.read(0.002)

    def prompt(self, seconds, said=b""):
        """Wait until something is said and a line can be typed; return what was shown, None if that does not come."""
        end = time.monotonic() + seconds
        while not (said in self._shown and self._shown.endswith(PROMPT)):
            if time.monotonic() > end:
                return None
            self.read(0.02)
        shown, self._shown = self._shown, b""
        return shown

    def is_back(self, k):
        """Whether what is typed after Ctrl-C is obeyed; a terminal that takes a paste may lose what comes at once."""
        marks = (b"/mark%c%c" % (97 + k % 26, 97 + again) for again in range(10))
        return any(self.type(mark + b"\n") or self.prompt(3, b"there is no " + mark) for mark in marks)

    def ended(self):
        """Return the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])


def answer(terminal):
    """What a new conversation answers to the question."""
    terminal.type(b"/clear\n")
    assert terminal.prompt(60, b"forgotten")
    terminal.type(QUESTION)
    return terminal.prompt(120).rpartition(b"\x1b[?2004l")[2]  # what the prompt shows ends there


@pytest.mark.slow
def test_a_hundred_times_at_random_moments(files):
    terminal = Terminal(*files, "--max-new-tokens", "60", "--temperature", "0")
    assert terminal.prompt(120)
    wanted, at_random, late = answer(terminal), random.Random(0), []
    terminal.type(QUESTION + b"\x1b[200~the end of this paste is what Ctrl-C has a terminal forget")
    terminal.read(0.2)
    terminal.type(b"\x03")
    assert terminal.is_back(0)
    for k in range(100):
        if at_random.random() < 0.7:
            terminal.type(b"\x1b[200~" + LONG + b"\x1b[201~\n")
        else:
            terminal.type(QUESTION)
        terminal.read(at_random.uniform(0, 0.7))
        terminal.type(b"\x03" * at_random.choice([1, 1, 2, 3]))
        begun = time.monotonic()
        assert terminal.is_back(k), terminal._shown[-2000:]
        late.append(time.monotonic() - begun)
        if k % 10 == 9:
            assert answer(terminal) == wanted != b""
    assert sorted(late)[90] < 5
    terminal.type(b"exit\n")
    assert terminal.ended() == 0
