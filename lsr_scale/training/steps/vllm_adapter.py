"""GRPO's completions by vLLM in the training process, which is sent the adapter alone, exactly, as PEFT's LoRA.

TRL's own way (`VLLMGeneration`) merges the adapter into the base's weights and sends all of them; into weights of four
bits nothing can be merged exactly. Here vLLM loads the base once, and at each step the LoRA: some hundred kilobytes.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lsr_scale.adapters.save_and_load import write_adapter
from lsr_scale.errors import UserError
from lsr_scale.exporting.pairs import metadata_of, write_lora
from lsr_scale.exporting.source import open_adapter
from lsr_scale.units import byte_size

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for its max_lora_rank
_KEPT = 2  # exports: vLLM may still read the one before


def write_live_lora(model: Any, folder: Path) -> tuple[int, int]:
    """Write the adapter of a model in training as PEFT's LoRA, and return its largest rank and its bytes.

    Args:
        model: The PEFT model, with whole factors.
        folder: Made anew.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory() as own:
        write_adapter(model, Path(own))
        source = open_adapter(own)
        pairs = {name: source.pair(name) for name in source.modules}
        write_lora(folder, pairs, source, torch.float32, metadata_of(source, "lora"))
    size = (folder / "adapter_model.safetensors").stat().st_size
    return max(down.shape[0] for down, _ in pairs.values()), size


@contextmanager
def sending_adapter() -> Iterator[None]:
    """Have TRL's trainer, if it is made within this, use vLLM as this module does."""
    from trl.trainer import grpo_trainer

    theirs = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = _adapter_generation()  # pyright: ignore
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = theirs


@functools.cache
def _adapter_generation() -> type:
    from trl.generation import vllm_generation

    class AdapterGeneration(vllm_generation.VLLMGeneration):
        """TRL's, which sends the adapter as a LoRA in place of all weights.

        Attributes:
            say: Told of the first transfer, and of some later ones, how large it is and how long it takes.
            exports: Where the LoRAs lie.
            request: The newest one, as vLLM wants it named; None before the first.
            sent: Bytes and seconds of each transfer; whoever logs them empties it.
        """

        say: Callable[[str], None] = staticmethod(lambda text: None)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.exports = tempfile.TemporaryDirectory(prefix="lsr_scale_lora_")
            self.request: Any = None
            self.num_sent = 0
            self.sent: list[tuple[int, float]] = []
            super().__init__(*args, **kwargs)

        def _init_vllm(self) -> None:
            folder = Path(self.exports.name) / "0"
            rank, _ = write_live_lora(self.model, folder)
            allowed = next((most for most in MAX_RANKS if most >= rank), None)
            if allowed is None:
                raise UserError(
                    f"training.use_vllm: the adapter's updates have rank {rank}, and vLLM takes {MAX_RANKS[-1]} at "
                    "most; lower adapter.rank or separation_rank, or leave use_vllm out"
                )
            engine = vllm_generation.LLM
            vllm_generation.LLM = functools.partial(engine, enable_lora=True, max_lora_rank=allowed, max_loras=1)
            try:
                super()._init_vllm()
            finally:
                vllm_generation.LLM = engine
            generate = self.llm.generate
            self.llm.generate = lambda *args, **kwargs: generate(*args, lora_request=self.request, **kwargs)

        def sync_weights(self) -> None:
            """Send the adapter as it is, by a folder of its own."""
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            began = time.monotonic()
            self.num_sent += 1
            folder = Path(self.exports.name) / str(self.num_sent)
            _, size = write_live_lora(self.model, folder)
            self.request = LoRARequest(f"step-{self.num_sent}", self.num_sent, str(folder))
            self.llm.reset_prefix_cache()
            self._forget(self.num_sent - _KEPT)
            self.sent.append((size, time.monotonic() - began))
            if self.num_sent == 1 or self.num_sent % 100 == 0:
                self.say(f"vLLM is sent the adapter as LoRA: {byte_size(size)} in {self.sent[-1][1]:.2f} s")

        def _forget(self, number: int) -> None:
            folder = Path(self.exports.name) / str(number)
            for file in folder.glob("*"):
                file.unlink()
            if folder.is_dir():
                folder.rmdir()

    return AdapterGeneration
