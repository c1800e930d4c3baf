"""All that docs/guides/clients.md shows, run against real servers: commands, programs, and what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving import running, serving_of

from softmeet import Ensemble
from softmeet.server.security import Protection

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "clients.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def parts():
    """Each section's blocks, as (kind, text), by the section's title."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {section.partition("\n")[0]: BLOCK.findall(section) for section in sections}


PARTS = parts()


def matches(expected, printed):
    """Whether a page's text is what was printed, but for what its … leave out."""
    pattern = ".*?".join(map(re.escape, expected.strip().split("…")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """The page's two servers, and a folder that is the present one; maps the page's addresses to theirs."""
    folder = tmp_path_factory.mktemp("clients")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as servers:
        patch.chdir(folder)
        patch.setenv("LLM_USER_PATH", str(folder))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        plain = Ensemble.from_pretrained()
        chat = Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-c"], "logit-mean")
        protected = Protection(keys=("sesame",), hosts=("127.0.0.1", "localhost"))
        found = {
            "8000": servers.enter_context(running(serving_of({"default": plain}))),
            "8001": servers.enter_context(running(serving_of({"default": chat}, protection=protected))),
        }
        models, _ = (text for kind, text in (PARTS["llm"] + PARTS["lm-eval"]) if kind == "yaml")
        (folder / "extra-openai-models.yaml").write_text(here(models, found))
        (folder / "keys.json").write_text('{"softmeet": "sesame"}')  # as by the page's first command of llm
        yield found


def here(text, addresses):
    """A page's text with the addresses of the servers of the test."""
    for port, url in addresses.items():
        text = re.sub(rf"(http://127\.0\.0\.1|localhost):{port}", url, text)
    return text


def commands(text):
    """(command, what is printed) of a console block."""
    for part in text.split("$ ")[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


@pytest.mark.slow
@pytest.mark.parametrize("section", ["curl", "Chat", "llm"])
def test_commands_print_what_the_page_shows(addresses, section):
    for kind, text in PARTS[section]:
        for command, printed in commands(text) if kind == "console" else ():
            if not command.startswith("softmeet serve"):
                done = subprocess.run(["bash", "-c", here(command, addresses)], capture_output=True, text=True)
                assert matches(printed, done.stdout + done.stderr), (command, done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of llm
def test_programs_print_what_the_page_shows(addresses):
    names = {}
    for section in ("OpenAI's Python client", "Chat", "ollama's Python client", "llm"):
        blocks = PARTS[section]
        for (kind, code), (after, printed) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            if kind != "py":
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(here(code, addresses), "clients.md", "exec"), names)
            assert after == "text"
            assert matches(printed, out.getvalue()), out.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_prints_what_the_page_shows_both_ways(addresses, tmp_path):
    (data, task, *runs) = (text for _, text in PARTS["lm-eval"])
    Path("tasks").mkdir()
    Path("tasks/king.jsonl").write_text(data)
    Path("tasks/king.yaml").write_text(task)
    Path("zoo").symlink_to(PAGE.parents[2] / "zoo")
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    import softmeet.evaluation.harness  # noqa: F401 - the harness then knows ensembles

    tasks = TaskManager(include_path="tasks", include_defaults=False)
    for text in runs:
        ((command, printed),) = commands(text)
        words = shlex.split(here(command, addresses))
        options = {word: words[words.index(f"--{word}") + 1] for word in ("model", "model_args", "tasks")}
        options["tasks"] = options["tasks"].split(",")
        found = simple_evaluate(**options, task_manager=tasks)
        assert matches(printed, make_table(found)), make_table(found)
