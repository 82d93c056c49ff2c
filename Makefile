# Every target sets up what it needs in .venv, from a fresh clone, with nothing else typed.
#
#   make demo [VIDEO=clip.mp4] [ARGS='--kill filter']
#   make test [ARGS='tests/unit -k layers']     make test-long
#   make soak [SECONDS=3600] [SEED=7]           ordinary use, everything at once, with kills
#   make fuzz [COUNT=1000000] [SEED=7]          random messages, descriptors and files
#   make mutants [ARGS='--seeds 1 torn-mark']   known faults, which the tests must find
#   make test-kernel [KERNEL=uml|debian|full]   the tests that ask a real kernel, in a guest
#   make test-interop [TORCH=torch==2.13.0+cpu]  what other libraries do with views and tokens, in an environment of its own
#   make test-model                             the models of the shared memory's protocol, with Spin
#   make lint   make types   make format        make sanitize   make bench   make wheel   make clean
#
# PYTHON names the interpreter (3.11 or newer): make test PYTHON=python3.13

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --quiet
ARGS   ?=
VIDEO  ?=
KERNEL ?= uml
SECONDS ?= 3600
COUNT ?= 1000000
SEED   ?=
TORCH  ?= torch

# Hundreds of tests start fresh interpreters: without cached bytecode each would compile all it imports again.
unexport PYTHONDONTWRITEBYTECODE

NATIVE := $(wildcard native/*.[ch] native/*/*.[ch])
ASAN   := .build-asan
SANITIZED = $(wildcard tests/unit/test_native*.py tests/unit/test_mapping*.py)

INTEROP := $(VENV)-interop
CONSUMERS = $(TORCH) opencv-python-headless pillow pyarrow cffi numba joblib loky cloudpickle 'dask[distributed]' celery

# The stamps form a chain, so that `make -j` never runs two pips in one environment.
BASE := $(VENV)/.stamp-base
DEMO := $(VENV)/.stamp-demo
DEV  := $(VENV)/.stamp-dev
EXT  := $(VENV)/.stamp-ext

.PHONY: demo test test-long mutants soak fuzz test-interop test-kernel test-model lint types format sanitize bench wheel dev clean
.DEFAULT_GOAL := test

demo: $(DEMO) $(EXT)
	$(VENV)/bin/dmabuf demo $(VIDEO) $(ARGS)

# Some workers for a whole run or a directory of tests, none for single files or for -k (tests/conftest.py); -n says how many.
test: $(DEV) $(EXT)
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

# The fault handler's hard end is for the short tests: these set their own watchdogs.
test-long: $(DEV) $(EXT)
	$(PY) -m pytest -m long --fresh-children -o faulthandler_timeout=0 -o timeout=7200 $(ARGS)

# Known faults, each put into a copy of the tree: the tests must find them.
mutants: $(DEV) $(EXT)
	$(PY) -m tools.mutants $(ARGS)

# A seed says what the processes do and when they are killed, not how they interleave.
soak: $(DEV) $(EXT)
	$(PY) -m tests.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Random messages, descriptors and files. ARGS='receive message' for some of the targets.
fuzz: $(DEV) $(EXT)
	$(PY) -m tests.fuzz --count $(COUNT) $(if $(SEED),--seed $(SEED)) $(ARGS)

# What other libraries do with views and tokens (docs/views.md, docs/sharing.md). Each is installed if it can be, and the tests of the others
# are skipped: some have no wheel for some Pythons, and a torch for GPUs takes gigabytes.
test-interop: $(DEV) $(EXT)
	$(PYTHON) -m venv --system-site-packages $(INTEROP)
	echo "$(CURDIR)/$(VENV)/lib/$$($(PY) -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')/site-packages" > \
	  "$$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/everyday.pth"
	for package in $(CONSUMERS); do \
	  $(INTEROP)/bin/python -m pip --disable-pip-version-check --quiet install "$$package" || echo "without $$package"; done
	PYTHONPATH=$(CURDIR)/src $(INTEROP)/bin/python -m pytest -n0 tests/interop $(ARGS)

# The models of the shared memory's protocol, with Spin (apt-get install spin). ARGS='-k facts'
test-model: $(DEV) $(EXT)
	$(PY) -m pytest -m model -n0 tests/model $(ARGS)

# A real Linux kernel as the judge: fetched and built once (minutes), kept in the user's cache; see tools/kernel.
test-kernel: $(DEV) $(EXT)
	$(PY) -m tools.kernel test --kernel $(KERNEL) -- $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m tools.check_house
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)
	$(PY) tools/check_native.py
	$(PY) -m tools.citations
	$(PY) -m tools.links

types: $(DEV)
	$(PY) -m mypy

format: $(DEV)
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

# PEERS=1 measures other libraries too, in the same run.
bench: $(DEMO) $(EXT)
	$(if $(PEERS),$(PIP) install --requirement bench/peers.txt)
	$(PY) -m bench $(ARGS)

# A whole copy of the package with an instrumented extension, so that the everyday one stays as it is.
# Python must start with the sanitizer's run-time already loaded, and with plain malloc, so that its objects are seen too.
sanitize: $(DEV)
	@test -n "$(SANITIZED)" || { echo "no tests/unit/test_native*.py or test_mapping*.py to run" >&2; exit 1; }
	rm -rf $(ASAN)
	DMABUF_SANITIZE=1 $(PY) setup.py -q build --build-base $(ASAN) --build-lib $(ASAN)/lib
	PYTHONPATH=$(CURDIR)/$(ASAN)/lib PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$(realpath "$$($${CC:-gcc} -print-file-name=libasan.so)")" \
	$(PY) -m pytest -p no:cacheprovider $(SANITIZED) $(ARGS)

wheel: $(DEV)
	$(PY) -m build --wheel

dev: $(DEV) $(EXT)

clean:
	rm -rf $(VENV) $(INTEROP) $(ASAN) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	rm -f src/dmabuf/_native*.so
	find src tests tools bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BASE):
	@sh tools/check_machine.sh $(PYTHON)
	@echo "setting up $(VENV) (about a minute, once)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install 'setuptools>=77'
	@touch $@

# Without build isolation the extension is compiled by the environment's own setuptools: no second download.
$(DEMO): $(BASE) pyproject.toml setup.py
	$(PIP) install --no-build-isolation --editable '.[demo]'
	@touch $@

$(DEV): $(DEMO)
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

# Order-only on DEV where both are wanted: they would write the same extension.
$(EXT): $(DEMO) $(NATIVE) $(if $(filter-out demo bench,$(or $(MAKECMDGOALS),test)),| $(DEV))
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# Somebody removed the extension by hand: the stamp is a lie.
ifeq ($(wildcard src/dmabuf/_native*.so),)
.PHONY: $(EXT)
endif
