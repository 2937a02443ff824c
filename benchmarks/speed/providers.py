"""The providers of `throughput.py`: how each builds its model, switches checkpointing and takes a step.

A provider is a class made with the run's configuration; its worker calls `build` once, then `turn` for every
measurement and `rest` after each. Packages are imported where they are used, since some patch others.
"""

import gc
import importlib.util
import itertools
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import LINEARS
from benchmarks.speed.smaller_gpu import Card
from benchmarks.speed.workers import MissingError

LORA = {"rank": 16, "alpha": 32.0}
LEARNING_RATE = 1e-4


def model_config(config: dict[str, Any]) -> Any:
    """Return the Transformers configuration of the run's model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config["values"])


def random_model(config: dict[str, Any]) -> Any:
    """Return the model with random weights, quantized layer by layer as it is made; the same for every provider."""
    from lsr_scale.model import head_modules, meta_model, quantization_config
    from lsr_scale.model.random_weights import init_random_weights

    torch.manual_seed(config["seed"])
    empty = meta_model(model_config(config), "causal_lm", dtype=torch.bfloat16, attention="sdpa")
    kind = "none" if config["base"] == "bf16" else config["base"]
    quantizer = quantization_config(kind, True, torch.bfloat16, head_modules(empty))
    device = torch.device("cuda", 0) if config["device"] == "cuda" else torch.device("cpu")
    model = init_random_weights(empty, quantizer, device)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def elapsed_ms(begin: Any, end: Any) -> float:
    """Return the milliseconds between two of a provider's marks."""
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


class Provider:
    """What all trainers share: batches, the timed step, memory, profile."""

    packages: tuple[str, ...] = ()
    autocast = True
    replays = False  # what a replayed graph uses was taken while it was captured, in the warm-up
    name = ""
    model: Any  # takes input_ids and labels, returns what has a loss

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.device = torch.device("cuda", 0) if config["device"] == "cuda" else torch.device("cpu")
        self.notes: list[str] = []
        self.mode: str | None = None
        limit = config.get("memory_gib")
        self.gpu: Any = Card(limit, torch.cuda) if limit else torch.cuda

    def build(self) -> None:
        """Make the model and its adapters.

        Raises:
            MissingError: if a package is absent.
        """
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingError(f"{package} is not installed")
        if self.config.get("memory_gib") and self.device.type == "cuda":
            self.gpu.keep()
        self.make()
        self.model.train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().to("cpu", copy=True) for p in self.trainable]
        self.rest()

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

    def rest(self) -> None:
        """Give back what the step allocated."""
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

    def turn(self, request: dict[str, Any]) -> dict[str, Any]:
        """Warm up, time the steps, and return times (ms), peak memory (GiB), losses and the parameter count.

        Nobody waits for the GPU between steps, as in training: a step's time is that between two marks in its queue.
        """
        config, tokens, seq_len = self.config, request["tokens"], request["seq_len"]
        if request["mode"] != self.mode:
            self.checkpoint(request["mode"])
            self.mode = request["mode"]
        trainable = self.trainable
        with torch.no_grad():
            for parameter, value in zip(trainable, self.start, strict=True):
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
        with profile(activities=kinds) as found:
            step()
            self.synchronize()
        order = "cuda_time_total" if self.device.type == "cuda" else "cpu_time_total"
        text = found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100)
        path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- this library


class Own(Provider):
    """An adapter of this library, or PEFT's LoRA, on the fused path; without a method, the frozen base alone."""

    method: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    fused = True
    held = False
    policy: Any = None

    def make(self) -> None:
        """Build the base, inject the adapter; `checkpoint` fuses."""
        from lsr_scale.adapters import peft_config
        from lsr_scale.layers.frozen_linear import freeze_quantized

        base = random_model(self.config)
        freeze_quantized(base)
        self.model = base
        if self.method is not None:
            from peft import get_peft_model

            options = {"target_modules": LINEARS, **self.options}
            self.model = get_peft_model(base, peft_config(self.method, options, "CAUSAL_LM"))
        else:
            base.enable_input_require_grads()

    def checkpoint(self, mode: str) -> None:
        """Fuse again with the wanted recomputation; unfused, Transformers' checkpointing."""
        if not self.fused:
            return super().checkpoint(mode)
        import lsr_scale

        lsr_scale.unfuse(self.model)
        recompute: Any = "full" if mode == "auto" else mode
        report = lsr_scale.fuse(self.model, recompute=recompute, cache_weights=self.held)
        self.notes = [str(report)]
        print(f"fuse(recompute={recompute!r}, cache_weights={self.held}): {report}", flush=True)
        self.policy = None

    def first_step_begins(self, tokens: int) -> None:
        """With "auto", begin as a run's first step begins."""
        if self.mode == "auto" and self.policy is None and self.device.type == "cuda":
            from lsr_scale.training.callbacks.memory import FitMemoryCallback

            self.policy = FitMemoryCallback(tokens, self.notes.append, self.gpu)
            self.policy.on_train_begin(None, None, None)

    def first_step_ends(self) -> None:
        """With "auto", let layers keep what fits, as a run does after its first step."""
        if self.policy is not None:
            self.policy.on_step_end(None, None, None, model=self.model)

    def rest(self) -> None:
        """Give back what the step allocated, held weights too: the next turn makes them again."""
        if self.held or self.mode == "auto":
            from lsr_scale.fused import clear_weight_cache

            clear_weight_cache(self.model)
            self.mode = None
        super().rest()


