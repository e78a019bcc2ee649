# Two commands are all that a fresh clone needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-output
export HF_HUB_OFFLINE := 1
export LORA_EXPORT_CACHE ?= $(CURDIR)/.cache
unexport PYTHONDONTWRITEBYTECODE  # a file is compiled once, not by every process that reads it

.PHONY: env demo demo-qlora demo-int4 demo-diffusion test test-all coverage lint docs smoke release format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        merge, prove, export and measure a real adapter on a real model; ends with a report"
	@echo "make demo-qlora  the same with an adapter that was trained on the 4-bit base"
	@echo "make demo-int4   the same in int4, calibrated so that it keeps the adapter"
	@echo "make demo-diffusion  the same with a LoRA on a pipeline of images; the report shows the pictures"
	@echo "make test        the quick tests        make test-all  slow ones too        make coverage  of the quick ones"
	@echo "make lint        style, types, dead code, unused dependencies                make docs  the documentation"
	@echo "make smoke       wheel and sdist; the wheel tried in a clean environment"
	@echo "make release     the same, checked as a release is, with its bill of materials in dist/"

env: $(BIN)/.ready

# Everything in one pip call: the pinned torch must be chosen together with what depends on it. 21,000 files are
# compiled on all cores, which pip would do on one; some, which nobody imports, are no valid Python.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch==2.13.0 -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: $(BIN)/.ready
	@$(BIN)/python examples/demo.py --adapter lora-speeches --out $(OUT)

demo-qlora: $(BIN)/.ready
	@$(BIN)/python examples/demo.py --adapter qlora-speeches --out $(OUT)-qlora

demo-int4: $(BIN)/.ready
	@$(BIN)/python examples/demo.py --int4 --out $(OUT)-int4

demo-diffusion: $(BIN)/.ready
	@$(BIN)/python examples/diffusion.py --out $(OUT)-diffusion

# The files with tests that need the machine to themselves; to collect all others a second time takes long.
TIMED = $(shell grep -rl --include='test_*.py' 'mark\.timing' tests)

# A worker for each core: the libraries that its plug-ins import must not start a thread for each core, too.
test: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu and not timing" -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -q -m "timing and not slow and not gpu" $(TIMED)

test-all: $(BIN)/.ready
	$(BIN)/python -m pytest -q --timeout 3600

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/vulture
	$(BIN)/deptry .

docs: $(BIN)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Wheel and sdist, and the wheel in an environment of its own. Files are dated by the newest entry of CHANGELOG.md, so
# that the same sources give the same bytes.
smoke release: export SOURCE_DATE_EPOCH = $(shell date -u +%s -d $$(sed -n 's/^## .* - //p' CHANGELOG.md | head -1))
smoke: $(BIN)/.ready
	rm -rf dist build/smoke
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 dist/*.whl
	build/smoke/bin/python tools/smoke.py

# Their tools have an environment of their own, because the one with the wheel is what the bill of materials lists.
release: smoke
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build \
		check-wheel-contents cyclonedx-bom pyright twine
	build/release/bin/python tools/release.py build/smoke/bin/python

coverage: $(BIN)/.ready
	$(BIN)/coverage run -m pytest -q -m "not slow and not gpu and not timing" -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage run -m pytest -q -m "timing and not slow and not gpu" $(TIMED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

format: $(BIN)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache site demo-output*
