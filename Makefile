# `make train` and `make test` do all the set-up of a fresh machine, once, in .venv; ARGS go to the command that is run.
#   make train ARGS="--config train/configs/scenes.yaml"      make test ARGS="tests/test_ops.py -k lengths"
# PYTHON=/path/to/python3.11     the interpreter, where it is not found by its name
# TORCH="torch==2.13.0"          what pip installs as PyTorch, options included ("torch==2.13.0 --index-url URL")
# TORCH=installed                keep the PyTorch that PYTHON already has, for instance a CUDA build of the machine's own
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Operators that DeepSpeed compiles stay inside the project; Ninja and CMake come from .venv.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: train test bench report lint clean
.DEFAULT_GOAL := test

train: .venv/package.stamp
	$(BIN)/deepspeed train/run.py $(ARGS)

test: .venv/package.stamp
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/package.stamp
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

report: .venv/package.stamp
	$(BIN)/python -m bench.report $(ARGS)

lint: .venv/package.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .torch_extensions pixart_fast/native.so .venv/package.stamp

.venv/requirements.stamp: requirements.txt
	@fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	  if $$python -c "$$fits" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or 3.12 was found: install one, or name it with make PYTHON=/path/to/python3.11." >&2; exit 1; \
	fi; \
	if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$found cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; \
	  exit 1; \
	fi; \
	test -x $(BIN)/pip || $$found -m venv $(if $(filter installed,$(TORCH)),--system-site-packages) .venv
	@echo "Installing the pinned requirements into .venv: some minutes, once."
	@$(if $(filter installed,$(TORCH)),,$(PIP) install $(TORCH))
	@# The rest must not replace that PyTorch by another build, nor the Triton that a CUDA build came with.
	@$(BIN)/python -c 'from importlib.metadata import distributions as found; \
	  print(*sorted({d.name + "==" + d.version for d in found() if d.name in ("torch", "triton")}), sep="\n")' > .venv/torch.txt
	@sed 's/==.*/==/; s/^/^/' .venv/torch.txt > .venv/kept.txt
	@grep -v -f .venv/kept.txt requirements.txt > .venv/requirements.txt
	@$(PIP) install -r .venv/requirements.txt -c .venv/torch.txt
	@touch $@

.venv/package.stamp: .venv/requirements.stamp setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/cpu/*)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from pixart_fast import ops; print("Installed.", "Note: " + ops.native_problem if ops.native_problem else "")'
	@touch $@