class LsrAdapter(Own):
    """LSR-Adapt, fused."""

    method = "lsr"
    options = {**LORA, "separation_rank": 16}  # noqa: RUF012


class LsrHeld(LsrAdapter):
    """LSR-Adapt, fused, with the weights dequantized once and held in bf16 beside the quantized ones."""

    held = True


class LsrGraphs(LsrAdapter):
    """LSR-Adapt, fused, its forward and backward passes replayed as CUDA graphs."""

    replays = True
    graphs: Any = None

    def inputs(self, ids: Tensor) -> Any:
        """Return the batches in the form that graphs take, with the number of supervised tokens."""
        from lsr_scale.fused.cuda_graphs import StepGraphs, static_batch

        self.graphs = StepGraphs(self.model.get_base_model())
        positions = torch.arange(ids.shape[2]).repeat(ids.shape[1])[None]
        made = []
        for rows in ids:
            row = rows.reshape(1, -1)
            batch = static_batch(row, row.masked_fill(positions == 0, -100), positions, longest=ids.shape[2])
            count = float(batch["weights"].sum())
            made.append(({k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}, count))
        return made

    def loss_of(self, batch: Any) -> Tensor:
        """Replay the batch's graph, which makes the gradients as well."""
        loss, gradients = self.graphs.replay(*batch)
        self.graphs.add_to_grads(gradients)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Do nothing more."""

    def rest(self) -> None:
        """Let go of the graphs."""
        self.graphs = None
        super().rest()


class LsrUnfused(LsrAdapter):
    """LSR-Adapt, every linear by itself."""

    fused = False


class KronLoraAdapter(Own):
    """Kron-LoRA at its defaults, without the dropout that would leave the fused path."""

    method = "kron_lora"
    options = {"dropout": 0.0}  # noqa: RUF012


class LoraAdapter(Own):
    """PEFT's LoRA modules on the fused path."""

    method = "lora"
    options = LORA


class Frozen(Own):
    """No adapters: what a step costs whose gradient only flows through the base."""


# --------------------------------------------------------------------------------------------------------- PEFT


class PeftLora(Provider):
    """PEFT's LoRA on Transformers."""

    packages = ("peft",)
    liger = False

    def make(self) -> None:
        """Build the base and inject PEFT's adapter."""
        if self.liger:
            self.apply_liger()
        self.model = self.adapted(random_model(self.config))

    def adapted(self, base: Any) -> Any:
        """Return the base with its adapters."""
        from peft import LoraConfig, get_peft_model

        shared = {"target_modules": LINEARS, "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
        return get_peft_model(base, LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], **shared))

    def apply_liger(self) -> None:
        """Patch the model's architecture before it is made: RoPE, RMSNorm, SwiGLU, fused linear cross-entropy."""
        from liger_kernel import transformers as liger

        kind = self.config["values"]["model_type"]
        apply = {"llama": liger.apply_liger_kernel_to_llama, "mistral": liger.apply_liger_kernel_to_mistral}[kind]
        apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)


class PeftLoraLiger(PeftLora):
    """PEFT's LoRA on Liger's kernels."""

    packages = ("peft", "liger_kernel")
    liger = True


class PeftKbitLiger(PeftLoraLiger):
    """PEFT's documented recipe for quantized bases on Liger's kernels: `prepare_model_for_kbit_training` comes first.

    It holds norms, embeddings and head in float32, and with them the hidden states.
    """

    def adapted(self, base: Any) -> Any:
        """Return the base with its adapters."""
        from peft import prepare_model_for_kbit_training

        return super().adapted(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))


class PeftFrozenLiger(PeftLoraLiger):
    """Liger's kernels without adapters; the embeddings' output requires a gradient, so it flows through every layer."""

    def adapted(self, base: Any) -> Any:
        """Return the base itself."""
        base.enable_input_require_grads()
        return base


