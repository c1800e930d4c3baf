"""The command line as a user meets it: by exit code, stdout and stderr; once in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import byte_tokenizers
import gguf_files
import pytest
import transformers
from commands import process, run
from ensembles import Asking

import softmeet
from softmeet import Ensemble
from softmeet.__main__ import main as started
from softmeet.errors import CheckpointError
from softmeet.rules import registry
from softmeet.suspended import note_interrupts


def test_a_prompt_streams_and_is_summed_up(members):
    done = run("generate", "hello", *members, "--seed", 1, "--max-new-tokens", 6, "--summary")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "rule: meet" in done.stderr
    assert "head passes a token" in done.stderr
    again = run("generate", "-", *members, "--seed", 1, "--max-new-tokens", 6, stdin="hello\n")
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def test_json_from_several_prompts_and_a_file(members, tmp_path):
    (tmp_path / "prompt.txt").write_text("abc")
    done = run(
        "generate", "hello", "world", "-f", tmp_path / "prompt.txt", *members, "--json", "--max-new-tokens", 4,
        "--rule", "prob-mean", "--weights", "0.25,0.75", "--temperature", "0.7", "--top-p", "0.9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [c["prompt"] for c in found["completions"]] == ["abc", "hello", "world"]
    assert [m["weight"] for m in found["members"]] == [0.25, 0.75]
    assert found["rule"] == "prob-mean"
    assert found["head_passes_per_token"] == 0


def test_reproducible_prompts_are_continued_as_alone(members):
    how = ("--reproducible", "--max-new-tokens", 5, *members)
    together = run("generate", "hello", "the world", *how, "--seed", 3, "--json")
    assert together.returncode == 0, together.stderr
    for made in json.loads(together.stdout)["completions"]:
        assert run("generate", made["prompt"], *how, "--seed", 3).stdout == made["text"] + "\n"
    assert run("generate", "a", *how).stderr.startswith("error: --reproducible needs --seed N, or --no-do-sample")
    assert run("generate", "a", *how, "--temperature", 0).returncode == 0
    late = run("generate", "a", *how, "--seed", 3, "--token-seconds", 1)
    assert late.stderr.startswith("error: leave out --token-seconds")


def test_a_token_that_took_its_time_is_said(members, monkeypatch):
    monkeypatch.setattr(registry.RULES, "_registered", {"test-asking": Asking})
    done = run("generate", "hello", *members, "--rule", "test-asking", "--token-seconds", 0, "--max-new-tokens", 3)
    assert "BUDGET at all 3 tokens: the budget of steps or time ended first: this is the best point" in done.stderr


def test_weights_of_prompts_are_those_that_are_reported(members):
    ensemble = Ensemble.from_pretrained(members[1::2])
    expected = [ensemble.prompt_weights(prompt) for prompt in ("hello", "abc")]
    common = [*members, "--max-new-tokens", 2, "--no-do-sample", "--prompt-weights", "--json"]
    one, two = (json.loads(run("generate", *prompts, *common).stdout) for prompts in (["hello"], ["hello", "abc"]))
    assert [m["weight"] for m in one["members"]] == pytest.approx(expected[0])
    assert [m["weight"] for m in two["members"]] == pytest.approx([(a + b) / 2 for a, b in zip(*expected, strict=True)])
    for completion, own in zip(two["completions"], expected, strict=True):
        assert completion["weights"] == pytest.approx(own)
    assert one["completions"][0] == two["completions"][0]


@pytest.mark.parametrize(
    "words", [["generate", "-f"], ["evaluate", "-t"], ["check", "-t"], ["generate", "x", "--device"]]
)
def test_a_file_that_is_no_text_is_named(words, tmp_path, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a\nb\xff\xfe")
    done = run(*words, path)
    assert done.returncode == 2
    assert f"error: expected UTF-8 in {path}, but byte 3 (line 2) is not" in done.stderr


@pytest.mark.parametrize("words", [["generate"], ["generate", "-"], ["evaluate", "-t", "-"]])
def test_stdin_that_is_no_text_is_named(words, monkeypatch):
    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", None)
    assert "error: expected UTF-8 in stdin, but byte 1 (line 1) is not" in run(*words, stdin=b"a\xff").stderr


START = """
import os
import signal
import sys
import threading
from softmeet.cli import main

assert "torch" not in sys.modules and "transformers" not in sys.modules
read = []


def opened(event, told):
    if event == "open" and told[1] == "r" and "/transformers/models/" in str(told[0]):
        read.append(told[0])


sys.addaudithook(opened)
try:
    main.main()
except SystemExit as end:
    assert not end.code, end.code
assert "scipy.optimize" not in sys.modules and "softmeet.ensemble" in sys.modules
# Of the sources of some modules, docstrings are made.
most = {"yes": 1.1 * len({*read}), "no": 100}[os.environ["IS_FIRST"]]
assert len(read) < most, (len(read), most)
assert sys.modules["transformers.utils"].is_scipy_available()
"""

# The compiler is there once it is needed.
NATIVE = """
import sys
import threading
from softmeet.cli import main

try:
    main.main()
except SystemExit as end:
    assert not end.code, end.code
