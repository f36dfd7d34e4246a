# Every command of the README and of CI. `make study` and `make test` are all a new machine needs:
# Python 3.11 to 3.13, git, a package index.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
DEVELOPS := $(VENV)/.develops
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install study test test-long test-system chaos check format clean

install: $(DEVELOPS)

# What a study needs. Bytecode of it by all cores, not by pip's one, nor by each first import; not
# of tests, nor of the templates in some packages that are no Python.
$(RUNS): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile -e .
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
	touch $@

# And what tests and checks need.
$(DEVELOPS): $(RUNS)
	$(PIP) -e '.[dev]'
	touch $@

study: $(RUNS)
	$(BIN)/harness grid grids/scale_study.yaml --submit
	$(BIN)/harness report scale_study --out reports/

# Fast tests first, so that a mistake shows early. JOBS tests at a time, of one thread and about
# 2 GB each.
JOBS ?= 2
BESIDE := -n $(JOBS) --dist worksteal
test: install
	$(BIN)/python -m pytest $(BESIDE) -m "not slow and not long and not gpu and not slurm and not browser and not system"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not long and not gpu and not slurm and not browser and not system"

# Proofs that take minutes: several ranks, searches, a report to DeepSpeed that reproduces. File by
# file: what the tests of a file share takes minutes, too.
test-long: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "long and not gpu and not slurm and not system" --durations=5

# Tests that need packages of the operating system: real Fashion-MNIST files, chromium, sshd, a
# Slurm. One at a time: there is one cluster.
test-system: install
	$(BIN)/python -m pytest -m "(browser or system or slurm) and not gpu" -rs --durations=5

# Everything that may go wrong, in full; about three hours on two cores: 200 kills at random moments and
# inside of writes; 20 commands at once; 2, 1 and 3 ranks in turn; bad disks and clocks, stopped
# workers, hung ranks, a real Slurm; ten thousand cells; hostile input.
chaos: install
	$(BIN)/python -m tests.chaos.kills --kills 200
	$(BIN)/python -m tests.chaos.together --commands 20
	$(BIN)/python -m pytest -rs tests/chaos tests/ledger tests/launch tests/slurm tests/cli/test_hostile.py \
		tests/study/test_schema.py tests/study/test_hostile_values.py tests/models/test_weight_files.py \
		tests/analysis/test_report.py tests/train/test_ranks.py tests/train/test_resume.py \
		tests/train/test_memory.py -m "not gpu"
	$(BIN)/python benchmarks/large_study.py --check

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist
