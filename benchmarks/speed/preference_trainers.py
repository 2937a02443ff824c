"""The trainers that `preference.py` measures: an ordinary run's, and TRL's on PEFT's LoRA, asked for steps in turns.

A turn is a whole `train()` of some steps on the same rows, from the factors of the turn before; its first steps do not
count. Their seconds are between the ends of two steps, when the device has done all of its work.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.models import LINEARS
from benchmarks.speed.providers import MissingError
from benchmarks.speed.providers.base import LORA, pretrained_model, random_model, start_alike

LEARNING_RATE = 1e-5  # so low that completions stay the base's
LSR = {"rank": 16, "separation_rank": 16, "alpha": 32.0}
# parts of a GRPO step by the methods of TRL's trainer that do them; what is left is forward, backward and optimizer
PARTS = {"generation_s": "_generate_single_turn", "scoring_s": "_calculate_rewards"}


class StepTimes(TrainerCallback):
    """When steps ended."""

    def __init__(self, now: Any) -> None:
        self.now = now
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin a turn."""
        self.ends = [self.now()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the end of a step."""
        self.ends.append(self.now())


class Trained:
    """One trainer in a process of its own; see `workers.work`."""

    method, options = "lora", LORA
    compute = "bf16"

    def __init__(self, config: dict[str, Any]) -> None:
        """Take a measurement's configuration, with one of its modes as `mode`."""
        self.config = config
        self.notes: list[str] = []
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}

    def build(self) -> None:
        """Make the trainer, and have it note its times."""
        self.trainer = self.make()
        start_alike(self.trainer.model, self.config["seed"])
        self.times = StepTimes(self.now)
        self.trainer.add_callback(self.times)
        if self.config["case"] == "grpo":
            for part, name in PARTS.items():
                setattr(self.trainer, name, self.timed(getattr(self.trainer, name), self.parts[part]))

    def make(self) -> Any:
        """Return the trainer."""
        raise NotImplementedError

    def now(self) -> float:
        """Return the time at which the device has done all that it was given."""
        if self.config["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, method: Any, seconds: list[float]) -> Any:
        """Return a method that notes how long each of its calls takes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(self.now() - began)

        return call

    def free_memory(self) -> None:
        """Give what the allocator has cached to the other processes."""
        if self.config["device"] == "cuda":
            torch.cuda.empty_cache()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train a turn.

        Returns:
            `step_s`, under GRPO `generation_s` and `scoring_s` too, of the steps that count; `losses` and, under GRPO,
            `completion_tokens` (means) of all; `peak_memory_gib`, `trainable_parameters`, `notes`.
        """
        del request
        warm_up, on_gpu = self.config["warm_up"], self.config["device"] == "cuda"
        for seconds in self.parts.values():
            seconds.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.trainer.train()
        ends = self.times.ends
        logged = [row for row in self.trainer.state.log_history if "loss" in row]
        reply: dict[str, Any] = {
            "step_s": [end - begin for begin, end in zip(ends[warm_up:], ends[warm_up + 1 :], strict=False)],
            "losses": [row["loss"] for row in logged],
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "trainable_parameters": sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad),
            "notes": list(dict.fromkeys(self.notes)),
        }
        if self.config["case"] == "grpo":
            reply |= {part: seconds[warm_up:] for part, seconds in self.parts.items()}
            reply["completion_tokens"] = [row["completions/mean_length"] for row in logged]
        return reply


