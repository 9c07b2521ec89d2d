# make demo                     install, then everything on a small synthetic set, down to the README's table
# make test                     install, lint, all tests
# make faults                   kill training 50 times, resume it each time, compare the end with an unbroken run
# make fuzz                     10,000 malformed inputs for every loader and the command line; most of an hour
# make table DATA=ratings.csv   the README's benchmark table for real data (or an already converted directory)
# make precision DATA=ratings.csv   the table of what each precision costs, likewise; of five seeds

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes with a thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4
# What `make table` trains for; the published recipe otherwise.
EPOCHS ?= 20
SEEDS ?= 1
# Where tables keep models, so that they need not train them again; other settings want another place.
OUT ?= run/table
# Where `make faults` trains; a fresh directory.
FAULTS ?= run/faults

.PHONY: demo test lint table precision faults fuzz clean

demo: $(VENV)/installed
	mkdir -p run
	$(BIN)/python -m neural_cf synthetic --users 1000 --items 1500 --ratings 100000 --seed 1 run/demo-ratings.csv
	$(BIN)/python -m benchmarks.table run/demo-ratings.csv --out run/demo --overwrite \
		--epochs 10 --factors 16 --layers 64 32 16 --batch-size 1024 --learning-rate 0.002

test: $(VENV)/tests-installed lint
	$(PYTEST)

lint: $(VENV)/tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

table: $(VENV)/installed
	@test -n "$(DATA)" || { echo 'make table: DATA=ratings.csv or DATA=directory of a split' >&2; exit 2; }
	$(BIN)/python -m benchmarks.table "$(DATA)" --out "$(OUT)" --epochs $(EPOCHS) --seeds $(SEEDS)

precision: SEEDS = 1 2 3 4 5
precision: EPOCHS = 8
precision: OUT = run/precision
precision: $(VENV)/installed
	@test -n "$(DATA)" || { echo 'make precision: DATA=ratings.csv or DATA=directory of a split' >&2; exit 2; }
	$(BIN)/python -m benchmarks.precision "$(DATA)" --out "$(OUT)" --epochs $(EPOCHS) --seeds $(SEEDS)

faults: $(VENV)/installed
	$(BIN)/python -m benchmarks.faults --kills 50 --out "$(FAULTS)"

fuzz: $(VENV)/tests-installed
	FUZZ_EXAMPLES=10000 $(PYTEST) --durations=0 tests/distiller/untrusted/test_fuzz.py

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/tests-installed: $(VENV)/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) run/demo run/demo-ratings.csv
