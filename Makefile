# The virtual environment: `make VENV=/elsewhere` or the environment variable VENV sets another path.
VENV ?= .venv
# The first Python >= 3.11 that is found; `make PYTHON=/path/to/python` sets another one.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
# Test processes that run in parallel, each on one thread.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# Dependencies are reinstalled when setup.cfg changes, the link to this checkout when the checkout moves.
DEPENDENCIES := $(VENV)/.dependencies-$(shell sha256sum setup.cfg | cut -c1-12)
CHECKOUT := $(VENV)/.checkout-$(shell pwd | sha256sum | cut -c1-12)
PIP_FAILED = { echo 'pip could not install the dependencies in $(VENV); the lines above say which. Without access to \
pypi.org set PIP_INDEX_URL to a mirror. The next call of make continues.'; exit 1; }

.PHONY: install docs demo test fast test-elsewhere matrix check format bench learn faults audit clean browser-test

install: $(DEPENDENCIES) $(CHECKOUT)

$(DEPENDENCIES): setup.cfg
	@test -x $(BIN)/python || test -n "$(PYTHON)" \
	|| { echo 'No Python >= 3.11 was found: install one, or run `make PYTHON=/path/to/python`.'; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=23.2' 'setuptools>=77' wheel || $(PIP_FAILED)
	$(BIN)/python -m pip install --quiet -e '.[dev]' || $(PIP_FAILED)
	rm -f $(VENV)/.dependencies-* $(VENV)/.checkout-*
	touch $@ $(CHECKOUT)

$(CHECKOUT): | $(DEPENDENCIES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.checkout-*
	touch $@

demo: install
	$(BIN)/python examples/quickstart.py

test: install
	$(PYTEST)

# What starts no processes and takes, but for a few, less than a third of a second a test, without the cells of the matrix
# (`make matrix`), in under three minutes; a test among the slowest ten may have to be marked as slow.
fast: install
	$(PYTEST) -m "not dist and not slow and not browser and not matrix" --durations=10

# The numerical tests as on other machines: with the kernels of a processor without AVX, and with those of one with AVX2
# at two threads for each of JOBS processes (more threads than cores) and in random order. The variables choose the code
# paths of torch, oneDNN and MKL and ask for no more than the processor has. `make test-elsewhere SEED=1` repeats an order.
NUMERICAL := $(addprefix tests/,augment evaluation losses methods metrics nn optim)
SEED ?= $(shell date +%s)
ELSEWHERE = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not dist and not slow" $(NUMERICAL)
test-elsewhere: install
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(ELSEWHERE)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(ELSEWHERE) \
		--random-order-bucket=global --random-order-seed=$(SEED)

# Every method under every condition: runs the cells and writes docs/matrix.md.
matrix: install
	$(PYTEST) -m matrix --matrix docs/matrix.md tests/methods

# The documentation site in build/site; a warning, such as a broken link, is an error. `tests/browser/test_site.py` builds
# it too, in `make test`, and looks at it where there is a browser.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Needs a browser: Debian's package chromium; without one the tests are skipped.
browser-test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs tests/browser

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

# Fifty kills of a training run; writes what it finds into docs/faults.md.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.run_faults

# Known weaknesses of the installed packages; needs the internet.
audit: install
	@$(BIN)/python -c "from urllib.request import urlopen; urlopen('https://pypi.org/pypi/pip/json', timeout=10)" 2>/dev/null \
	|| { echo 'make audit asks pypi.org, which cannot be reached: nothing was audited.'; exit 1; }
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks

learn: install
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks.learn --jobs 2

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache runs
