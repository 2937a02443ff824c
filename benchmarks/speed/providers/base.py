"""What all providers share: the base model, the timed steps, memory, a profile.

A provider is a class made with the run's configuration; its worker calls `build` once, then `measure` for every
measurement and `free_memory` after each. Packages are imported where they are used, since some patch others.
"""

import gc
import importlib.util
import itertools
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.providers import MissingError
from benchmarks.speed.smaller_gpu import SmallerGpu

LORA = {"rank": 16, "alpha": 32.0}
LEARNING_RATE = 1e-4


def model_config(config: dict[str, Any]) -> Any:
    """Return the Transformers configuration of the run's model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config["values"])


def base_model(config: dict[str, Any]) -> Any:
    """Return the frozen base: the weights of `config["folder"]`, or random ones; the same for every provider."""
    model = pretrained_model(config) if config.get("folder") else random_model(config)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def pretrained_model(config: dict[str, Any]) -> Any:
    """Return the model of a local folder, quantized by Transformers as it is loaded."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {}
    if config["base"] == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options
        )
    where = {"": 0} if config["device"] == "cuda" else {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        config["folder"], dtype=torch.bfloat16, attn_implementation="sdpa", device_map=where, **settings
    )


def random_model(config: dict[str, Any]) -> Any:
    """Return the model with random weights, quantized layer by layer as it is made."""
    from lsr_scale.model import head_modules, meta_model, quantization_config
    from lsr_scale.model.random_weights import init_random_weights

    torch.manual_seed(config["seed"])
    empty = meta_model(model_config(config), "causal_lm", dtype=torch.bfloat16, attention="sdpa")
    kind = "none" if config["base"] == "bf16" else config["base"]
    quantizer = quantization_config(kind, True, torch.bfloat16, head_modules(empty))
    device = torch.device("cuda", 0) if config["device"] == "cuda" else torch.device("cpu")
    return init_random_weights(empty, quantizer, device)


def start_alike(model: Any, seed: int) -> None:
    """Give LoRA's factors a start that depends on their names, shapes and a seed alone: the same in every library."""
    generator = torch.Generator().manual_seed(seed)
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name)
    with torch.no_grad():
        for _, parameter in named:
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def elapsed_ms(begin: Any, end: Any) -> float:
    """Return the milliseconds between two of a provider's marks."""
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


class Provider:
    """What all trainers share: batches, the timed step, memory, profile."""

    packages: tuple[str, ...] = ()
    autocast = True
    replays = False  # CUDA graphs: their memory was allocated at capture, in the warm-up
    name = ""
    model: Any  # takes input_ids and labels, returns what has a loss

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.device = torch.device("cuda", 0) if config["device"] == "cuda" else torch.device("cpu")
        self.notes: list[str] = []
        self.mode: str | None = None
        limit = config.get("memory_gib")
        self.gpu: Any = SmallerGpu(limit, torch.cuda) if limit else torch.cuda

    def build(self) -> None:
        """Make the model and its adapters.

        Raises:
            MissingError: if a package is absent.
        """
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingError(f"{package} is not installed")
        if self.config.get("memory_gib") and self.device.type == "cuda":
            self.gpu.limit_allocator()
        self.make()
        self.model.train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.initial = [p.detach().to("cpu", copy=True) for p in self.trainable]
        self.free_memory()

    def make(self) -> None:
        """Set `self.model`."""
        raise NotImplementedError

    def checkpoint(self, mode: str) -> None:
        """Switch activation checkpointing: Transformers' own, per decoder layer, not reentrant."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if mode == "none":
            base.gradient_checkpointing_disable()
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def free_memory(self) -> None:
        """Free what the step allocated."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return a mark of now in the device's queue of work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def first_step_begins(self, tokens: int) -> None:
        """What a provider does before the first step of a turn, which has so many tokens."""

    def first_step_ends(self) -> None:
        """What a provider does after it."""

    def inputs(self, ids: Tensor) -> Any:
        """Return what each step is given: `ids` is `[steps, rows, length]`, on the CPU; all is on the device then."""
        return ids.to(self.device)

    def loss_of(self, batch: Any) -> Tensor:
        """Return the loss of a batch, every token of which is supervised."""
        return self.model(input_ids=batch, labels=batch).loss

    def backward(self, loss: Tensor) -> None:
        """Give the parameters their gradients."""
        loss.backward()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Warm up, time the steps, and return times (ms), peak memory (GiB), losses and the parameter count.

        Nobody waits for the GPU between steps, as in training: a step's time is that between two marks in its queue.
        """
        config, tokens, seq_len = self.config, request["tokens"], request["seq_len"]
        if request["mode"] != self.mode:
            self.checkpoint(request["mode"])
            self.mode = request["mode"]
        trainable = self.trainable
        with torch.no_grad():
            for parameter, value in zip(trainable, self.initial, strict=True):
                parameter.copy_(value)  # every turn trains the same thing
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=on_gpu) if trainable else None
        generator = torch.Generator().manual_seed(config["seed"])
        count = config["warmup"] + config["steps"]
        shape = (count, tokens // seq_len, seq_len)
        batches = self.inputs(torch.randint(0, config["shape"]["vocab"], shape, generator=generator))
        autocast = self.autocast and self.name not in config["without_autocast"]

        def step(batch: Any) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext():
                loss = self.loss_of(batch)
            self.backward(loss)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        marks, losses, warm_peak = [self.mark()], [], 0
        for index in range(count):
            if index in (0, config["warmup"]):
                self.synchronize()
                if on_gpu:
                    warm_peak = torch.cuda.max_memory_allocated() if index else 0
                    torch.cuda.reset_peak_memory_stats()
            if not index:
                self.first_step_begins(tokens)
            losses.append(step(batches[index]))
            marks.append(self.mark())
            if not index:
                self.synchronize()
                self.first_step_ends()
        self.synchronize()
        times = [elapsed_ms(begin, end) for begin, end in itertools.pairwise(marks)]
        peak = max(torch.cuda.max_memory_allocated(), self.replays * warm_peak) / 2**30 if on_gpu else None
        if request.get("profile"):
            self.profile(lambda: step(batches[0]), Path(request["profile"]))
        values = [float(loss) for loss in losses]
        return {
            "step_ms": times[config["warmup"] :],
            "warmup_ms": times[: config["warmup"]],
            "peak_memory_gib": peak,
            "peak_memory_warmup_gib": warm_peak / 2**30 if on_gpu else None,
            "trainable_parameters": sum(p.numel() for p in trainable),
            "loss_initial": values[0],
            "loss_first": values[config["warmup"]],
            "loss_last": values[-1],
            "notes": list(self.notes),
        }

    def profile(self, step: Any, path: Path) -> None:
        """Write the 40 kernels that take the most time in one step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        with profile(activities=kinds) as profiled:
            step()
            self.synchronize()
        order = "cuda_time_total" if self.device.type == "cuda" else "cpu_time_total"
        text = profiled.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100)
        path.write_text(text + "\n", encoding="utf-8")
