# `make` alone prints what there is to make.
PROFILE ?= cpu
CORES ?= 1
CELL_TIMEOUT ?=

# An active virtual environment, or a conda environment named srmcmc, is used as it is. Otherwise .venv is made from
# requirements.lock; its stamp is written last, so that an interrupted installation does not look finished.
ifneq ($(filter-out $(CURDIR)/.venv,$(VIRTUAL_ENV)),)
  PYTHON := $(VIRTUAL_ENV)/bin/python
else ifeq ($(CONDA_DEFAULT_ENV),srmcmc)
  PYTHON := python
else
  PYTHON := .venv/bin/python
  ENV := .venv/complete
endif

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# A kernelspec "python3" in the user's home must not take the notebooks to another interpreter.
export JUPYTER_PREFER_ENV_PATH := 1
# glibc keeps freed memory instead of asking for new pages at each step: up to a quarter of a chain's time.
export MALLOC_MMAP_THRESHOLD_ := 1000000000
export MALLOC_TRIM_THRESHOLD_ := 4000000000
export MALLOC_TOP_PAD_ := 268435456

.PHONY: help figures test checkpoints lab app notebooks book lock

help:
	@echo 'make figures      run the notebooks that changed, with workflow/parameters/$$PROFILE.yaml (PROFILE=cpu)'
	@echo 'make test         ruff, pytest, and the notebooks through nbval (without the appendix)'
	@echo 'make checkpoints  train the shipped models again, into checkpoints/retrained/ (hours)'
	@echo 'make lab          open the notebooks in JupyterLab'
	@echo 'make app          the explorer without code, in a browser (Voilà)'
	@echo 'make notebooks    execute the notebooks in place, so that their committed outputs are true'
	@echo 'make book         build/book/index.html: README, docs/, the notebooks as they are stored, and the API'
	@echo 'make lock         renew requirements.lock from pyproject.toml (needs uv; UV_FLAGS=--upgrade moves every version)'
	@echo
	@echo 'Python: an active virtual environment, or a conda environment named srmcmc, as it is; otherwise .venv, made'
	@echo 'from requirements.lock when first needed. CELL_TIMEOUT is the limit of one cell in seconds.'

# --nolock: a killed run must not block the next; two at once are safe, for the runner writes aside and renames.
SNAKEMAKE = "$(PYTHON)" -m snakemake --snakefile workflow/Snakefile --cores $(CORES) --keep-going --rerun-incomplete \
  --nolock --quiet all

figures: $(ENV)
	@"$(PYTHON)" workflow/scripts/run_notebook.py --check --parameters "workflow/parameters/$(PROFILE).yaml"
	$(SNAKEMAKE) --config profile="$(PROFILE)" $(if $(CELL_TIMEOUT),cell_timeout=$(CELL_TIMEOUT))
	@echo 'The figures of profile $(PROFILE) are up to date.'

test: $(ENV)
	"$(PYTHON)" -m ruff check
	"$(PYTHON)" -m ruff format --check
	@rm -rf .cache/test-figures
	SRMCMC_FIGURES="$(CURDIR)/.cache/test-figures" "$(PYTHON)" -m pytest
	SRMCMC_FIGURES="$(CURDIR)/.cache/test-figures" "$(PYTHON)" -m pytest --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=900 notebooks/*.ipynb

checkpoints: $(ENV)
	$(SNAKEMAKE) checkpoints

lab: $(ENV)
	"$(PYTHON)" -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

app: $(ENV)
	@"$(PYTHON)" -c 'import voila' || { echo 'make app needs Voilà: pip install .[app]' >&2; exit 1; }
	"$(PYTHON)" -m voila notebooks/explore.ipynb --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_cell_tags=about-code

notebooks: $(ENV)
	"$(PYTHON)" workflow/scripts/run_notebook.py --in-place --cell-timeout $(or $(CELL_TIMEOUT),3600) notebooks/*.ipynb

book: $(ENV)
	"$(PYTHON)" -m sphinx --fresh-env --fail-on-warning --keep-going --nitpicky --quiet \
	  -c docs -d build/doctrees . build/book
	@echo 'The book is in build/book/index.html.'

lock:
	@command -v uv >/dev/null || { echo 'make lock needs uv: pip install uv' >&2; exit 1; }
	uv pip compile --universal --python-version 3.11 --all-extras --no-annotate $(UV_FLAGS) pyproject.toml \
	  --output-file requirements.lock

.venv/complete: requirements.lock pyproject.toml
	@if ! .venv/bin/python -c "$$IN_RANGE" 2>/dev/null; then \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c "$$IN_RANGE" 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'No Python from 3.11 to 3.13 with its venv module was found as python3, python3.13, python3.12 or' >&2; \
	    echo 'python3.11 (Debian: apt-get install python3-venv). Install one, or activate an environment with it.' >&2; \
	    exit 1; \
	  fi; \
	  echo "making .venv with $$("$$found" --version)"; \
	  "$$found" -m venv --clear .venv; \
	fi
	.venv/bin/python -m pip install $(if $(CI)$(wildcard $@),--quiet) --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

define IN_RANGE
import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
endef
export IN_RANGE