class Ours(Trained):
    """An ordinary run's trainer, with PEFT's LoRA modules on the fused path."""

    def make(self) -> Any:
        """Return the trainer of the run."""
        from lsr_scale.config import run_from_dict
        from lsr_scale.run.folder import RunFolder
        from lsr_scale.training.assembly import build_trainer

        config = self.config
        adapter = {"method": self.method, "target_modules": LINEARS, **self.options}
        memory = "save" if config["mode"] == "full" else "speed"
        on_gpu = config["device"] == "cuda"
        run = run_from_dict(
            {
                "model": {
                    **{"name": config["model_folder"], "random_weights": not config["folder"]},
                    **{"quantization": "none" if config["base"] == "bf16" else config["base"], "dtype": "bfloat16"},
                },
                "adapter": adapter,
                "data": {"train": [config["rows"]]},
                "training": {
                    **_shared(config),
                    **{"memory": memory, "fused": "on" if on_gpu else "auto", "compute": self.compute},
                    **{"output_dir": f"{config['scratch']}/{type(self).__name__}-{config['mode']}"},
                    **({"reward": ["exact_answer"]} if config["case"] == "grpo" else {}),
                },
                "eval": {"tasks": []},
            }
        )
        folder = RunFolder(Path(run.training["output_dir"]))
        folder.path.mkdir(parents=True)
        trainer: Any = build_trainer(run, folder, say=self.notes.append)
        if config["mode"] == "saved":
            from lsr_scale.fused import clear_weight_cache

            clear_weight_cache(trainer.model)
        return trainer

    def free_memory(self) -> None:
        """Free the weights that are cached dequantized too: the next turn's first pass caches them again."""
        from lsr_scale.fused.modules import FusedLayer
        from lsr_scale.fused.patching import set_weight_cache

        for layer in self.trainer.model.modules():
            if isinstance(layer, FusedLayer) and layer.weight_cache:
                set_weight_cache(layer, False)
                set_weight_cache(layer, True)
        super().free_memory()


class OursLsr(Ours):
    """An ordinary run's trainer with LSR-Adapt."""

    method, options = "lsr", LSR


class OursLsrFp8(OursLsr):
    """LSR-Adapt with the base's products in FP8."""

    compute = "fp8"


class Trl(Trained):
    """TRL's trainer on PEFT's LoRA and transformers' layers."""

    liger = False

    def make(self) -> Any:
        """Return the trainer."""
        import trl
        from datasets import Dataset
        from peft import LoraConfig

        from lsr_scale.model import load_tokenizer

        config = self.config
        if self.liger:
            self.check_liger()
        on_gpu, grpo = config["device"] == "cuda", config["case"] == "grpo"
        shared = _shared(config)
        shared.pop("method")
        shared.pop("max_prompt_length", None)
        arguments = (trl.GRPOConfig if grpo else trl.DPOConfig)(
            output_dir=f"{config['scratch']}/{type(self).__name__}-{config['mode']}",
            gradient_checkpointing=config["mode"] == "full",
            **{"bf16": on_gpu, "use_cpu": not on_gpu, "use_liger_kernel": self.liger},
            **{"report_to": "none", "disable_tqdm": True, **shared},
        )
        base = pretrained_model(config) if config["folder"] else random_model(config)
        rows = [json.loads(line) for line in Path(config["rows"]).read_text(encoding="utf-8").splitlines()]
        settings = {"r": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": 0.0, "target_modules": LINEARS}
        given: dict[str, Any] = {
            "model": base,
            "args": arguments,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": load_tokenizer(config["model_folder"]),
            "peft_config": LoraConfig(task_type="CAUSAL_LM", **settings),
        }
        return trl.GRPOTrainer(reward_funcs=exact_answers, **given) if grpo else trl.DPOTrainer(**given)

    def check_liger(self) -> None:
        """Raise MissingError where Liger's kernels are not there."""
        from transformers.utils import is_liger_kernel_available

        if not is_liger_kernel_available():
            raise MissingError("liger-kernel is not installed, or older than transformers wants it")


class TrlLiger(Trl):
    """TRL's trainer on PEFT's LoRA and Liger's kernels: RoPE, RMSNorm, SwiGLU; the head is TRL's own fused one."""

    liger = True


def exact_answers(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    """Return what a run's reward `exact_answer` returns, as TRL asks for it."""
    from lsr_scale.rewards.checked import text_of
    from lsr_scale.rewards.shipped import exact_answer

    return [exact_answer(text_of(one), wanted) for one, wanted in zip(completions, answer, strict=True)]


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all trainers have, by the names that both libraries give them."""
    settings = {
        **{"method": config["case"], "seed": config["seed"], "max_steps": config["warm_up"] + config["steps"]},
        **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        **{"logging_steps": 1, "save_strategy": "no", "max_grad_norm": 1.0, "beta": 0.1},
        **{"per_device_train_batch_size": config["batch"], "gradient_accumulation_steps": config["accumulation"]},
    }
    if config["case"] == "dpo":
        return {**settings, "max_length": config["length"], "train_sampling_strategy": "sequential"}
    return {
        **settings,
        **{"beta": 0.0, "temperature": 1.0, "num_generations": config["completions"]},
        **{"max_completion_length": config["new_tokens"], "max_prompt_length": 512},
    }
