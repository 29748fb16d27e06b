# Everything sets up its environment in .venv at the first call.
#
#     make demo   pretrain a small GPT-2 with two workers on this machine
#     make test   lint, types and tests
#     make docs   the pages, into out/docs
#     make dist   a wheel and an sdist, checked
#
# make test-oldest: the tests with the lowest versions that pyproject.toml admits, in .venv-oldest.

VENV := .venv
OLDEST := .venv-oldest
PYTHON ?= python3
BIN := $(VENV)/bin
SITE_PACKAGES = PYTHON -c "import site; print(site.getsitepackages()[0])"

.PHONY: demo test test-oldest lint types smoke docs dist soak benchmark clean

DEMO := --max_steps 1200 --output_dir out/demo

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file examples/launch/cpu_2.yaml examples/pretrain_gpt2.py \
		--use_cpu --optim dlion_mavo --learning_rate 7e-4 --weight_decay 0.1 \
		--per_device_train_batch_size 4 --save_strategy no --model_card true $(DEMO)

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

# The demo, but a few steps of it.
smoke:
	$(MAKE) demo DEMO="--max_steps 6 --eval_steps 3 --logging_steps 2 --max_eval_blocks 32 --output_dir out/smoke"

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A wheel and an sdist; and the wheel alone, in an environment that has only the dependencies, used from another folder.
dist: $(VENV)/.installed
	rm -rf build dist out/dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m venv out/dist
	out/dist/bin/pip install --quiet --no-deps dist/*.whl
	$(SITE_PACKAGES:PYTHON=$(BIN)/python) > "$$($(SITE_PACKAGES:PYTHON=out/dist/bin/python))/dependencies.pth"
	cp examples/minimal_trainer.py out/dist
	cd out/dist && unset PYTHONPATH && bin/hf_dlion env && \
		bin/python -c "import hf_dlion, sys; assert hf_dlion.__file__.startswith(sys.prefix), hf_dlion.__file__" && \
		bin/python -m torch.distributed.run --nproc-per-node 2 minimal_trainer.py --use_cpu \
		--optim dlion_mavo --max_steps 3 --logging_steps 1 --output_dir out

# What takes too long for each change: above all, half an hour of training in which every 20 to 60 seconds a worker is
# killed, frozen, out of space or, as root, cut off.
soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# The measurements of docs/benchmarks.md; as root on Linux for limited links.
benchmark: $(VENV)/.installed
	$(BIN)/python -m examples.benchmarks.network --workers 4 --output model_cards/network/4_workers
	$(BIN)/python -m examples.benchmarks.network --workers 2 --output model_cards/network/2_workers
	$(BIN)/python -m examples.benchmarks.step --output model_cards/step
	$(BIN)/python -m examples.benchmarks.checks --output model_cards/checks
	$(BIN)/python -m examples.benchmarks.orthogonal --output model_cards/orthogonal

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist out
