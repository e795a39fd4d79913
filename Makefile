# make ablations   the study, end to end (tiny by default; make ablations STUDY=mini for another)
# make figures     figures again from the tables of a study, or of any folder: make figures FROM=results/reference/mini-h200
# make test        every check
# make test-gpu    the kernels' tests, and a resumed training, on this machine's GPU
# make bench-kernels   times the kernels on this machine's GPU, into results/reference/kernels-$(GPU)
# make style       format and mend what can be mended
# FLAGS goes to Snakemake, such as FLAGS="--resources gpu=4".
# Each target sets up .venv first, when it is missing or older than what it is made from.

STUDY ?= tiny
CONFIG ?= config/$(STUDY).yaml
FROM ?=
FLAGS ?=
GPU ?= h200

VENV := .venv
READY := $(VENV)/.ready
UV_VERSION := 0.13.9
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3.12 python3.13 python3.11 python3; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && command -v $$name && break; done)
RESULTS := results/$(shell sed -n 's/^study: *\([A-Za-z0-9._-]*\).*/\1/p' $(CONFIG))
PARTS := report tables figures notebooks

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYTHONUNBUFFERED := 1
unexport PYTHONPATH PYTHONHOME

.PHONY: ablations figures test test-gpu bench-kernels style help
.DELETE_ON_ERROR:

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile

ablations: $(READY)
	@python -m sla2.config --paths $(CONFIG)
	@snakemake ablations --configfile $(CONFIG) $(FLAGS)
	@$(MAKE) --no-print-directory $(RESULTS)/report.zip
	@printf '\n%s\n' 'Look at:'
	@printf '  %-10s %s\n' page '$(RESULTS)/report/index.html' tables '$(RESULTS)/tables/ablation.csv and its neighbours' \
		figures '$(RESULTS)/figures/' notebooks '$(RESULTS)/notebooks/' videos '$(RESULTS)/generate/' \
		archive '$(RESULTS)/report.zip (the page and where every number comes from, to pass on)'

# Asked for once the study is complete, in a make of its own that sees the files as they are then.
$(RESULTS)/report.zip: $(foreach part,$(PARTS),$(wildcard $(RESULTS)/$(part)/*)) $(wildcard workflow/report/*)
	@snakemake ablations --configfile $(CONFIG) --report $@

# Inside a study Snakemake keeps the books; another folder has tables and perhaps lossless videos, and nothing else is needed.
figures: $(READY)
ifeq ($(FROM),)
	@[ -e $(RESULTS)/tables/ablation.csv ] || { echo "error: $(RESULTS)/tables holds no tables; run 'make ablations CONFIG=$(CONFIG)', or give FROM=<folder with tables/>" >&2; exit 2; }
	@snakemake figures --configfile $(CONFIG) --forcerun figure contact_sheet --allowed-rules figures figure contact_sheet
	@echo "figures: $(RESULTS)/figures/"
else
	@[ -e $(FROM)/tables/ablation.csv ] || { echo "error: $(FROM)/tables holds no tables; give FROM=<folder with tables/>" >&2; exit 2; }
	@for script in $(filter-out %/contact_sheet.py,$(wildcard workflow/scripts/*.py)); do \
		python $$script --tables $(FROM)/tables --output $(FROM)/figures/$$(basename $$script .py) || exit; done
	@if [ -n "$$(find $(FROM)/generate -name '*.mkv' 2>/dev/null | head -1)" ]; then \
		python workflow/scripts/contact_sheet.py --tables $(FROM)/tables --videos $(FROM)/generate --output $(FROM)/figures/contact_sheet; \
		else echo "contact_sheet: $(FROM) holds no lossless videos, so this figure stays as it is"; fi
	@echo "figures: $(FROM)/figures/"
endif

# Two test processes that wait for each other's threads take many times as long.
test: export OMP_NUM_THREADS := 1
test: $(READY)
	ruff check .
	ruff format --check .
	lint-imports
	snakemake --lint
	snakefmt --check Snakefile workflow/rules
	pytest -n 2 --dist loadgroup

test-gpu: $(READY)
	@python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: torch sees no GPU here; run this on a machine with one")'
	pytest tests/kernels
	pytest tests/test_stage2.py -k device

bench-kernels: $(READY)
	python kernels/bench/measure.py --output results/reference/kernels-$(GPU) --commit $$(git rev-parse HEAD)
	python kernels/bench/figures.py results/reference/kernels-$(GPU)

style: $(READY)
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

$(READY): pyproject.toml requirements.lock
	@$(VENV)/bin/python -c '$(SUPPORTED)' 2>/dev/null || { \
		[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH, only $$(python3 --version 2>&1 || true); install one, or give make PYTHON=/path/to/python3.12" >&2; exit 2; }; \
		"$(PYTHON)" -c '$(SUPPORTED)' || { echo "error: PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1), not 3.11, 3.12 or 3.13; give another" >&2; exit 2; }; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make an environment; install its venv package, such as: apt-get install python3-venv" >&2; exit 2; }; \
		"$(PYTHON)" -m venv --clear $(VENV); }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(VENV)/bin/uv pip sync --require-hashes requirements.lock
	@$(VENV)/bin/uv pip install --no-deps --editable .
	@touch $@
