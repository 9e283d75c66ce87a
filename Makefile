PROFILE ?= demo
DATASET ?= synthetic
EDITION ?= v2
SEED    ?= 0
BUILD   ?= build
RETRAIN ?= 0
PYTHON  ?= .venv/bin/python

SMOKE = build/smoke
CHOICES = RETRAIN PROFILE DATASET EDITION SEED BUILD PYTHON
$(foreach name,$(CHOICES),$(eval override $(name) := $$(value $(name))))  # make expands no $$ in them,
export $(CHOICES)  # and the shell takes them as they are
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: book test test-long verify lab clean environment

book: environment
	"$$PYTHON" -m companion book --profile "$$PROFILE" --dataset "$$DATASET" --edition "$$EDITION" \
	    --seed "$$SEED" --build "$$BUILD"
	@echo "The book is at $$BUILD/html/index.html"

test: export OMP_NUM_THREADS = 1  # two processes share the cores
test: environment
	"$$PYTHON" -m ruff check .
	"$$PYTHON" -m pytest -n 2 --dist loadfile
	rm -rf $(SMOKE)
	mkdir -p $(SMOKE)
	@# the one notebook outside the book, which a test builds
	"$$PYTHON" -m papermill --prepare-only --log-level WARNING -p profile smoke -p build build/smoke-book \
	    notebooks/live_explorer.ipynb $(SMOKE)/live_explorer.ipynb
	"$$PYTHON" -m pytest --nbval-lax --nbval-current-env $(SMOKE)

# Kills, by the dozen.
test-long: environment
	"$$PYTHON" -m pytest -m long

verify: environment
	"$$PYTHON" -m companion verify --build "$$BUILD"

lab: environment
	"$$PYTHON" -m jupyterlab notebooks

clean:
	rm -rf build

# `make PYTHON=/path/to/python ...` uses an environment of your own instead of making .venv.
ifeq ($(PYTHON),.venv/bin/python)
environment: .venv/installed
# Scripts in .venv hold its path: it is made anew after the project was moved or copied.
PLACE = $(shell cat .venv/lib/*/site-packages/project.pth 2>/dev/null)
MOVED = $(if $(PLACE),$(if $(findstring =$(CURDIR)=,=$(PLACE)=),,yes))
ifneq ($(MOVED),)
.PHONY: .venv/installed
endif
else
environment:
	@"$$PYTHON" -c "import snakemake" || \
	    { echo "PYTHON=$$PYTHON is no Python with the packages of requirements.txt: install them there" >&2; exit 1; }
endif

.venv/installed: requirements.txt pyproject.toml
	$(if $(MOVED),rm -rf .venv)
	python3 -m venv .venv
	"$$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	@# so that a notebook finds companion and data in whatever folder its kernel starts
	"$$PYTHON" -c "import pathlib, site; pathlib.Path(site.getsitepackages()[0], 'project.pth').write_text(str(pathlib.Path.cwd()))"
	touch $@
