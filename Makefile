# Every target does its own set-up: it needs python3 with venv, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS thread a test process: the processes already fill the cores. Compiled code is kept, whatever the shell says:
# some sixty processes start, and each would compile all of softmeet again.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: install demo docs figures test test-slow soak bench check format lint clean

install: $(VENV)/.local ## Install softmeet, GGUF files, the server and its page into .venv.
	@echo "installed; type now:"
	@echo "  . $(BIN)/activate"
	@echo "  softmeet models                # the GGUF files on this machine"
	@echo "  softmeet chat a.gguf b.gguf    # two of them, by path or by name, as one"

demo: $(VENV)/.demo ## Score held-out text and continue prompts, with the bundled members.
	@echo "loading softmeet and torch"
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python examples/demo.py

test: ## Run the tests, but those of clusters, browsers, packages, programs as a whole (make test-slow).
	@echo "make test: 5 to 6 minutes on two idle cores, and on first use the installation, some minutes more."
	@$(MAKE) --no-print-directory $(VENV)/.test
	$(TEST_ENV) $(BIN)/pytest -rfEs -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## Run those tests: 5 minutes. CI runs both.
	@command -v chromium >/dev/null || echo "without chromium (apt install chromium) the tests of the page are skipped"
	@command -v npm >/dev/null || echo "without npm (apt install npm) those of OpenAI's client for JavaScript are skipped"
	@command -v nginx caddy >/dev/null || echo "without nginx and caddy (apt install nginx caddy) those of proxies are skipped"
	$(TEST_ENV) $(BIN)/pytest -rfEs -m slow $(PYTEST_ARGS)

test-%: $(VENV)/.test ## Run the tests of one room, a folder of tests/: make test-rules.
	$(TEST_ENV) $(BIN)/pytest -rfEs $(PYTEST_ARGS) tests/$*

soak: $(VENV)/.test ## Load two servers with all that clients do for an hour (HOURS=, MINUTES=), killing one now and then.
	$(BIN)/python benchmarks/soak.py $(if $(MINUTES),--minutes $(MINUTES),--hours $(or $(HOURS),1)) --json soak.json $(SOAK_ARGS)

bench: $(VENV)/.bench ## Time the solver and decoding beside the alternatives, at sizes of a few minutes each.
	$(BIN)/python benchmarks/solver.py passes --positions 128
	$(BIN)/python benchmarks/solver.py row --size small --limit 20
	$(BIN)/python benchmarks/decode.py meet --repeats 3
	$(BIN)/python benchmarks/price.py --speculate auto --repeats 3
	$(BIN)/python benchmarks/memory.py peak
	$(BIN)/python benchmarks/solver.py growth --quick
	$(BIN)/python benchmarks/gates.py curves --smoke
	$(BIN)/python benchmarks/memory.py plan
	$(BIN)/python benchmarks/serve.py streams --counts 1,32 --tokens 32 --meet-tokens 4

docs: $(VENV)/.docs ## Build the site into site/; every broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open site/index.html"

figures: | $(BIN)/python ## Write the figures on pages from benchmarks/results, and say which command measures each again.
	$(BIN)/python tools/update_figures.py

check: lint docs test test-slow ## What CI does: format, lint, types, layers, spelling, the site, tests.

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	npx --yes @biomejs/biome@2.6.9 check --error-on-warnings
	$(BIN)/codespell src docs tools benchmarks examples README.md CHANGELOG.md CONTRIBUTING.md

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	npx --yes @biomejs/biome@2.6.9 check --write

clean:
	rm -rf $(VENV) build dist site

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Install the bundled members and softmeet with an extra, $(1), with more options of pip, $(2), and print a dot every
# three seconds: pip says nothing while it unpacks torch.
define install
@printf "installing softmeet with the extra $(1) into $(VENV), in a minute or more: "
@$(BIN)/python -m pip install --quiet $(2) --editable ./zoo --editable '.[$(1)]' & pip=$$!; \
while kill -0 $$pip 2>/dev/null; do printf .; sleep 3; done; echo; wait $$pip
@touch $@
endef

# torch for CUDA has some GB: without such a GPU, that for CPUs is tried first.
$(VENV)/.local: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	@command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet --retries 0 --timeout 10 \
	  --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null || true
	$(call install,local,--no-compile)
	@echo "compiling what a chat imports"
	@echo hello | PYTHONDONTWRITEBYTECODE= $(BIN)/softmeet chat --vocabulary bytes --max-new-tokens 1 >/dev/null 2>&1 || true
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c \
	  "from softmeet.members.llama_library import library; import softmeet.readers.llama_cpp; library()" 2>/dev/null || true

# Compiling all of every package would take half of the time; Python compiles what the demo imports when it first does.
$(VENV)/.demo: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	$(call install,demo,--no-compile)

$(VENV)/.test $(VENV)/.bench $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	$(call install,$*)
