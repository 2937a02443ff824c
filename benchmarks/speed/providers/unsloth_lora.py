"""Unsloth's provider: its own loader and LoRA, on the weights of every other provider."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import LINEARS
from benchmarks.speed.providers.base import LORA, Provider, base_model, model_config


class UnslothLora(Provider):
    """Unsloth's own path: `FastLanguageModel.from_pretrained` on a local folder, then its `get_peft_model`.

    The folder holds a configuration and a tokenizer of a few words. Where Unsloth asks Transformers for the weights it
    gets the random model of every other provider, so that no checkpoint is written and all its patches happen as
    usual. If that fails, the same model is saved and loaded as any other quantized checkpoint. Real weights
    (`config["folder"]`) it loads itself.
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
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        if self.config["base"] == "int8":
            raise RuntimeError("Unsloth's kernels take a 4-bit or 16-bit base; on int8 it leaves its fast path")
        model = self.base(FastLanguageModel)
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

    def base(self, loader: Any) -> Any:
        """Return the base: loaded from the folder of real weights, or random ones on Unsloth's way."""
        if self.config.get("folder"):
            return self.loaded(loader, Path(self.config["folder"]), in_memory=False)
        folder = Path(self.scratch.name) / f"random-{self.config['model']}"
        self.write_folder(folder)
        try:
            model = self.loaded(loader, folder, in_memory=True)
            self.notes.append("weights passed to Unsloth's loader in memory")
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"in memory: {type(error).__name__}; through a saved checkpoint instead", flush=True)
            self.free_memory()
            base = base_model(self.config)
            base.save_pretrained(folder)
            del base
            self.free_memory()
            model = self.loaded(loader, folder, in_memory=False)
            self.notes.append("loaded from a saved checkpoint")
        return model

    def loaded(self, loader: Any, folder: Path, in_memory: bool) -> Any:
        """Return the base as Unsloth loads it."""
        import unsloth.models.llama as target  # pyright: ignore[reportMissingImports]

        config = self.config
        original = target.AutoModelForCausalLM

        class InMemory:
            """Stands where Unsloth's loader asks Transformers for a model."""

            @staticmethod
            def from_pretrained(*args: Any, **kwargs: Any) -> Any:
                return base_model(config)

        if in_memory:
            target.AutoModelForCausalLM = InMemory
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