assert not {"scipy.optimize", "sympy", "torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()
import torch
from transformers import masking_utils

with masking_utils.TransformGetItemToIndex():
    pass
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


MISSING = """
import json
import sys
import threading
from softmeet.cli import main

for words in json.loads(sys.argv[1]):
    print("=", file=sys.stderr)
    sys.argv[1:] = words
    try:
        main.main()
    except SystemExit as end:
        assert end.code == 2, (words, end.code)
    else:
        raise AssertionError(words)
    assert "torch" not in sys.modules, words
"""


@pytest.mark.slow
def test_a_member_that_is_not_there_is_refused_before_torch_is_imported(tmp_path):
    """By every command, in one process, as each would bring torch to all that follow."""
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question": "a?", "answer": "b"}')
    asked = [
        ["generate", "x", "-m"],
        ["chat"],
        ["serve", "-m"],
        ["advise", "wide/gpt2"],
        ["answer", str(tmp_path / "q.jsonl"), "-m"],
        ["evaluate", "-t", str(tmp_path / "q.jsonl"), "-m"],
        ["inspect", "x", "-m"],
        ["check", "-m"],
    ]
    given = [[*words, str(tmp_path / "none.gguf")] for words in asked]
    done = process(json.dumps(given), program=("-c", MISSING))
    assert done.returncode == 0, done.stderr
    said = done.stderr.replace("\n", "").split("=")[1:]
    assert ["none.gguf: there is no such file" in one for one in said] == [True] * len(asked)


INTERRUPTED = """
import signal, sys
from softmeet.__main__ import main

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            {}

sys.meta_path.insert(0, Interrupts())
main()
"""


LOST = """try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
            raise ImportError"""


@pytest.mark.parametrize("comes", ["signal.raise_signal(signal.SIGINT)", LOST])
def test_ctrl_c_while_the_program_is_loaded_is_no_fault(comes, interruptible):
    done = process("--help", program=("-c", INTERRUPTED.format(comes)))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_that_is_lost_while_members_are_loaded_ends_the_command(monkeypatch, interruptible):
    def load(*_, **__):
        with suppress(KeyboardInterrupt):  # as in a callback of llama.cpp's
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("softmeet.ensemble.Ensemble.from_pretrained", load)
    note_interrupts()
    assert run("generate", "x", "-m", "wide/gpt2").returncode == 130
    said = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert said["project"]["scripts"] == {"softmeet": "softmeet.__main__:main"}


def test_ctrl_c_during_an_answer_is_said(monkeypatch):
    monkeypatch.setattr("softmeet.cli.generate._stream", MagicMock(side_effect=KeyboardInterrupt))
    done = run("generate", "x", "-m", "wide/gpt2", "--rule", "logit-mean")
    assert (done.returncode, done.stderr) == (130, "stopped\n")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", [ModuleNotFoundError, CheckpointError])
def test_ctrl_c_that_a_library_makes_another_error_of_ends_a_command(kind, monkeypatch, capsys):
    """As transformers does within an import; what is made of that is one, too."""

    def loading(**options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise kind("Could not import module 'LlamaConfig'") from error

    monkeypatch.setattr("softmeet.cli.main.app", loading)
    monkeypatch.setattr("softmeet.freed_memory.keep", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        started()
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.slow
def test_a_start_is_quick_and_texts_are_utf8_in_any_locale(members, tmp_path):
    """It imports nothing that no command needs, and reads the folder of models once, and the second time not at all.

    In a locale that decodes ASCII alone, the words of the command line come with surrogates in place of other bytes.
    What is written is what this process writes.
    """
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_ASSETS_CACHE": str(tmp_path)}
    words = ("generate", "-", "é→", *members, "--gate", "none", "--max-new-tokens", 6, "--seed", 1, "--json")
    for is_first in ("yes", "no"):
        done = process(*words, stdin="ü\n", program=("-c", START), IS_FIRST=is_first, **plain)
        assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["completions"]
    assert [c["prompt"] for c in found] == ["ü", "é→"]
    assert found == json.loads(run(*words, stdin="ü\n").stdout)["completions"]


@pytest.mark.slow
def test_native_members_start_without_torchs_compiler(tmp_path):
    for name in "ab":
        tokenizer = byte_tokenizers.byte_level()
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
        model = transformers.LlamaForCausalLM(config)
        gguf_files.write(tmp_path / f"{name}.gguf", model, tokenizer, bits=8, pre="gpt-2")
    asked = ("chat", tmp_path / "a.gguf", tmp_path / "b.gguf", "--max-new-tokens", 3)
    done = process(*asked, stdin="the king\n", program=("-c", NATIVE))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["config", "nothing"]])
def test_a_reader_that_goes_ends_a_command_in_silence(words):
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if words[1:] == ["nothing"] else subprocess.PIPE
    done = subprocess.run([sys.executable, "-m", "softmeet", *words], stdout=writer, stderr=errors, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert not done.stderr


def test_a_reader_that_goes_ends_a_text_in_silence(members):
    """In this process, as it takes seconds to start."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8", closefd=False) as gone:
        # By an average: meet might say on stderr that its gate is being calibrated.
        done = run("generate", "a", *members, "--max-new-tokens", 3, "--rule", "logit-mean", stdout=gone)
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), writer)  # where the rest of it may go
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_version_help_and_completion():
    assert run("--version").stdout.startswith(f"softmeet {softmeet.__version__} (python ")
    assert "--max-new-tokens" in run("generate", "--help").stdout
    assert "--show-completion" in run("--help").stdout
