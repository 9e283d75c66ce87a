PROFILE ?= demo
DATASET ?= synthetic
EDITION ?= v2
SEED    ?= 0
BUILD   ?= build
RETRAIN ?= 0
PYTHON  ?= .venv/bin/python

SNAKEMAKE = $(PYTHON) -m snakemake --cores all
SMOKE     = build/smoke

.PHONY: book test verify lab clean unlock environment

book: environment
	$(SNAKEMAKE) --rerun-incomplete --config profile=$(PROFILE) dataset=$(DATASET) edition=$(EDITION) \
	    seed=$(SEED) build=$(BUILD) retrain=$(RETRAIN)
	@echo "The book is at $(BUILD)/html/index.html"

test: environment
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest
	rm -rf $(SMOKE)
	mkdir -p $(SMOKE)
	for notebook in notebooks/*.ipynb; do \
	    $(PYTHON) -m papermill --prepare-only --log-level WARNING -p profile smoke -p build $(CURDIR)/build/smoke-book \
	        $$notebook $(SMOKE)/$$(basename $$notebook) || exit 1; \
	done
	$(PYTHON) -m pytest --nbval-lax --nbval-current-env $(SMOKE)

verify: environment
	$(PYTHON) -m flowlib verify --build $(BUILD)

lab: environment
	$(PYTHON) -m jupyter lab notebooks

clean:
	rm -rf build

unlock: environment
	$(SNAKEMAKE) --unlock

# `make PYTHON=/path/to/python ...` uses an environment of your own instead of making .venv.
ifeq ($(PYTHON),.venv/bin/python)
environment: .venv/installed
endif

.venv/installed: requirements.txt pyproject.toml
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@
