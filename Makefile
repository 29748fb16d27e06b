# make demo: pretrain a small GPT-2 with two workers on this machine. make test: lint, types and tests.
# Both set up their environment in .venv at the first call. make test-oldest: the tests with the lowest versions that
# pyproject.toml admits, in .venv-oldest.

VENV := .venv
OLDEST := .venv-oldest
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-oldest lint types smoke soak benchmark clean

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file examples/launch/cpu_2.yaml examples/pretrain_gpt2.py \
		--use_cpu --optim dlion_mavo --learning_rate 7e-4 --weight_decay 0.1 \
		--per_device_train_batch_size 4 --max_steps 1200 --save_strategy no --model_card true --output_dir out/demo

test: lint types
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Not in CI. PYTHON is 3.10 to 3.13, as torch 2.6 needs it.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# A few steps of the examples, with two processes where processes matter.
smoke: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file examples/launch/cpu_2.yaml examples/pretrain_gpt2.py --use_cpu \
		--optim dlion_avg --max_steps 6 --eval_steps 3 --logging_steps 2 --max_eval_blocks 32 --output_dir out/smoke

# What takes too long for each change: above all, half an hour of training in which every 20 to 60 seconds a worker is
# killed, frozen, out of space or, as root, cut off.
soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The measurements in the README; as root on Linux for limited links.
benchmark: $(VENV)/.installed
	$(BIN)/python -m examples.benchmarks.network --workers 4 --output model_cards/network/4_workers
	$(BIN)/python -m examples.benchmarks.network --workers 2 --output model_cards/network/2_workers
	$(BIN)/python -m examples.benchmarks.step --output model_cards/step
	$(BIN)/python -m examples.benchmarks.checks --output model_cards/checks

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) out