class PeftLokr(PeftLora):
    """PEFT's LoKr; it does not take a quantized base."""

    def adapted(self, base: Any) -> Any:
        """Return the base with LoKr adapters."""
        from peft import LoKrConfig, get_peft_model

        config = LoKrConfig(r=LORA["rank"], alpha=LORA["alpha"], target_modules=LINEARS, task_type="CAUSAL_LM")
        return get_peft_model(base, config)


# ------------------------------------------------------------------------------------------------------ Unsloth


class UnslothLora(Provider):
    """Unsloth's own path: `FastLanguageModel.from_pretrained` on a local folder, then its `get_peft_model`.

    The folder holds a configuration and a tokenizer of a few words. Where Unsloth asks Transformers for the weights it
    gets the random model of every other provider, so that no checkpoint is written and all its patches happen as
    usual. If that fails, the same model is saved and loaded as any other quantized checkpoint.
    """

    packages = ("unsloth", "unsloth_zoo")
    modes = {"none": False, "full": True, "offload": "unsloth"}  # noqa: RUF012

    def build(self) -> None:
        """Set what Unsloth reads when it is imported, import it before anything that it patches, and build."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        self.scratch = tempfile.TemporaryDirectory(prefix="unsloth-")
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(self.scratch.name) / "unsloth_compiled_cache")
        os.chdir(self.scratch.name)  # it writes into the working folder
        super().build()

    def make(self) -> None:
        """Load, then adapt; the checkpointing is the worker's, for good."""
        from unsloth import FastLanguageModel

        if self.config["base"] == "int8":
            raise RuntimeError("Unsloth's kernels take a 4-bit or 16-bit base; on int8 it leaves its fast path")
        folder = Path(self.scratch.name) / f"random-{self.config['model']}"
        self.write_folder(folder)
        try:
            model = self.loaded(FastLanguageModel, folder, in_memory=True)
            self.notes.append("weights handed to Unsloth's loader in memory")
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"in memory: {type(error).__name__}; through a saved checkpoint instead", flush=True)
            self.rest()
            base = random_model(self.config)
            base.save_pretrained(folder)
            del base
            self.rest()
            model = self.loaded(FastLanguageModel, folder, in_memory=False)
            self.notes.append("loaded from a saved checkpoint")
        self.model = FastLanguageModel.get_peft_model(
            model,
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            lora_dropout=0.0,
            bias="none",
            target_modules=LINEARS,
            use_gradient_checkpointing=self.modes[self.config["mode"]],
            random_state=self.config["seed"],
        )
        self.model.for_training()

    def loaded(self, loader: Any, folder: Path, in_memory: bool) -> Any:
        """Return the base as Unsloth loads it."""
        import unsloth.models.llama as target

        config = self.config
        original = target.AutoModelForCausalLM

        class Handed:
            """Stands where Unsloth's loader asks Transformers for a model."""

            @staticmethod
            def from_pretrained(*args: Any, **kwargs: Any) -> Any:
                return random_model(config)

        if in_memory:
            target.AutoModelForCausalLM = Handed
        try:
            model, _ = loader.from_pretrained(
                str(folder),
                max_seq_length=max(seq_len for _, seq_len in config["points"]),
                dtype=torch.bfloat16,
                load_in_4bit=config["base"] == "nf4",
                load_in_16bit=config["base"] == "bf16",
                use_gradient_checkpointing=self.modes[config["mode"]],
                use_exact_model_name=True,
                fix_tokenizer=False,
                local_files_only=True,
                device_map={"": str(self.device)},
            )
        finally:
            target.AutoModelForCausalLM = original
        return model

    def write_folder(self, folder: Path) -> None:
        """Write the configuration and a word-level tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        config = model_config(self.config)
        config.architectures = ["MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        words = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    def checkpoint(self, mode: str) -> None:
        """Nothing: Unsloth's mode is fixed when the adapters are made."""
        if mode != self.config["mode"]:
            raise RuntimeError(f"this worker was built for {self.config['mode']}, not {mode}")


CLASSES: dict[str, type] = {
    "lsr": LsrAdapter,
    "lsr_held": LsrHeld,
    "lsr_graphs": LsrGraphs,
    "lsr_unfused": LsrUnfused,
    "kron_lora": KronLoraAdapter,
    "lora": LoraAdapter,
    "frozen": Frozen,
    "peft_lora": PeftLora,
    "peft_lora_liger": PeftLoraLiger,
    "peft_kbit_liger": PeftKbitLiger,
    "peft_frozen_liger": PeftFrozenLiger,
    "peft_lokr": PeftLokr,
    "unsloth_lora": UnslothLora,
}
for _name, _provider in CLASSES.items():
    _provider.name = _name  # pyright: ignore[reportAttributeAccessIssue]
